//! Decisions on a request's headers, as the client and the upstream see them.

use serde_json::{Value, json};
use zentinel_wasm_e2e::http::exchange;
use zentinel_wasm_e2e::{HttpRequest, Stack, Transport, on_both_transports, wait};

const HOOK: &str = "on_request_headers";

/// The values of a header that the upstream received.
fn upstream_saw(received: &Value, name: &str) -> Vec<String> {
    received["headers"]
        .as_array()
        .expect("the upstream did not list the headers")
        .iter()
        .filter(|pair| pair[0].as_str().is_some_and(|key| key.eq_ignore_ascii_case(name)))
        .map(|pair| pair[1].as_str().unwrap_or_default().to_owned())
        .collect()
}

mod headers {
    use super::*;

    on_both_transports! {
        are_unchanged_without_an_opinion
        are_added_replaced_and_removed
        are_appended_to_the_client_s
        the_host_can_be_set
        framing_headers_cannot_be_changed
    }

    fn are_unchanged_without_an_opinion(transport: Transport) {
        let stack = Stack::over(transport).start();
        let response = stack.send(&HttpRequest::get("/a/b").query("q", "1").header("X-Debug", "keep").header("Accept", "text/html"));
        assert_eq!(response.status(), 200);
        let received = response.json();
        assert_eq!(received["path"], "/a/b?q=1");
        assert_eq!(upstream_saw(&received, "x-debug"), ["keep"]);
        assert_eq!(upstream_saw(&received, "accept"), ["text/html"]);
        assert_eq!(upstream_saw(&received, "host"), ["shop.example"]);
    }

    fn are_added_replaced_and_removed(transport: Transport) {
        let stack = Stack::over(transport).start();
        let answer = json!({
            "decision": "allow",
            "add_request_headers": {"X-Processed": "true", "X-Replaced": "new", "X-Many": ["one", "two"]},
            "remove_request_headers": ["X-Debug"],
        });
        let response = stack.send(&HttpRequest::get("/").answer(HOOK, &answer).header("X-Debug", "secret").header("X-Replaced", "old"));
        assert_eq!(response.status(), 200);
        let received = response.json();
        assert_eq!(upstream_saw(&received, "x-processed"), ["true"]);
        assert_eq!(upstream_saw(&received, "x-replaced"), ["new"]);
        assert_eq!(upstream_saw(&received, "x-many").join(", "), "one, two");
        assert_eq!(upstream_saw(&received, "x-debug"), [""; 0]);
    }

    fn are_appended_to_the_client_s(transport: Transport) {
        let stack = Stack::over(transport).start();
        let answer = json!({"append_request_headers": {"X-Seen-By": ["agent", "policy"]}, "remove_request_headers": ["X-Debug"]});
        let request = HttpRequest::get("/").answer(HOOK, &answer).header("X-Seen-By", "client").header("X-Debug", "1");
        let received = stack.send(&request).json();
        assert_eq!(upstream_saw(&received, "x-seen-by").join(", "), "client, agent, policy");
        assert_eq!(upstream_saw(&received, "x-debug"), [""; 0]);
    }

    fn the_host_can_be_set(transport: Transport) {
        let stack = Stack::over(transport).start();
        let received =
            stack.send(&HttpRequest::get("/").answer(HOOK, &json!({"add_request_headers": {"Host": "internal.example:8080"}}))).json();
        assert_eq!(upstream_saw(&received, "host"), ["internal.example:8080"]);
    }

    /// If applied, these changes would make the upstream wait for a body that never arrives, or
    /// read an empty one.
    fn framing_headers_cannot_be_changed(transport: Transport) {
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
                for request in [HttpRequest::get("/"), HttpRequest::post("/", b"whole"), HttpRequest::post("/", b"whole").chunked()] {
                    let response = stack.send(&request.answer(HOOK, &answer));
                    if !fail_open {
                        assert_eq!((response.status(), stack.upstream_requests()), (500, before), "{answer}");
                        continue;
                    }
                    assert_eq!(response.status(), 200, "{answer}");
                    let received = response.json();
                    let expected = if received["method"] == "POST" { "whole" } else { "" };
                    assert_eq!(received["body"], expected, "{answer}");
                }
            }
        }
    }
}

mod blocks {
    use super::*;

    on_both_transports! {
        have_no_body_where_the_status_forbids_one
        are_a_500_when_invalid
        have_appended_headers_and_a_cookie
        ignore_other_header_changes
        have_status_body_and_headers
        default_to_403_and_may_be_called_deny
    }

    fn have_no_body_where_the_status_forbids_one(transport: Transport) {
        let stack = Stack::over(transport).start();
        for status in [204, 205, 304] {
            for body in [json!(null), json!("none")] {
                let response =
                    stack.send(&HttpRequest::get("/").answer(HOOK, &json!({"decision": "block", "status": status, "body": body})));
                assert_eq!((response.status(), response.text().as_str()), (status, ""));
                let len = response.header("content-length");
                assert!(len.as_deref().is_none_or(|len| len == "0"), "{status}: {len:?}");
                assert!(response.complete);
            }
        }
    }

    fn are_a_500_when_invalid(transport: Transport) {
        let stack = Stack::over(transport).start();
        for answer in [
            json!({"decision": "block", "status": 103}),
            json!({"decision": "block", "add_response_headers": {"Set-Cookie": ["a=1", "b=2"]}}),
            json!({"decision": "block", "add_response_headers": {"Content-Length": "3"}, "body": "abcdef"}),
        ] {
            assert_eq!(stack.send(&HttpRequest::get("/").answer(HOOK, &answer)).status(), 500, "{answer}");
        }
    }

    fn have_appended_headers_and_a_cookie(transport: Transport) {
        let stack = Stack::over(transport).start();
        let answer = json!({
            "decision": "block",
            "add_response_headers": {"Vary": "Accept"},
            "append_response_headers": {"Vary": "Cookie", "Set-Cookie": "refused=1"},
        });
        let response = stack.send(&HttpRequest::get("/").answer(HOOK, &answer));
        assert_eq!(response.status(), 403);
        assert_eq!(response.header("vary").as_deref(), Some("Accept, Cookie"));
        assert_eq!(response.header("set-cookie").as_deref(), Some("refused=1"));
    }

    /// This is why two cookies in a block are a module error: a block's own headers have one value
    /// per name, and header changes beside the block are ignored.
    fn ignore_other_header_changes(transport: Transport) {
        let stack = Stack::over(transport).start();
        for hook in [HOOK, "on_response_headers"] {
            let answer = json!({"decision": "block", "body": "no", "remove_response_headers": ["Content-Type"]});
            let response = stack.send(&HttpRequest::get("/").answer(hook, &answer));
            assert_eq!(response.status(), 403, "{hook}");
            assert!(response.header("content-type").is_some(), "{hook}");
            let answer = json!({"decision": "redirect", "body": "/", "append_response_headers": {"X-Beside": "1"}});
            let response = stack.send(&HttpRequest::get("/").answer(hook, &answer));
            assert_eq!((response.status(), response.header("x-beside")), (302, None), "{hook}");
        }
    }

    fn have_status_body_and_headers(transport: Transport) {
        let stack = Stack::over(transport).start();
        let before = stack.upstream_requests();
        let answer = json!({
            "decision": "block",
            "status": 451,
            "body": "{\"error\":\"not here: context: or elsewhere\"}",
            "add_response_headers": {"Content-Type": "application/problem+json", "X-Policy": "geo"},
        });
        let response = stack.send(&HttpRequest::get("/").answer(HOOK, &answer));
        assert_eq!(response.status(), 451);
        assert_eq!(response.text(), "{\"error\":\"not here: context: or elsewhere\"}");
        assert_eq!(response.header("content-type").as_deref(), Some("application/problem+json"));
        assert_eq!(response.header("x-policy").as_deref(), Some("geo"));
        assert_eq!(stack.upstream_requests(), before);
    }

    fn default_to_403_and_may_be_called_deny(transport: Transport) {
        let stack = Stack::over(transport).start();
        for decision in ["block", "deny", "DENY"] {
            let response = stack.send(&HttpRequest::get("/").answer(HOOK, &json!({"decision": decision, "body": "Forbidden"})));
            assert_eq!((response.status(), response.text().as_str()), (403, "Forbidden"));
        }
    }
}

mod redirects {
    use super::*;

    on_both_transports! {
        have_an_encoded_url
        have_status_and_location
    }

    fn have_an_encoded_url(transport: Transport) {
        let stack = Stack::over(transport).start();
        let response = stack.send(&HttpRequest::get("/").answer(HOOK, &json!({"decision": "redirect", "body": "/caf\u{e9} x?a=%2F#top"})));
        assert_eq!(response.header("location").as_deref(), Some("/caf%C3%A9%20x?a=%2F#top"));
    }

    fn have_status_and_location(transport: Transport) {
        let stack = Stack::over(transport).start();
        let url = "https://login.example/?next=%2Fcart&a=b";
        let default = stack.send(&HttpRequest::get("/").answer(HOOK, &json!({"decision": "redirect", "body": url})));
        assert_eq!((default.status(), default.header("location").as_deref()), (302, Some(url)));
        for status in [301, 302, 303, 307, 308] {
            let answer = json!({"decision": "redirect", "status": status, "body": url});
            let response = stack.send(&HttpRequest::get("/").answer(HOOK, &answer));
            assert_eq!((response.status(), response.header("location").as_deref()), (status, Some(url)));
        }
    }
}

mod challenges {
    use super::*;

    on_both_transports! {
        show_their_page
        are_a_401_with_an_authentication_scheme
    }

    fn show_their_page(transport: Transport) {
        let stack = Stack::over(transport).start();
        let before = stack.upstream_requests();
        let answer = json!({
            "decision": "challenge",
            "challenge_type": "captcha",
            "challenge_params": {"body": "<h1>Are you human?</h1>", "content-type": "text/html", "site_key": "k", "level": 3, "strict": true},
        });
        let response = stack.send(&HttpRequest::get("/").answer(HOOK, &answer));
        assert_eq!(response.status(), 403);
        assert_eq!(response.text(), "<h1>Are you human?</h1>");
        assert!(response.header("content-type").is_some_and(|kind| kind.starts_with("text/html")));
        assert_eq!(stack.upstream_requests(), before);
    }

    fn are_a_401_with_an_authentication_scheme(transport: Transport) {
        let stack = Stack::over(transport).start();
        let answer = json!({
            "decision": "challenge",
            "challenge_type": "basic",
            "challenge_params": {"www-authenticate": "Basic realm=\"shop\""},
        });
        let response = stack.send(&HttpRequest::get("/").answer(HOOK, &answer));
        assert_eq!(response.status(), 401);
        assert_eq!(response.header("www-authenticate").as_deref(), Some("Basic realm=\"shop\""));
    }
}

mod audit_log {
    use super::*;

    on_both_transports! {
        has_the_reason_of_a_block
    }

    fn has_the_reason_of_a_block(transport: Transport) {
        let stack = Stack::over(transport).start();
        let answer = json!({
            "decision": "block",
            "tags": ["path-traversal"],
            "rule_ids": ["SEC-001", "OWASP-930"],
            "confidence": 0.95,
            "reason_codes": ["PATH_TRAVERSAL_DETECTED"],
        });
        assert_eq!(stack.send(&HttpRequest::get("/etc/passwd").answer(HOOK, &answer)).status(), 403);
        let entry =
            wait::until("the audit log has the block", || stack.audit_log().into_iter().find(|entry| entry["rule_ids"] != Value::Null));
        assert_eq!(entry["rule_ids"], json!(["SEC-001", "OWASP-930"]));
        assert!(entry["tags"].as_array().is_some_and(|tags| tags.contains(&json!("path-traversal"))), "{entry}");
    }
}

mod invalid_answers {
    use super::*;

    on_both_transports! {
        are_a_500_when_failing_closed
        are_allowed_when_failing_open
    }

    fn are_a_500_when_failing_closed(transport: Transport) {
        let stack = Stack::over(transport).start();
        for broken in ["{\"decision\":\"perhaps\"}", "not json", "!trap", "{\"add_request_headers\":{\"X\":\"a\\r\\nb\"}}"] {
            assert_eq!(stack.send(&HttpRequest::get("/").query(HOOK, broken)).status(), 500, "{broken}");
            assert_eq!(stack.send(&HttpRequest::get("/")).status(), 200, "after {broken}");
        }
    }

    fn are_allowed_when_failing_open(transport: Transport) {
        let stack = Stack::over(transport).agent_args(&["--fail-open"]).start();
        for broken in ["{\"decision\":\"perhaps\"}", "not json", "!trap"] {
            assert_eq!(stack.send(&HttpRequest::get("/").query(HOOK, broken)).status(), 200, "{broken}");
        }
        assert_eq!(stack.send(&HttpRequest::get("/").answer(HOOK, &json!({"decision": "block"}))).status(), 403);
    }
}

mod module_input {
    use super::*;

    on_both_transports! {
        has_the_form_of_the_product_page
    }

    fn has_the_form_of_the_product_page(transport: Transport) {
        let stack = Stack::over(transport).start();
        let answer = json!({"decision": "block", "status": 418, "body": "$event"});
        let request = HttpRequest::get("/cart")
            .answer(HOOK, &answer)
            .header("user-agent", "Mozilla/5.0")
            .header("X-Forwarded-Proto", "https")
            .header("Cookie", "a=1")
            .header("Accept", "text/html")
            .header("Accept", "text/plain");
        let response = stack.send(&request);
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
        let headers = event["headers"].as_object().expect("the headers are not an object");
        assert!(headers.keys().all(|name| !name.starts_with(':')), "{headers:?}");
    }
}

mod decision_log {
    use super::*;

    on_both_transports! {
        says_which_request_was_refused_and_why
        joins_the_events_of_a_request_when_the_last_one_is_answered
        awaits_no_body_of_a_response_without_one
    }

    fn says_which_request_was_refused_and_why(transport: Transport) {
        let mut stack = Stack::over(transport).agent_args(&["--decision-log", "refused", "--decision-log-client", "full"]).start();
        let answer = json!({"decision": "block", "status": 451, "rule_ids": ["r-1"]});
        assert_eq!(stack.send(&HttpRequest::get("/allowed")).status(), 200);
        assert_eq!(stack.send(&HttpRequest::get("/a/b").answer(HOOK, &answer)).status(), 451);
        let line = wait::until("the line", || {
            let log = stack.agent().log();
            let mut lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            lines.find(|line| line["target"] == "decision")
        });
        assert_eq!((&line["method"], &line["path"], &line["client"]), (&json!("GET"), &json!("/a/b"), &json!("127.0.0.1")), "{line}");
        assert!(line["route"].is_string() && line["correlation_id"].is_string(), "{line}");
        assert_eq!((&line["decision"], &line["status"], &line["hooks"][0]["rule_ids"]), (&json!("block"), &json!(451), &json!(["r-1"])));
    }

    fn joins_the_events_of_a_request_when_the_last_one_is_answered(transport: Transport) {
        let mut stack = Stack::over(transport).agent_args(&["--decision-log", "all"]).start();
        assert_eq!(stack.send(&HttpRequest::get("/allowed")).status(), 200);
        let line = wait::until("the line", || {
            let log = stack.agent().log();
            let mut lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            lines.find(|line| line["path"] == "/allowed")
        });
        assert_eq!((&line["decision"], &line["complete"]), (&json!("allow"), &Value::Null), "{line}");
        let hooks: Vec<_> = line["hooks"].as_array().expect("no hooks").iter().map(|hook| hook["hook"].as_str()).collect();
        assert_eq!(hooks, ["on_request_headers", "on_response_headers", "on_response_body"].map(Some), "{line}");
    }

    fn awaits_no_body_of_a_response_without_one(transport: Transport) {
        let mut stack = Stack::over(transport).agent_args(&["--decision-log", "all"]).start();
        let head = exchange(stack.proxy_port(), "HEAD", "/head", &[("Host".into(), "shop.example".into())], None);
        assert_eq!(head.expect("no response").status(), 200);
        for status in ["204", "304"] {
            stack.send(&HttpRequest::get(&format!("/{status}")).query("status", status).query("chunked", "1"));
        }
        // The last one, so events of the others that came late are known too.
        assert_eq!(stack.send(&HttpRequest::get("/last")).status(), 200);
        let lines = wait::until("the lines", || {
            let log = stack.agent().log();
            let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            let lines: Vec<_> = lines.filter(|line| line["target"] == "decision" && line["path"] != "/ready").collect();
            lines.iter().any(|line| line["path"] == "/last").then_some(lines)
        });
        let seen: Vec<_> = lines.iter().map(|line| (line["path"].as_str(), &line["complete"])).collect();
        assert_eq!(seen, ["/head", "/204", "/304", "/last"].map(|path| (Some(path), &Value::Null)), "{lines:?}");
    }
}
