//! Decisions on responses, as the client sees them.

use serde_json::json;
use zentinel_wasm_e2e::upstream::pattern;
use zentinel_wasm_e2e::{HttpRequest, Stack, Transport, on_both_transports};

const HEADERS: &str = "on_response_headers";
const BODY: &str = "on_response_body";

/// Larger than one socket read and one buffer of the proxy.
const LARGE: usize = 200_000;

mod headers {
    use super::*;

    on_both_transports! {
        are_added_replaced_and_removed
        are_appended_to_the_upstream_s
        can_be_set_in_the_request_phase
        removing_framing_headers_has_no_effect
        setting_framing_headers_is_a_module_error
    }

    fn are_added_replaced_and_removed(transport: Transport) {
        let stack = Stack::over(transport).start();
        let answer = json!({
            "add_response_headers": {"X-Frame-Options": "DENY", "X-Upstream": "hidden"},
            "remove_response_headers": ["X-Powered-By"],
        });
        let response = stack.send(&HttpRequest::get("/").answer(HEADERS, &answer));
        assert_eq!(response.status(), 200);
        assert_eq!(response.header("x-frame-options").as_deref(), Some("DENY"));
        assert_eq!(response.header("x-upstream").as_deref(), Some("hidden"));
        assert_eq!(response.header("x-powered-by"), None);
        assert_eq!(response.header("set-cookie").as_deref(), Some("a=1, b=2"), "other headers are unchanged");
    }

    fn are_appended_to_the_upstream_s(transport: Transport) {
        let stack = Stack::over(transport).start();
        let answer = json!({"append_response_headers": {"Set-Cookie": "c=3", "Vary": ["Accept", "Cookie"]}});
        for hook in ["on_request_headers", HEADERS] {
            let response = stack.send(&HttpRequest::get("/").answer(hook, &answer));
            assert_eq!(response.header("set-cookie").as_deref(), Some("a=1, b=2, c=3"), "{hook}");
            assert_eq!(response.header("vary").as_deref(), Some("Accept, Cookie"), "{hook}");
        }
    }

    fn can_be_set_in_the_request_phase(transport: Transport) {
        let stack = Stack::over(transport).start();
        let answer = json!({"add_response_headers": {"X-Frame-Options": "DENY"}});
        let response = stack.send(&HttpRequest::get("/").answer("on_request_headers", &answer));
        assert_eq!(response.status(), 200);
        assert_eq!(response.header("x-frame-options").as_deref(), Some("DENY"));
    }

    /// The proxy frames responses itself, whichever headers are removed.
    fn removing_framing_headers_has_no_effect(transport: Transport) {
        let stack = Stack::over(transport).start();
        let names = ["Content-Length", "Transfer-Encoding", "Connection", "Keep-Alive", "Proxy-Connection", "TE", "Trailer", "Upgrade"];
        for name in names {
            for chunked in [false, true] {
                let mut request =
                    HttpRequest::get("/download").query("bytes", "5000").answer(HEADERS, &json!({"remove_response_headers": [name]}));
                if chunked {
                    request = request.query("chunked", "1");
                }
                let response = stack.send(&request);
                assert_eq!(response.status(), 200, "{name}");
                assert!(response.complete && response.body == pattern(5000), "{name}: {} bytes came", response.body.len());
            }
        }
    }

    fn setting_framing_headers_is_a_module_error(transport: Transport) {
        let stack = Stack::over(transport).start();
        for answer in [
            json!({"add_response_headers": {"Content-Length": "3"}}),
            json!({"append_response_headers": {"Transfer-Encoding": "gzip"}}),
            json!({"decision": "block", "add_response_headers": {"Connection": "keep-alive"}}),
        ] {
            assert_eq!(stack.send(&HttpRequest::get("/").answer(HEADERS, &answer)).status(), 500, "{answer}");
        }
    }
}

mod decisions {
    use super::*;

    on_both_transports! {
        block
        redirect
        challenge
    }

    fn block(transport: Transport) {
        let stack = Stack::over(transport).start();
        let answer = json!({
            "decision": "block",
            "status": 502,
            "body": "the shop is closed",
            "add_response_headers": {"Retry-After": "60"},
        });
        let response = stack.send(&HttpRequest::get("/").answer(HEADERS, &answer));
        assert_eq!((response.status(), response.text().as_str()), (502, "the shop is closed"));
        assert_eq!(response.header("retry-after").as_deref(), Some("60"));
        assert!(response.complete);
    }

    fn redirect(transport: Transport) {
        let stack = Stack::over(transport).start();
        let answer = json!({"decision": "redirect", "status": 303, "body": "https://shop.example/sorry"});
        let response = stack.send(&HttpRequest::get("/").answer(HEADERS, &answer));
        assert_eq!((response.status(), response.header("location").as_deref()), (303, Some("https://shop.example/sorry")));
    }

    fn challenge(transport: Transport) {
        let stack = Stack::over(transport).start();
        let answer = json!({"decision": "challenge", "challenge_type": "captcha", "challenge_params": {"body": "prove it"}});
        let response = stack.send(&HttpRequest::get("/").answer(HEADERS, &answer));
        assert_eq!((response.status(), response.text().as_str()), (403, "prove it"));
    }
}

mod bodies {
    use super::*;

    on_both_transports! {
        can_abort_the_response
        reach_the_client_unchanged
    }

    /// No part of the body reaches the client. A short response is replaced by the block. A long
    /// one is truncated after its headers, because the proxy has sent them already.
    fn can_abort_the_response(transport: Transport) {
        let stack = Stack::over(transport).start();
        let blocked = json!({"decision": "block", "status": 451, "body": "not for you"});
        for size in ["100", "200000"] {
            let response = stack.send(&HttpRequest::get("/").query("bytes", size).answer(BODY, &blocked));
            let replaced = response.status() == 451 && response.text() == "not for you";
            let truncated = !response.complete && response.body.is_empty();
            assert!(replaced || truncated, "{size}: {response:?}");
        }
        assert_eq!(stack.send(&HttpRequest::get("/")).status(), 200);
    }

    fn reach_the_client_unchanged(transport: Transport) {
        let stack = Stack::over(transport).start();
        let size = LARGE.to_string();
        for chunked in [false, true] {
            let mut request = HttpRequest::get("/download").query("bytes", &size);
            if chunked {
                request = request.query("chunked", "1");
            }
            let response = stack.send(&request);
            assert_eq!(response.status(), 200);
            assert!(response.complete && response.body == pattern(LARGE), "{} bytes came", response.body.len());
        }
    }

    #[test]
    #[ignore = "needs the real proxy: cargo xtask e2e"]
    fn are_replaced_by_text() {
        let stack = Stack::over(Transport::UnixSocket).start();
        for data in ["Modified response content", "größer als vorher: ".repeat(500).as_str()] {
            let answer = json!({"response_body_mutation": {"action": "replace", "chunk_index": 0, "data": data}});
            let response = stack.send(&HttpRequest::get("/").answer(BODY, &answer));
            assert_eq!(response.status(), 200);
            assert_eq!(response.text(), data);
            assert!(response.complete, "the length does not match the body");
        }
    }

    #[test]
    #[ignore = "needs the real proxy: cargo xtask e2e"]
    fn are_replaced_by_bytes() {
        let stack = Stack::over(Transport::UnixSocket).start();
        let answer = json!({"response_body_mutation": {"action": "replace", "data_base64": "AP+AfwE="}});
        let response = stack.send(&HttpRequest::get("/").answer(BODY, &answer));
        assert_eq!(response.body, [0, 0xff, 0x80, 0x7f, 1]);
    }
}

mod module_input {
    use super::*;

    on_both_transports! {
        includes_the_request
    }

    fn includes_the_request(transport: Transport) {
        let stack = Stack::over(transport).start();
        let answer = json!({"decision": "block", "status": 418, "body": "$event"});
        let response = stack.send(&HttpRequest::get("/cart").query("status", "404").answer(HEADERS, &answer));
        assert_eq!(response.status(), 418);
        let event = response.json();
        assert_eq!(event["status"], 404);
        assert_eq!(event["method"], "GET");
        assert_eq!(event["client_ip"], "127.0.0.1");
        assert!(event["uri"].as_str().is_some_and(|uri| uri.starts_with("/cart?status=404&")));
        assert_eq!(event["headers"]["X-Powered-By"], "upstream");
        assert_eq!(event["header_values"]["Set-Cookie"], json!(["a=1", "b=2"]));
    }

    #[test]
    #[ignore = "needs the real proxy: cargo xtask e2e"]
    fn includes_request_and_response_for_a_body() {
        let stack = Stack::over(Transport::UnixSocket).start();
        let answer = json!({"response_body_mutation": {"action": "replace", "data": "$event"}});
        let event = stack.send(&HttpRequest::get("/cart").query("status", "404").answer(BODY, &answer)).json();
        assert_eq!(event["status"], 404);
        assert_eq!(event["method"], "GET");
        assert_eq!(event["headers"]["X-Powered-By"], "upstream");
        assert_eq!(event["is_last"], true);
        let body = event["body"].as_str().expect("the body is not text");
        assert!(body.contains("\"method\":\"GET\""), "{body}");
    }
}
