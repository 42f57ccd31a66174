//! Encodes answers as frames.

use std::borrow::Cow;
use std::sync::Arc;

use zentinel_wasm_contract::answer::{CloseCode, CloseReason};
use zentinel_wasm_contract::{Answer, BodyAction, BodyMutation, Decision, Encode, Failure, FailureKind, Hook, WebsocketDecision, json};

use super::agent_response::{AgentResponse, MutationField};
use super::encoding::Encoding;
use super::frame::{self, kind};
use crate::guardrail;
use crate::limits::MAX_FRAME;
use crate::phase::Phase;
use crate::proxy::{Proxy, for_proxy};

/// Encodes answers to one event on a Unix socket as frames.
#[derive(Clone, Debug)]
pub struct SocketEncoder {
    /// Encoding of the connection.
    pub encoding: Encoding,
    /// The proxy of the connection.
    pub proxy: Proxy,
    /// Phase of the event.
    pub phase: Phase,
    /// Id of the event, by which the proxy finds its request.
    pub correlation_id: Arc<str>,
    /// Number of the connection.
    pub connection: u64,
}

impl Encode for SocketEncoder {
    type Encoded = Vec<u8>;

    fn correlation_id(&self) -> &Arc<str> {
        &self.correlation_id
    }

    fn connection(&self) -> Option<u64> {
        Some(self.connection)
    }

    fn encode(&self, answer: &Answer<'_>) -> Result<Vec<u8>, Failure> {
        if let Some(frame) = self.plain_allow(answer) {
            return Ok(frame);
        }
        let answer = for_proxy(answer, self.proxy);
        let payload = AgentResponse {
            answer: &answer,
            correlation_id: &self.correlation_id,
            request_body_mutation: answer
                .request_body_mutation
                .as_ref()
                .map(|mutation| request_mutation(mutation, self.phase))
                .transpose()?,
            response_body_mutation: answer.response_body_mutation.as_ref().map(|mutation| response_mutation(mutation, self.phase)),
            websocket_decision: websocket_decision(&answer, self.phase.hook),
            guardrail: guardrail::verdict(&answer, self.phase.hook),
        };
        let mut out = Vec::with_capacity(256);
        frame::append(&mut out, kind::AGENT_RESPONSE, |out| {
            // Neither fails: the types are plain, and writing to a vector cannot fail.
            let _ = match self.encoding {
                Encoding::Json => serde_json::to_writer(out, &payload).is_ok(),
                Encoding::MessagePack => rmp_serde::encode::write_named(out, &payload).is_ok(),
            };
        });
        if out.len() - 4 > MAX_FRAME {
            return Err(Failure::new(
                FailureKind::OutputLimit,
                format!("the answer takes {} bytes, more than a frame may have", out.len()),
            ));
        }
        Ok(out)
    }
}

impl SocketEncoder {
    /// The frame of an allow with nothing else, which most answers are. Only its id differs.
    fn plain_allow(&self, answer: &Answer<'_>) -> Option<Vec<u8>> {
        const BEFORE: &[u8] = br#"{"version":2,"decision":"allow","audit":{"custom":{"correlation_id":"#;
        const AFTER: &[u8] = b"}}}";

        if self.encoding != Encoding::Json || self.phase.has_own_verdict() || *answer != Answer::default() {
            return None;
        }
        let mut out = Vec::with_capacity(BEFORE.len() + AFTER.len() + 8 * self.correlation_id.len() + 64);
        frame::append(&mut out, kind::AGENT_RESPONSE, |out| {
            out.extend_from_slice(BEFORE);
            json::string(out, &self.correlation_id);
            out.extend_from_slice(AFTER);
        });
        Some(out)
    }
}

/// The proxy uses the data of a request mutation as it is, so it must be text.
fn request_mutation<'a>(mutation: &'a BodyMutation<'_>, phase: Phase) -> Result<MutationField<'a>, Failure> {
    let data = match &mutation.action {
        BodyAction::PassThrough => None,
        BodyAction::Drop => Some(Cow::Borrowed("")),
        BodyAction::Replace(bytes) => match std::str::from_utf8(bytes) {
            Ok(text) => Some(Cow::Borrowed(text)),
            Err(_) => {
                return Err(Failure::new(
                    FailureKind::InvalidResult,
                    "`request_body_mutation` is not UTF-8: the proxy takes only text for a request body",
                ));
            }
        },
    };
    Ok(MutationField { data, chunk_index: mutation.chunk_index.unwrap_or(phase.chunk_index) })
}

/// The proxy decodes the data of a response mutation from base64.
fn response_mutation<'a>(mutation: &'a BodyMutation<'_>, phase: Phase) -> MutationField<'a> {
    let data = match &mutation.action {
        BodyAction::PassThrough => None,
        BodyAction::Drop => Some(Cow::Borrowed("")),
        BodyAction::Replace(bytes) => Some(Cow::Owned(base64_simd::STANDARD.encode_to_string(&**bytes))),
    };
    MutationField { data, chunk_index: mutation.chunk_index.unwrap_or(phase.chunk_index) }
}

/// The decision about a WebSocket frame. The proxy reads only this field for a frame, so a block
/// without it becomes a close.
fn websocket_decision<'a>(answer: &'a Answer<'_>, hook: Hook) -> Option<Cow<'a, WebsocketDecision<'a>>> {
    const REFUSED: WebsocketDecision<'_> =
        WebsocketDecision::Close { code: CloseCode::POLICY_VIOLATION, reason: CloseReason::from_static("refused") };

    match (&answer.websocket_decision, &answer.decision) {
        // A rejection in either field takes effect.
        (Some(decision), verdict) if *decision != WebsocketDecision::Allow || *verdict == Decision::Allow => Some(Cow::Borrowed(decision)),
        (_, _) if hook != Hook::WebsocketFrame => None,
        (_, Decision::Allow) => Some(Cow::Owned(WebsocketDecision::Allow)),
        (_, _) => Some(Cow::Owned(REFUSED)),
    }
}

#[cfg(test)]
mod tests {
    use zentinel_wasm_guest_json::answer;

    use super::*;
    use serde_json::{Value, json};

    fn encoder(hook: Hook) -> SocketEncoder {
        SocketEncoder {
            encoding: Encoding::Json,
            proxy: Proxy::default(),
            phase: Phase { hook, chunk_index: 7 },
            correlation_id: Arc::from("c\"1"),
            connection: 0,
        }
    }

    fn sent(encoder: &SocketEncoder, answer: &str) -> Value {
        let frame = encoder.encode(&answer::read(answer.as_bytes()).unwrap()).unwrap();
        let (frame, _) = frame::next(&frame).unwrap().unwrap();
        assert_eq!(frame.kind, kind::AGENT_RESPONSE);
        let json: Value = serde_json::from_slice(frame.payload).unwrap();
        let other = SocketEncoder { encoding: Encoding::MessagePack, ..encoder.clone() };
        let packed = other.encode(&answer::read(answer.as_bytes()).unwrap()).unwrap();
        assert_eq!(rmp_serde::from_slice::<Value>(&packed[frame::HEADER..]).unwrap(), json);
        json
    }

    #[test]
    fn a_plain_allow_has_only_the_id() {
        assert_eq!(
            sent(&encoder(Hook::RequestHeaders), ""),
            json!({"version": 2, "decision": "allow", "audit": {"custom": {"correlation_id": "c\"1"}}})
        );
    }

    #[test]
    fn sends_every_field_of_an_answer() {
        let answer = r#"{"decision":"block","status":451,"body":"no","add_response_headers":{"A":"1"},"remove_response_headers":["B"],
            "add_request_headers":{"C":["1","2"]},"tags":["t"],"rule_ids":["r"],"confidence":0.5,"reason_codes":["x"],
            "routing_metadata":{"upstream":"u"},"needs_more":true}"#;
        assert_eq!(
            sent(&encoder(Hook::RequestHeaders), answer),
            json!({
                "version": 2,
                "decision": {"block": {"status": 451, "body": "no", "headers": {"A": "1"}}},
                "request_headers": [{"set": {"name": "C", "value": "1"}}, {"add": {"name": "C", "value": "2"}}],
                "response_headers": [{"remove": {"name": "B"}}],
                "routing_metadata": {"upstream": "u"},
                "audit": {"tags": ["t"], "rule_ids": ["r"], "reason_codes": ["x"], "confidence": 0.5, "custom": {"correlation_id": "c\"1"}},
                "needs_more": true,
            })
        );
    }

    #[test]
    fn a_block_without_headers_has_null() {
        let decision = &sent(&encoder(Hook::RequestHeaders), r#"{"decision":"deny"}"#)["decision"];
        assert_eq!(*decision, json!({"block": {"status": 403, "body": null, "headers": null}}));
    }

    #[test]
    fn request_bodies_are_text_and_response_bodies_base64() {
        let answer = r#"{"request_body_mutation":{"action":"replace","data":"hi"},"response_body_mutation":{"action":"replace","data":"hi","chunk_index":2}}"#;
        let sent = sent(&encoder(Hook::RequestBody), answer);
        assert_eq!(sent["request_body_mutation"], json!({"data": "hi", "chunk_index": 7}));
        assert_eq!(sent["response_body_mutation"], json!({"data": "aGk=", "chunk_index": 2}));
        let bytes = br#"{"request_body_mutation":{"action":"replace","data_base64":"/w=="}}"#;
        let failure = encoder(Hook::RequestBody).encode(&answer::read(bytes).unwrap()).unwrap_err();
        assert_eq!(failure.kind, FailureKind::InvalidResult);
    }

    #[test]
    fn drop_is_an_empty_chunk_and_pass_through_null() {
        let sent = sent(
            &encoder(Hook::RequestBody),
            r#"{"request_body_mutation":{"action":"drop"},"response_body_mutation":{"action":"pass_through"}}"#,
        );
        assert_eq!(sent["request_body_mutation"], json!({"data": "", "chunk_index": 7}));
        assert_eq!(sent["response_body_mutation"], json!({"data": null, "chunk_index": 7}));
    }

    #[test]
    fn a_blocked_websocket_frame_closes_the_connection() {
        let hook = Hook::WebsocketFrame;
        assert_eq!(sent(&encoder(hook), "")["websocket_decision"], "allow");
        assert_eq!(sent(&encoder(hook), r#"{"websocket_decision":"drop"}"#)["websocket_decision"], "drop");
        assert_eq!(
            sent(&encoder(hook), r#"{"decision":"block"}"#)["websocket_decision"],
            json!({"close": {"code": 1008, "reason": "refused"}})
        );
        let contradiction = sent(&encoder(hook), r#"{"decision":"block","websocket_decision":"allow"}"#);
        assert_eq!(contradiction["websocket_decision"], json!({"close": {"code": 1008, "reason": "refused"}}));
    }

    #[test]
    fn a_guardrail_verdict_is_in_the_routing_metadata() {
        let verdict = |answer: &str| -> Value {
            let sent = sent(&encoder(Hook::GuardrailInspect), answer);
            serde_json::from_str(sent["routing_metadata"]["guardrail_response"].as_str().unwrap()).unwrap()
        };
        assert_eq!(verdict("")["detected"], false);
        assert_eq!(verdict(r#"{"guardrail_response":{"detected":true,"confidence":0.5}}"#), json!({"detected": true, "confidence": 0.5}));
        let derived = verdict(r#"{"decision":"block","body":"pii","reason_codes":["SSN"],"confidence":0.25}"#);
        assert_eq!((&derived["detected"], &derived["confidence"]), (&json!(true), &json!(0.25)));
        assert_eq!(derived["detections"][0]["category"], "SSN");
        let contradiction = verdict(r#"{"decision":"block","guardrail_response":{"detected":false}}"#);
        assert_eq!(contradiction["detected"], true);
    }

    #[test]
    fn an_old_proxy_gets_a_block_instead_of_a_challenge() {
        let old = SocketEncoder { proxy: Proxy::of_version("0.6.45"), ..encoder(Hook::RequestHeaders) };
        // The proxy finds the parameter `body` in any case.
        let answer = r#"{"decision":"challenge","challenge_type":"captcha","challenge_params":{"Body":"prove it"},"tags":["t"]}"#;
        let to_old = sent(&old, answer);
        assert_eq!(to_old["decision"], json!({"block": {"status": 403, "body": "prove it", "headers": null}}));
        assert_eq!(to_old["audit"]["tags"], json!(["t"]));
        assert!(sent(&encoder(Hook::RequestHeaders), answer)["decision"].get("challenge").is_some());
    }
}
