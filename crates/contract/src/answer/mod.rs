//! What a module decides about one event.

mod audit;
mod body;
mod decision;
mod headers;
mod websocket;

pub use audit::Audit;
pub use body::{BodyAction, BodyMutation};
pub use decision::Decision;
pub use headers::HeaderOp;
pub use websocket::WebsocketDecision;

use crate::text::Text;

/// A module's answer to one event. [`Default`] is to allow it unchanged.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer<'a> {
    /// What becomes of the request or response.
    pub decision: Decision<'a>,
    /// Changes to the request's headers, in the order in which they apply.
    pub request_headers: Vec<HeaderOp<'a>>,
    /// Changes to the response's headers; with [`Decision::Block`], only removals, for what it adds is in the decision.
    pub response_headers: Vec<HeaderOp<'a>>,
    /// What goes to the audit log.
    pub audit: Audit<'a>,
    /// Hints for the choice of an upstream.
    pub routing_metadata: Vec<(Text<'a>, Text<'a>)>,
    /// The decision is not final: the module wants to see the body first.
    pub needs_more: bool,
    /// What becomes of this chunk of the request body.
    pub request_body_mutation: Option<BodyMutation<'a>>,
    /// What becomes of this chunk of the response body.
    pub response_body_mutation: Option<BodyMutation<'a>>,
    /// What becomes of a WebSocket frame. Where a module says nothing of it, the decision tells.
    pub websocket_decision: Option<WebsocketDecision<'a>>,
    /// The verdict of a guardrail inspection, as the JSON object that the proxy takes.
    pub guardrail_response: Option<Text<'a>>,
}
