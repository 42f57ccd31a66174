//! The agent's life under a proxy that stays.

use serde_json::json;
use std::sync::mpsc;
use std::thread;
use zentinel_wasm_e2e::{Ask, Stack, on_both_transports};

on_both_transports! {
    fn a_restarted_agent_decides_again(transport) {
        let mut stack = Stack::over(transport).start();
        let blocked = Ask::get("/").answer("on_request_headers", &json!({"decision": "block"}));
        assert_eq!(stack.send(&blocked).status(), 403);
        stack.stop_agent();
        let meanwhile = stack.send(&Ask::get("/")).status();
        assert!(meanwhile >= 500, "a closed proxy lets nothing through without its agent: {meanwhile}");
        stack.start_agent();
        stack.wait_until_ready();
        assert_eq!(stack.send(&blocked).status(), 403);
    }

    fn a_looping_call_delays_none_of_the_others(transport) {
        const OTHERS: usize = 9;
        let stack = Stack::over(transport).start();
        let (done, finished) = mpsc::channel();
        thread::scope(|scope| {
            let ask = |what: &'static str, ask: Ask| {
                let (done, stack) = (done.clone(), &stack);
                scope.spawn(move || done.send((what, stack.send(&ask).status())).expect("the test listens"));
            };
            ask("loop", Ask::get("/").query("on_request_headers", "!loop"));
            for _ in 0..OTHERS {
                ask("other", Ask::get("/"));
            }
        });
        let mut order: Vec<_> = finished.try_iter().collect();
        assert_eq!(order.pop(), Some(("loop", 500)), "the loop ends last, by its deadline");
        assert_eq!(order, [("other", 200); OTHERS]);
    }
}
