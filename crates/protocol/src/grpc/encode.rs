//! Encodes answers as messages.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use prost::Message as _;
use zentinel_wasm_bounds::log_limited;
use zentinel_wasm_contract::answer::Printable;
use zentinel_wasm_contract::{
    Answer, Audit, Block, BodyAction, BodyMutation, Decision, Encode, Failure, FailureKind, HeaderOp, WebsocketDecision,
};

use super::proto;
use super::proto::agent_response::Decision as ProtoDecision;
use super::proto::agent_to_proxy::Message;
use crate::guardrail;
use crate::limits::MAX_ID;
use crate::phase::Phase;
use crate::proxy::{Proxy, for_proxy};

/// Largest answer that is sent, in bytes, without its correlation id. The proxy's client accepts
/// messages of up to 4 MiB; a larger one would end its stream and all events on it.
const MAX_ANSWER: usize = (4 << 20) - MAX_ID;

/// What the answers of one stream share.
#[derive(Debug, Default)]
pub(super) struct Peer {
    /// The proxy of the stream.
    pub(super) proxy: Proxy,
    /// The loss of routing metadata was logged.
    warned_of_loss: AtomicBool,
}

impl Peer {
    pub(super) fn new(proxy: Proxy) -> Self {
        Self { proxy, warned_of_loss: AtomicBool::new(false) }
    }
}

/// Encodes answers to one event of a stream as messages.
#[derive(Clone, Debug)]
pub(super) struct GrpcEncoder {
    pub(super) peer: Arc<Peer>,
    /// Phase of the event.
    pub(super) phase: Phase,
    /// Id of the event, by which the proxy finds its request.
    pub(super) correlation_id: Arc<str>,
}

impl Encode for GrpcEncoder {
    type Encoded = proto::AgentToProxy;

    fn correlation_id(&self) -> &Arc<str> {
        &self.correlation_id
    }

    fn encode(&self, answer: &Answer<'_>) -> Result<proto::AgentToProxy, Failure> {
        let answer = for_proxy(answer, self.peer.proxy);
        if let Some(field) = not_carried(&answer) {
            let detail = format!("`{field}` cannot be carried over gRPC, which has no field for it: use the Unix socket");
            return Err(Failure::new(FailureKind::InvalidResult, detail));
        }
        self.warn_of_loss(&answer);
        let response = proto::AgentResponse {
            correlation_id: self.correlation_id.as_ref().to_owned(),
            decision: Some(decision(&answer.decision)),
            request_headers: answer.request_headers.iter().map(header_op).collect(),
            response_headers: answer.response_headers.iter().map(header_op).collect(),
            audit: audit(&answer.audit, guardrail::verdict(&answer, self.phase.hook).as_deref()),
            processing_time_ms: None,
            needs_more: answer.needs_more,
        };
        // The id does not count: the client chose it, and every answer must carry it.
        let size = response.encoded_len() - self.correlation_id.len();
        if size > MAX_ANSWER {
            let detail = format!("the answer takes {size} bytes, more than the {MAX_ANSWER} that the proxy accepts over gRPC");
            return Err(Failure::new(FailureKind::OutputLimit, detail));
        }
        Ok(proto::AgentToProxy { message: Some(Message::Response(response)) })
    }

    fn loses_routing_metadata(&self, answer: &Answer<'_>) -> bool {
        !answer.routing_metadata.is_empty()
    }
}

impl GrpcEncoder {
    /// Logs, once per stream, that routing metadata is dropped: gRPC has no field for it, and no
    /// proxy decides by it.
    fn warn_of_loss(&self, answer: &Answer<'_>) {
        if self.loses_routing_metadata(answer) && !self.peer.warned_of_loss.swap(true, Relaxed) {
            log_limited!(
                warn,
                correlation_id = &*self.correlation_id,
                hook = self.phase.hook.export(),
                "dropped the module's `routing_metadata`: gRPC has no field for it; use the Unix socket (logged once per stream)"
            );
        }
    }
}

/// The first field of `answer` that gRPC cannot carry and that changes what happens to the request.
///
/// A final rejection is sent without such fields, because it takes effect without them.
fn not_carried(answer: &Answer<'_>) -> Option<&'static str> {
    let changes =
        |mutation: &Option<BodyMutation<'_>>| mutation.as_ref().is_some_and(|mutation| mutation.action != BodyAction::PassThrough);
    let refuses = answer.decision != Decision::Allow;
    if refuses && !answer.needs_more {
        return None;
    }
    if changes(&answer.request_body_mutation) {
        Some("request_body_mutation")
    } else if changes(&answer.response_body_mutation) {
        Some("response_body_mutation")
    } else if !refuses && matches!(answer.websocket_decision, Some(WebsocketDecision::Drop | WebsocketDecision::Close { .. })) {
        Some("websocket_decision")
    } else {
        None
    }
}

fn decision(decision: &Decision<'_>) -> ProtoDecision {
    match decision {
        Decision::Allow => ProtoDecision::Allow(proto::AllowDecision {}),
        Decision::Block(refusal) => block(refusal),
        Decision::Redirect { status, url } => {
            ProtoDecision::Redirect(proto::RedirectDecision { url: url.to_string(), status: status.get().into() })
        }
        Decision::Challenge { challenge_type, params } => ProtoDecision::Challenge(proto::ChallengeDecision {
            challenge_type: challenge_type.to_string(),
            params: params.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect(),
        }),
    }
}

fn block(block: &Block<'_>) -> ProtoDecision {
    ProtoDecision::Block(proto::BlockDecision {
        status: block.status().get().into(),
        body: block.body().map(str::to_owned),
        headers: block.headers().iter().map(|(name, value)| header(name, value)).collect(),
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

/// The audit data, which most answers do not have. gRPC has no other field for a guardrail's
/// verdict.
fn audit(audit: &Audit<'_>, guardrail: Option<&str>) -> Option<proto::AuditMetadata> {
    let texts = |list: &[Printable<'_>]| list.iter().map(Printable::to_string).collect();
    if *audit == Audit::default() && guardrail.is_none() {
        return None;
    }
    Some(proto::AuditMetadata {
        tags: texts(&audit.tags),
        rule_ids: texts(&audit.rule_ids),
        confidence: audit.confidence.map(|confidence| confidence.get() as f32),
        reason_codes: texts(&audit.reason_codes),
        custom: guardrail.map(|verdict| ("guardrail_response".to_owned(), verdict.to_owned())).into_iter().collect(),
    })
}

#[cfg(test)]
mod tests {
    use zentinel_wasm_contract::Hook;

    use zentinel_wasm_guest_json::answer;

    use super::proto::header_op::Operation;
    use super::*;

    fn encoder(hook: Hook, proxy: Proxy) -> GrpcEncoder {
        GrpcEncoder { peer: Arc::new(Peer::new(proxy)), phase: Phase { hook, chunk_index: 0 }, correlation_id: Arc::from("c") }
    }

    fn sent(encoder: &GrpcEncoder, answer: &str) -> proto::AgentResponse {
        match encoder.encode(&answer::read(answer.as_bytes()).unwrap()).unwrap().message {
            Some(Message::Response(response)) => response,
            other => panic!("{other:?}"),
        }
    }

    fn blocked(status: u32, body: Option<&str>, headers: &[(&str, &str)]) -> ProtoDecision {
        ProtoDecision::Block(proto::BlockDecision {
            status,
            body: body.map(str::to_owned),
            headers: headers.iter().map(|(name, value)| header(name, value)).collect(),
        })
    }

    #[test]
    fn a_plain_allow_has_only_the_id() {
        let allow = sent(&encoder(Hook::RequestHeaders, Proxy::default()), "");
        assert_eq!(allow.encode_to_vec(), [0x0a, 1, b'c', 0x12, 0]);
    }

    #[test]
    fn sends_every_field_that_grpc_has() {
        let answer = r#"{"decision":"block","status":451,"body":"no","add_response_headers":{"A":"1"},"remove_response_headers":["B"],
            "add_request_headers":{"C":["1","2"]},"tags":["t"],"rule_ids":["r"],"confidence":0.5,"reason_codes":["x"],"needs_more":true}"#;
        let response = sent(&encoder(Hook::RequestHeaders, Proxy::default()), answer);
        assert_eq!(response.decision, Some(blocked(451, Some("no"), &[("A", "1")])));
        let op = |operation| proto::HeaderOp { operation: Some(operation) };
        let changes = [Operation::Set(header("C", "1")), Operation::Add(header("C", "2"))].map(op);
        assert_eq!(response.request_headers, changes);
        assert_eq!(response.response_headers, [op(Operation::Remove("B".into()))]);
        let audit = response.audit.unwrap();
        assert_eq!((audit.tags, audit.rule_ids, audit.reason_codes), (vec!["t".into()], vec!["r".into()], vec!["x".into()]));
        assert_eq!((audit.confidence, response.needs_more), (Some(0.5), true));
    }

    #[test]
    fn an_old_proxy_gets_a_block_instead_of_a_challenge() {
        let answer = r#"{"decision":"challenge","challenge_type":"captcha","challenge_params":{"body":"prove it"}}"#;
        let to_old = sent(&encoder(Hook::RequestHeaders, Proxy::of_version("0.6.45")), answer);
        assert_eq!(to_old.decision, Some(blocked(403, Some("prove it"), &[])));
        let to_new = sent(&encoder(Hook::RequestHeaders, Proxy::of_version("0.6.54")), answer);
        assert!(matches!(to_new.decision, Some(ProtoDecision::Challenge(_))));
    }

    #[test]
    fn a_field_that_grpc_lacks_is_a_module_error() {
        let encoder = encoder(Hook::RequestBody, Proxy::default());
        let encode = |answer: &str| encoder.encode(&answer::read(answer.as_bytes()).unwrap());
        for (answer, field) in [
            (r#"{"request_body_mutation":{"action":"replace","data":"x"}}"#, "request_body_mutation"),
            (r#"{"request_body_mutation":{"action":"drop"}}"#, "request_body_mutation"),
            (r#"{"response_body_mutation":{"action":"drop"}}"#, "response_body_mutation"),
            (r#"{"websocket_decision":"drop"}"#, "websocket_decision"),
            (r#"{"websocket_decision":{"close":{"code":1008}}}"#, "websocket_decision"),
            // A block that needs more is not final.
            (r#"{"decision":"block","needs_more":true,"request_body_mutation":{"action":"drop"}}"#, "request_body_mutation"),
        ] {
            let failure = encode(answer).unwrap_err();
            assert_eq!(failure.kind, FailureKind::InvalidResult);
            assert!(failure.detail.contains(field) && failure.detail.contains("cannot be carried over gRPC"), "{failure}");
        }
        for carried in [
            r#"{"request_body_mutation":{"action":"pass_through"},"response_body_mutation":{"action":"pass_through"}}"#,
            r#"{"websocket_decision":"allow"}"#,
            r#"{"routing_metadata":{"a":"b"}}"#,
        ] {
            encode(carried).unwrap();
        }
    }

    #[test]
    fn a_final_rejection_is_sent_without_the_fields_that_grpc_lacks() {
        for beside in [
            r#""websocket_decision":{"close":{"code":1011}}"#,
            r#""websocket_decision":"drop""#,
            r#""request_body_mutation":{"action":"drop"}"#,
        ] {
            let refused = sent(&encoder(Hook::WebsocketFrame, Proxy::default()), &format!(r#"{{"decision":"block",{beside}}}"#));
            assert_eq!(refused.decision, Some(blocked(403, None, &[])));
        }
    }

    #[test]
    fn a_guardrail_verdict_is_in_the_audit_data() {
        let response =
            sent(&encoder(Hook::GuardrailInspect, Proxy::default()), r#"{"guardrail_response":{"detected":true,"confidence":0.5}}"#);
        assert_eq!(response.audit.unwrap().custom["guardrail_response"], r#"{"confidence":0.5,"detected":true}"#);
    }

    #[test]
    fn an_answer_too_large_for_the_proxy_is_a_module_error() {
        let answer = format!(r#"{{"decision":"block","body":"{}"}}"#, "x".repeat(MAX_ANSWER));
        let encoder = encoder(Hook::RequestHeaders, Proxy::default());
        let failure = encoder.encode(&answer::read(answer.as_bytes()).unwrap()).unwrap_err();
        assert_eq!(failure.kind, FailureKind::OutputLimit);
        let long = GrpcEncoder { correlation_id: Arc::from("x".repeat(MAX_ANSWER)), ..encoder };
        long.encode(&Answer::default()).unwrap();
    }
}
