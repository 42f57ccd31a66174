//! What reaches the client and the upstream under 0.6.45, which knows less:
//! `cargo xtask e2e --proxy-version 0.6.45`.

use serde_json::json;
use zentinel_wasm_e2e::{Ask, Stack, Transport, on_both_transports};

const HOOK: &str = "on_request_headers";

on_both_transports! {
    fn request_and_response_headers_are_changed(transport) {
        let stack = Stack::over(transport).start();
        let request = json!({"add_request_headers": {"X-Processed": "true"}, "remove_request_headers": ["X-Debug"]});
        let response = json!({"add_response_headers": {"X-Frame-Options": "DENY"}, "remove_response_headers": ["X-Powered-By"]});
        let ask = Ask::get("/").answer(HOOK, &request).answer("on_response_headers", &response).header("X-Debug", "1");
        let response = stack.send(&ask);
        assert_eq!(response.status(), 200);
        let headers = response.json()["headers"].to_string().to_ascii_lowercase();
        assert!(headers.contains(r#"["x-processed","true"]"#) && !headers.contains("x-debug"), "{headers}");
        assert_eq!(response.header("x-frame-options").as_deref(), Some("DENY"));
        assert_eq!(response.header("x-powered-by"), None);
    }

    fn a_block_has_its_status_and_text(transport) {
        let stack = Stack::over(transport).start();
        let before = stack.upstream_requests();
        let response = stack.send(&Ask::get("/").answer(HOOK, &json!({"decision": "block", "status": 451, "body": "not here"})));
        assert_eq!(response.status(), 451);
        assert!(response.text().contains("not here"), "{}", response.text());
        assert_eq!(stack.upstream_requests(), before);
    }

    /// This proxy would let a challenge through, so the agent does not send it one.
    fn a_challenge_is_a_block_that_shows_its_page(transport) {
        let mut stack = Stack::over(transport).start();
        let before = stack.upstream_requests();
        let answer = json!({"decision": "challenge", "challenge_type": "captcha", "challenge_params": {"body": "prove it"}});
        let response = stack.send(&Ask::get("/").answer(HOOK, &answer));
        assert_eq!(response.status(), 403);
        assert!(response.text().contains("prove it"), "{}", response.text());
        assert_eq!(stack.upstream_requests(), before);
        assert!(stack.agent().log().contains("0.6.45"), "the agent says once why");
    }

    fn a_redirect_is_not_let_through(transport) {
        let stack = Stack::over(transport).start();
        let before = stack.upstream_requests();
        let response = stack.send(&Ask::get("/").answer(HOOK, &json!({"decision": "redirect", "body": "https://login.example/"})));
        assert!(response.status() >= 300, "{response:?}");
        assert_eq!(stack.upstream_requests(), before);
    }

    fn a_request_is_blocked_for_its_body(transport) {
        let stack = Stack::over(transport).start();
        let answer = json!({"decision": "block", "status": 422, "body": "no such order"});
        assert_eq!(stack.send(&Ask::post("/orders", b"quantity=-1").answer("on_request_body", &answer)).status(), 422);
        assert_eq!(stack.send(&Ask::post("/orders", b"quantity=1")).status(), 200);
    }
}

#[test]
#[ignore = "needs the real proxy: cargo xtask e2e"]
fn a_response_body_is_replaced() {
    let stack = Stack::over(Transport::UnixSocket).start();
    // This proxy leaves the length as it was.
    let answer = json!({"response_body_mutation": {"action": "replace", "data": "0123456789"}});
    let response = stack.send(&Ask::get("/").query("bytes", "10").answer("on_response_body", &answer));
    assert_eq!(response.text(), "0123456789");
}
