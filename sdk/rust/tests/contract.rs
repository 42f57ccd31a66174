//! The agent reads the SDK's answers as they were meant.

use std::borrow::Cow;

use zentinel_wasm_contract::answer::{
    Block, BlockStatus, BodyAction, BodyMutation, CloseCode, CloseReason, Confidence, Decision as Read, HeaderName, HeaderOp, HeaderValue,
    RedirectStatus, RedirectUrl, WebsocketDecision,
};
use zentinel_wasm_guest_json::answer;
use zentinel_wasm_sdk::{Decision, Detection, Inspection, Severity};

fn golden(name: &str) -> String {
    let path = format!("{}/../../crates/guest-json/golden/{name}.json", env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Asserts that the agent reads the decision like the JSON of the product page.
fn assert_golden(decision: &Decision, name: &str) {
    let (json, golden) = (decision.to_json(), golden(name));
    let read = answer::read(json.as_bytes()).unwrap_or_else(|error| panic!("{json}: {error}"));
    assert_eq!(read, answer::read(golden.as_bytes()).unwrap(), "{json}");
}

fn name(name: &str) -> HeaderName<'_> {
    HeaderName::new(name.into()).unwrap()
}

fn value(value: &str) -> HeaderValue<'_> {
    HeaderValue::new(value.into()).unwrap()
}

mod decisions {
    use super::*;

    #[test]
    fn builds_the_examples_of_the_product_page() {
        let result = Decision::allow()
            .status(403)
            .body("Forbidden")
            .set_request_header("X-Processed", "true")
            .remove_request_header("X-Debug")
            .set_response_header("X-Frame-Options", "DENY")
            .tag("processed");
        assert_golden(&result, "result");
        let challenge =
            Decision::challenge("captcha").param("site_key", "your-captcha-site-key").param("action", "login").tag("bot-challenge");
        assert_golden(&challenge, "challenge");
        let audit = Decision::block(403)
            .tag("path-traversal")
            .rule_id("SEC-001")
            .rule_id("OWASP-930")
            .confidence(0.95)
            .reason_code("PATH_TRAVERSAL_DETECTED");
        assert_golden(&audit, "audit");
        assert_golden(&Decision::allow().routing("upstream", "api-v2-backend").routing("priority", "high"), "routing");
        assert_golden(&Decision::allow().needs_more(), "needs_more");
    }

    #[test]
    fn blocks_and_redirects() {
        let json = Decision::block(451).body("né\u{0}").set_response_header("Retry-After", "5").to_json();
        let mut block = Block::new(BlockStatus::new(451).unwrap(), Some("né\u{0}".into()));
        block.headers_mut().set(vec![("Retry-After".into(), vec!["5".into()])]).unwrap();
        assert_eq!(answer::read(json.as_bytes()).unwrap().decision, Read::Block(block));

        let json = Decision::redirect("/login?a=\"b\"").status(303).to_json();
        // The agent encodes characters that a URL must not contain.
        let redirect = |status, url: &'static str| Read::Redirect { status, url: RedirectUrl::new(url.into()).unwrap() };
        let expected = redirect(RedirectStatus::new(303).unwrap(), "/login?a=%22b%22");
        assert_eq!(answer::read(json.as_bytes()).unwrap().decision, expected);
        let json = Decision::redirect("/login").to_json();
        assert_eq!(answer::read(json.as_bytes()).unwrap().decision, redirect(RedirectStatus::FOUND, "/login"));
    }

    #[test]
    fn drops_frames_and_closes_connections() {
        let json = Decision::allow().drop_frame().to_json();
        assert_eq!(answer::read(json.as_bytes()).unwrap().websocket_decision, Some(WebsocketDecision::Drop));
        let json = Decision::allow().close_websocket(1008, "no \"such\" words").to_json();
        let close = WebsocketDecision::Close { code: CloseCode::POLICY_VIOLATION, reason: CloseReason::from_static("no \"such\" words") };
        assert_eq!(answer::read(json.as_bytes()).unwrap().websocket_decision, Some(close));
    }

    #[test]
    fn clamps_the_confidence() {
        let confidence = |score| {
            let json = Decision::allow().confidence(score).to_json();
            answer::read(json.as_bytes()).unwrap().audit.confidence.map(Confidence::get).unwrap()
        };
        assert_eq!([confidence(7.0), confidence(-1.0), confidence(f64::NAN), confidence(0.25)], [1.0, 0.0, 0.0, 0.25]);
    }
}

mod headers {
    use super::*;

    #[test]
    fn the_last_value_of_a_set_header_wins() {
        let json = Decision::allow()
            .set_response_header("x-a", "1")
            .set_response_header("X-A", "2")
            .set_response_header_values("Set-Cookie", ["a=1", "b=\"2\""])
            .remove_response_header("Server")
            .to_json();
        assert_eq!(
            *answer::read(json.as_bytes()).unwrap().response_headers,
            [
                HeaderOp::Remove(name("Server")),
                HeaderOp::Set(name("x-a"), value("2")),
                HeaderOp::Set(name("Set-Cookie"), value("a=1")),
                HeaderOp::Add(name("Set-Cookie"), value("b=\"2\"")),
            ]
        );
    }

    #[test]
    fn appends_keep_earlier_values() {
        let json = Decision::allow()
            .append_request_header("Cookie", "a=1")
            .append_response_header("Set-Cookie", "a=1")
            .append_response_header("X-A", "1")
            .append_response_header("set-cookie", "b=2")
            .to_json();
        let answer = answer::read(json.as_bytes()).unwrap();
        assert_eq!(*answer.request_headers, [HeaderOp::Add(name("Cookie"), value("a=1"))]);
        assert_eq!(
            *answer.response_headers,
            [
                HeaderOp::Add(name("Set-Cookie"), value("a=1")),
                HeaderOp::Add(name("Set-Cookie"), value("b=2")),
                HeaderOp::Add(name("X-A"), value("1")),
            ]
        );
    }
}

mod bodies {
    use super::*;

    #[test]
    fn keeps_replaces_and_drops_bodies() {
        let action = |decision: Decision, request: bool| {
            let json = decision.to_json();
            let answer = answer::read(json.as_bytes()).unwrap();
            let mutation = if request { answer.request_body_mutation } else { answer.response_body_mutation };
            let Some(BodyMutation { action, chunk_index: None }) = mutation else { panic!("{json}") };
            match action {
                BodyAction::PassThrough => "keep".to_owned().into_bytes(),
                BodyAction::Drop => "drop".to_owned().into_bytes(),
                BodyAction::Replace(bytes) => bytes.into_owned(),
            }
        };
        let text = "é\"\\\n\u{1}";
        assert_eq!(action(Decision::allow().keep_request_body(), true), b"keep");
        assert_eq!(action(Decision::allow().replace_request_body(text), true), text.as_bytes());
        assert_eq!(action(Decision::allow().replace_request_body_bytes([0xff, 0]), true), [0xff, 0]);
        assert_eq!(action(Decision::allow().drop_request_body(), true), b"drop");
        assert_eq!(action(Decision::allow().keep_response_body(), false), b"keep");
        assert_eq!(action(Decision::allow().replace_response_body(text.to_owned()), false), text.as_bytes());
        assert_eq!(action(Decision::allow().replace_response_body_bytes(*b"abc"), false), b"abc");
        assert_eq!(action(Decision::allow().drop_response_body(), false), b"drop");
    }

    #[test]
    fn sends_bytes_as_base64_even_if_they_are_utf_8() {
        let json = Decision::allow().replace_request_body_bytes(*b"abc").to_json();
        let answer = answer::read(json.as_bytes()).unwrap();
        assert!(json.contains("YWJj"));
        assert!(matches!(answer.request_body_mutation.unwrap().action, BodyAction::Replace(Cow::Owned(_))));
    }
}

mod guardrails {
    use super::*;

    #[test]
    fn writes_verdicts_in_the_format_of_the_proxy() {
        let inspection = Inspection::clean()
            .detection(Detection::new("email", "an address").severity(Severity::High).confidence(0.9).span(3..17))
            .detection(Detection::new("ssn", "a \"number\"").confidence(f64::NAN))
            .redacted("to ***");
        let json = inspection.to_json();
        let response = answer::read(json.as_bytes()).unwrap().guardrail_response.unwrap();
        let response: serde_json::Value = serde_json::from_str(&response).unwrap();
        let expected = serde_json::json!({
            "detected": true,
            "confidence": 0.9,
            "detections": [
                {"category": "email", "description": "an address", "severity": "high", "confidence": 0.9, "span": {"start": 3, "end": 17}},
                {"category": "ssn", "description": "a \"number\"", "severity": "medium", "confidence": 0},
            ],
            "redacted_content": "to ***",
        });
        // As JSON numbers, 0 and 0.0 are equal.
        assert_eq!(response.to_string().replace("0.0", "0"), expected.to_string());
        let json = Inspection::clean().to_json();
        assert!(answer::read(json.as_bytes()).unwrap().guardrail_response.is_some());
    }
}

mod module {
    use serde::Deserialize;
    use zentinel_wasm_sdk::{Completion, Decision, Guardrail, Inspection, Request, RequestBody, Response};

    #[derive(Default, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Config {
        closed: Option<String>,
    }

    fn headers(request: &Request<'_>, config: &Config) -> Option<Decision> {
        let closed = config.closed.as_deref()?;
        request.path().starts_with(closed).then(|| Decision::block(404))
    }

    fn body(body: &RequestBody<'_>, _: &Config) -> Result<Decision, std::num::ParseIntError> {
        let number: u32 = body.text().unwrap_or_default().parse()?;
        Ok(Decision::allow().tag(number.to_string()))
    }

    fn response(_: &Response<'_>, _: &Config) -> Decision {
        Decision::allow()
    }

    fn inspect(_: &Guardrail<'_>, _: &Config) -> Inspection {
        Inspection::clean()
    }

    fn complete(_: &Completion<'_>, _: &Config) {}

    zentinel_wasm_sdk::export! {
        config: Config,
        on_request_headers: headers,
        on_request_body: body,
        on_response_headers: response,
        on_guardrail_inspect: inspect,
        on_request_complete: complete,
    }
}

#[test]
fn call_hook_configures_and_calls_the_module() {
    use module::call_hook;

    let admin = r#"{"uri":"/admin/x"}"#;
    assert_eq!(call_hook("on_request_headers", admin), Ok(None));
    assert_eq!(call_hook("on_configure", r#"{"closed":"/admin"}"#), Ok(None));
    assert_eq!(call_hook("on_request_headers", admin), Ok(Some(r#"{"decision":"block","status":404}"#.to_owned())));
    assert_eq!(call_hook("on_request_headers", r#"{"uri":"/"}"#), Ok(None));

    let refusal = call_hook("on_configure", r#"{"closd":"/admin"}"#).unwrap().unwrap();
    let reason = answer::read_configured(refusal.as_bytes()).unwrap().unwrap();
    assert!(reason.contains("closd"), "{reason}");
    assert!(call_hook("on_request_headers", admin).unwrap().is_some(), "a rejected configuration replaced the current one");

    assert_eq!(call_hook("on_request_body", r#"{"body":"7"}"#), Ok(Some(r#"{"decision":"allow","tags":["7"]}"#.to_owned())));
    assert!(call_hook("on_request_body", r#"{"body":"x"}"#).is_err());
    assert_eq!(call_hook("on_response_headers", "{}"), Ok(None));
    assert_eq!(call_hook("on_request_complete", "{}"), Ok(None));
    assert!(call_hook("on_guardrail_inspect", "{}").unwrap().is_some());
    assert!(call_hook("on_request_headers", "not json").is_err());
    assert!(call_hook("on_response_body", "{}").is_err());
}
