//! What a module decides about one event.

use std::borrow::Cow;

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

/// What becomes of a request or response.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Decision<'a> {
    /// It goes on.
    #[default]
    Allow,
    /// It is refused.
    Block {
        /// HTTP status, 200 to 599.
        status: u16,
        /// Body of the response; empty where the status allows none.
        body: Option<Text<'a>>,
        /// Headers of the response, several values of one name joined.
        headers: Vec<(Text<'a>, Text<'a>)>,
    },
    /// The client is sent elsewhere.
    Redirect {
        /// 301, 302, 303, 307 or 308.
        status: u16,
        /// Where to: a URI reference (RFC 3986).
        url: Text<'a>,
    },
    /// The client has to prove something first.
    Challenge {
        /// Kind of the challenge, such as `captcha`.
        challenge_type: Text<'a>,
        /// Parameters of the challenge, as strings.
        params: Vec<(Text<'a>, Text<'a>)>,
    },
}

/// A change to one header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HeaderOp<'a> {
    /// Replaces all values.
    Set(Text<'a>, Text<'a>),
    /// Adds a value.
    Add(Text<'a>, Text<'a>),
    /// Removes all values.
    Remove(Text<'a>),
}

/// What goes to the audit log.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Audit<'a> {
    /// Freeform tags.
    pub tags: Vec<Text<'a>>,
    /// Rules that matched.
    pub rule_ids: Vec<Text<'a>>,
    /// From 0 to 1.
    pub confidence: Option<f64>,
    /// Structured reasons.
    pub reason_codes: Vec<Text<'a>>,
}

/// What becomes of one chunk of a body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BodyMutation<'a> {
    /// The change.
    pub action: BodyAction<'a>,
    /// The chunk meant. None means the one at hand.
    pub chunk_index: Option<u32>,
}

/// A change to one chunk of a body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BodyAction<'a> {
    /// The chunk stays as it is.
    PassThrough,
    /// The chunk becomes these bytes.
    Replace(Cow<'a, [u8]>),
    /// The chunk is left out.
    Drop,
}

impl<'a> From<BodyAction<'a>> for BodyMutation<'a> {
    /// The change to the chunk at hand.
    fn from(action: BodyAction<'a>) -> Self {
        Self { action, chunk_index: None }
    }
}

/// What becomes of a WebSocket frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WebsocketDecision<'a> {
    /// The frame goes on.
    Allow,
    /// The frame is left out.
    Drop,
    /// The connection is closed.
    Close {
        /// Close code (RFC 6455, 7.4), 1000 to 4999.
        code: u16,
        /// Reason, at most 123 bytes.
        reason: Text<'a>,
    },
}
