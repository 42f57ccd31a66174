//! The changes that a module may make to a body. Those that the proxy would ignore, or forward
//! under a wrong length, are module errors.

use serde_json::{Value, json};
use testkit::{Agent, Connection, Program, base64, decision, kind, module, module_error, request, request_body, response_body};

const AGENT: Program = Program(env!("CARGO_BIN_EXE_zentinel-wasm-agent"));

/// The headers of a request with a body: of `length` bytes, or in chunks.
fn post(id: &str, length: Option<usize>) -> Value {
    let mut event = request(id, "/");
    event["method"] = json!("POST");
    match length {
        Some(length) => event["headers"]["content-length"] = json!([length.to_string()]),
        None => event["headers"]["transfer-encoding"] = json!(["chunked"]),
    }
    event
}

/// A chunk as the proxy streams it. `before` bytes of the body came earlier.
fn chunk(id: &str, index: u32, data: &[u8], before: usize, is_last: bool) -> Value {
    json!({
        "correlation_id": id, "data": base64(data), "is_last": is_last, "total_size": null, "chunk_index": index,
        "bytes_received": before + data.len(),
    })
}

#[track_caller]
fn start(wat: &str, options: &[&str]) -> (Agent, Connection) {
    let modules = tempfile::tempdir().unwrap();
    let agent = AGENT.start(&module::write(modules.path(), "m.wasm", wat), &[&["--timeout-ms", "30000"], options].concat());
    let proxy = agent.connect();
    (agent, proxy)
}

fn replacing(data: &str) -> String {
    format!(r#"{{"request_body_mutation":{{"action":"replace","data":"{data}"}}}}"#)
}

#[track_caller]
fn assert_rejected(agent: &Agent, answer: &Value, code: &str, detail: &str) {
    assert_eq!((decision(answer), module_error(answer)), ("block", Some(code)), "{answer}");
    assert!(answer.get("request_body_mutation").is_none() && answer.get("needs_more").is_none(), "{answer}");
    agent.log.wait_for_line(detail, |line| line.contains(detail));
}

mod lengths {
    use super::*;

    #[test]
    fn announced_is_kept() {
        let (agent, mut proxy) = start(&module::answering(&["on_request_body"], &replacing("****")), &[]);
        proxy.ask(kind::REQUEST_HEADERS, &post("same", Some(4)));
        let answer = proxy.ask(kind::REQUEST_BODY, &chunk("same", 0, b"4111", 0, true));
        assert_eq!(answer["request_body_mutation"], json!({"data": "****", "chunk_index": 0}));

        proxy.ask(kind::REQUEST_HEADERS, &post("other", Some(9)));
        let answer = proxy.ask(kind::REQUEST_BODY, &chunk("other", 0, b"card=4111", 0, true));
        assert_rejected(&agent, &answer, "WASM_INVALID_RESULT", "makes 4 bytes of 9, but the request announced 9 bytes");
        agent.end();
    }

    #[test]
    fn announced_cannot_become_zero() {
        let (agent, mut proxy) = start(&module::answering(&["on_request_body"], r#"{"request_body_mutation":{"action":"drop"}}"#), &[]);
        proxy.ask(kind::REQUEST_HEADERS, &post("a", Some(9)));
        let answer = proxy.ask(kind::REQUEST_BODY, &chunk("a", 0, b"card=4111", 0, true));
        assert_rejected(&agent, &answer, "WASM_INVALID_RESULT", "makes 0 bytes of 9, but the request announced 9 bytes");
        agent.end();
    }

    #[test]
    fn unannounced_may_change() {
        let (agent, mut proxy) = start(&module::answering(&["on_request_body"], &replacing("more than that")), &[]);
        proxy.ask(kind::REQUEST_HEADERS, &post("a", None));
        let answer = proxy.ask(kind::REQUEST_BODY, &chunk("a", 0, b"4111", 0, true));
        assert_eq!(answer["request_body_mutation"]["data"], "more than that");
        agent.end();
    }

    #[test]
    fn unknown_counts_as_announced() {
        let (agent, mut proxy) = start(&module::answering(&["on_request_body"], &replacing("****")), &[]);
        let answer = proxy.ask(kind::REQUEST_BODY, &chunk("unseen", 0, b"4111", 0, true));
        assert_eq!(answer["request_body_mutation"]["data"], "****");
        // Two live requests with one id, so the agent cannot tell which of them a length belongs
        // to.
        for length in [None, Some(9)] {
            proxy.ask(kind::REQUEST_HEADERS, &post("twin", length));
        }
        for id in ["unseen", "twin"] {
            let answer = proxy.ask(kind::REQUEST_BODY, &chunk(id, 0, b"card=4111", 0, true));
            assert_rejected(&agent, &answer, "WASM_INVALID_RESULT", "does not know whether the request announced a length");
        }
        agent.end();
    }

    #[test]
    fn wrong_leaves_the_original_when_failing_open() {
        let (agent, mut proxy) = start(&module::answering(&["on_request_body"], &replacing("****")), &["--fail-open"]);
        proxy.ask(kind::REQUEST_HEADERS, &post("a", Some(9)));
        let answer = proxy.ask(kind::REQUEST_BODY, &chunk("a", 0, b"card=4111", 0, true));
        assert_eq!((decision(&answer), module_error(&answer)), ("allow", Some("WASM_INVALID_RESULT")));
        assert!(answer.get("request_body_mutation").is_none(), "{answer}");
        agent.end();
    }
}

mod ignored {
    use super::*;

    #[test]
    fn change_to_a_buffered_request_body_is_an_error() {
        let (agent, mut proxy) = start(&module::answering(&["on_request_body"], &replacing("****")), &[]);
        proxy.ask(kind::REQUEST_HEADERS, &post("a", None));
        let answer = proxy.ask(kind::REQUEST_BODY, &request_body("a", "4111"));
        assert_rejected(&agent, &answer, "WASM_INVALID_RESULT", "would be ignored, because the proxy has buffered the body");
        // The first part of a body over the proxy's limit.
        let mut part = request_body("b", "4111");
        part["is_last"] = json!(false);
        assert_rejected(&agent, &proxy.ask(kind::REQUEST_BODY, &part), "WASM_INVALID_RESULT", "has buffered the body");
        agent.end();
    }

    #[test]
    fn change_in_the_answer_of_another_hook_is_an_error() {
        let (agent, mut proxy) = start(&module::answering(&module::PAGE_HOOKS, &replacing("****")), &[]);
        let answer = proxy.get("a", "/");
        assert_rejected(&agent, &answer, "WASM_INVALID_RESULT", "would be ignored in an answer of `on_request_headers`");
        let answer = proxy.ask(kind::RESPONSE_BODY, &response_body("b", "4111"));
        assert_rejected(&agent, &answer, "WASM_INVALID_RESULT", "would be ignored in an answer of `on_response_body`");
        agent.end();
    }

    #[test]
    fn drop_of_a_response_body_is_an_error() {
        for change in [r#"{"action":"drop"}"#, r#"{"action":"replace","data":""}"#] {
            let answer = format!(r#"{{"response_body_mutation":{change}}}"#);
            let (agent, mut proxy) = start(&module::answering(&["on_response_body"], &answer), &[]);
            let answer = proxy.ask(kind::RESPONSE_BODY, &response_body("a", "secret"));
            assert_rejected(&agent, &answer, "WASM_INVALID_RESULT", "the proxy sends the original instead of an empty body");
            agent.end();
        }
    }

    #[test]
    fn needs_more_in_the_block_of_the_last_chunk() {
        let answer = r#"{"decision":"block","status":422,"needs_more":true}"#;
        let (agent, mut proxy) = start(&module::answering(&["on_request_body"], answer), &[]);
        proxy.ask(kind::REQUEST_HEADERS, &post("a", None));
        let first = proxy.ask(kind::REQUEST_BODY, &chunk("a", 0, b"one", 0, false));
        assert_eq!((decision(&first), &first["needs_more"]), ("block", &json!(true)));
        let last = proxy.ask(kind::REQUEST_BODY, &chunk("a", 1, b"", 3, true));
        assert_eq!((decision(&last), last.get("needs_more")), ("block", None), "{last}");
        agent.end();
    }
}

/// `--collect-request-body`
mod collecting {
    use super::*;

    const COLLECT: &str = "--collect-request-body";

    /// Sends a body in `chunks`, after the headers of its request, and returns the answers.
    #[track_caller]
    fn send(proxy: &mut Connection, id: &str, chunks: &[&[u8]]) -> Vec<Value> {
        let mut before = 0;
        let mut answers = Vec::new();
        for (index, data) in chunks.iter().enumerate() {
            answers.push(proxy.ask(kind::REQUEST_BODY, &chunk(id, index as u32, data, before, index + 1 == chunks.len())));
            before += data.len();
        }
        answers
    }

    /// What the proxy forwards after these answers to `chunks`, or None when it blocks the request.
    fn forwarded(chunks: &[&[u8]], answers: &[Value]) -> Option<Vec<u8>> {
        let mut body = Vec::new();
        for (chunk, answer) in chunks.iter().zip(answers) {
            if decision(answer) != "allow" && answer.get("needs_more") != Some(&json!(true)) {
                return None;
            }
            match answer["request_body_mutation"]["data"].as_str() {
                Some(data) => body.extend_from_slice(data.as_bytes()),
                None => body.extend_from_slice(chunk),
            }
        }
        Some(body)
    }

    #[track_caller]
    fn assert_held(answer: &Value) {
        assert_eq!((decision(answer), &answer["needs_more"]), ("allow", &json!(true)), "{answer}");
        assert_eq!(answer["request_body_mutation"]["data"], "", "{answer}");
    }

    #[test]
    fn calls_the_module_once_with_the_whole() {
        let (agent, mut proxy) = start(&module::echo(&["on_request_body"]), &[COLLECT]);
        proxy.ask(kind::REQUEST_HEADERS, &post("a", Some(9)));
        let answers = send(&mut proxy, "a", &["gr\u{f6}".as_bytes(), b"\xc3", b"\x9fe=1", b""]);
        answers[..3].iter().for_each(assert_held);
        let seen = module::seen(&answers[3]);
        for (field, expected) in [
            ("body", json!("gr\u{f6}\u{df}e=1")),
            ("body_encoding", json!("utf-8")),
            ("chunk_index", json!(0)),
            ("is_last", json!(true)),
            ("total_size", json!(9)),
            ("bytes_received", json!(9)),
            ("method", json!("POST")),
        ] {
            assert_eq!(seen[field], expected, "{field}");
        }
        // The module has no opinion, so the whole body replaces the last chunk.
        assert_eq!(answers[3]["request_body_mutation"], json!({"data": "gr\u{f6}\u{df}e=1", "chunk_index": 3}));
        assert_eq!(answers[3].get("needs_more"), None);
        agent.end();
    }

    #[test]
    fn masks_a_number_that_spans_chunks() {
        let chunks: [&[u8]; 3] = [b"card=41111111", b"11111111&x=\"1\"", b""];
        for (options, expected) in [(&[][..], "card=4111111111111111&x=\"1\""), (&[COLLECT], "card=****************&x=\"1\"")] {
            let (agent, mut proxy) = start(&module::masking(), options);
            for length in [Some(27), None] {
                let id = format!("{length:?}");
                proxy.ask(kind::REQUEST_HEADERS, &post(&id, length));
                let answers = send(&mut proxy, &id, &chunks);
                assert_eq!(forwarded(&chunks, &answers).as_deref(), Some(expected.as_bytes()));
            }
            agent.end();
        }
    }

    #[test]
    fn makes_a_block_of_the_whole_final() {
        let (agent, mut proxy) = start(&module::masking(), &[COLLECT]);
        let answers = send(&mut proxy, "a", &[b"!", b"x"]);
        assert_held(&answers[0]);
        assert_eq!((answers[1]["decision"]["block"]["status"].clone(), answers[1].get("needs_more")), (json!(422), None));
        agent.end();
    }

    #[test]
    fn keeps_an_announced_length() {
        for length in [Some(4), None] {
            let (agent, mut proxy) = start(&module::answering(&["on_request_body"], &replacing("12345")), &[COLLECT]);
            proxy.ask(kind::REQUEST_HEADERS, &post("a", length));
            let answers = send(&mut proxy, "a", &[b"ab", b"cd"]);
            assert_held(&answers[0]);
            if length.is_some() {
                assert_rejected(&agent, &answers[1], "WASM_INVALID_RESULT", "makes 5 bytes of 4, but the request announced 4 bytes");
            } else {
                assert_eq!(answers[1]["request_body_mutation"], json!({"data": "12345", "chunk_index": 1}));
            }
            agent.end();
        }
    }

    #[test]
    fn rejects_binary_bodies_without_a_hole() {
        for options in [&[COLLECT][..], &[COLLECT, "--fail-open"]] {
            let (agent, mut proxy) = start(&module::answering(&["on_request_body"], "{}"), options);
            let answers = send(&mut proxy, "a", &[b"text", b"\xff\xfe"]);
            assert_held(&answers[0]);
            assert_rejected(&agent, &answers[1], "WASM_BODY_NOT_COLLECTED", "the body is not UTF-8");
            // A single chunk needs no collecting.
            let alone = send(&mut proxy, "b", &[b"\xff\xfe"]);
            assert_eq!((decision(&alone[0]), module_error(&alone[0])), ("allow", None));
            agent.end();
        }
    }

    #[test]
    fn returns_a_body_over_the_limit_whole_or_rejects_it() {
        let chunks: [&[u8]; 4] = ["größer ".as_bytes(), b"als \xe2\x82", b"\xac sein darf", b"\xff"];
        let options = [COLLECT, "--max-body-bytes", "10"];
        let (agent, mut proxy) = start(&module::masking(), &options);
        let answers = send(&mut proxy, "a", &chunks);
        assert_held(&answers[0]);
        assert_rejected(&agent, &answers[1], "WASM_BODY_LIMIT", "raise `--max-body-bytes`");
        agent.end();

        let (agent, mut proxy) = start(&module::masking(), &[&options[..], &["--fail-open"]].concat());
        let answers = send(&mut proxy, "a", &chunks);
        assert_eq!(module_error(&answers[1]), Some("WASM_BODY_LIMIT"));
        assert_eq!(forwarded(&chunks, &answers), Some(chunks.concat()));
        agent.end();
    }

    #[test]
    fn returns_the_whole_when_the_module_fails_open() {
        let trapping = module::with_hooks(&["on_request_body"], |_| "unreachable".into(), "");
        let chunks: [&[u8]; 3] = [b"one ", b"two ", b"three"];
        for (options, expected) in [(&[COLLECT][..], None), (&[COLLECT, "--fail-open"], Some(chunks.concat()))] {
            let (agent, mut proxy) = start(&trapping, options);
            let answers = send(&mut proxy, "a", &chunks);
            assert_eq!(module_error(&answers[2]), Some("WASM_TRAP"));
            assert_eq!(forwarded(&chunks, &answers), expected);
            agent.end();
        }
    }

    #[test]
    fn rejects_both_live_requests_with_one_id() {
        for options in [&[COLLECT][..], &[COLLECT, "--fail-open"]] {
            let (agent, mut proxy) = start(&module::masking(), options);
            for _ in 0..2 {
                proxy.ask(kind::REQUEST_HEADERS, &post("twin", None));
            }
            assert_held(&proxy.ask(kind::REQUEST_BODY, &chunk("twin", 0, b"one", 0, false)));
            for (index, data) in [(0, b"two"), (1, b"one"), (1, b"two")] {
                let answer = proxy.ask(kind::REQUEST_BODY, &chunk("twin", index, data, 3 * index as usize, index > 0));
                assert_rejected(&agent, &answer, "WASM_BODY_NOT_COLLECTED", "another live request has the same correlation id");
            }
            agent.end();
        }
    }

    #[test]
    fn does_not_keep_a_chunk_whose_answer_was_superseded() {
        let (agent, mut proxy) = start(&module::masking(), &[COLLECT]);
        let event = |kind, event: &Value| testkit::frame(kind, &serde_json::to_vec(event).unwrap());
        for (id, second) in
            [("a", event(kind::REQUEST_HEADERS, &post("a", None))), ("b", event(kind::RESPONSE_HEADERS, &testkit::response("b", 200)))]
        {
            // Both arrive before the first is answered, so only the second is.
            let first = event(kind::REQUEST_BODY, &chunk(id, 0, b"one", 0, false));
            proxy.send_raw(&[first, second].concat());
            assert_eq!(proxy.answer().get("request_body_mutation"), None);
            let last = proxy.ask(kind::REQUEST_BODY, &chunk(id, 1, b"two", 3, true));
            assert_rejected(&agent, &last, "WASM_BODY_NOT_COLLECTED", "the body was rejected");
        }
        agent.end();
    }

    #[test]
    fn keeps_connections_apart() {
        let (agent, mut one) = start(&module::masking(), &[COLLECT]);
        let mut two = agent.connect();
        assert_held(&one.ask(kind::REQUEST_BODY, &chunk("a", 0, b"one", 0, false)));
        assert_held(&two.ask(kind::REQUEST_BODY, &chunk("a", 0, b"two", 0, false)));
        let last = one.ask(kind::REQUEST_BODY, &chunk("a", 1, b"!", 3, true));
        assert_eq!(last["request_body_mutation"]["data"], "one!");
        // A connection cannot continue a body of another connection.
        let mut three = agent.connect();
        let stray = three.ask(kind::REQUEST_BODY, &chunk("a", 1, b"!", 3, true));
        assert_rejected(&agent, &stray, "WASM_BODY_NOT_COLLECTED", "without the chunks before it");
        // The agent would wait for the rest of its body.
        drop(two);
        agent.end();
    }

    #[test]
    fn accepts_a_retry_after_a_rejection() {
        let (agent, mut proxy) = start(&module::masking(), &[COLLECT]);
        for _ in 0..2 {
            proxy.ask(kind::REQUEST_HEADERS, &post("a", None));
            assert_held(&proxy.ask(kind::REQUEST_BODY, &chunk("a", 0, b"one", 0, false)));
            let answer = proxy.ask(kind::REQUEST_BODY, &chunk("a", 1, b"\xff", 3, false));
            assert_eq!(module_error(&answer), Some("WASM_BODY_NOT_COLLECTED"));
        }
        proxy.ask(kind::REQUEST_HEADERS, &post("a", None));
        let answers = send(&mut proxy, "a", &[b"one", b"two"]);
        assert_eq!(answers[1]["request_body_mutation"]["data"], "onetwo");
        agent.end();
    }

    #[test]
    fn drops_a_cancelled_body() {
        let (agent, mut proxy) = start(&module::masking(), &[COLLECT]);
        assert_held(&proxy.ask(kind::REQUEST_BODY, &chunk("a", 0, b"one", 0, false)));
        proxy.send(kind::CANCEL, &json!({"correlation_id": "a"}));
        let answer = proxy.ask(kind::REQUEST_BODY, &chunk("a", 1, b"two", 3, true));
        assert_rejected(&agent, &answer, "WASM_BODY_NOT_COLLECTED", "the body was rejected");
        agent.end();
    }

    #[test]
    fn leaves_no_hole_for_an_unreadable_event() {
        let (agent, mut proxy) = start(&module::masking(), &[COLLECT, "--fail-open"]);
        for damage in [json!(5), json!("%%%%")] {
            let id = damage.to_string();
            assert_held(&proxy.ask(kind::REQUEST_BODY, &chunk(&id, 0, b"one", 0, false)));
            let mut last = chunk(&id, 1, b"two", 3, true);
            last["data"] = damage;
            assert_rejected(&agent, &proxy.ask(kind::REQUEST_BODY, &last), "WASM_INVALID_EVENT", "module error, blocked");
        }
        agent.end();
    }

    #[test]
    fn rejects_what_the_proxy_buffers() {
        let (agent, mut proxy) = start(&module::masking(), &[COLLECT]);
        let whole = proxy.ask(kind::REQUEST_BODY, &request_body("a", "!"));
        assert_eq!(whole["decision"]["block"]["status"], 422);
        let mut part = request_body("b", "4111");
        part["is_last"] = json!(false);
        let answer = proxy.ask(kind::REQUEST_BODY, &part);
        assert_rejected(&agent, &answer, "WASM_BODY_NOT_COLLECTED", r#"needs `request-body-mode \"stream\"`"#);
        agent.end();
    }

    #[test]
    fn finishes_bodies_across_a_reload() {
        let directory = tempfile::tempdir().unwrap();
        let path = module::write(directory.path(), "m.wasm", &module::masking());
        let agent = AGENT.start(&path, &[COLLECT, "--timeout-ms", "5000"]);
        let mut proxy = agent.connect();
        let chunks: [&[u8]; 2] = [b"card=41111111", b"11111111"];
        let first = proxy.ask(kind::REQUEST_BODY, &chunk("a", 0, chunks[0], 0, false));
        // A module without a hook for bodies, and a configuration that turns collecting off.
        module::write(directory.path(), "m.wasm", &module::tagging("new"));
        agent.signal(rustix::process::Signal::HUP);
        testkit::wait_for("the other module", || (proxy.get("ready", "/")["audit"]["tags"] == json!(["new"])).then_some(()));
        proxy.configure(&json!({"collect-request-body": false})).unwrap();
        let last = proxy.ask(kind::REQUEST_BODY, &chunk("a", 1, chunks[1], chunks[0].len(), true));
        assert_eq!(forwarded(&chunks, &[first, last]), Some(chunks.concat()));
        // Bodies that begin now are not collected.
        let answers = send(&mut proxy, "b", &chunks);
        assert!(answers.iter().all(|answer| answer.get("request_body_mutation").is_none()), "{answers:?}");
        agent.end();
    }

    #[test]
    fn can_be_configured_by_the_proxy() {
        let (agent, mut proxy) = start(&module::masking(), &[]);
        proxy.configure(&json!({"collect-request-body": true})).unwrap();
        let answers = send(&mut proxy, "a", &[b"41111111", b"11111111"]);
        assert_eq!(answers[1]["request_body_mutation"]["data"], "****************");
        assert!(proxy.configure(&json!({"collect_request_body": 1})).unwrap_err().contains("true or false"));
        agent.end();
    }

    #[test]
    fn delays_the_shutdown_until_bodies_are_complete() {
        let (mut agent, mut proxy) = start(&module::masking(), &[COLLECT]);
        let mut idle = agent.connect();
        let first = proxy.ask(kind::REQUEST_BODY, &chunk("a", 0, b"one", 0, false));
        assert_held(&first);
        agent.signal(rustix::process::Signal::TERM);
        // A connection without a body is closed as soon as it is idle.
        assert_eq!(idle.answer_or_end(), None);
        let last = proxy.ask(kind::REQUEST_BODY, &chunk("a", 1, b"two", 3, true));
        assert_eq!(last["request_body_mutation"]["data"], "onetwo");
        assert_eq!(proxy.answer_or_end(), None);
        assert_eq!(agent.wait().code(), Some(0));
    }

    #[test]
    fn handles_a_large_body() {
        let (agent, mut proxy) = start(&module::masking(), &[COLLECT]);
        let part = "x4111111111111111y".repeat(3500);
        let parts: Vec<&[u8]> = (0..16).map(|_| part.as_bytes()).chain([&b"."[..], b""]).collect();
        // The first two chunks differ, because the same chunk again could be a retry of the
        // proxy's.
        let parts = [&[&b"begin"[..]], &parts[..]].concat();
        let answers = send(&mut proxy, "a", &parts);
        let expected = format!("begin{}.", "x****************y".repeat(3500 * 16));
        assert_eq!(forwarded(&parts, &answers), Some(expected.into_bytes()));
        agent.end();
    }
}
