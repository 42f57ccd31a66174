//! What later hooks learn of their request, and when they learn nothing.

use std::io::Write as _;

use serde_json::{Value, json};
use testkit::{
    Agent, Connection, Program, base64, decision, frame, kind, module, request, request_body, response, response_body, wait_for,
};

const AGENT: Program = Program(env!("CARGO_BIN_EXE_zentinel-wasm-agent"));

fn echoing(hooks: &[&str], options: &[&str]) -> Agent {
    let modules = tempfile::tempdir().unwrap();
    AGENT.start(&module::write(modules.path(), "echo.wasm", &module::echo(hooks)), options)
}

#[track_caller]
fn ask(connection: &mut Connection, kind: u8, event: &Value) -> Value {
    module::seen(&connection.ask(kind, event))
}

/// The headers of a request with a body of 4 bytes.
fn post(id: &str, uri: &str) -> Value {
    let mut event = request(id, uri);
    event["method"] = json!("POST");
    event["headers"]["content-length"] = json!(["4"]);
    event
}

/// A chunk of a request's body that is not the last.
fn open_chunk(id: &str) -> Value {
    let mut event = request_body(id, "x");
    event["is_last"] = json!(false);
    event
}

/// Whether a response hook has got the fields that come from the request alone.
fn knows_request(seen: &Value) -> bool {
    let known = ["method", "uri", "client_ip"].map(|field| seen.get(field).is_some());
    assert!(known == [true; 3] || known == [false; 3], "some of the fields: {seen}");
    known[0]
}

mod later_hooks {
    use super::*;

    #[test]
    fn of_the_request_body_get_the_whole_request() {
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
    fn of_the_response_get_the_request_line_and_the_response() {
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
        // Response events may arrive on any connection.
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
    fn get_the_request_even_without_a_request_hook() {
        let agent = echoing(&["on_response_body"], &[]);
        let mut proxy = agent.connect();
        assert_eq!(decision(&proxy.get("a", "/page")), "allow");
        assert_eq!(decision(&proxy.ask(kind::RESPONSE_HEADERS, &response("a", 404))), "allow");
        let body = ask(&mut proxy, kind::RESPONSE_BODY, &response_body("a", "gone"));
        assert_eq!((&body["uri"], &body["status"], &body["headers"]["Content-Type"]), (&json!("/page"), &json!(404), &json!("text/plain")));
    }

    #[test]
    fn get_the_context_with_every_chunk() {
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
    fn get_header_names_in_the_configured_case() {
        let agent = echoing(&module::PAGE_HOOKS, &["--header-case", "lower"]);
        let mut proxy = agent.connect();
        proxy.get("a", "/");
        let body = ask(&mut proxy, kind::REQUEST_BODY, &request_body("a", "x"));
        assert_eq!(body["headers"]["user-agent"], "curl/8.0");
        proxy.ask(kind::RESPONSE_HEADERS, &response("a", 200));
        let body = ask(&mut proxy, kind::RESPONSE_BODY, &response_body("a", "x"));
        assert_eq!(body["header_values"], json!({"set-cookie": ["a=1", "b=2"]}));
    }

    #[test]
    fn get_nothing_for_an_unknown_request() {
        let agent = echoing(&module::PAGE_HOOKS, &[]);
        let mut proxy = agent.connect();
        assert!(!knows_request(&ask(&mut proxy, kind::RESPONSE_HEADERS, &response("stranger", 200))));
        assert_eq!(ask(&mut proxy, kind::REQUEST_BODY, &request_body("stranger-2", "x"))["correlation_id"], "stranger-2");
    }

    #[test]
    fn get_the_context_across_a_reload() {
        let modules = tempfile::tempdir().unwrap();
        let file = module::write(modules.path(), "echo.wasm", &module::echo(&module::PAGE_HOOKS));
        let agent = AGENT.start(&file, &["--admin-address", "127.0.0.1:0"]);
        let mut proxy = agent.connect();
        proxy.get("a", "/before");
        agent.signal(rustix::process::Signal::HUP);
        agent.admin().wait_for_metric(r#"wasm_agent_reloads_total{result="success"}"#, 1.0);
        assert_eq!(ask(&mut proxy, kind::RESPONSE_HEADERS, &response("a", 200))["uri"], "/before");
    }
}

mod shared_ids {
    use super::*;

    #[test]
    fn get_no_context_while_both_requests_live() {
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
        // Other ids are not affected.
        first.get("other", "/other");
        assert_eq!(ask(&mut second, kind::RESPONSE_HEADERS, &response("other", 200))["uri"], "/other");
    }

    #[test]
    fn stay_reserved_until_the_body_ends() {
        let agent = echoing(&["on_request_body", "on_response_headers"], &[]);
        let mut proxy = agent.connect();
        // Under HTTP/2, requests need not announce a body.
        let mut unannounced = request("unannounced", "/one");
        unannounced["method"] = json!("POST");
        proxy.ask(kind::REQUEST_HEADERS, &unannounced);
        // Any method may have a body.
        proxy.get("begun", "/one");
        assert_eq!(ask(&mut proxy, kind::REQUEST_BODY, &open_chunk("begun"))["uri"], "/one");
        proxy.ask(kind::REQUEST_HEADERS, &post("announced", "/one"));
        for id in ["unannounced", "begun", "announced"] {
            assert_eq!(ask(&mut proxy, kind::RESPONSE_HEADERS, &response(id, 413))["uri"], "/one");
            proxy.ask(kind::REQUEST_HEADERS, &post(id, "/two"));
            assert!(!knows_request(&ask(&mut proxy, kind::REQUEST_BODY, &request_body(id, "of /one"))), "{id}");
        }
    }

    /// The proxy may have let these requests through all the same.
    #[test]
    fn stay_reserved_after_a_late_block_or_a_challenge() {
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

    /// The proxy never gets the block, and may let the request through.
    #[test]
    fn stay_reserved_after_a_superseded_block() {
        const DURATION: &str = r#"wasm_agent_call_duration_seconds_sum{hook="on_request_headers"}"#;
        for superseding in [kind::REQUEST_HEADERS, kind::RESPONSE_HEADERS] {
            let modules = tempfile::tempdir().unwrap();
            let module = module::write(modules.path(), "refusing.wasm", &module::refusing_some(0, r#"{"decision":"block"}"#));
            let agent = AGENT.start(&module, &["--timeout-ms", "5000", "--admin-address", "127.0.0.1:0"]);
            let admin = agent.admin();
            let mut rounds = 0;
            wait_for("a block within 10 ms", || {
                rounds += 1;
                let id = format!("same-{rounds}");
                let mut proxy = agent.connect();
                // These fill the socket, so the answers have to wait.
                for _ in 0..8 {
                    proxy.send(kind::PING, &json!("x".repeat(64 << 10)));
                }
                let before = admin.metric(DURATION);
                proxy.send(kind::REQUEST_HEADERS, &request(&id, "/refused"));
                admin.wait_for_metric("wasm_agent_requests_blocked_total", f64::from(rounds));
                admin.wait_for_metric("wasm_agent_in_flight", 0.0);
                // After a later block the request still counts as live, so a response ends it.
                if admin.metric(DURATION) - before > 0.005 {
                    return None;
                }
                let second = if superseding == kind::REQUEST_HEADERS { request(&id, "/two") } else { response(&id, 200) };
                assert_eq!(decision(&proxy.ask(superseding, &second)), "allow");
                if superseding == kind::RESPONSE_HEADERS {
                    proxy.get(&id, "/two");
                }
                let seen = ask(&mut proxy, kind::RESPONSE_HEADERS, &response(&id, 200));
                assert!(!knows_request(&seen), "after {superseding:#04x}, this may be the response to /refused: {seen}");
                Some(())
            });
        }
    }

    /// The request is allowed when failing open.
    #[test]
    fn stay_reserved_after_an_unreadable_request() {
        let agent = echoing(&module::PAGE_HOOKS, &["--fail-open"]);
        let mut proxy = agent.connect();
        let mut unreadable = request("same", "/one");
        unreadable["headers"] = json!(7);
        assert_eq!(decision(&proxy.ask(kind::REQUEST_HEADERS, &unreadable)), "allow");
        proxy.get("same", "/two");
        assert!(!knows_request(&ask(&mut proxy, kind::RESPONSE_HEADERS, &response("same", 200))), "this may be the response to /one");
        // In the other order as well.
        proxy.get("other", "/one");
        unreadable["metadata"]["correlation_id"] = json!("other");
        proxy.ask(kind::REQUEST_HEADERS, &unreadable);
        assert!(!knows_request(&ask(&mut proxy, kind::RESPONSE_HEADERS, &response("other", 200))), "this may be the response to either");
    }
}

mod reused_ids {
    use super::*;

    #[test]
    fn get_a_context_after_the_response() {
        let agent = echoing(&module::PAGE_HOOKS, &[]);
        let mut proxy = agent.connect();
        for uri in ["/one", "/two", "/three"] {
            proxy.get("again", uri);
            assert_eq!(ask(&mut proxy, kind::RESPONSE_HEADERS, &response("again", 200))["uri"], uri);
            assert_eq!(ask(&mut proxy, kind::RESPONSE_BODY, &response_body("again", "x"))["uri"], uri);
        }
    }

    #[test]
    fn get_a_context_after_a_request_with_a_body() {
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
    fn are_not_freed_by_events_without_a_hook() {
        let agent = echoing(&["on_request_headers", "on_response_headers"], &[]);
        let mut proxy = agent.connect();
        proxy.get("same", "/one");
        assert_eq!(ask(&mut proxy, kind::RESPONSE_HEADERS, &response("same", 200))["uri"], "/one");
        proxy.get("same", "/two");
        proxy.ask(kind::RESPONSE_BODY, &response_body("same", "of /one"));
        proxy.ask(kind::REQUEST_COMPLETE, &json!({"correlation_id": "same", "status": 200, "duration_ms": 1}));
        proxy.get("same", "/three");
        assert!(!knows_request(&ask(&mut proxy, kind::RESPONSE_HEADERS, &response("same", 200))), "/two and /three are both live");
    }

    #[test]
    fn are_not_freed_by_an_interim_response() {
        for hooks in [&module::PAGE_HOOKS[..], &["on_request_headers", "on_response_headers"]] {
            let agent = echoing(hooks, &[]);
            let mut proxy = agent.connect();
            proxy.get("a", "/one");
            for status in [103, 200] {
                assert_eq!(ask(&mut proxy, kind::RESPONSE_HEADERS, &response("a", status))["uri"], "/one", "{status}");
            }
        }
    }
}

mod bounds {
    use super::*;

    /// As when the proxy sends no response events, or clients leave their requests open.
    #[test]
    fn endless_requests_take_bounded_memory_and_no_others_context() {
        /// Many times more than there is memory for contexts.
        const REQUESTS: usize = 100_000;
        /// Contexts, ids, and what the allocator keeps.
        const ROOM: u64 = 40 << 20;

        // The module has no hook for request headers.
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
}
