//! Fuzzes the readers of untrusted bytes. Each function accepts any bytes and panics if the agent
//! mishandles them.
//!
//! `tests/fuzz_seeds.rs` runs the same functions on the seeds, without a sanitizer.

use std::sync::Arc;

use serde_json::Value;
use zentinel_wasm_contract::Encode;
use zentinel_wasm_contract::answer::{HeaderName, HeaderValue};
use zentinel_wasm_contract::{BodyAction, Decision, Event, HeaderCase, HeaderOp, Hook, header};
use zentinel_wasm_guest_json::{answer, input};
use zentinel_wasm_protocol::socket::frame::{self, kind};
use zentinel_wasm_protocol::socket::{Encoding, SocketEncoder, decode};
use zentinel_wasm_protocol::{MAX_FRAME, Phase, Proxy, grpc};

use crate::uri::is_uri_reference;

/// Reads a stream of frames from a client. The first byte selects the encoding.
pub fn frames(data: &[u8]) {
    let Some((choice, mut rest)) = data.split_first() else { return };
    let encoding = if choice & 1 == 0 { Encoding::Json } else { Encoding::MessagePack };
    while let Ok(Some((frame, len))) = frame::next(rest) {
        assert!(len <= rest.len() && len <= 4 + MAX_FRAME);
        let _ = decode::configure(encoding, frame.payload);
        let _ = decode::correlation_id(encoding, frame.kind, frame.payload);
        if let Ok(event) = decode::event(encoding, frame.kind, frame.payload) {
            inputs(&event);
        }
        rest = &rest[len..];
    }
}

/// Reads a message of a gRPC stream.
pub fn messages(data: &[u8]) {
    grpc::read_event(data.to_vec().into(), inputs);
}

/// Checks that the module's input for an event is a JSON object, for any content of the event.
fn inputs(event: &Event<'_>) {
    const LIMIT: usize = 1 << 20;
    for case in [HeaderCase::Canonical, HeaderCase::Lower] {
        let mut out = Vec::new();
        let written = match event {
            Event::RequestHeaders(event) => {
                input::request(&mut out, event, case);
                object(&out);
                let context = input::context(event, &out);
                let body = zentinel_wasm_contract::event::BodyChunk {
                    correlation_id: "c".into(),
                    data: zentinel_wasm_contract::event::Data::Raw(b"\xff"),
                    is_last: true,
                    total_size: None,
                    chunk_index: 0,
                    bytes_received: None,
                    bytes_sent: None,
                };
                out.clear();
                input::request_body(&mut out, &body, Some(&context), LIMIT)
            }
            Event::RequestBody(chunk) => input::request_body(&mut out, chunk, None, LIMIT),
            Event::ResponseHeaders(event) => {
                input::response(&mut out, event, None, case);
                Ok(())
            }
            Event::ResponseBody(chunk) => input::response_body(&mut out, chunk, None, LIMIT),
            Event::WebsocketFrame(frame) => input::websocket_frame(&mut out, frame, LIMIT),
            Event::GuardrailInspect(event) => input::guardrail_inspect(&mut out, event, LIMIT),
            Event::RequestComplete(event) => {
                input::request_complete(&mut out, event);
                Ok(())
            }
        };
        if written.is_ok() {
            object(&out);
        }
    }
}

fn object(json: &[u8]) -> Value {
    let value: Value = serde_json::from_slice(json).unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(json)));
    assert!(value.is_object());
    value
}

/// Reads an answer of a module. An accepted answer can be encoded and injects nothing.
pub fn answers(data: &[u8]) {
    let _ = answer::read_configured(data);
    let Ok(answer) = answer::read(data) else { return };
    let headers: &[(HeaderName<'_>, HeaderValue<'_>)] = match &answer.decision {
        Decision::Block(block) => {
            let status = block.status().get();
            assert!((200..=599).contains(&status));
            // Responses with these statuses have no content.
            assert!(!matches!(status, 204 | 205 | 304) || block.body() == Some(""));
            block.headers()
        }
        Decision::Redirect { status, url } => {
            assert!(matches!(status.get(), 301 | 302 | 303 | 307 | 308));
            assert!(is_uri_reference(url) && !url.is_empty(), "{url}");
            &[]
        }
        Decision::Challenge { challenge_type, .. } => {
            assert!(!challenge_type.is_empty());
            &[]
        }
        Decision::Allow => &[],
    };
    for (at, (name, value)) in headers.iter().enumerate() {
        // The protocol carries one value of each.
        assert!(headers.iter().take(at).all(|(other, _)| !other.eq_ignore_ascii_case(name)));
        assert!(header::is_token(name) && header::is_value(value) && !header::is_framing(name));
        assert!(!name.eq_ignore_ascii_case("location") || is_uri_reference(value), "{value}");
    }
    for op in &*answer.response_headers {
        match op {
            HeaderOp::Set(name, value) => assert!(!name.eq_ignore_ascii_case("location") || is_uri_reference(value), "{value}"),
            HeaderOp::Add(name, _) => assert!(!name.eq_ignore_ascii_case("location")),
            HeaderOp::Remove(_) => {}
        }
    }
    for op in answer.request_headers.iter().chain(&*answer.response_headers) {
        match op {
            HeaderOp::Set(name, value) | HeaderOp::Add(name, value) => {
                assert!(header::is_token(name) && header::is_value(value) && !header::is_framing(name));
            }
            HeaderOp::Remove(name) => assert!(header::is_token(name)),
        }
    }
    let mut hosts = 0;
    for op in &*answer.request_headers {
        match op {
            HeaderOp::Set(name, value) if name.eq_ignore_ascii_case("host") => {
                assert!(header::is_host(value));
                hosts += 1;
            }
            HeaderOp::Add(name, _) => assert!(!name.eq_ignore_ascii_case("host")),
            HeaderOp::Remove(name) => assert!(!name.eq_ignore_ascii_case("host") && !header::is_framing(name)),
            HeaderOp::Set(..) => {}
        }
    }
    assert!(hosts <= 1);
    for text in answer.audit.tags.iter().chain(&answer.audit.rule_ids).chain(&answer.audit.reason_codes) {
        assert!(header::is_value(text));
    }
    assert!(answer.audit.confidence.is_none_or(|confidence| (0.0..=1.0).contains(&confidence.get())));

    for hook in Hook::ALL {
        for encoding in [Encoding::Json, Encoding::MessagePack] {
            for proxy in [Proxy::default(), Proxy::of_version("0.6.45")] {
                let encoder = SocketEncoder {
                    encoding,
                    proxy,
                    phase: Phase { hook, chunk_index: 7 },
                    correlation_id: Arc::from("id\"\\\n"),
                    connection: 0,
                };
                let Ok(bytes) = encoder.encode(&answer) else {
                    // The proxy takes only text as a request body. Everything else can be encoded.
                    assert!(matches!(answer.request_body_mutation.as_ref().map(|mutation| &mutation.action), Some(BodyAction::Replace(_))));
                    continue;
                };
                let (frame, len) = frame::next(&bytes).expect("a frame").expect("a whole one");
                assert_eq!((frame.kind, len), (kind::AGENT_RESPONSE, bytes.len()));
                if encoding == Encoding::Json {
                    let written = object(frame.payload);
                    assert_eq!(written["audit"]["custom"]["correlation_id"], "id\"\\\n");
                    // A decision other than an allow is never lost on the way.
                    assert_eq!(written["decision"] == "allow", answer.decision == Decision::Allow);
                }
            }
        }
    }
}

/// Reads header names, one per line.
pub fn headers(data: &[u8]) {
    for name in String::from_utf8_lossy(data).lines() {
        for case in [HeaderCase::Canonical, HeaderCase::Lower] {
            let mut quoted = b"\"".to_vec();
            header::write_name(&mut quoted, name, case);
            quoted.push(b'"');
            let read: String = serde_json::from_slice(&quoted).unwrap_or_else(|error| panic!("{error}: {name:?}"));
            assert!(read.eq_ignore_ascii_case(name), "{read:?} of {name:?}");
            if case == HeaderCase::Lower || !header::is_token(name) {
                assert_eq!(read, name);
            }
        }
    }
}
