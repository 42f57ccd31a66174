//! More events than instances, and the circuit breaker for a module that fails every call.

#[path = "common/short_timeouts.rs"]
mod short_timeouts;

use std::time::Duration;

use serde_json::{Value, json};
use testkit::{Agent, PATIENCE, Program, decision, id_of, kind, module, module_error, request, response, wait_for};

const AGENT: Program = Program(env!("CARGO_BIN_EXE_zentinel-wasm-agent"));

fn start(wat: &str, options: &[&str]) -> Agent {
    let modules = tempfile::tempdir().unwrap();
    AGENT.start(&module::write(modules.path(), "m.wasm", wat), &[&["--admin-address", "127.0.0.1:0"], options].concat())
}

#[test]
fn waiting_events_are_served_in_order() {
    const EVENTS: usize = 40;
    let agent = start(&module::busy(20, "served"), &["--pool-size", "1", "--timeout-ms", "60000"]);
    let mut proxy = agent.connect();
    for number in 0..EVENTS {
        proxy.send(kind::REQUEST_HEADERS, &request(&number.to_string(), "/"));
    }
    wait_for("waiting calls", || (agent.admin().metric("wasm_agent_pool_waiting") > 1.0).then_some(()));
    for number in 0..EVENTS {
        let answer = proxy.answer();
        assert_eq!(module_error(&answer), None, "{answer}");
        assert_eq!(id_of(&answer), number.to_string(), "out of order");
    }
    assert_eq!(agent.admin().metric("wasm_agent_pool_waiting"), 0.0);
    assert_eq!(agent.admin().metric("wasm_agent_pool_available"), 1.0);
}

#[test]
fn events_that_wait_beyond_their_deadline_are_overloaded() {
    const EVENTS: usize = 20;
    for (options, decided) in [(&[][..], "block"), (&["--fail-open"], "allow")] {
        let agent = start(&module::busy(400, "served"), &[&["--pool-size", "1", "--timeout-ms", "1000"], options].concat());
        let mut proxy = agent.connect();
        for number in 0..EVENTS {
            proxy.send(kind::REQUEST_HEADERS, &request(&number.to_string(), "/"));
        }
        let mut overloaded = 0;
        for _ in 0..EVENTS {
            let answer = proxy.answer();
            match module_error(&answer) {
                Some("WASM_OVERLOADED") => overloaded += 1,
                // It got an instance, but too late to finish.
                Some("WASM_TIMEOUT") => {}
                None => continue,
                Some(other) => panic!("{other}"),
            }
            assert_eq!(decision(&answer), decided);
        }
        // A call takes 400 ms, and all have 1 s, so most of them cannot be served.
        assert!(overloaded >= EVENTS / 2, "{overloaded}");
        assert_eq!(agent.admin().metric(r#"wasm_agent_errors_total{kind="overloaded"}"#), f64::from(overloaded as u32));
        // Overload does not make the module unhealthy.
        assert_eq!(agent.admin().get("/healthz").1, "healthy\n");
    }
}

#[test]
fn ends_when_the_queue_is_empty() {
    let agent = start(&module::busy(200, "served"), &["--pool-size", "1", "--timeout-ms", "5000"]);
    let mut proxy = agent.connect();
    for number in 0..100 {
        proxy.send(kind::REQUEST_HEADERS, &request(&number.to_string(), "/"));
    }
    for _ in 0..100 {
        proxy.answer();
    }
    assert_eq!(module_error(&proxy.get("after", "/")), None);
}

mod circuit {
    use super::*;

    const OPEN: &str = r#"wasm_agent_hook_circuit_open{hook="on_request_headers"}"#;

    const REASON: &str = "circuit open for on_request_headers: every call fails; probing once a second";

    fn start(wat: &str, idle: Duration) -> Agent {
        let modules = tempfile::tempdir().unwrap();
        let file = module::write(modules.path(), "m.wasm", wat);
        short_timeouts::start_with_short_breaker(&file, &["--admin-address", "127.0.0.1:0", "--timeout-ms", "20000"], idle)
    }

    /// Sends events that fail until the circuit is open. Returns how many reached the module.
    #[track_caller]
    fn open(mut fail: impl FnMut() -> Value) -> usize {
        let mut failures = 0;
        wait_for("the circuit to open", || {
            match module_error(&fail()) {
                Some("WASM_TRAP") => failures += 1,
                Some("WASM_CIRCUIT_OPEN") => return Some(()),
                other => panic!("{other:?}"),
            }
            None
        });
        failures
    }

    #[test]
    fn opens_when_every_call_fails_and_closes_after_a_probe() {
        let agent = start(&module::choosing(), PATIENCE);
        let admin = agent.admin();
        let mut proxy = agent.connect();
        // Both 100 failures and nothing but failures for a while are needed.
        let failures = open(|| proxy.get("bad", "/t"));
        assert!(failures >= 100, "{failures}");
        for metric in ["wasm_agent_circuit_open", OPEN] {
            assert_eq!(admin.metric(metric), 1.0, "{metric}");
        }
        assert_eq!(admin.metric(r#"wasm_agent_hook_circuit_open{hook="on_response_headers"}"#), 0.0);
        assert_eq!(admin.get("/healthz"), (200, format!("degraded: {REASON}\n")));
        assert_eq!(admin.get("/readyz"), (503, format!("not ready: {REASON}\n")));
        wait_for("the report", || {
            let report = proxy.report(kind::HEALTH_STATUS);
            (report["health_state"]["status"] == "degraded" && report["message"] == REASON).then_some(())
        });
        let entry = agent.log.wait_for_entry("the opened circuit", |entry| entry["message"] == REASON);
        assert_eq!((&entry["level"], &entry["hook"]), (&json!("WARN"), &json!("on_request_headers")));

        // Good requests fail as well for now, by the failure mode.
        let answer = proxy.get("good", "/");
        if module_error(&answer) == Some("WASM_CIRCUIT_OPEN") {
            assert_eq!(answer["decision"]["block"]["status"], 500);
        }
        // Failing probes keep it open.
        wait_for("a failing probe", || {
            let opened = admin.metric(OPEN);
            let error = module_error(&proxy.get("bad", "/t")).map(str::to_owned);
            assert!(opened == 1.0 || error.is_some());
            (error.as_deref() == Some("WASM_TRAP")).then_some(())
        });
        // The first successful one closes it.
        wait_for("a successful probe", || module_error(&proxy.get("good", "/")).is_none().then_some(()));
        assert_eq!(module_error(&proxy.get("good", "/")), None);
        for metric in ["wasm_agent_circuit_open", OPEN] {
            assert_eq!(admin.metric(metric), 0.0, "{metric}");
        }
        assert_eq!(admin.get("/healthz"), (200, "healthy\n".into()));
        assert_eq!(admin.get("/readyz").0, 200);
        let entry = agent.log.wait_for_entry("the closed circuit", |entry| {
            entry["message"].as_str().unwrap().contains("circuit closed for on_request_headers")
        });
        assert_eq!(entry["hook"], "on_request_headers");
    }

    #[test]
    fn of_one_hook_does_not_concern_the_others() {
        let trap =
            |failing: &'static str| move |hook: &str| if hook == failing { "unreachable".to_owned() } else { "i64.const 0".to_owned() };
        let hooks = ["on_request_headers", "on_response_headers"];
        for [failing, other] in [hooks, [hooks[1], hooks[0]]] {
            let agent = start(&module::with_hooks(&hooks, trap(failing), ""), PATIENCE);
            let admin = agent.admin();
            let mut proxy = agent.connect();
            let mut ask = |hook: &str| match hook {
                "on_request_headers" => proxy.get("a", "/"),
                _ => proxy.ask(kind::RESPONSE_HEADERS, &response("a", 200)),
            };
            // A success of the other hook after each failure.
            open(|| {
                assert_eq!(module_error(&ask(other)), None);
                ask(failing)
            });
            assert_eq!(module_error(&ask(other)), None);
            let reason = format!("circuit open for {failing}: ");
            for (path, status) in [("/healthz", 200), ("/readyz", 503)] {
                let (got, text) = admin.get(path);
                assert!(got == status && text.contains(&reason), "{path}: {got} {text}");
            }
            for (hook, open) in [(failing, 1.0), (other, 0.0)] {
                assert_eq!(admin.metric(&format!("wasm_agent_hook_circuit_open{{hook=\"{hook}\"}}")), open, "{hook}");
            }
        }
    }

    #[test]
    fn without_calls_does_not_prevent_readiness() {
        let agent = start(&module::choosing(), Duration::from_secs(1));
        let admin = agent.admin();
        let mut proxy = agent.connect();
        open(|| proxy.get("bad", "/t"));
        // No request arrives, as when an orchestrator sends them elsewhere.
        wait_for("readiness", || (admin.get("/readyz").0 == 200).then_some(()));
        assert_eq!(admin.get("/healthz"), (200, format!("degraded: {REASON}\n")));
        // The next one is a probe.
        assert_eq!(module_error(&proxy.get("bad", "/t")), Some("WASM_TRAP"));
        wait_for("the agent not to be ready", || {
            proxy.get("bad", "/t");
            (admin.get("/readyz") == (503, format!("not ready: {REASON}\n"))).then_some(())
        });
    }
}
