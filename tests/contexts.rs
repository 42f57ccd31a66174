//! What later hooks are told of the request that they belong to, and when they are told nothing.

use std::io::Write as _;

use serde_json::{Value, json};
use testkit::{Agent, Connection, Program, base64, decision, frame, kind, module, request, request_body, response, response_body};

const AGENT: Program = Program(env!("CARGO_BIN_EXE_zentinel-wasm-agent"));

fn echoing(hooks: &[&str], options: &[&str]) -> Agent {
    let modules = tempfile::tempdir().unwrap();
    AGENT.start(&module::write(modules.path(), "echo.wasm", &module::echo(hooks)), options)
}

#[track_caller]
fn ask(connection: &mut Connection, kind: u8, event: &Value) -> Value {
    module::seen(&connection.ask(kind, event))
}

/// The event of a request with a body of 4 bytes.
fn post(id: &str, uri: &str) -> Value {
    let mut event = request(id, uri);
    event["method"] = json!("POST");
    event["headers"]["content-length"] = json!(["4"]);
    event
}

/// A chunk of a request's body after which others follow.
fn open_chunk(id: &str) -> Value {
    let mut event = request_body(id, "x");
    event["is_last"] = json!(false);
    event
}

/// Fields of a request that a response hook may only know from the request itself.
fn knows_request(seen: &Value) -> bool {
    let known = ["method", "uri", "client_ip"].map(|field| seen.get(field).is_some());
    assert!(known == [true; 3] || known == [false; 3], "all or none: {seen}");
    known[0]
}

#[test]
fn the_request_body_hook_gets_the_whole_request_and_the_body() {
    let agent = echoing(&module::PAGE_HOOKS, &[]);
    let mut proxy = agent.connect();
    let headers = ask(&mut proxy, kind::REQUEST_HEADERS, &request("a", "/login?x=1"));
    let body = ask(&mut proxy, kind::REQUEST_BODY, &request_body("a", "user=\"ann\"\n"));
    let mut expected = headers.clone();
    for (name, value) in [
        ("body", json!("user=\"ann\"\n")),
        ("body_encoding", json!("utf-8")),
        ("chunk_index", json!(0)),
        ("is_last", json!(true)),
        ("total_size", json!(11)),
        ("bytes_received", json!(11)),
    ] {
        expected[name] = value;
    }
    assert_eq!(body, expected);
    assert_eq!(headers["method"], "GET");
    assert_eq!(headers["uri"], "/login?x=1");
    assert_eq!(headers["client_ip"], "192.0.2.7");
    assert_eq!(headers["client_port"], 50123);
    assert_eq!(headers["headers"], json!({"Host": "example.org", "User-Agent": "curl/8.0"}));
    assert_eq!(headers["route_id"], "all");
    agent.end();
}

#[test]
fn the_response_hooks_get_the_request_s_line_and_the_response() {
    let agent = echoing(&module::PAGE_HOOKS, &[]);
    let mut proxy = agent.connect();
    proxy.get("a", "/page");
    let headers = ask(&mut proxy, kind::RESPONSE_HEADERS, &response("a", 201));
    assert_eq!(
        headers,
        json!({
            "correlation_id": "a", "status": 201,
            "headers": {"Content-Type": "text/plain", "Set-Cookie": "a=1, b=2"}, "header_values": {"Set-Cookie": ["a=1", "b=2"]},
            "method": "GET", "uri": "/page", "client_ip": "192.0.2.7",
        })
    );
    // Response events may come on any connection.
    let body = ask(&mut agent.connect(), kind::RESPONSE_BODY, &response_body("a", "hello"));
    assert_eq!(
        body,
        json!({
            "correlation_id": "a", "method": "GET", "uri": "/page", "client_ip": "192.0.2.7", "status": 201,
            "headers": {"Content-Type": "text/plain", "Set-Cookie": "a=1, b=2"}, "header_values": {"Set-Cookie": ["a=1", "b=2"]},
            "body": "hello", "body_encoding": "utf-8", "chunk_index": 0, "is_last": true, "total_size": 5, "bytes_sent": 5,
        })
    );
    agent.end();
}

#[test]
fn a_hook_of_the_response_alone_is_told_of_the_request_too() {
    let agent = echoing(&["on_response_body"], &[]);
    let mut proxy = agent.connect();
    assert_eq!(decision(&proxy.get("a", "/page")), "allow");
    assert_eq!(decision(&proxy.ask(kind::RESPONSE_HEADERS, &response("a", 404))), "allow");
    let body = ask(&mut proxy, kind::RESPONSE_BODY, &response_body("a", "gone"));
    assert_eq!((&body["uri"], &body["status"], &body["headers"]["Content-Type"]), (&json!("/page"), &json!(404), &json!("text/plain")));
}

#[test]
fn chunks_of_a_body_all_get_the_context() {
    let agent = echoing(&module::PAGE_HOOKS, &[]);
    let mut proxy = agent.connect();
    proxy.get("a", "/stream");
    for (index, is_last) in [(0, false), (1, false), (2, true)] {
        let chunk = json!({
            "correlation_id": "a", "data": base64(&[0xff, index]), "is_last": is_last, "total_size": null, "chunk_index": index,
            "bytes_received": 2 * (index + 1),
        });
        let seen = ask(&mut proxy, kind::REQUEST_BODY, &chunk);
        assert_eq!(seen["uri"], "/stream");
        assert_eq!((&seen["body"], &seen["body_encoding"]), (&json!(base64(&[0xff, index])), &json!("base64")));
        assert_eq!((&seen["chunk_index"], &seen["is_last"], &seen["total_size"]), (&json!(index), &json!(is_last), &Value::Null));
    }
}

#[test]
fn two_live_requests_with_one_id_get_none_of_each_other_s_context() {
    let agent = echoing(&module::PAGE_HOOKS, &[]);
    let (mut first, mut second) = (agent.connect(), agent.connect());
    first.get("same", "/public");
    second.get("same", "/secret");
    for proxy in [&mut first, &mut second] {
        let body = ask(proxy, kind::REQUEST_BODY, &request_body("same", "x"));
        assert!(!knows_request(&body));
        assert_eq!(body["correlation_id"], "same");
        assert!(body.get("headers").is_none());
    }
    for proxy in [&mut first, &mut second] {
        assert!(!knows_request(&ask(proxy, kind::RESPONSE_HEADERS, &response("same", 200))));
        let body = ask(proxy, kind::RESPONSE_BODY, &response_body("same", "x"));
        assert!(!knows_request(&body) && body.get("status").is_none());
    }
    // Another id is not touched by it.
    first.get("other", "/other");
    assert_eq!(ask(&mut second, kind::RESPONSE_HEADERS, &response("other", 200))["uri"], "/other");
}

#[test]
fn an_id_whose_request_has_ended_may_be_used_again() {
    let agent = echoing(&module::PAGE_HOOKS, &[]);
    let mut proxy = agent.connect();
    for uri in ["/one", "/two", "/three"] {
        proxy.get("again", uri);
        assert_eq!(ask(&mut proxy, kind::RESPONSE_HEADERS, &response("again", 200))["uri"], uri);
        assert_eq!(ask(&mut proxy, kind::RESPONSE_BODY, &response_body("again", "x"))["uri"], uri);
    }
}

#[test]
fn an_id_whose_request_had_a_body_may_be_used_again() {
    for hooks in [&module::PAGE_HOOKS[..], &["on_request_body", "on_response_headers"]] {
        let agent = echoing(hooks, &[]);
        let mut proxy = agent.connect();
        for uri in ["/one", "/two", "/three"] {
            proxy.ask(kind::REQUEST_HEADERS, &post("again", uri));
            assert_eq!(ask(&mut proxy, kind::REQUEST_BODY, &request_body("again", "body"))["uri"], uri);
            assert_eq!(ask(&mut proxy, kind::RESPONSE_HEADERS, &response("again", 200))["uri"], uri);
            proxy.ask(kind::RESPONSE_BODY, &response_body("again", "x"));
        }
    }
}

/// The proxy may send events for which the module has no hook.
#[test]
fn an_event_that_the_module_does_not_take_ends_no_other_request_of_its_id() {
    let agent = echoing(&["on_request_headers", "on_response_headers"], &[]);
    let mut proxy = agent.connect();
    proxy.get("same", "/one");
    assert_eq!(ask(&mut proxy, kind::RESPONSE_HEADERS, &response("same", 200))["uri"], "/one");
    proxy.get("same", "/two");
    proxy.ask(kind::RESPONSE_BODY, &response_body("same", "of /one"));
    proxy.ask(kind::REQUEST_COMPLETE, &json!({"correlation_id": "same", "status": 200, "duration_ms": 1}));
    proxy.get("same", "/three");
    assert!(!knows_request(&ask(&mut proxy, kind::RESPONSE_HEADERS, &response("same", 200))), "/two and /three are both under way");
}

#[test]
fn an_interim_response_ends_nothing() {
    for hooks in [&module::PAGE_HOOKS[..], &["on_request_headers", "on_response_headers"]] {
        let agent = echoing(hooks, &[]);
        let mut proxy = agent.connect();
        proxy.get("a", "/one");
        for status in [103, 200] {
            assert_eq!(ask(&mut proxy, kind::RESPONSE_HEADERS, &response("a", status))["uri"], "/one", "{status}");
        }
    }
}

#[test]
fn a_response_before_the_end_of_the_body_does_not_lend_the_id() {
    let agent = echoing(&["on_request_body", "on_response_headers"], &[]);
    let mut proxy = agent.connect();
    // Under HTTP/2 a body need not be announced.
    let mut unannounced = request("unannounced", "/one");
    unannounced["method"] = json!("POST");
    proxy.ask(kind::REQUEST_HEADERS, &unannounced);
    // Nor need its method be one that has a body.
    proxy.get("begun", "/one");
    assert_eq!(ask(&mut proxy, kind::REQUEST_BODY, &open_chunk("begun"))["uri"], "/one");
    proxy.ask(kind::REQUEST_HEADERS, &post("announced", "/one"));
    for id in ["unannounced", "begun", "announced"] {
        assert_eq!(ask(&mut proxy, kind::RESPONSE_HEADERS, &response(id, 413))["uri"], "/one");
        proxy.ask(kind::REQUEST_HEADERS, &post(id, "/two"));
        assert!(!knows_request(&ask(&mut proxy, kind::REQUEST_BODY, &request_body(id, "of /one"))), "{id}");
    }
}

/// Refusals that the proxy may not have heeded.
#[test]
fn a_refusal_that_is_late_or_a_challenge_does_not_lend_the_id() {
    let challenge = r#"{"decision":"challenge","challenge_type":"captcha"}"#;
    for (milliseconds, refusal) in [(30, r#"{"decision":"block"}"#), (0, challenge)] {
        let modules = tempfile::tempdir().unwrap();
        let module = module::write(modules.path(), "refusing.wasm", &module::refusing_some(milliseconds, refusal));
        let agent = AGENT.start(&module, &["--timeout-ms", "5000"]);
        let mut proxy = agent.connect();
        assert_ne!(decision(&proxy.get("same", "/refused")), "allow");
        proxy.get("same", "/two");
        assert!(!knows_request(&ask(&mut proxy, kind::RESPONSE_HEADERS, &response("same", 200))), "{refusal}");
    }
}

/// The proxy never gets the refusal, and may let the request through.
#[test]
fn a_refusal_that_is_superseded_before_it_is_sent_does_not_lend_the_id() {
    for superseding in [kind::REQUEST_HEADERS, kind::RESPONSE_HEADERS] {
        let modules = tempfile::tempdir().unwrap();
        let module = module::write(modules.path(), "refusing.wasm", &module::refusing_some(0, r#"{"decision":"block"}"#));
        let agent = AGENT.start(&module, &["--timeout-ms", "5000", "--admin-address", "127.0.0.1:0"]);
        let mut proxy = agent.connect();
        // What the socket has no room for keeps the answers waiting.
        for _ in 0..8 {
            proxy.send(kind::PING, &json!("x".repeat(64 << 10)));
        }
        proxy.send(kind::REQUEST_HEADERS, &request("same", "/refused"));
        agent.admin().wait_for_metric("wasm_agent_requests_blocked_total", 1.0);
        let second = if superseding == kind::REQUEST_HEADERS { request("same", "/two") } else { response("same", 200) };
        assert_eq!(decision(&proxy.ask(superseding, &second)), "allow");
        if superseding == kind::RESPONSE_HEADERS {
            proxy.get("same", "/two");
        }
        let seen = ask(&mut proxy, kind::RESPONSE_HEADERS, &response("same", 200));
        assert!(!knows_request(&seen), "it may be the response to /refused: {seen}");
    }
}

/// Failing open, it is allowed.
#[test]
fn a_request_that_cannot_be_read_does_not_lend_its_id() {
    let agent = echoing(&module::PAGE_HOOKS, &["--fail-open"]);
    let mut proxy = agent.connect();
    let mut unreadable = request("same", "/one");
    unreadable["headers"] = json!(7);
    assert_eq!(decision(&proxy.ask(kind::REQUEST_HEADERS, &unreadable)), "allow");
    proxy.get("same", "/two");
    assert!(!knows_request(&ask(&mut proxy, kind::RESPONSE_HEADERS, &response("same", 200))), "it may be the response to /one");
    // And the other way round.
    proxy.get("other", "/one");
    unreadable["metadata"]["correlation_id"] = json!("other");
    proxy.ask(kind::REQUEST_HEADERS, &unreadable);
    assert!(!knows_request(&ask(&mut proxy, kind::RESPONSE_HEADERS, &response("other", 200))), "it may be the response to either");
}

#[test]
fn a_response_whose_request_was_never_seen_gets_no_context() {
    let agent = echoing(&module::PAGE_HOOKS, &[]);
    let mut proxy = agent.connect();
    assert!(!knows_request(&ask(&mut proxy, kind::RESPONSE_HEADERS, &response("stranger", 200))));
    assert_eq!(ask(&mut proxy, kind::REQUEST_BODY, &request_body("stranger-2", "x"))["correlation_id"], "stranger-2");
}

#[test]
fn a_reload_keeps_the_contexts_of_requests_under_way() {
    let modules = tempfile::tempdir().unwrap();
    let file = module::write(modules.path(), "echo.wasm", &module::echo(&module::PAGE_HOOKS));
    let agent = AGENT.start(&file, &["--admin-address", "127.0.0.1:0"]);
    let mut proxy = agent.connect();
    proxy.get("a", "/before");
    agent.signal(rustix::process::Signal::HUP);
    agent.admin().wait_for_metric(r#"wasm_agent_reloads_total{result="success"}"#, 1.0);
    assert_eq!(ask(&mut proxy, kind::RESPONSE_HEADERS, &response("a", 200))["uri"], "/before");
}

#[test]
fn contexts_write_header_names_as_they_are_told_to() {
    let agent = echoing(&module::PAGE_HOOKS, &["--header-case", "lower"]);
    let mut proxy = agent.connect();
    proxy.get("a", "/");
    let body = ask(&mut proxy, kind::REQUEST_BODY, &request_body("a", "x"));
    assert_eq!(body["headers"]["user-agent"], "curl/8.0");
    proxy.ask(kind::RESPONSE_HEADERS, &response("a", 200));
    let body = ask(&mut proxy, kind::RESPONSE_BODY, &response_body("a", "x"));
    assert_eq!(body["header_values"], json!({"set-cookie": ["a=1", "b=2"]}));
}

/// As where the proxy sends no response events, or clients leave their requests open.
#[test]
fn requests_that_never_end_cost_bounded_memory_and_no_other_s_context() {
    /// Many times as many as there is memory for contexts.
    const REQUESTS: usize = 100_000;
    /// Contexts, ids, and what an allocator keeps.
    const ROOM: u64 = 40 << 20;

    // No module is called for them.
    let agent = echoing(&["on_response_headers"], &[]);
    let mut proxy = agent.connect();
    proxy.get("warm", "/");
    let before = agent.resident();
    let mut writer = proxy.writer();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for at in 0..REQUESTS {
                let mut event = request(&format!("request-{at}"), "/some/path?of=usual&length=1");
                event["headers"]["cookie"] = json!(["x".repeat(500)]);
                writer.write_all(&frame(kind::REQUEST_HEADERS, &serde_json::to_vec(&event).unwrap())).unwrap();
            }
        });
        for _ in 0..REQUESTS {
            assert_eq!(decision(&proxy.answer()), "allow");
        }
    });
    let more = agent.resident().saturating_sub(before);
    println!("{} MiB more, {} MiB in all", more >> 20, agent.resident() >> 20);
    assert!(more < ROOM, "{} MiB more", more >> 20);
    proxy.get("another", "/known");
    assert_eq!(ask(&mut proxy, kind::RESPONSE_HEADERS, &response("another", 200))["uri"], "/known");
    proxy.get("request-0", "/other");
    assert!(!knows_request(&ask(&mut proxy, kind::RESPONSE_HEADERS, &response("request-0", 200))));
    agent.end();
}
