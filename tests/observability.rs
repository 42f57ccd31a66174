//! Health and metrics, in the protocol and over HTTP, and the log.

use std::collections::BTreeSet;

use rustix::process::Signal;
use serde_json::{Value, json};
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use testkit::{
    Admin, Agent, Connection, PATIENCE, Program, decision, frame, id_of, kind, module, module_error, request, response, wait_for,
};

const AGENT: Program = Program(env!("CARGO_BIN_EXE_zentinel-wasm-agent"));

const ADMIN: [&str; 2] = ["--admin-address", "127.0.0.1:0"];

fn start(wat: &str, options: &[&str]) -> Agent {
    let modules = tempfile::tempdir().unwrap();
    AGENT.start(&module::write(modules.path(), "m.wasm", wat), options)
}

/// An agent that has allowed, failed and reloaded, so every metric has a series.
fn well_used() -> (Agent, Admin) {
    let modules = tempfile::tempdir().unwrap();
    let file = module::write(modules.path(), "m.wasm", &module::choosing());
    let agent = AGENT.start(&file, &ADMIN);
    let admin = agent.admin();
    let mut proxy = agent.connect();
    proxy.get("a", "/");
    proxy.get("b", "/t");
    agent.signal(Signal::HUP);
    admin.wait_for_metric(r#"wasm_agent_reloads_total{result="success"}"#, 1.0);
    (agent, admin)
}

/// The names of the metrics in `/metrics`.
fn names(admin: Admin) -> BTreeSet<String> {
    let (_, text) = admin.get("/metrics");
    text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next().map(str::to_owned)).collect()
}

/// Runs promtool with `input`. Returns its success and output, or None when promtool is missing.
fn promtool(arguments: &[&str], input: &[u8]) -> Option<(bool, String)> {
    let started = Command::new("promtool").args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let Ok(mut child) = started else {
        eprintln!("skipped: promtool is missing (Debian: apt-get install prometheus)");
        return None;
    };
    child.stdin.take().unwrap().write_all(input).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    Some((output.status.success(), text.into_owned()))
}

mod reports {
    use super::*;

    #[test]
    fn follow_the_handshake() {
        let agent = start(&module::choosing(), &[]);
        let mut proxy = agent.connect();
        let health = proxy.report(kind::HEALTH_STATUS);
        assert_eq!(health["agent_id"], "zentinel-wasm-agent");
        assert_eq!(health["health_state"], json!({"status": "healthy"}));
        assert!(health["timestamp_ms"].as_u64().unwrap() > 1_600_000_000_000);
        assert!(health["valid_until_ms"].as_u64() > health["timestamp_ms"].as_u64());
        let metrics = proxy.report(kind::METRICS_REPORT);
        assert_eq!(metrics["agent_id"], "zentinel-wasm-agent");
        for (group, name) in [
            ("counters", "wasm_agent_requests_total"),
            ("gauges", "wasm_agent_in_flight"),
            ("histograms", "wasm_agent_call_duration_seconds"),
        ] {
            assert!(metrics[group].as_array().unwrap().iter().any(|metric| metric["name"] == name), "no {name} in {group}");
        }
    }

    #[test]
    fn are_repeated_unasked() {
        let agent = start(&module::choosing(), &[]);
        let mut proxy = agent.connect();
        proxy.get("a", "/t");
        let counter = |report: &Value, name: &str, label: Value| {
            report["counters"].as_array().unwrap().iter().find(|metric| metric["name"] == name && metric["labels"] == label).unwrap()["value"]
            .clone()
        };
        wait_for("a report with the trap", || {
            let report = proxy.report(kind::METRICS_REPORT);
            // A report may be made between the request and its error.
            let counted = counter(&report, "wasm_agent_errors_total", json!({"kind": "trap"})) == 1;
            assert!(!counted || counter(&report, "wasm_agent_requests_total", json!({})) == 1);
            counted.then_some(())
        });
        wait_for("the health report", || (proxy.report(kind::HEALTH_STATUS)["load"]["requests_processed"] == 1).then_some(()));
    }

    #[test]
    fn have_the_latency_of_calls_and_the_timeouts() {
        let agent = start(&module::busy(20, "x"), &[&ADMIN[..], &["--timeout-ms", "20000"]].concat());
        let mut proxy = agent.connect();
        let load = proxy.report(kind::HEALTH_STATUS)["load"].clone();
        assert_eq!((&load["avg_latency_ms"], &load["requests_rejected"], &load["requests_timed_out"]), (&json!(0.0), &json!(0), &json!(0)));
        proxy.get("a", "/");
        agent.signal(Signal::HUP);
        let load = wait_for("a report of it", || {
            let load = proxy.report(kind::HEALTH_STATUS)["load"].clone();
            // A report may be made between the arrival of the event and its answer.
            (load["requests_processed"] == 1 && load["in_flight"] == 0).then_some(load)
        });
        for field in ["avg_latency_ms", "p50_latency_ms", "p95_latency_ms", "p99_latency_ms"] {
            assert!(load[field].as_f64().unwrap() > 10.0, "{field}: {load}");
        }
        let agent = start(&module::choosing(), &ADMIN);
        let mut proxy = agent.connect();
        assert_eq!(module_error(&proxy.get("a", "/l")), Some("WASM_TIMEOUT"));
        agent.signal(Signal::HUP);
        wait_for("the timeout", || (proxy.report(kind::HEALTH_STATUS)["load"]["requests_timed_out"] == 1).then_some(()));
    }
}

mod metrics {
    use super::*;

    #[test]
    fn count_requests_errors_and_instances() {
        let agent = start(&module::choosing(), &[&ADMIN[..], &["--fail-open", "--pool-size", "3"]].concat());
        let admin = agent.admin();
        let mut proxy = agent.connect();
        for uri in ["/", "/t", "/t", "/"] {
            proxy.get("a", uri);
        }
        for (series, value) in [
            ("wasm_agent_requests_total", 4.0),
            ("wasm_agent_requests_blocked_total", 0.0),
            ("wasm_agent_fail_open_total", 2.0),
            (r#"wasm_agent_errors_total{kind="trap"}"#, 2.0),
            (r#"wasm_agent_errors_total{kind="timeout"}"#, 0.0),
            (r#"wasm_agent_call_duration_seconds_count{hook="on_request_headers"}"#, 4.0),
            ("wasm_agent_instances_discarded_total", 2.0),
            ("wasm_agent_connections", 1.0),
            ("wasm_agent_in_flight", 0.0),
            ("wasm_agent_circuit_open", 0.0),
        ] {
            assert_eq!(admin.metric(series), value, "{series}");
        }
        // Discarded instances are replaced off the request path.
        admin.wait_for_metric("wasm_agent_pool_available", 3.0);
        let (_, text) = admin.get("/metrics");
        let info = text.lines().find_map(|line| line.strip_prefix("wasm_agent_module_info{sha256=\"")).expect("the module's digest");
        assert!(info.split('"').next().unwrap().len() == 64 && info.ends_with(" 1"), "{info}");
        drop(proxy);
        admin.wait_for_metric("wasm_agent_connections", 0.0);
    }

    #[test]
    fn count_blocks_by_the_module_and_by_its_errors() {
        let block = start(&module::answering(&["on_request_headers"], r#"{"decision":"deny"}"#), &ADMIN);
        block.connect().get("a", "/");
        assert_eq!(block.admin().metric("wasm_agent_requests_blocked_total"), 1.0);
        let trap = start(&module::choosing(), &ADMIN);
        trap.connect().get("a", "/t");
        assert_eq!(trap.admin().metric("wasm_agent_requests_blocked_total"), 1.0);
    }

    #[test]
    fn count_a_collision_of_ids_once() {
        const COLLISIONS: &str = "wasm_agent_id_collisions_total";
        let both = |proxy: &mut Connection| {
            let event = frame(kind::REQUEST_HEADERS, &serde_json::to_vec(&request("same", "/")).unwrap());
            proxy.send_raw(&event.repeat(2));
            proxy.answer();
        };
        // On the connection alone, because this module needs no contexts.
        let agent = start(&module::choosing(), &ADMIN);
        let (admin, mut proxy) = (agent.admin(), agent.connect());
        assert!(names(admin).contains(COLLISIONS));
        proxy.get("same", "/");
        proxy.get("same", "/");
        assert_eq!(admin.metric(COLLISIONS), 0.0);
        both(&mut proxy);
        admin.wait_for_metric(COLLISIONS, 1.0);
        // Among the contexts alone: requests in turn, on two connections.
        let agent = start(&module::echo(&module::PAGE_HOOKS), &ADMIN);
        let (admin, mut proxy) = (agent.admin(), agent.connect());
        proxy.get("other", "/");
        proxy.ask(kind::RESPONSE_HEADERS, &response("other", 200));
        assert_eq!(admin.metric(COLLISIONS), 0.0);
        agent.connect().get("other", "/");
        admin.wait_for_metric(COLLISIONS, 1.0);
        // On both.
        both(&mut proxy);
        admin.wait_for_metric(COLLISIONS, 2.0);
    }

    #[test]
    fn have_the_deadline_in_force() {
        let agent = start(&module::choosing(), &[&ADMIN[..], &["--timeout-ms", "250"]].concat());
        let admin = agent.admin();
        assert_eq!(admin.metric("wasm_agent_timeout_seconds"), 0.25);
        agent.connect().configure(&json!({"timeout-ms": 5000})).unwrap();
        assert_eq!(admin.metric("wasm_agent_timeout_seconds"), 5.0);
    }

    #[test]
    fn have_stable_names() {
        let (_agent, admin) = well_used();
        let expected = [
            "wasm_agent_call_duration_seconds",
            "wasm_agent_circuit_open",
            "wasm_agent_connections",
            "wasm_agent_decision_log_dropped_total",
            "wasm_agent_decisions_total",
            "wasm_agent_errors_total",
            "wasm_agent_fail_open_total",
            "wasm_agent_guest_memory_max_bytes",
            "wasm_agent_hook_circuit_open",
            "wasm_agent_id_collisions_total",
            "wasm_agent_in_flight",
            "wasm_agent_instance_start_failures_total",
            "wasm_agent_instances_discarded_total",
            "wasm_agent_last_reload_successful",
            "wasm_agent_log_lines_lost_total",
            "wasm_agent_module_info",
            "wasm_agent_otlp_dropped_total",
            "wasm_agent_panics_total",
            "wasm_agent_pool_available",
            "wasm_agent_pool_waiting",
            "wasm_agent_proxy_config_rejected",
            "wasm_agent_reloads_total",
            "wasm_agent_requests_blocked_total",
            "wasm_agent_requests_total",
            "wasm_agent_routing_metadata_lost_total",
            "wasm_agent_rule_hits_total",
            "wasm_agent_timeout_seconds",
        ];
        assert_eq!(names(admin).iter().map(String::as_str).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn pass_promtool() {
        let (_agent, admin) = well_used();
        if let Some((success, output)) = promtool(&["check", "metrics"], admin.get("/metrics").1.as_bytes()) {
            assert!(success && output.is_empty(), "{output}");
        }
    }
}

mod deployment {
    use super::*;

    /// The metrics that a text mentions, without the suffixes of a histogram's series.
    fn mentioned(text: &str) -> BTreeSet<String> {
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').filter(|word| word.starts_with("wasm_agent_"));
        words
            .map(|word| {
                word.strip_suffix("_bucket").or(word.strip_suffix("_sum")).or(word.strip_suffix("_count")).unwrap_or(word).to_owned()
            })
            .collect()
    }

    /// Calls `see` with every string under the key `wanted`.
    fn strings(value: &Value, wanted: &str, see: &mut impl FnMut(&str)) {
        match value {
            Value::Array(values) => values.iter().for_each(|value| strings(value, wanted, see)),
            Value::Object(object) => {
                for (key, value) in object {
                    match value {
                        Value::String(text) if key == wanted => see(text),
                        value => strings(value, wanted, see),
                    }
                }
            }
            _ => {}
        }
    }

    fn deployed(file: &str) -> String {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy").join(file);
        std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    #[test]
    fn dashboard_shows_every_metric() {
        let (_agent, admin) = well_used();
        let dashboard: Value = serde_json::from_str(&deployed("grafana/zentinel-wasm-agent.json")).unwrap();
        let mut shown = BTreeSet::new();
        strings(&dashboard, "expr", &mut |expression| shown.extend(mentioned(expression)));
        strings(&dashboard, "query", &mut |query| shown.extend(mentioned(query)));
        assert_eq!(shown, names(admin));
    }

    #[test]
    fn alerts_use_existing_metrics_and_have_cases() {
        let (_agent, admin) = well_used();
        let rules = deployed("prometheus/alerts.yml");
        let used = mentioned(&rules);
        assert!(!used.is_empty() && used.is_subset(&names(admin)), "{used:?}");
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/prometheus/alerts.yml");
        if let Some((success, output)) = promtool(&["check", "rules", path.to_str().unwrap()], b"") {
            assert!(success, "{output}");
        }
        let cases = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/alerts.yml");
        if let Some((success, output)) = promtool(&["test", "rules", cases.to_str().unwrap()], b"") {
            assert!(success, "{output}");
        }
        // Every alert has a case, and every case an alert.
        let cases = std::fs::read_to_string(cases).unwrap();
        let alerts = |text: &str, key: &str| {
            text.lines()
                .filter_map(|line| line.trim_start_matches([' ', '-']).strip_prefix(key))
                .map(|name| name.trim().to_owned())
                .collect::<BTreeSet<_>>()
        };
        assert_eq!(alerts(&rules, "alert:"), alerts(&cases, "alertname:"));
    }
}

mod admin {
    use super::*;

    #[test]
    fn serves_its_paths_and_no_others() {
        let agent = start(&module::choosing(), &ADMIN);
        let admin = agent.admin();
        assert_eq!(admin.get("/healthz"), (200, "healthy\n".into()));
        assert_eq!(admin.get("/readyz"), (200, "ready\n".into()));
        assert_eq!(admin.get("/").0, 404);
        assert_eq!(admin.get("/metrics/../etc/passwd").0, 404);
    }

    #[test]
    fn is_healthy_and_ready_after_the_start() {
        let modules = tempfile::tempdir().unwrap();
        let agent = AGENT.launch(&module::write(modules.path(), "m.wasm", &module::choosing()), |command| {
            command.args(ADMIN);
        });
        let admin = agent.admin();
        wait_for("readiness", || (admin.get("/readyz").0 == 200).then_some(()));
        assert_eq!(admin.get("/healthz"), (200, "healthy\n".to_owned()));
    }

    #[test]
    fn is_starting_while_the_module_compiles() {
        let modules = tempfile::tempdir().unwrap();
        // Large enough for the compilation to last longer than the checks.
        let function = "(func (param i32) (result i32) (i32.add (local.get 0) (i32.const 1)))";
        let large = module::tagging("x").trim_end().strip_suffix(')').unwrap().to_owned() + &function.repeat(60_000) + ")";
        let file = module::write(modules.path(), "m.wasm", &large);
        let mut agent = AGENT.launch(&file, |command| {
            command.args(ADMIN);
        });
        let admin = agent.admin();
        assert_eq!(admin.get("/healthz"), (200, "starting\n".to_owned()));
        assert_eq!(admin.get("/readyz"), (503, "starting\n".to_owned()));
        let (status, metrics) = admin.get("/metrics");
        assert_eq!(status, 200);
        assert!(metrics.lines().any(|line| line == "wasm_agent_requests_total 0"), "{metrics}");
        agent.signal(Signal::TERM);
        assert_eq!(agent.wait().code(), Some(0), "{}", agent.log.whole());
        assert!(!agent.log.whole().contains("serving the socket"));
    }

    #[test]
    fn is_not_ready_while_draining() {
        let agent = start(&module::busy(3000, "x"), &[&ADMIN[..], &["--timeout-ms", "20000"]].concat());
        let admin = agent.admin();
        let mut proxy = agent.connect();
        proxy.send(kind::REQUEST_HEADERS, &request("slow", "/"));
        admin.wait_for_metric("wasm_agent_in_flight", 1.0);
        agent.signal(Signal::TERM);
        wait_for("readiness to end", || (admin.get("/readyz") == (503, "not ready: draining\n".into())).then_some(()));
        assert_eq!(admin.get("/healthz"), (200, "draining\n".into()));
        assert_eq!(decision(&proxy.answer()), "allow");
    }

    #[test]
    fn closes_a_connection_after_one_answer() {
        let agent = start(&module::choosing(), &ADMIN);
        let mut stream = TcpStream::connect(agent.admin().0).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all("GET /metrics HTTP/1.1\r\nHost: agent\r\n\r\n".repeat(2).as_bytes()).unwrap();
        let mut answers = String::new();
        stream.read_to_string(&mut answers).unwrap();
        assert_eq!(answers.matches("HTTP/1.1 200 OK").count(), 1, "{answers}");
    }

    #[test]
    fn is_not_blocked_by_clients_that_never_read() {
        /// More than the admin address serves at once.
        const CLIENTS: usize = 40;
        let agent = start(&module::choosing(), &ADMIN);
        let admin = agent.admin();
        let requests = "GET /metrics HTTP/1.1\r\nHost: agent\r\n\r\n".repeat(20_000);
        let clients: Vec<_> = (0..CLIENTS)
            .map(|_| {
                let mut client = TcpStream::connect(admin.0).unwrap();
                client.set_nonblocking(true).unwrap();
                // The agent may close the connection before it has read all.
                let _ = client.write_all(requests.as_bytes());
                client
            })
            .collect();
        assert_eq!(admin.get("/healthz").0, 200);
        drop(clients);
    }

    #[test]
    fn in_use_is_rejected_at_the_start() {
        let first = start(&module::choosing(), &ADMIN);
        let modules = tempfile::tempdir().unwrap();
        let mut second = AGENT.launch(&module::write(modules.path(), "m.wasm", &module::choosing()), |command| {
            command.args(["--admin-address", &first.admin().0.to_string()]);
        });
        assert_eq!(second.wait().code(), Some(1));
        assert!(second.log.whole().contains("cannot serve `--admin-address 127.0.0.1:"));
        assert!(!second.socket.exists());
    }
}

mod module_errors {
    use super::*;

    #[test]
    fn are_one_entry_with_all_identifiers() {
        let agent = start(&module::choosing(), &[]);
        let mut event = request("id-1", "/t");
        event["metadata"]["traceparent"] = json!("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
        let answer = agent.connect().ask(kind::REQUEST_HEADERS, &event);
        assert_eq!((id_of(&answer), module_error(&answer)), ("id-1", Some("WASM_TRAP")));
        let entry = agent.log.wait_for_entry("the module error", |entry| entry["kind"] == "WASM_TRAP");
        assert!(entry["timestamp"].as_str().unwrap().ends_with('Z'), "{entry}");
        assert_eq!(entry["level"], "ERROR");
        assert_eq!(entry["correlation_id"], "id-1");
        assert_eq!(entry["hook"], "on_request_headers");
        assert_eq!(entry["module"].as_str().unwrap().len(), 64);
        assert_eq!(entry["traceparent"], "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
        assert_eq!(entry.get("suppressed"), None, "{entry}");
        let message = entry["message"].as_str().unwrap();
        assert!(message.starts_with("module error, blocked: ") && message.contains("unreachable"), "{message}");
        assert_eq!(agent.log.entries().iter().filter(|entry| entry["level"] == "ERROR").count(), 1);
    }

    #[test]
    fn of_later_hooks_have_the_trace_of_their_request() {
        let wat = module::with_hooks(&["on_response_headers"], |_| "unreachable".into(), "");
        let agent = start(&wat, &["--fail-open"]);
        let mut proxy = agent.connect();
        let mut event = request("id-2", "/");
        event["metadata"]["traceparent"] = json!("00-11111111111111111111111111111111-2222222222222222-00");
        proxy.ask(kind::REQUEST_HEADERS, &event);
        proxy.ask(kind::RESPONSE_HEADERS, &response("id-2", 200));
        let entry = agent.log.wait_for_entry("the module error", |entry| entry["kind"] == "WASM_TRAP");
        assert_eq!((&entry["hook"], &entry["correlation_id"]), (&json!("on_response_headers"), &json!("id-2")));
        assert_eq!(entry["traceparent"], "00-11111111111111111111111111111111-2222222222222222-00");
        assert!(entry["message"].as_str().unwrap().starts_with("module error, allowed: "), "{entry}");
    }

    #[test]
    fn are_rate_limited_and_counted() {
        const ERRORS: usize = 400;
        // Every error costs an instance, so the deadline must allow for waiting for another.
        let wat = module::answering(&["on_request_headers"], "not JSON");
        let agent = start(&wat, &[&ADMIN[..], &["--timeout-ms", "20000"]].concat());
        let mut proxy = agent.connect();
        for number in 0..ERRORS {
            assert_eq!(module_error(&proxy.get(&number.to_string(), "/")), Some("WASM_INVALID_RESULT"));
        }
        assert_eq!(agent.admin().metric(r#"wasm_agent_errors_total{kind="invalid_result"}"#), ERRORS as f64);
        let is_error = |entry: &&Value| entry["kind"] == "WASM_INVALID_RESULT";
        // Once the limit allows another line, it has the number of suppressed ones.
        let suppressed = wait_for("the number of suppressed lines", || {
            proxy.get("more", "/");
            agent.log.entries().iter().filter(is_error).find_map(|entry| entry["suppressed"].as_u64())
        });
        assert!((1..ERRORS as u64 * 2).contains(&suppressed), "{suppressed}");
        assert!(agent.log.entries().iter().filter(is_error).count() >= 20);
    }
}

mod guest_logs {
    use super::*;

    #[test]
    fn have_a_target_and_the_correlation_id() {
        let agent = start(&module::logging("hello from the module"), &[]);
        agent.connect().get("id-3", "/");
        let entry = agent.log.wait_for_entry("the module's line", |entry| entry["message"] == "hello from the module");
        assert_eq!((&entry["target"], &entry["level"], &entry["correlation_id"]), (&json!("guest"), &json!("INFO"), &json!("id-3")));
        assert_eq!(entry["module"].as_str().unwrap().len(), 64);
    }

    #[test]
    fn come_from_assemblyscript_imports() {
        let modules = tempfile::tempdir().unwrap();
        let file = module::write(modules.path(), "m.wasm", &module::assemblyscript());
        let agent = AGENT.launch(&file, |command| {
            command.env("RUST_LOG", "info,guest=debug");
        });
        wait_for("the socket", || UnixStream::connect(&agent.socket).ok());
        let mut proxy = agent.connect();
        assert_eq!(decision(&proxy.get("id-5", "/")), "allow");
        agent.log.wait_for_entry("the last line", |entry| entry["message"] == "console.timeEnd: no such timer: hi ü😀");
        let entries = agent.log.entries();
        let lines: Vec<_> = entries.iter().filter(|entry| entry["target"] == "guest").collect();
        let logged: Vec<_> = lines.iter().map(|entry| (entry["level"].as_str().unwrap(), entry["message"].as_str().unwrap())).collect();
        let hi = "hi ü😀";
        let levels = ["INFO", "DEBUG", "INFO", "WARN", "ERROR"];
        assert_eq!(logged[..5], levels.map(|level| (level, hi)));
        assert_eq!(logged[5..7], [("ERROR", "assertion failed: hi ü😀"), ("DEBUG", "hi ü😀 1.5 2")]);
        for (level, timer) in &logged[7..9] {
            assert!(*level == "INFO" && timer.starts_with("hi ü😀: ") && timer.ends_with(" ms"), "{timer}");
        }
        assert_eq!(logged.len(), 10);
        assert!(lines.iter().all(|entry| entry["correlation_id"] == "id-5"), "{lines:?}");

        let mut exit = request("id-6", "/");
        exit["method"] = json!("EXIT");
        assert_eq!(module_error(&proxy.ask(kind::REQUEST_HEADERS, &exit)), Some("WASM_TRAP"));
        agent.log.wait_for_entry("the reason", |entry| {
            entry["correlation_id"] == "id-6" && entry["message"].as_str().is_some_and(|text| text.contains("`process.exit(3)`"))
        });
    }

    #[test]
    fn cannot_forge_an_entry_of_the_agent() {
        let forged = "x\n{\"level\":\"ERROR\",\"message\":\"forged\"}";
        let agent = start(&module::logging(forged), &[]);
        agent.connect().get("a", "/");
        agent.log.wait_for_entry("the module's line", |entry| entry["target"] == "guest");
        assert!(agent.log.entries().iter().all(|entry| entry["message"] != "forged"));
        let agent = start(&module::logging(forged), &["--log-format", "text"]);
        agent.connect().get("a", "/");
        agent.log.wait_for_line("the module's line", |line| line.contains("guest"));
        assert!(agent.log.lines().iter().all(|line| !line.starts_with('{')), "{:?}", agent.log.lines());
    }
}

mod format {
    use super::*;

    /// Starts an agent whose log may have nothing about its start.
    fn quiet(wat: &str, rust_log: &str, options: &[&str]) -> Agent {
        let modules = tempfile::tempdir().unwrap();
        let agent = AGENT.launch(&module::write(modules.path(), "m.wasm", wat), |command| {
            command.env("RUST_LOG", rust_log).args(options);
        });
        // The file exists a moment before connections are accepted.
        wait_for("the socket", || UnixStream::connect(&agent.socket).ok());
        // The answer arrives once the module serves.
        agent.connect().get("first", "/");
        agent
    }

    #[test]
    fn text_is_readable() {
        let agent = start(&module::logging("hello"), &["--log-format", "text"]);
        agent.connect().get("id-4", "/");
        let line = agent.log.wait_for_line("the module's line", |line| line.contains("hello"));
        assert!(line.contains(" INFO guest: ") && line.contains("correlation_id=\"id-4\""), "{line}");
        let digest = line.split_once("module=\"").and_then(|(_, rest)| rest.split_once('"')).expect("the digest").0;
        assert!(digest.len() == 12 && digest.bytes().all(|byte| byte.is_ascii_hexdigit()), "{line}");
        assert!(agent.log.lines().iter().all(|line| !line.contains("suppressed")), "{:?}", agent.log.lines());
        assert!(agent.log.entries().is_empty());
    }

    #[test]
    fn follows_rust_log() {
        let agent = quiet(&module::logging("hello"), "warn", &[]);
        agent.end();
        let agent = quiet(&module::logging("hello"), "warn,guest=info", &[]);
        let entries = agent.log.wait_for_entry("the module's line", |entry| entry["message"] == "hello");
        assert_eq!(entries["target"], "guest");
        assert!(agent.log.entries().iter().all(|entry| entry["target"] == "guest"), "{:?}", agent.log.lines());
        // The installer's unit sets RUST_LOG=info. `--verbose` takes precedence.
        let agent = quiet(&module::choosing(), "info", &["--verbose"]);
        agent.log.wait_for_entry("a debug line", |entry| entry["level"] == "DEBUG");
    }

    #[test]
    fn is_empty_at_warning_level_without_trouble() {
        let mut agent = quiet(&module::choosing(), "warn", &[]);
        agent.signal(Signal::TERM);
        assert_eq!(agent.wait().code(), Some(0));
        assert_eq!(agent.log.whole(), "");
    }
}
