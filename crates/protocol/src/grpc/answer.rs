//! From an answer to the message that the proxy reads.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use prost::Message as _;
use zentinel_wasm_contract::{Answer, Audit, BodyAction, Decision, Failure, FailureKind, HeaderOp, Hook, Text, WebsocketDecision};

use super::proto::agent_response::Decision as DecisionWire;
use super::proto::agent_to_proxy::Message;
use super::{MAX_ANSWER, proto};
use crate::answer::{Phase, Proxy, for_proxy, guardrail};
use crate::{Encode, log_limited};

/// What the answers of one stream have in common.
#[derive(Debug, Default)]
pub(super) struct Peer {
    /// The proxy at the other end.
    pub(super) proxy: Proxy,
    /// It has been said what is lost on this transport.
    told_of_loss: AtomicBool,
}

impl Peer {
    pub(super) fn new(proxy: Proxy) -> Self {
        Self { proxy, told_of_loss: AtomicBool::new(false) }
    }
}

/// Writes answers to one event of a stream as messages.
#[derive(Clone, Debug)]
pub(super) struct Wire {
    pub(super) peer: Arc<Peer>,
    /// The event's place.
    pub(super) phase: Phase,
    /// The event's id, by which the proxy finds its request.
    pub(super) correlation_id: Arc<str>,
}

impl Encode for Wire {
    type Encoded = proto::AgentToProxy;

    fn correlation_id(&self) -> &Arc<str> {
        &self.correlation_id
    }

    fn encode(&self, answer: &Answer<'_>) -> Result<proto::AgentToProxy, Failure> {
        let answer = for_proxy(answer, self.peer.proxy);
        self.tell_of_loss(&answer);
        let response = proto::AgentResponse {
            correlation_id: self.correlation_id.as_ref().to_owned(),
            decision: Some(decision(&answer)),
            request_headers: answer.request_headers.iter().map(header_op).collect(),
            response_headers: answer.response_headers.iter().map(header_op).collect(),
            audit: audit(&answer.audit, guardrail(&answer, self.phase.hook).as_deref()),
            processing_time_ms: None,
            needs_more: answer.needs_more,
        };
        // The id is the client's, and every answer has to carry it.
        let size = response.encoded_len() - self.correlation_id.len();
        if size > MAX_ANSWER {
            let detail = format!("the answer has {size} bytes, more than the {MAX_ANSWER} that the proxy takes over gRPC");
            return Err(Failure::new(FailureKind::OutputLimit, detail));
        }
        Ok(proto::AgentToProxy { message: Some(Message::Response(response)) })
    }
}

impl Wire {
    /// Says once a stream that an answer holds something for which gRPC has no field.
    fn tell_of_loss(&self, answer: &Answer<'_>) {
        let changes = |mutation: &Option<zentinel_wasm_contract::BodyMutation<'_>>| {
            mutation.as_ref().is_some_and(|mutation| mutation.action != BodyAction::PassThrough)
        };
        let lost = if changes(&answer.request_body_mutation) {
            "request_body_mutation"
        } else if changes(&answer.response_body_mutation) {
            "response_body_mutation"
        } else if !answer.routing_metadata.is_empty() {
            "routing_metadata"
        } else if answer.websocket_decision.is_some() && self.phase.hook == Hook::WebsocketFrame {
            "websocket_decision"
        } else {
            return;
        };
        if !self.peer.told_of_loss.swap(true, Relaxed) {
            log_limited!(
                warn,
                correlation_id = &*self.correlation_id,
                hook = self.phase.hook.export(),
                "the module's `{lost}` is lost: gRPC has no field for it; use the Unix socket (said once a stream)"
            );
        }
    }
}

/// A frame that the module wants left out or answered by closing has no other way to be told than a block.
fn decision(answer: &Answer<'_>) -> DecisionWire {
    match (&answer.decision, &answer.websocket_decision) {
        (Decision::Allow, None | Some(WebsocketDecision::Allow)) => DecisionWire::Allow(proto::AllowDecision {}),
        (Decision::Allow, Some(WebsocketDecision::Drop)) => block(403, None, &[]),
        (Decision::Allow, Some(WebsocketDecision::Close { reason, .. })) => block(403, Some(reason), &[]),
        (Decision::Block { status, body, headers }, _) => block(*status, body.as_ref(), headers),
        (Decision::Redirect { status, url }, _) => {
            DecisionWire::Redirect(proto::RedirectDecision { url: url.to_string(), status: (*status).into() })
        }
        (Decision::Challenge { challenge_type, params }, _) => DecisionWire::Challenge(proto::ChallengeDecision {
            challenge_type: challenge_type.to_string(),
            params: params.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect(),
        }),
    }
}

fn block(status: u16, body: Option<&Text<'_>>, headers: &[(Text<'_>, Text<'_>)]) -> DecisionWire {
    DecisionWire::Block(proto::BlockDecision {
        status: status.into(),
        body: body.map(Text::to_string),
        headers: headers.iter().map(|(name, value)| header(name, value)).collect(),
    })
}

fn header(name: &str, value: &str) -> proto::Header {
    proto::Header { name: name.to_owned(), value: value.to_owned() }
}

fn header_op(op: &HeaderOp<'_>) -> proto::HeaderOp {
    use proto::header_op::Operation;

    let operation = match op {
        HeaderOp::Set(name, value) => Operation::Set(header(name, value)),
        HeaderOp::Add(name, value) => Operation::Add(header(name, value)),
        HeaderOp::Remove(name) => Operation::Remove(name.to_string()),
    };
    proto::HeaderOp { operation: Some(operation) }
}

/// What goes to the audit log; nothing, mostly. A guardrail's verdict finds its only place here.
fn audit(audit: &Audit<'_>, guardrail: Option<&str>) -> Option<proto::AuditMetadata> {
    let texts = |list: &[Text<'_>]| list.iter().map(Text::to_string).collect();
    if *audit == Audit::default() && guardrail.is_none() {
        return None;
    }
    Some(proto::AuditMetadata {
        tags: texts(&audit.tags),
        rule_ids: texts(&audit.rule_ids),
        confidence: audit.confidence.map(|confidence| confidence as f32),
        reason_codes: texts(&audit.reason_codes),
        custom: guardrail.map(|verdict| ("guardrail_response".to_owned(), verdict.to_owned())).into_iter().collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wire(hook: Hook, proxy: Proxy) -> Wire {
        Wire { peer: Arc::new(Peer::new(proxy)), phase: Phase { hook, chunk_index: 0 }, correlation_id: Arc::from("c") }
    }

    fn sent(wire: &Wire, answer: &str) -> proto::AgentResponse {
        match wire.encode(&Answer::parse(answer.as_bytes()).unwrap()).unwrap().message {
            Some(Message::Response(response)) => response,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_allow_is_short() {
        let allow = sent(&wire(Hook::RequestHeaders, Proxy::default()), "");
        assert_eq!(allow.encode_to_vec(), [0x0a, 1, b'c', 0x12, 0]);
    }

    #[test]
    fn everything_that_grpc_has_a_field_for_is_sent() {
        let answer = r#"{"decision":"block","status":451,"body":"no","add_response_headers":{"A":"1"},"remove_response_headers":["B"],
            "add_request_headers":{"C":["1","2"]},"tags":["t"],"rule_ids":["r"],"confidence":0.5,"reason_codes":["x"],"needs_more":true}"#;
        let response = sent(&wire(Hook::RequestHeaders, Proxy::default()), answer);
        assert_eq!(response.decision, Some(block(451, Some(&Text::borrowed("no")), &[("A".into(), "1".into())])));
        let ops = [HeaderOp::Set("C".into(), "1".into()), HeaderOp::Add("C".into(), "2".into())];
        assert_eq!(response.request_headers, ops.iter().map(header_op).collect::<Vec<_>>());
        assert_eq!(response.response_headers, [header_op(&HeaderOp::Remove("B".into()))]);
        let audit = response.audit.unwrap();
        assert_eq!((audit.tags, audit.rule_ids, audit.reason_codes), (vec!["t".into()], vec!["r".into()], vec!["x".into()]));
        assert_eq!((audit.confidence, response.needs_more), (Some(0.5), true));
    }

    #[test]
    fn old_proxies_get_a_block_for_a_challenge() {
        let answer = r#"{"decision":"challenge","challenge_type":"captcha","challenge_params":{"body":"prove it"}}"#;
        let to_old = sent(&wire(Hook::RequestHeaders, Proxy::of_version("0.6.45")), answer);
        assert_eq!(to_old.decision, Some(block(403, Some(&Text::borrowed("prove it")), &[])));
        let to_new = sent(&wire(Hook::RequestHeaders, Proxy::of_version("0.6.54")), answer);
        assert!(matches!(to_new.decision, Some(DecisionWire::Challenge(_))));
    }

    #[test]
    fn a_frame_that_is_to_be_dropped_is_not_allowed() {
        let dropped = sent(&wire(Hook::WebsocketFrame, Proxy::default()), r#"{"websocket_decision":"drop"}"#);
        assert!(matches!(dropped.decision, Some(DecisionWire::Block(_))));
    }

    #[test]
    fn a_guardrail_verdict_travels_in_the_audit_data() {
        let response =
            sent(&wire(Hook::GuardrailInspect, Proxy::default()), r#"{"guardrail_response":{"detected":true,"confidence":0.5}}"#);
        assert_eq!(response.audit.unwrap().custom["guardrail_response"], r#"{"confidence":0.5,"detected":true}"#);
    }

    #[test]
    fn an_answer_that_the_proxy_would_not_take_is_a_module_error() {
        let answer = format!(r#"{{"decision":"block","body":"{}"}}"#, "x".repeat(MAX_ANSWER));
        let wire = wire(Hook::RequestHeaders, Proxy::default());
        let failure = wire.encode(&Answer::parse(answer.as_bytes()).unwrap()).unwrap_err();
        assert_eq!(failure.kind, FailureKind::OutputLimit);
        let long = Wire { correlation_id: Arc::from("x".repeat(MAX_ANSWER)), ..wire };
        long.encode(&Answer::default()).unwrap();
    }
}
