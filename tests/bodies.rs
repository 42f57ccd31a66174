//! What a module may do to a body, and what is a module error because the proxy would ignore it, or
//! send it on under a length that is no longer true.

mod common;

use common::{Agent, Connection, base64, decision, kind, module, module_error, request, request_body, response_body};
use serde_json::{Value, json};

/// The event of the headers of a request with a body: of `length` bytes, or in chunks.
fn post(id: &str, length: Option<usize>) -> Value {
    let mut event = request(id, "/");
    event["method"] = json!("POST");
    match length {
        Some(length) => event["headers"]["content-length"] = json!([length.to_string()]),
        None => event["headers"]["transfer-encoding"] = json!(["chunked"]),
    }
    event
}

/// The event of a chunk as the proxy streams it; `before` bytes of the body came earlier.
fn chunk(id: &str, index: u32, data: &[u8], before: usize, is_last: bool) -> Value {
    json!({
        "correlation_id": id, "data": base64(data), "is_last": is_last, "total_size": null, "chunk_index": index,
        "bytes_received": before + data.len(),
    })
}

#[track_caller]
fn start(wat: &str, options: &[&str]) -> (Agent, Connection) {
    let modules = tempfile::tempdir().unwrap();
    let agent = Agent::start(&module::write(modules.path(), "m.wasm", wat), &[&["--timeout-ms", "5000"], options].concat());
    let proxy = agent.connect();
    (agent, proxy)
}

fn replacing(data: &str) -> String {
    format!(r#"{{"request_body_mutation":{{"action":"replace","data":"{data}"}}}}"#)
}

#[track_caller]
fn assert_refused(agent: &Agent, answer: &Value, code: &str, detail: &str) {
    assert_eq!((decision(answer), module_error(answer)), ("block", Some(code)), "{answer}");
    assert!(answer.get("request_body_mutation").is_none() && answer.get("needs_more").is_none(), "{answer}");
    agent.log.wait_for_line(detail, |line| line.contains(detail));
}

mod lengths {
    use super::*;

    #[test]
    fn an_announced_one_stays() {
        let (agent, mut proxy) = start(&module::answering(&["on_request_body"], &replacing("****")), &[]);
        proxy.ask(kind::REQUEST_HEADERS, &post("same", Some(4)));
        let answer = proxy.ask(kind::REQUEST_BODY, &chunk("same", 0, b"4111", 0, true));
        assert_eq!(answer["request_body_mutation"], json!({"data": "****", "chunk_index": 0}));

        proxy.ask(kind::REQUEST_HEADERS, &post("other", Some(9)));
        let answer = proxy.ask(kind::REQUEST_BODY, &chunk("other", 0, b"card=4111", 0, true));
        assert_refused(&agent, &answer, "WASM_INVALID_RESULT", "makes 4 bytes of 9, but the request announced 9 bytes");
        agent.end();
    }

    #[test]
    fn an_announced_one_does_not_become_none() {
        let (agent, mut proxy) = start(&module::answering(&["on_request_body"], r#"{"request_body_mutation":{"action":"drop"}}"#), &[]);
        proxy.ask(kind::REQUEST_HEADERS, &post("a", Some(9)));
        let answer = proxy.ask(kind::REQUEST_BODY, &chunk("a", 0, b"card=4111", 0, true));
        assert_refused(&agent, &answer, "WASM_INVALID_RESULT", "makes 0 bytes of 9, but the request announced 9 bytes");
        agent.end();
    }

    #[test]
    fn one_that_nobody_announced_may_change() {
        let (agent, mut proxy) = start(&module::answering(&["on_request_body"], &replacing("more than that")), &[]);
        proxy.ask(kind::REQUEST_HEADERS, &post("a", None));
        let answer = proxy.ask(kind::REQUEST_BODY, &chunk("a", 0, b"4111", 0, true));
        assert_eq!(answer["request_body_mutation"]["data"], "more than that");
        agent.end();
    }

    #[test]
    fn one_that_is_not_known_counts_as_announced() {
        let (agent, mut proxy) = start(&module::answering(&["on_request_body"], &replacing("****")), &[]);
        let answer = proxy.ask(kind::REQUEST_BODY, &chunk("unseen", 0, b"4111", 0, true));
        assert_eq!(answer["request_body_mutation"]["data"], "****");
        // Two live requests of one id: the agent cannot tell whose length it would be.
        for length in [None, Some(9)] {
            proxy.ask(kind::REQUEST_HEADERS, &post("twin", length));
        }
        for id in ["unseen", "twin"] {
            let answer = proxy.ask(kind::REQUEST_BODY, &chunk(id, 0, b"card=4111", 0, true));
            assert_refused(&agent, &answer, "WASM_INVALID_RESULT", "does not know whether the request announced a length");
        }
        agent.end();
    }

    #[test]
    fn where_errors_are_allowed_the_original_goes_on() {
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
    fn a_change_to_a_buffered_request_body_is_an_error() {
        let (agent, mut proxy) = start(&module::answering(&["on_request_body"], &replacing("****")), &[]);
        proxy.ask(kind::REQUEST_HEADERS, &post("a", None));
        let answer = proxy.ask(kind::REQUEST_BODY, &request_body("a", "4111"));
        assert_refused(&agent, &answer, "WASM_INVALID_RESULT", "would be ignored, because the proxy has buffered the body");
        // The first part of a body that is over the proxy's limit.
        let mut part = request_body("b", "4111");
        part["is_last"] = json!(false);
        assert_refused(&agent, &proxy.ask(kind::REQUEST_BODY, &part), "WASM_INVALID_RESULT", "has buffered the body");
        agent.end();
    }

    #[test]
    fn a_change_in_the_answer_of_another_hook_is_an_error() {
        let (agent, mut proxy) = start(&module::answering(&module::PAGE_HOOKS, &replacing("****")), &[]);
        let answer = proxy.get("a", "/");
        assert_refused(&agent, &answer, "WASM_INVALID_RESULT", "would be ignored in an answer of `on_request_headers`");
        let answer = proxy.ask(kind::RESPONSE_BODY, &response_body("b", "4111"));
        assert_refused(&agent, &answer, "WASM_INVALID_RESULT", "would be ignored in an answer of `on_response_body`");
        agent.end();
    }

    #[test]
    fn dropping_a_response_body_is_an_error() {
        for change in [r#"{"action":"drop"}"#, r#"{"action":"replace","data":""}"#] {
            let answer = format!(r#"{{"response_body_mutation":{change}}}"#);
            let (agent, mut proxy) = start(&module::answering(&["on_response_body"], &answer), &[]);
            let answer = proxy.ask(kind::RESPONSE_BODY, &response_body("a", "secret"));
            assert_refused(&agent, &answer, "WASM_INVALID_RESULT", "the proxy sends the original instead of an empty body");
            agent.end();
        }
    }

    #[test]
    fn a_refusal_of_the_last_chunk_is_final() {
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
