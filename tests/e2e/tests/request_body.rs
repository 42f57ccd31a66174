//! Decisions on a request's body, as the client and the upstream see them.

use serde_json::json;
use zentinel_wasm_e2e::upstream::pattern;
use zentinel_wasm_e2e::{HttpRequest, Stack, Transport, on_both_transports};

const HEADERS: &str = "on_request_headers";
const BODY: &str = "on_request_body";

/// Larger than one socket read and one buffer of the proxy.
const LARGE: usize = 200_000;

const STREAM: &str = r#"request-body-mode "stream""#;
const INSPECT_FIRST: &str = r#"request-body-mode "inspect-first""#;

mod decisions {
    use super::*;

    on_both_transports! {
        block_in_every_mode
        are_left_to_the_body_by_needs_more
        change_headers_with_inspect_first
    }

    fn block_in_every_mode(transport: Transport) {
        for mode in ["", STREAM, INSPECT_FIRST] {
            let stack = Stack::over(transport).agent_lines(mode).start();
            let answer = json!({"decision": "block", "status": 422, "body": "no such order"});
            let response = stack.send(&HttpRequest::post("/orders", b"quantity=-1").answer(BODY, &answer));
            assert_eq!((response.status(), response.text().as_str()), (422, "no such order"), "{mode}");
            assert_eq!(stack.send(&HttpRequest::post("/orders", b"quantity=1")).status(), 200, "{mode}");
        }
    }

    fn are_left_to_the_body_by_needs_more(transport: Transport) {
        let stack = Stack::over(transport).agent_lines(STREAM).start();
        let request = HttpRequest::post("/login", b"user=root").answer(HEADERS, &json!({"decision": "allow", "needs_more": true}));
        let blocked = stack.send(&request.clone().answer(BODY, &json!({"decision": "block", "status": 403, "body": "not root"})));
        assert_eq!((blocked.status(), blocked.text().as_str()), (403, "not root"));
        let allowed = stack.send(&request.answer(BODY, &json!({"decision": "allow"})));
        assert_eq!(allowed.status(), 200);
        assert_eq!(allowed.json()["body"], "user=root");
    }

    fn change_headers_with_inspect_first(transport: Transport) {
        let stack = Stack::over(transport).agent_lines(INSPECT_FIRST).start();
        let answer = json!({"add_request_headers": {"X-Body-Checked": "yes"}, "remove_request_headers": ["X-Debug"]});
        let received = stack.send(&HttpRequest::post("/", b"{}").answer(BODY, &answer).header("X-Debug", "1")).json();
        let headers = received["headers"].to_string().to_ascii_lowercase();
        assert!(headers.contains(r#"["x-body-checked","yes"]"#), "{headers}");
        assert!(!headers.contains("x-debug"), "{headers}");
        assert_eq!(received["body"], "{}");
    }

    #[test]
    #[ignore = "needs the real proxy: cargo xtask e2e"]
    fn block_the_last_chunk_despite_needs_more() {
        let stack = Stack::over(Transport::UnixSocket).agent_lines(STREAM).start();
        let answer = json!({"decision": "block", "status": 422, "needs_more": true});
        assert_eq!(stack.send(&HttpRequest::post("/", b"one chunk").answer(BODY, &answer)).status(), 422);
        // With several chunks, the last one is empty.
        assert_eq!(stack.send(&HttpRequest::post("/", &pattern(LARGE)).chunked().answer(BODY, &answer)).status(), 422);
    }
}

mod large_bodies {
    use super::*;

    on_both_transports! {
        reach_the_upstream_unchanged
    }

    fn reach_the_upstream_unchanged(transport: Transport) {
        let sent = pattern(LARGE);
        for mode in ["", STREAM, INSPECT_FIRST] {
            let stack = Stack::over(transport).agent_lines(mode).start();
            let response = stack.send(&HttpRequest::post("/upload", &sent).query("echo", "1"));
            assert_eq!(response.status(), 200, "{mode}");
            assert!(response.complete && response.body == sent, "{mode}: {} bytes came back", response.body.len());
            let response = stack.send(&HttpRequest::post("/upload", &sent).chunked().query("echo", "1"));
            assert!(response.complete && response.body == sent, "{mode}, chunked: {} bytes came back", response.body.len());
        }
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
        let response = stack.send(&HttpRequest::post("/orders", "größe=1".as_bytes()).answer(BODY, &answer));
        assert_eq!(response.status(), 418);
        let event = response.json();
        assert_eq!(event["method"], "POST");
        assert_eq!(event["client_ip"], "127.0.0.1");
        assert_eq!(event["headers"]["Content-Type"], "application/octet-stream");
        assert_eq!(event["body"], "größe=1");
        assert_eq!(event["body_encoding"], "utf-8");
        assert_eq!(event["chunk_index"], 0);
        assert_eq!(event["is_last"], true);
    }
}

mod mutations {
    use super::*;

    /// The proxy has sent the headers before a streamed body is replaced, so an announced length
    /// cannot change.
    #[test]
    #[ignore = "needs the real proxy: cargo xtask e2e"]
    fn replace_a_streamed_body() {
        let stack = Stack::over(Transport::UnixSocket).agent_lines(STREAM).start();
        let replace = |data: &str| json!({"request_body_mutation": {"action": "replace", "data": data}});

        let response = stack.send(&HttpRequest::post("/pay", b"card=4111").chunked().answer(BODY, &replace("card=[removed] größe")));
        assert_eq!(response.status(), 200);
        assert_eq!(response.json()["body"], "card=[removed] größe");

        let response = stack.send(&HttpRequest::post("/pay", b"card=4111").answer(BODY, &replace("card=****")));
        assert_eq!(response.status(), 200);
        assert_eq!(response.json()["body"], "card=****");
    }

    #[test]
    #[ignore = "needs the real proxy: cargo xtask e2e"]
    fn drop_a_streamed_body() {
        let stack = Stack::over(Transport::UnixSocket).agent_lines(STREAM).start();
        let answer = json!({"request_body_mutation": {"action": "drop"}});
        let response = stack.send(&HttpRequest::post("/pay", b"card=4111").chunked().answer(BODY, &answer));
        assert_eq!(response.status(), 200);
        assert_eq!(response.json()["body_bytes"], 0);
    }

    #[test]
    #[ignore = "needs the real proxy: cargo xtask e2e"]
    fn pass_a_streamed_body_through() {
        let stack = Stack::over(Transport::UnixSocket).agent_lines(STREAM).start();
        let answer = json!({"request_body_mutation": {"action": "pass_through", "chunk_index": 0}});
        let response = stack.send(&HttpRequest::post("/pay", b"card=4111").answer(BODY, &answer));
        assert_eq!(response.json()["body"], "card=4111");
    }

    #[test]
    #[ignore = "needs the real proxy: cargo xtask e2e"]
    fn apply_to_the_current_chunk_whatever_their_index() {
        let stack = Stack::over(Transport::UnixSocket).agent_lines(STREAM).start();
        for index in [0, 1, 99] {
            let answer = json!({"request_body_mutation": {"action": "replace", "data": "card=****", "chunk_index": index}});
            assert_eq!(stack.send(&HttpRequest::post("/pay", b"card=4111").answer(BODY, &answer)).json()["body"], "card=****", "{index}");
        }
    }

    /// The proxy has announced the client's length to the upstream.
    #[test]
    #[ignore = "needs the real proxy: cargo xtask e2e"]
    fn must_keep_an_announced_length() {
        let mut stack = Stack::over(Transport::UnixSocket).agent_lines(STREAM).start();
        for change in [json!({"action": "replace", "data": "***"}), json!({"action": "drop"})] {
            let answer = json!({"request_body_mutation": change});
            let response = stack.send(&HttpRequest::post("/pay", b"card=4111").answer(BODY, &answer));
            assert_eq!(response.status(), 500, "{change}");
            let response = stack.send(&HttpRequest::post("/pay", b"card=4111").chunked().answer(BODY, &answer));
            assert_eq!(response.status(), 200, "{change}, chunked");
        }
        assert!(stack.agent().log().contains("the request announced 9 bytes"));
    }

    /// Otherwise a policy that redacts bodies would silently stop working in these modes.
    #[test]
    #[ignore = "needs the real proxy: cargo xtask e2e"]
    fn are_rejected_where_the_proxy_ignores_them() {
        let answer = json!({"request_body_mutation": {"action": "replace", "data": "card=****"}});
        for mode in ["", INSPECT_FIRST, r#"request-body-mode "hybrid:65536""#] {
            let mut stack = Stack::over(Transport::UnixSocket).agent_lines(mode).start();
            for request in [HttpRequest::post("/pay", b"card=4111"), HttpRequest::post("/pay", b"card=4111").chunked()] {
                let response = stack.send(&request.answer(BODY, &answer));
                assert_eq!(response.status(), 500, "{mode}");
            }
            assert!(stack.agent().log().contains("the proxy has buffered the body"), "{mode}");
        }
    }

    /// The gRPC message has no field for the mutation, so the original body would be forwarded.
    #[test]
    #[ignore = "needs the real proxy: cargo xtask e2e"]
    fn are_rejected_over_grpc() {
        let stack = Stack::over(Transport::Grpc).agent_lines(STREAM).start();
        for mutation in [json!({"action": "replace", "data": "card=****"}), json!({"action": "drop"})] {
            let response = stack.send(&HttpRequest::post("/pay", b"card=4111").answer(BODY, &json!({"request_body_mutation": mutation})));
            assert_eq!(response.status(), 500, "{mutation}");
        }
        let response =
            stack.send(&HttpRequest::post("/pay", b"ok").answer(BODY, &json!({"request_body_mutation": {"action": "pass_through"}})));
        assert_eq!((response.status(), response.json()["body"].as_str()), (200, Some("ok")));
    }
}

/// `--collect-request-body`
mod collected_bodies {
    use super::*;

    const COLLECT: &str = "--collect-request-body";

    /// Lines with card numbers, and the same lines with the numbers masked. Their lengths vary, so
    /// chunks of any size split some of the numbers.
    fn cards(count: usize) -> (String, String) {
        cards_and("é", count)
    }

    fn cards_and(filler: &str, count: usize) -> (String, String) {
        let lines = |number: &str| (0..count).map(|at| format!("{number}{}\n", filler.repeat(at % 7))).collect::<String>();
        (lines("4111111111111111"), lines("****************"))
    }

    fn start(args: &[&str]) -> Stack {
        Stack::over(Transport::UnixSocket).agent_lines(STREAM).agent_args(args).start()
    }

    /// A request for which the mirror module masks card numbers.
    fn masked_request(body: &str) -> HttpRequest {
        HttpRequest::post("/pay", body.as_bytes()).query("echo", "1").query(BODY, "!mask")
    }

    #[test]
    #[ignore = "needs the real proxy: cargo xtask e2e"]
    fn are_inspected_across_chunks() {
        // Without filler, and much of it, because where chunks end depends on timing. In ASCII,
        // because a chunk that splits a code point is not text and changes its length if masked.
        let (plain, _) = cards_and("", 30_000);
        let stack = start(&[]);
        let response = stack.send(&masked_request(&plain));
        assert_eq!(response.status(), 200);
        assert!(response.text().contains("4111111111111111"), "no chunk splits a number, so this test shows nothing");

        let (body, masked) = cards(6000);
        let stack = start(&[COLLECT]);
        for request in [masked_request(&body), masked_request(&body).chunked()] {
            let response = stack.send(&request);
            assert_eq!(response.status(), 200);
            assert!(response.complete && response.text() == masked, "{} bytes came back", response.body.len());
        }
    }

    #[test]
    #[ignore = "needs the real proxy: cargo xtask e2e"]
    fn can_change_in_length_only_if_sent_in_chunks() {
        let mut stack = start(&[COLLECT]);
        let (body, _) = cards(6000);
        let answer = json!({"request_body_mutation": {"action": "replace", "data": "short"}});
        let request = HttpRequest::post("/pay", body.as_bytes()).query("echo", "1").answer(BODY, &answer);
        let response = stack.send(&request.clone().chunked());
        assert_eq!((response.status(), response.text().as_str()), (200, "short"));
        assert_eq!(stack.send(&request).status(), 500);
        let announced = format!("the request announced {} bytes", body.len());
        assert!(stack.agent().log().contains(&announced));
    }

    #[test]
    #[ignore = "needs the real proxy: cargo xtask e2e"]
    fn are_unchanged_without_an_opinion() {
        let stack = start(&[COLLECT]);
        let (body, _) = cards(20_000);
        for request in [HttpRequest::post("/", body.as_bytes()), HttpRequest::post("/", body.as_bytes()).chunked()] {
            let response = stack.send(&request.query("echo", "1"));
            assert!(response.status() == 200 && response.text() == body, "{}: {} bytes", response.status(), response.body.len());
        }
        // A small body, an empty one, and bytes in one chunk.
        assert_eq!(stack.send(&HttpRequest::post("/", b"x")).json()["body"], "x");
        assert_eq!(stack.send(&HttpRequest::post("/", b"").chunked()).json()["body_bytes"], 0);
        assert_eq!(stack.send(&HttpRequest::post("/", b"\xff\xfe").query("echo", "1")).body, b"\xff\xfe");
    }

    #[test]
    #[ignore = "needs the real proxy: cargo xtask e2e"]
    fn can_be_blocked() {
        let stack = start(&[COLLECT]);
        let (body, _) = cards(6000);
        let answer = json!({"decision": "block", "status": 422, "body": "no", "needs_more": true});
        for request in [HttpRequest::post("/", body.as_bytes()), HttpRequest::post("/", body.as_bytes()).chunked()] {
            let response = stack.send(&request.answer(BODY, &answer));
            assert_eq!((response.status(), response.text().as_str()), (422, "no"));
        }
    }

    #[test]
    #[ignore = "needs the real proxy: cargo xtask e2e"]
    fn are_rejected_if_binary_in_several_chunks() {
        for args in [&[COLLECT][..], &[COLLECT, "--fail-open"]] {
            let mut stack = start(args);
            let (text, _) = cards(6000);
            // At the end, so the proxy has read the whole body when it rejects it.
            let body = [text.as_bytes(), b"\xff\xfe"].concat();
            for request in [HttpRequest::post("/", &body), HttpRequest::post("/", &body).chunked()] {
                assert_eq!(stack.send(&request).status(), 500);
            }
            assert!(stack.agent().log().contains("the body is not UTF-8"));
        }
    }

    #[test]
    #[ignore = "needs the real proxy: cargo xtask e2e"]
    fn are_unchanged_after_an_error_when_failing_open() {
        let (body, _) = cards(6000);
        let echoed = |stack: &Stack, answer: &str| {
            for request in [HttpRequest::post("/", body.as_bytes()), HttpRequest::post("/", body.as_bytes()).chunked()] {
                let response = stack.send(&request.query("echo", "1").query(BODY, answer));
                assert!(response.status() == 200 && response.text() == body, "{answer}: {} {}", response.status(), response.body.len());
            }
        };
        let stack = start(&[COLLECT, "--fail-open"]);
        echoed(&stack, "!trap");
        echoed(&stack, "no JSON");
        // Too large, and split inside code points.
        echoed(&start(&[COLLECT, "--fail-open", "--max-body-bytes", "100000"]), "!trap");
    }

    #[test]
    #[ignore = "needs the real proxy: cargo xtask e2e"]
    fn can_be_enabled_by_the_proxy() {
        let lines = format!("{STREAM}; config {{ collect-request-body #true }}");
        let stack = Stack::over(Transport::UnixSocket).agent_lines(&lines).start();
        let (body, masked) = cards(6000);
        assert_eq!(stack.send(&masked_request(&body)).text(), masked);
    }
}
