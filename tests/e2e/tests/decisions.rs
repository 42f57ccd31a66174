//! What a module decides on the request's headers, as the client and the upstream see it.

use serde_json::{Value, json};
use zentinel_wasm_e2e::{Ask, Stack, on_both_transports, wait};

const HOOK: &str = "on_request_headers";

/// The values that the upstream was sent for a header.
fn upstream_saw(told: &Value, name: &str) -> Vec<String> {
    told["headers"]
        .as_array()
        .expect("the upstream tells the headers")
        .iter()
        .filter(|pair| pair[0].as_str().is_some_and(|key| key.eq_ignore_ascii_case(name)))
        .map(|pair| pair[1].as_str().unwrap_or_default().to_owned())
        .collect()
}

on_both_transports! {
    fn no_opinion_lets_the_request_through_as_it_is(transport) {
        let stack = Stack::over(transport).start();
        let response = stack.send(&Ask::get("/a/b").query("q", "1").header("X-Debug", "keep").header("Accept", "text/html"));
        assert_eq!(response.status(), 200);
        let told = response.json();
        assert_eq!(told["path"], "/a/b?q=1");
        assert_eq!(upstream_saw(&told, "x-debug"), ["keep"]);
        assert_eq!(upstream_saw(&told, "accept"), ["text/html"]);
        assert_eq!(upstream_saw(&told, "host"), ["shop.example"]);
    }

    fn allow_adds_replaces_and_removes_request_headers(transport) {
        let stack = Stack::over(transport).start();
        let answer = json!({
            "decision": "allow",
            "add_request_headers": {"X-Processed": "true", "X-Replaced": "new", "X-Many": ["one", "two"]},
            "remove_request_headers": ["X-Debug"],
        });
        let response = stack.send(&Ask::get("/").answer(HOOK, &answer).header("X-Debug", "secret").header("X-Replaced", "old"));
        assert_eq!(response.status(), 200);
        let told = response.json();
        assert_eq!(upstream_saw(&told, "x-processed"), ["true"]);
        assert_eq!(upstream_saw(&told, "x-replaced"), ["new"]);
        assert_eq!(upstream_saw(&told, "x-many").join(", "), "one, two");
        assert_eq!(upstream_saw(&told, "x-debug"), [""; 0]);
    }

    fn appended_request_headers_stand_beside_those_of_the_client(transport) {
        let stack = Stack::over(transport).start();
        let answer = json!({"append_request_headers": {"X-Seen-By": ["agent", "policy"]}, "remove_request_headers": ["X-Debug"]});
        let ask = Ask::get("/").answer(HOOK, &answer).header("X-Seen-By", "client").header("X-Debug", "1");
        let told = stack.send(&ask).json();
        assert_eq!(upstream_saw(&told, "x-seen-by").join(", "), "client, agent, policy");
        assert_eq!(upstream_saw(&told, "x-debug"), [""; 0]);
    }

    fn host_may_be_set(transport) {
        let stack = Stack::over(transport).start();
        let told = stack.send(&Ask::get("/").answer(HOOK, &json!({"add_request_headers": {"Host": "internal.example:8080"}}))).json();
        assert_eq!(upstream_saw(&told, "host"), ["internal.example:8080"]);
    }

    /// Obeyed, these would make the upstream wait for a body that never comes, or read an empty
    /// one.
    fn headers_that_frame_a_message_are_the_proxy_s(transport) {
        for fail_open in [false, true] {
            let stack = Stack::over(transport).agent_args(if fail_open { &["--fail-open"] } else { &[] }).start();
            for answer in [
                json!({"add_request_headers": {"Content-Length": "30"}}),
                json!({"append_request_headers": {"Transfer-Encoding": "chunked"}}),
                json!({"add_request_headers": {"Connection": "X-Secret"}}),
                json!({"remove_request_headers": ["Content-Length"]}),
                json!({"remove_request_headers": ["Transfer-Encoding"]}),
                json!({"remove_request_headers": ["Host"]}),
            ] {
                let before = stack.upstream_requests();
                for ask in [Ask::get("/"), Ask::post("/", b"whole"), Ask::post("/", b"whole").chunked()] {
                    let response = stack.send(&ask.answer(HOOK, &answer));
                    if !fail_open {
                        assert_eq!((response.status(), stack.upstream_requests()), (500, before), "{answer}");
                        continue;
                    }
                    assert_eq!(response.status(), 200, "{answer}");
                    let told = response.json();
                    let expected = if told["method"] == "POST" { "whole" } else { "" };
                    assert_eq!(told["body"], expected, "{answer}");
                }
            }
        }
    }

    fn a_block_has_no_content_where_its_status_allows_none(transport) {
        let stack = Stack::over(transport).start();
        for status in [204, 205, 304] {
            for body in [json!(null), json!("none")] {
                let response = stack.send(&Ask::get("/").answer(HOOK, &json!({"decision": "block", "status": status, "body": body})));
                assert_eq!((response.status(), response.text().as_str()), (status, ""));
                let len = response.header("content-length");
                assert!(len.as_deref().is_none_or(|len| len == "0"), "{status}: {len:?}");
                assert!(response.complete);
            }
        }
    }

    fn what_no_client_could_make_sense_of_is_a_500(transport) {
        let stack = Stack::over(transport).start();
        for answer in [
            json!({"decision": "block", "status": 103}),
            json!({"decision": "block", "add_response_headers": {"Set-Cookie": ["a=1", "b=2"]}}),
            json!({"decision": "block", "add_response_headers": {"Content-Length": "3"}, "body": "abcdef"}),
        ] {
            assert_eq!(stack.send(&Ask::get("/").answer(HOOK, &answer)).status(), 500, "{answer}");
        }
    }

    fn a_block_carries_appended_headers_and_a_cookie(transport) {
        let stack = Stack::over(transport).start();
        let answer = json!({
            "decision": "block",
            "add_response_headers": {"Vary": "Accept"},
            "append_response_headers": {"Vary": "Cookie", "Set-Cookie": "refused=1"},
        });
        let response = stack.send(&Ask::get("/").answer(HOOK, &answer));
        assert_eq!(response.status(), 403);
        assert_eq!(response.header("vary").as_deref(), Some("Accept, Cookie"));
        assert_eq!(response.header("set-cookie").as_deref(), Some("refused=1"));
    }

    /// Hence two cookies in a block are a module error: neither a block's own headers, which are one
    /// value a name, nor changes beside it could carry them.
    fn other_header_changes_beside_a_refusal_are_not_read(transport) {
        let stack = Stack::over(transport).start();
        for hook in [HOOK, "on_response_headers"] {
            let answer = json!({"decision": "block", "body": "no", "remove_response_headers": ["Content-Type"]});
            let response = stack.send(&Ask::get("/").answer(hook, &answer));
            assert_eq!(response.status(), 403, "{hook}");
            assert!(response.header("content-type").is_some(), "{hook}");
            let answer = json!({"decision": "redirect", "body": "/", "append_response_headers": {"X-Beside": "1"}});
            let response = stack.send(&Ask::get("/").answer(hook, &answer));
            assert_eq!((response.status(), response.header("x-beside")), (302, None), "{hook}");
        }
    }

    fn the_url_of_a_redirect_arrives_encoded(transport) {
        let stack = Stack::over(transport).start();
        let response = stack.send(&Ask::get("/").answer(HOOK, &json!({"decision": "redirect", "body": "/caf\u{e9} x?a=%2F#top"})));
        assert_eq!(response.header("location").as_deref(), Some("/caf%C3%A9%20x?a=%2F#top"));
    }

    fn block_sends_its_status_body_and_headers_and_spares_the_upstream(transport) {
        let stack = Stack::over(transport).start();
        let before = stack.upstream_requests();
        let answer = json!({
            "decision": "block",
            "status": 451,
            "body": "{\"error\":\"not here: context: or elsewhere\"}",
            "add_response_headers": {"Content-Type": "application/problem+json", "X-Policy": "geo"},
        });
        let response = stack.send(&Ask::get("/").answer(HOOK, &answer));
        assert_eq!(response.status(), 451);
        assert_eq!(response.text(), "{\"error\":\"not here: context: or elsewhere\"}");
        assert_eq!(response.header("content-type").as_deref(), Some("application/problem+json"));
        assert_eq!(response.header("x-policy").as_deref(), Some("geo"));
        assert_eq!(stack.upstream_requests(), before);
    }

    fn deny_is_block_and_the_status_is_403_unless_it_says_otherwise(transport) {
        let stack = Stack::over(transport).start();
        for decision in ["block", "deny", "DENY"] {
            let response = stack.send(&Ask::get("/").answer(HOOK, &json!({"decision": decision, "body": "Forbidden"})));
            assert_eq!((response.status(), response.text().as_str()), (403, "Forbidden"));
        }
    }

    fn redirect_sends_its_status_and_the_location(transport) {
        let stack = Stack::over(transport).start();
        let url = "https://login.example/?next=%2Fcart&a=b";
        let default = stack.send(&Ask::get("/").answer(HOOK, &json!({"decision": "redirect", "body": url})));
        assert_eq!((default.status(), default.header("location").as_deref()), (302, Some(url)));
        for status in [301, 302, 303, 307, 308] {
            let answer = json!({"decision": "redirect", "status": status, "body": url});
            let response = stack.send(&Ask::get("/").answer(HOOK, &answer));
            assert_eq!((response.status(), response.header("location").as_deref()), (status, Some(url)));
        }
    }

    fn challenge_shows_its_page(transport) {
        let stack = Stack::over(transport).start();
        let before = stack.upstream_requests();
        let answer = json!({
            "decision": "challenge",
            "challenge_type": "captcha",
            "challenge_params": {"body": "<h1>Are you human?</h1>", "content-type": "text/html", "site_key": "k", "level": 3, "strict": true},
        });
        let response = stack.send(&Ask::get("/").answer(HOOK, &answer));
        assert_eq!(response.status(), 403);
        assert_eq!(response.text(), "<h1>Are you human?</h1>");
        assert!(response.header("content-type").is_some_and(|kind| kind.starts_with("text/html")));
        assert_eq!(stack.upstream_requests(), before);
    }

    fn challenge_with_an_authentication_scheme_is_a_401(transport) {
        let stack = Stack::over(transport).start();
        let answer = json!({
            "decision": "challenge",
            "challenge_type": "basic",
            "challenge_params": {"www-authenticate": "Basic realm=\"shop\""},
        });
        let response = stack.send(&Ask::get("/").answer(HOOK, &answer));
        assert_eq!(response.status(), 401);
        assert_eq!(response.header("www-authenticate").as_deref(), Some("Basic realm=\"shop\""));
    }

    fn the_audit_log_says_why_a_request_was_refused(transport) {
        let stack = Stack::over(transport).start();
        let answer = json!({
            "decision": "block",
            "tags": ["path-traversal"],
            "rule_ids": ["SEC-001", "OWASP-930"],
            "confidence": 0.95,
            "reason_codes": ["PATH_TRAVERSAL_DETECTED"],
        });
        assert_eq!(stack.send(&Ask::get("/etc/passwd").answer(HOOK, &answer)).status(), 403);
        let entry = wait::until("the audit log has the refusal", || stack.audit_log().into_iter().find(|entry| entry["rule_ids"] != Value::Null));
        assert_eq!(entry["rule_ids"], json!(["SEC-001", "OWASP-930"]));
        assert!(entry["tags"].as_array().is_some_and(|tags| tags.contains(&json!("path-traversal"))), "{entry}");
    }

    fn a_broken_answer_is_a_500_in_fail_closed_mode_for_that_request_alone(transport) {
        let stack = Stack::over(transport).start();
        for broken in ["{\"decision\":\"perhaps\"}", "not json", "!trap", "{\"add_request_headers\":{\"X\":\"a\\r\\nb\"}}"] {
            assert_eq!(stack.send(&Ask::get("/").query(HOOK, broken)).status(), 500, "{broken}");
            assert_eq!(stack.send(&Ask::get("/")).status(), 200, "after {broken}");
        }
    }

    fn a_broken_answer_is_let_through_in_fail_open_mode(transport) {
        let stack = Stack::over(transport).agent_args(&["--fail-open"]).start();
        for broken in ["{\"decision\":\"perhaps\"}", "not json", "!trap"] {
            assert_eq!(stack.send(&Ask::get("/").query(HOOK, broken)).status(), 200, "{broken}");
        }
        assert_eq!(stack.send(&Ask::get("/").answer(HOOK, &json!({"decision": "block"}))).status(), 403);
    }

    fn the_guest_is_given_the_request_as_the_page_shows_it(transport) {
        let stack = Stack::over(transport).start();
        let answer = json!({"decision": "block", "status": 418, "body": "$event"});
        let ask = Ask::get("/cart")
            .answer(HOOK, &answer)
            .header("user-agent", "Mozilla/5.0")
            .header("X-Forwarded-Proto", "https")
            .header("Cookie", "a=1")
            .header("Accept", "text/html")
            .header("Accept", "text/plain");
        let response = stack.send(&ask);
        assert_eq!(response.status(), 418);
        let event = response.json();
        assert_eq!(event["method"], "GET");
        assert!(event["uri"].as_str().is_some_and(|uri| uri.starts_with("/cart?on_request_headers=")));
        assert_eq!(event["client_ip"], "127.0.0.1");
        assert!(event["correlation_id"].as_str().is_some_and(|id| !id.is_empty()));
        assert_eq!(event["headers"]["User-Agent"], "Mozilla/5.0");
        assert_eq!(event["headers"]["Host"], "shop.example");
        assert_eq!(event["headers"]["Accept"], "text/html, text/plain");
        assert_eq!(event["header_values"]["Accept"], json!(["text/html", "text/plain"]));
        let headers = event["headers"].as_object().expect("an object");
        assert!(headers.keys().all(|name| !name.starts_with(':')), "{headers:?}");
    }
}
