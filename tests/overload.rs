//! More events than instances, and the circuit breaker for a module that fails every call.

use std::time::Duration;

use testkit::{Agent, Program, decision, id_of, kind, module, module_error, request, wait_for};

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

#[test]
fn circuit_opens_when_every_call_fails_and_closes_after_a_probe() {
    let agent = start(&module::choosing(), &["--timeout-ms", "20000"]);
    let admin = agent.admin();
    let mut proxy = agent.connect();
    // 100 failures are not enough. Nothing but failures for 10 s is.
    let mut failures = 0;
    wait_for("the circuit to open", || {
        std::thread::sleep(Duration::from_millis(20));
        match module_error(&proxy.get("bad", "/t")) {
            Some("WASM_TRAP") => failures += 1,
            Some("WASM_CIRCUIT_OPEN") => return Some(()),
            other => panic!("{other:?}"),
        }
        None
    });
    assert!(failures >= 100, "{failures}");
    assert_eq!(admin.metric("wasm_agent_circuit_open"), 1.0);
    assert_eq!(admin.get("/healthz"), (200, "degraded: circuit open: every call fails; probing once a second\n".into()));
    assert_eq!(admin.get("/readyz").0, 503);
    wait_for("the report", || (proxy.report(kind::HEALTH_STATUS)["health_state"]["status"] == "degraded").then_some(()));
    agent.log.wait_for_entry("the opened circuit", |entry| entry["message"].as_str().unwrap().contains("circuit open"));

    // Good requests fail as well for now, by the failure mode.
    let answer = proxy.get("good", "/");
    if module_error(&answer) == Some("WASM_CIRCUIT_OPEN") {
        assert_eq!(answer["decision"]["block"]["status"], 500);
    }
    // Failing probes keep it open.
    wait_for("a failing probe", || {
        let opened = admin.metric("wasm_agent_circuit_open");
        let error = module_error(&proxy.get("bad", "/t")).map(str::to_owned);
        assert!(opened == 1.0 || error.is_some());
        (error.as_deref() == Some("WASM_TRAP")).then_some(())
    });
    // The first successful one closes it.
    wait_for("a successful probe", || module_error(&proxy.get("good", "/")).is_none().then_some(()));
    assert_eq!(module_error(&proxy.get("good", "/")), None);
    assert_eq!(admin.metric("wasm_agent_circuit_open"), 0.0);
    assert_eq!(admin.get("/healthz"), (200, "healthy\n".into()));
    assert_eq!(admin.get("/readyz").0, 200);
    agent.log.wait_for_entry("the closed circuit", |entry| entry["message"].as_str().unwrap().contains("circuit closed"));
}
