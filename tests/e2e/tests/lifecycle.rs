//! The agent's lifecycle while the proxy keeps running.

use serde_json::json;
use std::sync::mpsc;
use std::thread;
use zentinel_wasm_e2e::{HttpRequest, Stack, Transport, on_both_transports};

on_both_transports! {
    a_restarted_agent_decides_again
    a_looping_call_does_not_delay_others
}

fn a_restarted_agent_decides_again(transport: Transport) {
    let mut stack = Stack::over(transport).start();
    let blocked = HttpRequest::get("/").answer("on_request_headers", &json!({"decision": "block"}));
    assert_eq!(stack.send(&blocked).status(), 403);
    stack.stop_agent();
    let meanwhile = stack.send(&HttpRequest::get("/")).status();
    assert!(meanwhile >= 500, "the proxy allowed a request without its agent: {meanwhile}");
    stack.start_agent();
    stack.wait_until_ready();
    assert_eq!(stack.send(&blocked).status(), 403);
}

fn a_looping_call_does_not_delay_others(transport: Transport) {
    const OTHERS: usize = 9;
    let stack = Stack::over(transport).start();
    let (done, finished) = mpsc::channel();
    thread::scope(|scope| {
        let send = |name: &'static str, request: HttpRequest| {
            let (done, stack) = (done.clone(), &stack);
            scope.spawn(move || done.send((name, stack.send(&request).status())).expect("the receiver is gone"));
        };
        send("loop", HttpRequest::get("/").query("on_request_headers", "!loop"));
        for _ in 0..OTHERS {
            send("other", HttpRequest::get("/"));
        }
    });
    let mut order: Vec<_> = finished.try_iter().collect();
    assert_eq!(order.pop(), Some(("loop", 500)), "the loop must end last, at its deadline");
    assert_eq!(order, [("other", 200); OTHERS]);
}
