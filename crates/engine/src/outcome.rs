//! What became of an event, for those who record it.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use zentinel_wasm_contract::answer::{Confidence, Printable};
use zentinel_wasm_contract::{Answer, Decision, Event, FailureKind, Hook, Text, WebsocketDecision};
use zentinel_wasm_runtime::CallTimes;

/// Most tags, rule ids or reason codes of one answer that are recorded: far more than a policy
/// needs to explain itself.
const MAX_AUDIT_ENTRIES: usize = 32;

/// Longest recorded tag, rule id or reason code, in bytes.
const MAX_AUDIT_TEXT: usize = 256;

/// Longest recorded path with its query, in bytes. Longer ones are attacks, of which the beginning
/// is enough.
const MAX_URI: usize = 2048;

/// Longest recorded correlation id, route, method or address, in bytes.
const MAX_FIELD: usize = 256;

/// Is given the outcome of every event, for a log or a trace.
pub trait Observer: Send + Sync {
    /// Called once the answer is encoded, before it is sent, on the task of the connection: it must
    /// not wait, and what it cannot take at once it drops and counts.
    fn observe(&self, outcome: &Arc<Outcome>);
}

/// What became of one event. All texts are bounded, because clients and modules choose them.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The proxy's id of the request, which the client may have chosen.
    pub correlation_id: String,
    /// The request's trace context, from the proxy or else from the request's own header. Not
    /// checked.
    pub traceparent: Option<Arc<str>>,
    /// Distinguishes the request from all others, also from those with the same id. None if the
    /// event belongs to no request that is remembered, or to one of several with its id.
    pub request: Option<u64>,
    /// No other event of the request is expected.
    pub is_last: bool,
    /// What the event says about the request. Only the first event of a request says all of it.
    pub request_line: Option<RequestLine>,
    /// The hook that takes the event.
    pub hook: Hook,
    /// Whether the module exports the hook. If not, the event is allowed.
    pub is_exported: bool,
    /// The SHA-256 of the module.
    pub module: String,
    /// What was answered.
    pub answer: AnswerSummary,
    /// Why the module gave no usable answer, if it gave none.
    pub error: Option<FailureKind>,
    /// The event was allowed because of a module error.
    pub fail_open: bool,
    /// When the event arrived.
    pub arrived: SystemTime,
    /// From the event's arrival to its answer.
    pub duration: Duration,
    /// What the call of the module took of that. Zero if it was not called.
    pub times: CallTimes,
}

impl Outcome {
    /// The outcome of an event that has just arrived, to be completed.
    pub(crate) fn begin(correlation_id: &str, hook: Hook, is_exported: bool, module: &str) -> Self {
        Self {
            correlation_id: bounded(correlation_id, MAX_FIELD),
            traceparent: None,
            request: None,
            is_last: true,
            request_line: None,
            hook,
            is_exported,
            module: module.to_owned(),
            answer: AnswerSummary::default(),
            error: None,
            fail_open: false,
            arrived: SystemTime::now(),
            duration: Duration::ZERO,
            times: CallTimes::default(),
        }
    }

    /// Memory that it takes, in bytes.
    pub fn size(&self) -> usize {
        let line = self.request_line.as_ref().map_or(0, |line| {
            [&line.route, &line.method, &line.uri].into_iter().flatten().map(String::len).sum::<usize>() + line.client.len()
        });
        let texts = self.correlation_id.len() + self.traceparent.as_ref().map_or(0, |text| text.len()) + self.module.len();
        size_of::<Self>() + texts + line + self.answer.size()
    }
}

/// What an event says about its request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RequestLine {
    /// Route that matched.
    pub route: Option<String>,
    /// HTTP method.
    pub method: Option<String>,
    /// Path and query.
    pub uri: Option<String>,
    /// Address of the client, to which the proxy may have appended the port.
    pub client: String,
}

impl RequestLine {
    /// What `event` says about its request, if anything.
    pub(crate) fn of(event: &Event<'_>) -> Option<Self> {
        let field = |text: &Text<'_>| bounded(text, MAX_FIELD);
        match event {
            Event::RequestHeaders(event) => Some(Self {
                route: event.metadata.route_id.as_ref().map(field),
                method: Some(field(&event.method)),
                uri: Some(bounded(&event.uri, MAX_URI)),
                client: field(&event.metadata.client_ip),
            }),
            Event::WebsocketFrame(event) => {
                Some(Self { route: event.route_id.as_ref().map(field), client: field(&event.client_ip), ..Self::default() })
            }
            Event::GuardrailInspect(event) => Some(Self { route: event.route_id.as_ref().map(field), ..Self::default() }),
            _ => None,
        }
    }
}

/// What an answer decides, as the label of metrics and in records.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DecisionKind {
    /// The request, response or frame is forwarded.
    #[default]
    Allow,
    /// A WebSocket frame is left out.
    Drop,
    /// An inspected text is objected to.
    Detect,
    /// The client has to prove something first.
    Challenge,
    /// The client is sent elsewhere.
    Redirect,
    /// A WebSocket connection is closed.
    Close,
    /// The request or response is refused.
    Block,
}

impl DecisionKind {
    /// Every kind, the mildest first.
    pub const ALL: [Self; 7] = [Self::Allow, Self::Drop, Self::Detect, Self::Challenge, Self::Redirect, Self::Close, Self::Block];

    /// The kind's name, as in the module's answer.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Drop => "drop",
            Self::Detect => "detect",
            Self::Challenge => "challenge",
            Self::Redirect => "redirect",
            Self::Close => "close",
            Self::Block => "block",
        }
    }

    /// Whether an answer to `hook` can decide this.
    pub const fn is_possible(self, hook: Hook) -> bool {
        match self {
            Self::Allow | Self::Block | Self::Redirect | Self::Challenge => !matches!(hook, Hook::Configure),
            Self::Drop | Self::Close => matches!(hook, Hook::WebsocketFrame),
            Self::Detect => matches!(hook, Hook::GuardrailInspect),
        }
    }

    /// What `answer` decides about an event of `hook`.
    pub(crate) fn of(answer: &Answer<'_>, hook: Hook) -> Self {
        match (&answer.decision, hook) {
            (Decision::Block(_), _) => Self::Block,
            (Decision::Redirect { .. }, _) => Self::Redirect,
            (Decision::Challenge { .. }, _) => Self::Challenge,
            (Decision::Allow, Hook::WebsocketFrame) => match answer.websocket_decision {
                Some(WebsocketDecision::Drop) => Self::Drop,
                Some(WebsocketDecision::Close { .. }) => Self::Close,
                Some(WebsocketDecision::Allow) | None => Self::Allow,
            },
            (Decision::Allow, Hook::GuardrailInspect) if answer.guardrail_response.as_ref().is_some_and(|verdict| verdict.detected()) => {
                Self::Detect
            }
            (Decision::Allow, _) => Self::Allow,
        }
    }
}

/// What an answer decides, and its reasons.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AnswerSummary {
    /// What is decided.
    pub decision: DecisionKind,
    /// Status of the response to the client, of a block or redirect.
    pub status: Option<u16>,
    /// The decision is not final: the module wants to see more of the body first.
    pub needs_more: bool,
    /// See [`Audit::tags`](zentinel_wasm_contract::Audit::tags).
    pub tags: Vec<String>,
    /// See [`Audit::rule_ids`](zentinel_wasm_contract::Audit::rule_ids).
    pub rule_ids: Vec<String>,
    /// See [`Audit::reason_codes`](zentinel_wasm_contract::Audit::reason_codes).
    pub reason_codes: Vec<String>,
    /// The module named more tags, rule ids or reason codes than these.
    pub is_truncated: bool,
    /// How sure the module is, from 0 to 1.
    pub confidence: Option<f64>,
}

impl AnswerSummary {
    /// The summary of an answer to an event of `hook`.
    pub(crate) fn of(answer: &Answer<'_>, hook: Hook) -> Self {
        let audit = &answer.audit;
        let texts = |list: &[Printable<'_>]| list.iter().take(MAX_AUDIT_ENTRIES).map(|text| bounded(text, MAX_AUDIT_TEXT)).collect();
        Self {
            decision: DecisionKind::of(answer, hook),
            status: match &answer.decision {
                Decision::Block(block) => Some(block.status().get()),
                Decision::Redirect { status, .. } => Some(status.get()),
                Decision::Allow | Decision::Challenge { .. } => None,
            },
            needs_more: answer.needs_more,
            tags: texts(&audit.tags),
            rule_ids: texts(&audit.rule_ids),
            reason_codes: texts(&audit.reason_codes),
            is_truncated: [&audit.tags, &audit.rule_ids, &audit.reason_codes].iter().any(|list| list.len() > MAX_AUDIT_ENTRIES),
            confidence: audit.confidence.map(Confidence::get),
        }
    }

    /// Memory of its texts, in bytes.
    fn size(&self) -> usize {
        let texts = [&self.tags, &self.rule_ids, &self.reason_codes].into_iter().flatten();
        texts.map(|text| size_of::<String>() + text.len()).sum()
    }
}

/// The first `max` bytes of `text`, with a mark if it has more.
fn bounded(text: &str, max: usize) -> String {
    if text.len() <= max {
        return text.to_owned();
    }
    format!("{}…", &text[..text.floor_char_boundary(max)])
}

#[cfg(test)]
mod tests {
    use zentinel_wasm_guest_json::answer;

    use super::*;

    #[track_caller]
    fn summary(json: &str, hook: Hook) -> AnswerSummary {
        AnswerSummary::of(&answer::read(json.as_bytes()).unwrap(), hook)
    }

    #[test]
    fn summaries_name_decision_and_status() {
        for (json, hook, decision, status) in [
            ("{}", Hook::RequestHeaders, DecisionKind::Allow, None),
            (r#"{"decision":"block","status":429}"#, Hook::RequestHeaders, DecisionKind::Block, Some(429)),
            (r#"{"decision":"redirect","body":"/x"}"#, Hook::RequestHeaders, DecisionKind::Redirect, Some(302)),
            (r#"{"websocket_decision":"drop"}"#, Hook::WebsocketFrame, DecisionKind::Drop, None),
            (r#"{"websocket_decision":{"close":{"code":1008}}}"#, Hook::WebsocketFrame, DecisionKind::Close, None),
            (r#"{"websocket_decision":"drop","decision":"block"}"#, Hook::WebsocketFrame, DecisionKind::Block, Some(403)),
            (r#"{"guardrail_response":{"detected":true}}"#, Hook::GuardrailInspect, DecisionKind::Detect, None),
            (r#"{"guardrail_response":{"detected":false}}"#, Hook::GuardrailInspect, DecisionKind::Allow, None),
        ] {
            let summary = summary(json, hook);
            assert_eq!((summary.decision, summary.status), (decision, status), "{json}");
            assert!(summary.decision.is_possible(hook), "{json}");
        }
    }

    #[test]
    fn summaries_are_bounded() {
        let long = "\u{e9}".repeat(1 << 20);
        let many: Vec<_> = (0..100).map(|at| at.to_string()).collect();
        let json = serde_json::json!({"tags": many, "rule_ids": [long], "reason_codes": ["short"]}).to_string();
        let summary = summary(&json, Hook::RequestHeaders);
        assert_eq!((summary.tags.len(), &*summary.tags[0], &*summary.reason_codes[0]), (MAX_AUDIT_ENTRIES, "0", "short"));
        assert!(summary.is_truncated);
        assert_eq!(summary.rule_ids, ["\u{e9}".repeat(MAX_AUDIT_TEXT / 2) + "…"]);
    }

    #[test]
    fn every_kind_is_possible_somewhere() {
        for (at, kind) in DecisionKind::ALL.into_iter().enumerate() {
            assert_eq!(kind as usize, at);
            assert!(Hook::ALL.into_iter().any(|hook| kind.is_possible(hook)), "{kind:?}");
            assert!(!kind.is_possible(Hook::Configure));
        }
    }
}
