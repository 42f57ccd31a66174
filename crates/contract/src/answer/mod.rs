//! What a module decides about one event.
//!
//! An [`Answer`] is plain data, and each of its parts has a type that keeps the rules of the
//! contract: it injects no header, does not change how a message is framed, and names no impossible
//! status. So whatever exists can be written. [`AnswerBuilder`] puts the parts together.

mod audit;
mod block;
mod body;
mod builder;
mod challenge;
mod decision;
mod error;
mod guardrail;
mod headers;
mod merge;
mod names;
mod printable;
mod redirect;
mod routing;
mod websocket;

pub use audit::{Audit, Confidence};
pub use block::{Block, BlockHeaders, BlockStatus};
pub use body::{BodyAction, BodyMutation};
pub use builder::AnswerBuilder;
pub use challenge::{ChallengeParams, ChallengeType};
pub use decision::Decision;
pub use error::AnswerError;
pub use guardrail::GuardrailVerdict;
pub use headers::{HeaderName, HeaderOp, HeaderValue, RequestChanges, ResponseChanges};
pub use printable::Printable;
pub use redirect::{RedirectStatus, RedirectUrl};
pub use routing::RoutingMetadata;
pub use websocket::{CloseCode, CloseReason, WebsocketDecision};

/// A module's answer to one event. The [`Default`] allows it unchanged.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer<'a> {
    /// What happens to the request or response.
    pub decision: Decision<'a>,
    /// Changes to the headers of the request.
    pub request_headers: RequestChanges<'a>,
    /// Changes to the headers of the upstream's response. The response of a block has its own
    /// headers, in [`Block`].
    pub response_headers: ResponseChanges<'a>,
    /// What goes to the audit log.
    pub audit: Audit<'a>,
    /// Hints for the choice of an upstream.
    pub routing_metadata: RoutingMetadata<'a>,
    /// The decision is not final: the module wants to see more of the body first.
    pub needs_more: bool,
    /// What happens to this chunk of the request body.
    pub request_body_mutation: Option<BodyMutation<'a>>,
    /// What happens to this chunk of the response body.
    pub response_body_mutation: Option<BodyMutation<'a>>,
    /// What happens to a WebSocket frame. None leaves it to the decision.
    pub websocket_decision: Option<WebsocketDecision<'a>>,
    /// The verdict of a guardrail inspection. None leaves it to the decision.
    pub guardrail_response: Option<GuardrailVerdict>,
}

impl Answer<'_> {
    /// The same, with every borrowed text copied, so that it may outlive the memory it was read
    /// from.
    pub fn into_owned(self) -> Answer<'static> {
        Answer {
            decision: self.decision.into_owned(),
            request_headers: self.request_headers.into_owned(),
            response_headers: self.response_headers.into_owned(),
            audit: self.audit.into_owned(),
            routing_metadata: self.routing_metadata.into_owned(),
            needs_more: self.needs_more,
            request_body_mutation: self.request_body_mutation.map(BodyMutation::into_owned),
            response_body_mutation: self.response_body_mutation.map(BodyMutation::into_owned),
            websocket_decision: self.websocket_decision.map(WebsocketDecision::into_owned),
            guardrail_response: self.guardrail_response,
        }
    }
}
