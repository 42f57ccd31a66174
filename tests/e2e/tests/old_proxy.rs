//! What reaches the client and the upstream behind 0.6.45, which supports fewer answers:
//! `cargo xtask e2e --proxy-version 0.6.45`.

use serde_json::json;
use zentinel_wasm_e2e::{HttpRequest, Stack, Transport, on_both_transports};

const HOOK: &str = "on_request_headers";

on_both_transports! {
    changes_request_and_response_headers
    blocks_with_status_and_text
    gets_a_block_with_the_page_of_a_challenge
    stops_a_redirected_request
    blocks_a_request_because_of_its_body
}

fn changes_request_and_response_headers(transport: Transport) {
    let stack = Stack::over(transport).start();
    let request_changes = json!({"add_request_headers": {"X-Processed": "true"}, "remove_request_headers": ["X-Debug"]});
    let response_changes = json!({"add_response_headers": {"X-Frame-Options": "DENY"}, "remove_response_headers": ["X-Powered-By"]});
    let request =
        HttpRequest::get("/").answer(HOOK, &request_changes).answer("on_response_headers", &response_changes).header("X-Debug", "1");
    let response = stack.send(&request);
    assert_eq!(response.status(), 200);
    let headers = response.json()["headers"].to_string().to_ascii_lowercase();
    assert!(headers.contains(r#"["x-processed","true"]"#) && !headers.contains("x-debug"), "{headers}");
    assert_eq!(response.header("x-frame-options").as_deref(), Some("DENY"));
    assert_eq!(response.header("x-powered-by"), None);
}

fn blocks_with_status_and_text(transport: Transport) {
    let stack = Stack::over(transport).start();
    let before = stack.upstream_requests();
    let response = stack.send(&HttpRequest::get("/").answer(HOOK, &json!({"decision": "block", "status": 451, "body": "not here"})));
    assert_eq!(response.status(), 451);
    assert!(response.text().contains("not here"), "{}", response.text());
    assert_eq!(stack.upstream_requests(), before);
}

/// This proxy treats a challenge as an allow, so the agent sends it a block instead.
fn gets_a_block_with_the_page_of_a_challenge(transport: Transport) {
    let mut stack = Stack::over(transport).start();
    let before = stack.upstream_requests();
    let answer = json!({"decision": "challenge", "challenge_type": "captcha", "challenge_params": {"body": "prove it"}});
    let response = stack.send(&HttpRequest::get("/").answer(HOOK, &answer));
    assert_eq!(response.status(), 403);
    assert!(response.text().contains("prove it"), "{}", response.text());
    assert_eq!(stack.upstream_requests(), before);
    assert!(stack.agent().log().contains("0.6.45"), "the agent does not log the reason");
}

fn stops_a_redirected_request(transport: Transport) {
    let stack = Stack::over(transport).start();
    let before = stack.upstream_requests();
    let response = stack.send(&HttpRequest::get("/").answer(HOOK, &json!({"decision": "redirect", "body": "https://login.example/"})));
    assert!(response.status() >= 300, "{response:?}");
    assert_eq!(stack.upstream_requests(), before);
}

fn blocks_a_request_because_of_its_body(transport: Transport) {
    let stack = Stack::over(transport).start();
    let answer = json!({"decision": "block", "status": 422, "body": "no such order"});
    assert_eq!(stack.send(&HttpRequest::post("/orders", b"quantity=-1").answer("on_request_body", &answer)).status(), 422);
    assert_eq!(stack.send(&HttpRequest::post("/orders", b"quantity=1")).status(), 200);
}

#[test]
#[ignore = "needs the real proxy: cargo xtask e2e"]
fn replaces_a_response_body() {
    let stack = Stack::over(Transport::UnixSocket).start();
    // This proxy does not change the announced length, so the replacement has the same length.
    let answer = json!({"response_body_mutation": {"action": "replace", "data": "0123456789"}});
    let response = stack.send(&HttpRequest::get("/").query("bytes", "10").answer("on_response_body", &answer));
    assert_eq!(response.text(), "0123456789");
}
