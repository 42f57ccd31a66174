//! What a module decides on the request's body.

use serde_json::json;
use zentinel_wasm_e2e::upstream::pattern;
use zentinel_wasm_e2e::{Ask, Stack, Transport, on_both_transports};

const HEADERS: &str = "on_request_headers";
const BODY: &str = "on_request_body";

/// Larger than one read of a socket and than one buffer of the proxy.
const LARGE: usize = 200_000;

const STREAM: &str = r#"request-body-mode "stream""#;
const INSPECT_FIRST: &str = r#"request-body-mode "inspect-first""#;

on_both_transports! {
    fn a_request_is_blocked_for_its_body(transport) {
        for mode in ["", STREAM, INSPECT_FIRST] {
            let stack = Stack::over(transport).agent_lines(mode).start();
            let answer = json!({"decision": "block", "status": 422, "body": "no such order"});
            let response = stack.send(&Ask::post("/orders", b"quantity=-1").answer(BODY, &answer));
            assert_eq!((response.status(), response.text().as_str()), (422, "no such order"), "{mode}");
            assert_eq!(stack.send(&Ask::post("/orders", b"quantity=1")).status(), 200, "{mode}");
        }
    }

    fn the_guest_is_given_the_body_with_the_request_it_belongs_to(transport) {
        let stack = Stack::over(transport).start();
        let answer = json!({"decision": "block", "status": 418, "body": "$event"});
        let response = stack.send(&Ask::post("/orders", "größe=1".as_bytes()).answer(BODY, &answer));
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

    fn a_large_body_reaches_the_upstream_byte_for_byte(transport) {
        let sent = pattern(LARGE);
        for mode in ["", STREAM, INSPECT_FIRST] {
            let stack = Stack::over(transport).agent_lines(mode).start();
            let response = stack.send(&Ask::post("/upload", &sent).query("echo", "1"));
            assert_eq!(response.status(), 200, "{mode}");
            assert!(response.complete && response.body == sent, "{mode}: {} bytes came back", response.body.len());
            let response = stack.send(&Ask::post("/upload", &sent).chunked().query("echo", "1"));
            assert!(response.complete && response.body == sent, "{mode}, chunked: {} bytes came back", response.body.len());
        }
    }

    fn needs_more_leaves_the_decision_to_the_body(transport) {
        let stack = Stack::over(transport).agent_lines(STREAM).start();
        let ask = Ask::post("/login", b"user=root").answer(HEADERS, &json!({"decision": "allow", "needs_more": true}));
        let blocked = stack.send(&ask.clone().answer(BODY, &json!({"decision": "block", "status": 403, "body": "not root"})));
        assert_eq!((blocked.status(), blocked.text().as_str()), (403, "not root"));
        let allowed = stack.send(&ask.answer(BODY, &json!({"decision": "allow"})));
        assert_eq!(allowed.status(), 200);
        assert_eq!(allowed.json()["body"], "user=root");
    }

    fn inspect_first_applies_request_headers_from_the_body_phase(transport) {
        let stack = Stack::over(transport).agent_lines(INSPECT_FIRST).start();
        let answer = json!({"add_request_headers": {"X-Body-Checked": "yes"}, "remove_request_headers": ["X-Debug"]});
        let told = stack.send(&Ask::post("/", b"{}").answer(BODY, &answer).header("X-Debug", "1")).json();
        let headers = told["headers"].to_string().to_ascii_lowercase();
        assert!(headers.contains(r#"["x-body-checked","yes"]"#), "{headers}");
        assert!(!headers.contains("x-debug"), "{headers}");
        assert_eq!(told["body"], "{}");
    }
}

/// The proxy has sent the headers by the time a streamed body is replaced: where they told a length,
/// that length stays.
#[test]
#[ignore = "needs the real proxy: cargo xtask e2e"]
fn a_streamed_body_is_replaced() {
    let stack = Stack::over(Transport::UnixSocket).agent_lines(STREAM).start();
    let replace = |data: &str| json!({"request_body_mutation": {"action": "replace", "data": data}});

    let response = stack.send(&Ask::post("/pay", b"card=4111").chunked().answer(BODY, &replace("card=[removed] größe")));
    assert_eq!(response.status(), 200);
    assert_eq!(response.json()["body"], "card=[removed] größe");

    let response = stack.send(&Ask::post("/pay", b"card=4111").answer(BODY, &replace("card=****")));
    assert_eq!(response.status(), 200);
    assert_eq!(response.json()["body"], "card=****");
}

#[test]
#[ignore = "needs the real proxy: cargo xtask e2e"]
fn a_streamed_body_is_dropped() {
    let stack = Stack::over(Transport::UnixSocket).agent_lines(STREAM).start();
    let answer = json!({"request_body_mutation": {"action": "drop"}});
    let response = stack.send(&Ask::post("/pay", b"card=4111").chunked().answer(BODY, &answer));
    assert_eq!(response.status(), 200);
    assert_eq!(response.json()["body_bytes"], 0);
}

#[test]
#[ignore = "needs the real proxy: cargo xtask e2e"]
fn a_streamed_body_is_passed_through() {
    let stack = Stack::over(Transport::UnixSocket).agent_lines(STREAM).start();
    let answer = json!({"request_body_mutation": {"action": "pass_through", "chunk_index": 0}});
    let response = stack.send(&Ask::post("/pay", b"card=4111").answer(BODY, &answer));
    assert_eq!(response.json()["body"], "card=4111");
}

#[test]
#[ignore = "needs the real proxy: cargo xtask e2e"]
fn the_chunk_at_hand_is_changed_whatever_index_is_named() {
    let stack = Stack::over(Transport::UnixSocket).agent_lines(STREAM).start();
    for index in [0, 1, 99] {
        let answer = json!({"request_body_mutation": {"action": "replace", "data": "card=****", "chunk_index": index}});
        assert_eq!(stack.send(&Ask::post("/pay", b"card=4111").answer(BODY, &answer)).json()["body"], "card=****", "{index}");
    }
}

/// The proxy has promised the upstream the length that the client announced.
#[test]
#[ignore = "needs the real proxy: cargo xtask e2e"]
fn a_replacement_of_another_length_than_announced_is_refused_at_once() {
    let mut stack = Stack::over(Transport::UnixSocket).agent_lines(STREAM).start();
    for change in [json!({"action": "replace", "data": "***"}), json!({"action": "drop"})] {
        let answer = json!({"request_body_mutation": change});
        let response = stack.send(&Ask::post("/pay", b"card=4111").answer(BODY, &answer));
        assert_eq!(response.status(), 500, "{change}");
        let response = stack.send(&Ask::post("/pay", b"card=4111").chunked().answer(BODY, &answer));
        assert_eq!(response.status(), 200, "{change}, chunked");
    }
    assert!(stack.agent().log().contains("the request announced 9 bytes"));
}

/// Otherwise a policy that redacts would stop working with the mode, and nobody would notice.
#[test]
#[ignore = "needs the real proxy: cargo xtask e2e"]
fn a_change_that_the_proxy_would_ignore_is_refused() {
    let answer = json!({"request_body_mutation": {"action": "replace", "data": "card=****"}});
    for mode in ["", INSPECT_FIRST, r#"request-body-mode "hybrid:65536""#] {
        let mut stack = Stack::over(Transport::UnixSocket).agent_lines(mode).start();
        for ask in [Ask::post("/pay", b"card=4111"), Ask::post("/pay", b"card=4111").chunked()] {
            let response = stack.send(&ask.answer(BODY, &answer));
            assert_eq!(response.status(), 500, "{mode}");
        }
        assert!(stack.agent().log().contains("the proxy has buffered the body"), "{mode}");
    }
}

#[test]
#[ignore = "needs the real proxy: cargo xtask e2e"]
fn a_refusal_of_the_last_chunk_is_acted_on_whatever_it_needs() {
    let stack = Stack::over(Transport::UnixSocket).agent_lines(STREAM).start();
    let answer = json!({"decision": "block", "status": 422, "needs_more": true});
    assert_eq!(stack.send(&Ask::post("/", b"one chunk").answer(BODY, &answer)).status(), 422);
    // The last one of these is empty.
    assert_eq!(stack.send(&Ask::post("/", &pattern(LARGE)).chunked().answer(BODY, &answer)).status(), 422);
}

/// Over gRPC the change would get lost, and the body that the module did not want would go on.
#[test]
#[ignore = "needs the real proxy: cargo xtask e2e"]
fn a_body_mutation_that_grpc_cannot_carry_is_a_500() {
    let stack = Stack::over(Transport::Grpc).agent_lines(STREAM).start();
    for mutation in [json!({"action": "replace", "data": "card=****"}), json!({"action": "drop"})] {
        let response = stack.send(&Ask::post("/pay", b"card=4111").answer(BODY, &json!({"request_body_mutation": mutation})));
        assert_eq!(response.status(), 500, "{mutation}");
    }
    let response = stack.send(&Ask::post("/pay", b"ok").answer(BODY, &json!({"request_body_mutation": {"action": "pass_through"}})));
    assert_eq!((response.status(), response.json()["body"].as_str()), (200, Some("ok")));
}

/// `--collect-request-body`
mod collected {
    use super::*;

    const COLLECT: &str = "--collect-request-body";

    /// Card numbers, with what a policy that masks them makes of them: each ends at another byte, so that chunks of any size cut
    /// some of them.
    fn cards(count: usize) -> (String, String) {
        cards_and("é", count)
    }

    fn cards_and(filler: &str, count: usize) -> (String, String) {
        let lines = |number: &str| (0..count).map(|at| format!("{number}{}\n", filler.repeat(at % 7))).collect::<String>();
        (lines("4111111111111111"), lines("****************"))
    }

    fn masking(args: &[&str]) -> Stack {
        Stack::over(Transport::UnixSocket).agent_lines(STREAM).agent_args(args).start()
    }

    /// A policy that masks card numbers.
    fn ask(body: &str) -> Ask {
        Ask::post("/pay", body.as_bytes()).query("echo", "1").query(BODY, "!mask")
    }

    #[test]
    #[ignore = "needs the real proxy: cargo xtask e2e"]
    fn a_policy_that_masks_sees_what_chunks_share() {
        // A chunk that cuts a code point is not text by itself, and its masked text has another length.
        let (plain, _) = cards_and("-", 6000);
        let stack = masking(&[]);
        let response = stack.send(&ask(&plain));
        assert_eq!(response.status(), 200);
        assert!(response.text().contains("4111111111111111"), "chunks cut numbers, or this test shows nothing");

        let (body, masked) = cards(6000);
        let stack = masking(&[COLLECT]);
        for ask in [ask(&body), ask(&body).chunked()] {
            let response = stack.send(&ask);
            assert_eq!(response.status(), 200);
            assert!(response.complete && response.text() == masked, "{} bytes came back", response.body.len());
        }
    }

    #[test]
    #[ignore = "needs the real proxy: cargo xtask e2e"]
    fn a_chunked_body_may_change_its_length_and_an_announced_one_not() {
        let mut stack = masking(&[COLLECT]);
        let (body, _) = cards(6000);
        let answer = json!({"request_body_mutation": {"action": "replace", "data": "short"}});
        let ask = Ask::post("/pay", body.as_bytes()).query("echo", "1").answer(BODY, &answer);
        let response = stack.send(&ask.clone().chunked());
        assert_eq!((response.status(), response.text().as_str()), (200, "short"));
        assert_eq!(stack.send(&ask).status(), 500);
        let announced = format!("the request announced {} bytes", body.len());
        assert!(stack.agent().log().contains(&announced));
    }

    #[test]
    #[ignore = "needs the real proxy: cargo xtask e2e"]
    fn without_an_opinion_the_whole_arrives() {
        let stack = masking(&[COLLECT]);
        let (body, _) = cards(20_000);
        for ask in [Ask::post("/", body.as_bytes()), Ask::post("/", body.as_bytes()).chunked()] {
            let response = stack.send(&ask.query("echo", "1"));
            assert!(response.status() == 200 && response.text() == body, "{}: {} bytes", response.status(), response.body.len());
        }
        // A small one, none at all, and bytes in one chunk.
        assert_eq!(stack.send(&Ask::post("/", b"x")).json()["body"], "x");
        assert_eq!(stack.send(&Ask::post("/", b"").chunked()).json()["body_bytes"], 0);
        assert_eq!(stack.send(&Ask::post("/", b"\xff\xfe").query("echo", "1")).body, b"\xff\xfe");
    }

    #[test]
    #[ignore = "needs the real proxy: cargo xtask e2e"]
    fn a_refusal_of_the_whole_reaches_the_client() {
        let stack = masking(&[COLLECT]);
        let (body, _) = cards(6000);
        let answer = json!({"decision": "block", "status": 422, "body": "no", "needs_more": true});
        for ask in [Ask::post("/", body.as_bytes()), Ask::post("/", body.as_bytes()).chunked()] {
            let response = stack.send(&ask.answer(BODY, &answer));
            assert_eq!((response.status(), response.text().as_str()), (422, "no"));
        }
    }

    #[test]
    #[ignore = "needs the real proxy: cargo xtask e2e"]
    fn bytes_in_several_chunks_are_refused() {
        for args in [&[COLLECT][..], &[COLLECT, "--fail-open"]] {
            let mut stack = masking(args);
            let (text, _) = cards(6000);
            // At the end, so that the proxy has read all of the body when it refuses it.
            let body = [text.as_bytes(), b"\xff\xfe"].concat();
            for ask in [Ask::post("/", &body), Ask::post("/", &body).chunked()] {
                assert_eq!(stack.send(&ask).status(), 500);
            }
            assert!(stack.agent().log().contains("the body is not UTF-8"));
        }
    }

    #[test]
    #[ignore = "needs the real proxy: cargo xtask e2e"]
    fn where_errors_are_allowed_the_original_arrives() {
        let (body, _) = cards(6000);
        let echoed = |stack: &Stack, answer: &str| {
            for ask in [Ask::post("/", body.as_bytes()), Ask::post("/", body.as_bytes()).chunked()] {
                let response = stack.send(&ask.query("echo", "1").query(BODY, answer));
                assert!(response.status() == 200 && response.text() == body, "{answer}: {} {}", response.status(), response.body.len());
            }
        };
        let stack = masking(&[COLLECT, "--fail-open"]);
        echoed(&stack, "!trap");
        echoed(&stack, "no JSON");
        // Too large, and cut within code points.
        echoed(&masking(&[COLLECT, "--fail-open", "--max-body-bytes", "100000"]), "!trap");
    }

    #[test]
    #[ignore = "needs the real proxy: cargo xtask e2e"]
    fn the_proxy_may_configure_it() {
        let lines = format!("{STREAM}; config {{ collect-request-body #true }}");
        let stack = Stack::over(Transport::UnixSocket).agent_lines(&lines).start();
        let (body, masked) = cards(6000);
        assert_eq!(stack.send(&ask(&body)).text(), masked);
    }
}
