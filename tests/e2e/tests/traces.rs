//! Spans of requests through the real proxy, for a collector.

#[path = "../../common/otlp.rs"]
mod received;

use received::{span_of, spans};
use serde_json::{Value, json};
use testkit::Collector;
use zentinel_wasm_e2e::{HttpRequest, Stack, Transport, on_both_transports};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

/// The `traceparent` that the upstream received.
fn upstream_saw(received: &Value) -> String {
    let headers = received["headers"].as_array().expect("the upstream did not list the headers");
    let header = headers.iter().find(|pair| pair[0].as_str().is_some_and(|name| name.eq_ignore_ascii_case("traceparent")));
    header.expect("no traceparent")[1].as_str().unwrap().to_owned()
}

mod spans_of_requests {
    use super::*;

    on_both_transports! {
        are_in_the_trace_that_the_upstream_sees
    }

    fn are_in_the_trace_that_the_upstream_sees(transport: Transport) {
        let collector = Collector::start();
        let stack = Stack::over(transport).agent_args(&["--otlp-endpoint", &collector.url()]).start();
        let with = |id: &str, flags: &str| {
            let traceparent = format!("00-{TRACE}-00f067aa0ba902b7-{flags}");
            HttpRequest::get("/").header("X-Request-Id", id).header("traceparent", &traceparent)
        };
        let response = stack.send(&with("unsampled", "00"));
        assert_eq!(response.status(), 200);
        let response = stack.send(&with("sampled", "01"));
        assert_eq!(response.status(), 200);
        let upstream = upstream_saw(&response.json());
        assert!(upstream.contains(TRACE), "{upstream}");
        for hook in ["on_request_headers", "on_response_headers"] {
            let received = span_of(&collector, "sampled", hook);
            assert_eq!(received.trace_id(), upstream.split('-').nth(1).unwrap(), "{hook}");
            // The proxy that is built without tracing passes the client's header on.
            assert_eq!(received.parent(), upstream.split('-').nth(2).unwrap(), "{hook}");
        }
        let blocked = HttpRequest::get("/").answer("on_request_headers", &json!({"decision": "block", "status": 451}));
        assert_eq!(stack.send(&blocked.header("X-Request-Id", "blocked")).status(), 451);
        let received = span_of(&collector, "blocked", "on_request_headers");
        assert_eq!((&*received.attributes["wasm.decision"], &*received.attributes["wasm.status"]), ("block", "451"));
        assert_ne!(received.trace_id(), TRACE);
        assert!(spans(&collector).iter().all(|received| received.id() != "unsampled"));
    }
}
