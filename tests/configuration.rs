//! The proxy's `config { }` block: applied whole or rejected whole.

use std::thread;

use rustix::process::Signal;
use serde_json::json;
use testkit::{Admin, Agent, Connection, Program, decision, id_of, kind, module, module_error, request, wait_for};

const AGENT: Program = Program(env!("CARGO_BIN_EXE_zentinel-wasm-agent"));

const RELOADED: &str = r#"wasm_agent_reloads_total{result="success"}"#;

const REJECTED: &str = r#"wasm_agent_reloads_total{result="failure"}"#;

/// Whether a configuration is rejected.
const IS_REJECTED: &str = "wasm_agent_proxy_config_rejected";

/// In MiB. The modules of these tests start with 12 MiB of memory.
const ENOUGH_MEMORY: u64 = 16;

fn start(wat: &str, options: &[&str]) -> (Agent, Admin) {
    let modules = tempfile::tempdir().unwrap();
    let file = module::write(modules.path(), "m.wasm", wat);
    let agent = AGENT.start(&file, &[&["--admin-address", "127.0.0.1:0"], options].concat());
    let admin = agent.admin();
    (agent, admin)
}

/// Whether a trap on this connection is answered with an allow.
#[track_caller]
fn is_fail_open(connection: &mut Connection) -> bool {
    let answer = connection.get("trap", "/t");
    assert_eq!(module_error(&answer), Some("WASM_TRAP"), "{answer}");
    decision(&answer) == "allow"
}

/// Completes a handshake with a configuration.
fn shake_hands_with(agent: &Agent, config: serde_json::Value) -> (Connection, serde_json::Value) {
    let mut proxy = Connection::open_silent(&agent.socket);
    let hello = json!({"supported_versions": [2], "proxy_id": "test", "proxy_version": "0.6.54", "config": config});
    proxy.send(kind::HANDSHAKE_REQUEST, &hello);
    let (got, handshake) = proxy.receive().expect("the agent closed the connection during the handshake");
    assert_eq!(got, kind::HANDSHAKE_RESPONSE);
    (proxy, handshake)
}

mod settings {
    use super::*;

    #[test]
    fn apply_to_every_connection() {
        let (agent, _) = start(&module::choosing(), &[]);
        let (mut proxy, mut other) = (agent.connect(), agent.connect());
        assert!(!is_fail_open(&mut proxy) && !is_fail_open(&mut other));
        proxy.configure(&json!({"fail-open": true})).unwrap();
        assert!(is_fail_open(&mut proxy) && is_fail_open(&mut other));
        // A setting that is no longer configured has the command line's value again.
        other.configure(&json!({})).unwrap();
        assert!(!is_fail_open(&mut proxy) && !is_fail_open(&mut other));
        agent.end();
    }

    #[test]
    fn may_come_in_the_handshake() {
        let (agent, _) = start(&module::choosing(), &[]);
        let (mut proxy, handshake) = shake_hands_with(&agent, json!({"fail-open": true}));
        assert_eq!(handshake["success"], true);
        assert!(is_fail_open(&mut proxy));
        let (_, handshake) = shake_hands_with(&agent, json!({"fail-open": 7}));
        assert_eq!(handshake["success"], false);
        assert!(handshake["error"].as_str().unwrap().contains("`fail-open` is 7: expected true or false"), "{handshake}");
        assert!(is_fail_open(&mut proxy));
    }

    #[test]
    fn sent_again_change_nothing() {
        let (agent, admin) = start(&module::choosing(), &[]);
        let config = json!({"pool-size": 2, "timeout-ms": 5000});
        let mut proxies: Vec<_> = (0..4).map(|_| agent.connect()).collect();
        for _ in 0..3 {
            for proxy in &mut proxies {
                proxy.configure(&config).unwrap();
            }
        }
        // The same in the other spelling, and as floating-point numbers, KDL's only kind.
        proxies[0].configure(&json!({"pool_size": 2.0, "timeout_ms": 5000.0})).unwrap();
        assert_eq!((admin.metric(RELOADED), admin.metric(REJECTED)), (1.0, 0.0));
        assert_eq!(admin.metric("wasm_agent_pool_available"), 2.0);
    }

    #[test]
    fn may_be_sent_by_connections_at_once() {
        let (agent, admin) = start(&module::choosing(), &[]);
        let config = json!({"pool-size": 3, "fail-open": true});
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let mut proxy = agent.connect();
                    proxy.configure(&config).unwrap();
                    // It applies to the very next event.
                    assert!(is_fail_open(&mut proxy));
                });
            }
        });
        assert_eq!(admin.metric(RELOADED), 1.0);
    }

    #[test]
    fn have_two_spellings() {
        for spelling in ["-", "_"] {
            let key = |name: &str| name.replace('-', spelling);

            let (agent, admin) = start(&module::choosing(), &[]);
            let mut proxy = agent.connect();
            proxy.configure(&json!({key("fail-open"): true})).unwrap();
            assert!(is_fail_open(&mut proxy));

            proxy.configure(&json!({key("pool-size"): 7})).unwrap();
            assert_eq!(admin.metric("wasm_agent_pool_available"), 7.0);

            // A loop ends at its deadline. With the first of these, the test would not end.
            proxy.configure(&json!({key("timeout-ms"): 60_000})).unwrap();
            proxy.configure(&json!({key("timeout-ms"): 5})).unwrap();
            assert_eq!(module_error(&proxy.get("loop", "/l")), Some("WASM_TIMEOUT"));

            let reason = proxy.configure(&json!({key("max-memory-mb"): 1})).unwrap_err();
            assert!(reason.contains("more than the limit of 1048576"), "{reason}");
            proxy.configure(&json!({key("max-memory-mb"): ENOUGH_MEMORY})).unwrap();

            let (agent, _) = start(&module::counting(), &["--pool-size", "1"]);
            let mut proxy = agent.connect();
            let counted = |proxy: &mut Connection| [0; 3].map(|_| module::count(&proxy.get("a", "/")));
            assert_eq!(counted(&mut proxy), [1, 2, 3]);
            proxy.configure(&json!({key("isolation"): "request"})).unwrap();
            assert_eq!(counted(&mut proxy), [1, 1, 1]);
            proxy.configure(&json!({key("isolation"): "pooled"})).unwrap();
            assert_eq!(counted(&mut proxy), [1, 2, 3]);

            let (agent, _) = start(&module::configurable(), &[]);
            let mut proxy = agent.connect();
            proxy.configure(&json!({key("module-config"): {"a": [1]}})).unwrap();
            assert_eq!(module::seen(&proxy.get("a", "/")), json!({"a": [1]}));
        }
    }

    #[test]
    fn change_without_an_error_for_running_requests() {
        let (agent, admin) = start(&module::configurable(), &["--module-config", "0", "--timeout-ms", "20000"]);
        let done = std::sync::atomic::AtomicBool::new(false);
        thread::scope(|scope| {
            let load = scope.spawn(|| {
                let mut proxy = agent.connect();
                let mut last = 0;
                while !done.load(std::sync::atomic::Ordering::SeqCst) {
                    for number in 0..16 {
                        proxy.send(kind::REQUEST_HEADERS, &request(&number.to_string(), "/"));
                    }
                    let mut newest = last;
                    for _ in 0..16 {
                        let answer = proxy.answer();
                        assert_eq!(module_error(&answer), None, "{answer}");
                        let seen = module::seen(&answer).as_u64().unwrap();
                        assert!(seen >= last, "{} went back from {last} to {seen}", id_of(&answer));
                        newest = newest.max(seen);
                    }
                    last = newest;
                }
                last
            });
            let mut proxy = agent.connect();
            for number in 1..=30 {
                proxy.configure(&json!({"module-config": number})).unwrap();
            }
            done.store(true, std::sync::atomic::Ordering::SeqCst);
            assert!(load.join().unwrap() > 0);
        });
        assert_eq!(admin.metric(RELOADED), 30.0);
    }
}

mod rejected {
    use super::*;

    #[test]
    fn whole_with_every_reason() {
        let (agent, admin) = start(&module::choosing(), &[]);
        let mut proxy = agent.connect();
        let reason = proxy.configure(&json!({"fail-open": true, "pool-size": 0, "colour": "red"})).unwrap_err();
        assert_eq!(
            reason,
            "unknown key `colour`: expected one of pool-size, fail-open, timeout-ms, max-memory-mb, isolation, collect-request-body, module-config; \
         `pool-size` is 0: expected a whole number from 1 to 1024"
        );
        assert!(!is_fail_open(&mut proxy));
        assert_eq!((admin.metric(RELOADED), admin.metric(REJECTED)), (0.0, 1.0));
        agent.log.wait_for_entry("the reason", |entry| {
            entry["level"] == "WARN"
                && entry["message"].as_str().unwrap().contains("rejected the proxy's configuration: unknown key `colour`")
        });
        for bad in [
            json!([]),
            json!("fail-open"),
            json!({"fail-open": "yes"}),
            json!({"fail-open": 1}),
            json!({"pool-size": 1.5}),
            json!({"pool-size": -1}),
            json!({"pool-size": 1_000_000}),
            json!({"timeout-ms": "40"}),
            json!({"timeout-ms": 0}),
            json!({"max-memory-mb": 5000}),
            json!({"isolation": "none"}),
            json!({"module-config": "{"}),
            json!({"FAIL-OPEN": true}),
        ] {
            let reason = proxy.configure(&bad).unwrap_err();
            assert!(!reason.is_empty() && !reason.contains('\n'), "{bad}: {reason}");
            assert!(!is_fail_open(&mut proxy), "{bad}");
        }
    }

    #[test]
    fn keeps_the_previous_configuration() {
        let (agent, _) = start(&module::choosing(), &[]);
        let mut proxy = agent.connect();
        proxy.configure(&json!({"fail-open": true})).unwrap();
        proxy.configure(&json!({"fail-open": false, "pool-size": "x"})).unwrap_err();
        assert!(is_fail_open(&mut proxy));
    }

    #[test]
    fn when_too_deep_or_too_large() {
        let (agent, _) = start(&module::choosing(), &[]);
        let mut good = agent.connect();
        let many = format!("[{}1]", "{\"\":1},".repeat(50_000));
        let large = format!("\"{}\"", "x".repeat(5 << 20));
        let texts = testkit::nested_texts();
        for config in [&texts, &format!("{{\"a\":{texts}}}"), &many, &large] {
            let mut proxy = Connection::open_silent(&agent.socket);
            let hello = format!(r#"{{"supported_versions":[2],"proxy_id":"test","proxy_version":"0.6.54","config":{config}}}"#);
            proxy.send_raw(&testkit::frame(kind::HANDSHAKE_REQUEST, hello.as_bytes()));
            let (_, handshake) = proxy.receive().expect("the agent closed the connection during the handshake");
            assert_eq!(handshake["success"], false);

            let mut proxy = agent.connect();
            proxy.send_raw(&testkit::frame(kind::CONFIGURE, format!(r#"{{"correlation_id":"c","config":{config}}}"#).as_bytes()));
            // The readable ones are answered.
            if config.contains(&texts) {
                assert_eq!(proxy.answer()["decision"]["block"]["status"], 400);
            }
            assert_eq!(decision(&proxy.get("a", "/")), "allow");
        }
        // As many keys as fit. The reason names only some.
        let keys: serde_json::Map<String, serde_json::Value> = (0..40_000).map(|at| (format!("key-{at}"), json!(1))).collect();
        let reason = good.configure(&keys.into()).unwrap_err();
        assert!(reason.len() < 2000, "{} bytes", reason.len());
        assert_eq!(decision(&good.get("a", "/")), "allow");
        agent.end_unharmed();
    }
}

mod rejection {
    use super::*;

    const REASON: &str = "rejected the proxy's configuration: `fail-open` is 7: expected true or false";

    /// How many log lines contain `text`, once a line contains `until`, which is logged later.
    fn logged_until(agent: &Agent, text: &str, until: &str) -> usize {
        let until = agent.log.wait_for_line(until, |line| line.contains(until));
        agent.log.lines().iter().take_while(|line| **line != until).filter(|line| line.contains(text)).count()
    }

    #[test]
    fn shows_in_health_until_a_configuration_is_accepted() {
        let (agent, admin) = start(&module::choosing(), &[]);
        assert_eq!(admin.metric(IS_REJECTED), 0.0);
        let mut proxy = agent.connect();
        proxy.configure(&json!({"fail-open": true})).unwrap();
        agent.connect().configure(&json!({"fail-open": 7})).unwrap_err();
        // Nobody is connected that has sent it. The reports to the others have it too.
        assert_eq!(admin.get("/healthz"), (200, format!("degraded: {REASON}\n")));
        assert_eq!(admin.get("/readyz"), (200, "ready\n".into()));
        assert_eq!(admin.metric(IS_REJECTED), 1.0);
        wait_for("the report", || (proxy.report(kind::HEALTH_STATUS)["message"] == REASON).then_some(()));
        // Even if it is the current one and changes nothing.
        proxy.configure(&json!({"fail-open": true})).unwrap();
        assert_eq!(admin.get("/healthz"), (200, "healthy\n".into()));
        assert_eq!((admin.metric(IS_REJECTED), admin.metric(RELOADED), admin.metric(REJECTED)), (0.0, 1.0, 1.0));
    }

    #[test]
    fn of_every_connection_is_logged_and_counted_once() {
        let (agent, admin) = start(&module::choosing(), &[]);
        for _ in 0..3 {
            for _ in 0..4 {
                agent.connect().configure(&json!({"fail-open": 7})).unwrap_err();
                assert_eq!(shake_hands_with(&agent, json!({"fail-open": 7})).1["success"], false);
                // Another proxy has another one.
                agent.connect().configure(&json!({"pool-size": 0})).unwrap_err();
            }
        }
        assert_eq!(admin.metric(REJECTED), 2.0);
        let health = admin.get("/healthz").1;
        assert!(health.contains(REASON) && health.contains("; rejected the proxy's configuration: `pool-size` is 0"), "{health}");
        agent.connect().configure(&json!({"pool-size": 3})).unwrap();
        assert_eq!(admin.get("/healthz").1, "healthy\n");
        assert_eq!(logged_until(&agent, REASON, "accepted the proxy's configuration"), 1);
        assert_eq!(logged_until(&agent, "rejected the proxy's configuration", "accepted the proxy's configuration"), 2);
        // A rejection after that is news.
        agent.connect().configure(&json!({"fail-open": 7})).unwrap_err();
        assert_eq!((admin.metric(REJECTED), admin.metric(IS_REJECTED)), (3.0, 1.0));
        wait_for("the second line", || (agent.log.lines().iter().filter(|line| line.contains(REASON)).count() == 2).then_some(()));
    }

    #[test]
    fn by_the_module_ends_with_a_reload() {
        let modules = tempfile::tempdir().unwrap();
        let file = module::write(modules.path(), "m.wasm", &module::configurable());
        let agent = AGENT.start(&file, &["--admin-address", "127.0.0.1:0"]);
        let admin = agent.admin();
        let config = json!({"module-config": "\"loud!\""});
        agent.connect().configure(&config).unwrap_err();
        agent.connect().configure(&json!({"fail-open": 7})).unwrap_err();
        assert!(admin.get("/healthz").1.contains("no exclamation marks"));
        // A module that takes any configuration.
        module::write(modules.path(), "m.wasm", &module::choosing());
        agent.signal(Signal::HUP);
        admin.wait_for_metric(RELOADED, 1.0);
        // No module makes a setting valid.
        wait_for("health", || (admin.get("/healthz").1 == format!("degraded: {REASON}\n")).then_some(()));
        assert_eq!(admin.metric(IS_REJECTED), 1.0);
        agent.connect().configure(&config).unwrap();
        assert_eq!((admin.get("/healthz").1.as_str(), admin.metric(IS_REJECTED)), ("healthy\n", 0.0));
    }
}

mod module_config {
    use super::*;

    #[test]
    fn may_come_from_a_file() {
        let modules = tempfile::tempdir().unwrap();
        let file = module::write(modules.path(), "m.wasm", &module::configurable());
        let config = modules.path().join("config.json");
        std::fs::write(&config, "\n{\"from\": \"a file\"}\n").unwrap();
        let agent = AGENT.start(&file, &["--module-config", &format!("@{}", config.display())]);
        assert_eq!(module::seen(&agent.connect().get("a", "/")), json!({"from": "a file"}));
    }

    #[test]
    fn reaches_every_instance_before_its_next_call() {
        let (agent, _) =
            start(&module::configurable(), &["--pool-size", "8", "--module-config", r#"{"generation":0}"#, "--timeout-ms", "20000"]);
        let mut proxies: Vec<_> = (0..4).map(|_| agent.connect()).collect();
        for generation in 0..20 {
            if generation > 0 {
                proxies[0].configure(&json!({"module-config": {"generation": generation}})).unwrap();
            }
            for proxy in &mut proxies {
                for number in 0..16 {
                    proxy.send(kind::REQUEST_HEADERS, &request(&number.to_string(), "/"));
                }
            }
            for proxy in &mut proxies {
                for _ in 0..16 {
                    assert_eq!(module::seen(&proxy.answer()), json!({"generation": generation}));
                }
            }
        }
    }

    #[test]
    fn may_be_rejected_by_the_module() {
        let (agent, _) = start(&module::configurable(), &["--module-config", r#""calm""#]);
        let mut proxy = agent.connect();
        let reason = proxy.configure(&json!({"module-config": "\"loud!\"", "pool-size": 1})).unwrap_err();
        assert!(reason.ends_with("rejects its configuration: no exclamation marks"), "{reason}");
        assert_eq!(module::seen(&proxy.get("a", "/")), json!("calm"));
    }

    #[test]
    fn rejected_at_the_start_ends_the_agent() {
        let modules = tempfile::tempdir().unwrap();
        let file = module::write(modules.path(), "m.wasm", &module::configurable());
        let mut agent = AGENT.launch(&file, |command| {
            command.args(["--module-config", r#""loud!""#]);
        });
        assert_eq!(agent.wait().code(), Some(1));
        assert!(agent.log.whole().contains("rejects its configuration: no exclamation marks"));
    }

    #[test]
    fn without_a_hook_is_logged_once() {
        const CONFIGURATIONS: usize = 5;
        let (agent, admin) = start(&module::choosing(), &[]);
        let mut proxy = agent.connect();
        for number in 0..CONFIGURATIONS {
            proxy.configure(&json!({"module-config": number})).unwrap();
        }
        assert_eq!(admin.metric(RELOADED), CONFIGURATIONS as f64);
        let count = |text: &str| agent.log.entries().iter().filter(|entry| entry["message"].as_str().unwrap().contains(text)).count();
        wait_for("the log", || (count("applied the proxy's configuration") == CONFIGURATIONS).then_some(()));
        assert_eq!(count("does not export `on_configure`"), 1);
    }
}

mod reload {
    use super::*;

    #[test]
    fn keeps_the_proxys_settings() {
        let modules = tempfile::tempdir().unwrap();
        let file = module::write(modules.path(), "m.wasm", &module::configurable());
        let agent = AGENT.start(&file, &["--admin-address", "127.0.0.1:0"]);
        let admin = agent.admin();
        let mut proxy = agent.connect();
        proxy.configure(&json!({"module-config": {"kept": true}, "pool-size": 3})).unwrap();
        agent.signal(Signal::HUP);
        admin.wait_for_metric(RELOADED, 2.0);
        assert_eq!(module::seen(&proxy.get("a", "/")), json!({"kept": true}));
        assert_eq!(admin.metric("wasm_agent_pool_available"), 3.0);
    }

    #[test]
    fn failure_is_not_hidden_by_new_settings() {
        let modules = tempfile::tempdir().unwrap();
        let file = module::write(modules.path(), "m.wasm", &module::choosing());
        let agent = AGENT.start(&file, &["--admin-address", "127.0.0.1:0"]);
        let admin = agent.admin();
        std::fs::write(&file, "not a module").unwrap();
        agent.signal(Signal::HUP);
        admin.wait_for_metric(REJECTED, 1.0);
        let mut proxy = agent.connect();
        // They apply to the current module, whatever its file contains now.
        proxy.configure(&json!({"pool-size": 2, "fail-open": true})).unwrap();
        assert!(is_fail_open(&mut proxy));
        assert!(admin.get("/healthz").1.starts_with("degraded: reload failed: cannot serve the module"));
    }
}
