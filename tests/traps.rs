//! What the log has of calls that trap or exceed their deadline: where in its code the module was.
//! `cargo xtask guests` tests the same with modules in real languages.

use std::fmt::Write as _;

use serde_json::{Value, json};
use testkit::{Agent, Connection, Program, kind, module, module_error};

const AGENT: Program = Program(env!("CARGO_BIN_EXE_zentinel-wasm-agent"));

/// Resident memory that differs between two measurements without a reason, in bytes.
const MEMORY_NOISE: u64 = 32 << 20;

/// An agent with a module whose hook has this body.
fn agent(hook: &str, functions: &str, options: &[&str]) -> (Agent, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let wat = module::with_hooks(&["on_request_headers"], |_| format!("{hook} (i64.const 0)"), functions);
    let path = module::write(folder.path(), "module.wasm", &wat);
    (AGENT.start(&path, options), folder)
}

/// The message of the module error of the request `id`.
fn message(agent: &Agent, id: &str) -> String {
    let entry = agent.log.wait_for_entry("the module error", |entry| entry["correlation_id"] == id && entry["kind"].is_string());
    entry["message"].as_str().unwrap().to_owned()
}

/// The message after one request.
fn logged(hook: &str, functions: &str, options: &[&str]) -> String {
    let (agent, _folder) = agent(hook, functions, options);
    agent.connect().get("a", "/");
    let message = message(&agent, "a");
    agent.end_unharmed();
    message
}

/// A function with a name that is part of the text.
fn named(name: &str, body: &str) -> String {
    let mut escaped = String::new();
    for byte in name.bytes() {
        let _ = write!(escaped, "\\{byte:02x}");
    }
    format!("(func $named (@name \"{escaped}\") {body})")
}

mod of_a_trap {
    use super::*;

    #[test]
    fn are_in_the_log_and_not_in_the_answer() {
        let functions = "(func $outer (call $divide)) (func $divide (drop (i32.div_u (i32.const 1) (i32.const 0))))";
        let (agent, _folder) = agent("(call $outer)", functions, &["--timeout-ms", "20000"]);
        let answer = agent.connect().get("a", "/");
        assert_eq!(module_error(&answer), Some("WASM_TRAP"));
        assert!(!answer.to_string().contains("divide"), "{answer}");
        assert_eq!(
            message(&agent, "a"),
            "module error, blocked: wasm trap: integer divide by zero (in `divide` < `outer` < `on_request_headers`)"
        );
        agent.end_unharmed();
    }

    #[test]
    fn are_found_again_in_a_compiled_module_from_the_cache() {
        let cache = tempfile::tempdir().unwrap();
        for _ in 0..2 {
            let message = logged("(call $f)", "(func $f (unreachable))", &["--cache-dir", cache.path().to_str().unwrap()]);
            assert!(message.ends_with("(in `f` < `on_request_headers`)"), "{message}");
        }
        assert_eq!(std::fs::read_dir(cache.path()).unwrap().count(), 1);
    }

    #[test]
    fn are_shown_when_an_instance_cannot_start() {
        let folder = tempfile::tempdir().unwrap();
        let start = r#"(func $prepare (unreachable)) (func (export "_initialize") (call $prepare))"#;
        let wat = module::with_hooks(&["on_request_headers"], |_| "i64.const 0".into(), start);
        let path = module::write(folder.path(), "module.wasm", &wat);
        let mut agent = AGENT.launch(&path, |_| ());
        assert_eq!(agent.wait().code(), Some(1));
        let log = agent.log.whole();
        assert!(
            log.contains("WASM_TRAP: `_initialize`: wasm trap: wasm `unreachable` instruction executed (in `prepare` < `_initialize`)"),
            "{log}"
        );
    }
}

mod of_a_timeout {
    use super::*;

    #[test]
    fn name_the_deadline_and_the_function() {
        let (agent, _folder) = agent("(call $spin)", "(func $spin (loop (br 0)))", &["--timeout-ms", "50"]);
        let mut connection = agent.connect();
        // On a machine that is busy at the deadline, the call has no turn in which to end itself.
        let entry = testkit::wait_for("a call that ends itself", || {
            connection.get("a", "/");
            let is_traced = |entry: &Value| entry["message"].as_str().is_some_and(|message| message.contains("(in "));
            agent.log.entries().into_iter().find(|entry| entry["kind"] == "WASM_TIMEOUT" && is_traced(entry))
        });
        assert_eq!(entry["message"], "module error, blocked: the call exceeded its deadline (in `spin` < `on_request_headers`)");
        assert_eq!(entry["deadline_ms"], 50);
        agent.end_unharmed();
    }
}

mod hostile {
    use super::*;

    #[test]
    fn names_are_bounded_and_forge_no_entry() {
        // So large that it is looked up on another thread.
        let name = format!("a\n{{\"level\":\"INFO\"}}\u{1b}[31m{}", "x".repeat(1 << 20));
        let message = logged("(call $named)", &named(&name, "(unreachable)"), &[]);
        assert!(message.contains("(in `a {\"level\":\"INFO\"} [31mxxx") && message.ends_with("x` < `on_request_headers`)"), "{message}");
        assert!(message.len() < 400 && !message.contains(char::is_control), "{message}");
    }

    #[test]
    fn debug_information_is_ignored() {
        let custom = |name: &str, bytes: &str| format!("(@custom \"{name}\" \"{}\")", bytes.repeat(100_000));
        let functions = format!(
            "(func $f (unreachable)) {} {} {}",
            custom(".debug_info", "\\01\\ff\\00\\05"),
            custom(".debug_abbrev", "\\01\\11\\01\\00"),
            custom(".debug_line", "\\ff\\ff\\ff\\00")
        );
        let message = logged("(call $f)", &functions, &[]);
        assert!(message.ends_with("(in `f` < `on_request_headers`)"), "{message}");
    }

    #[test]
    fn recursion_with_long_names_at_full_rate_takes_bounded_memory_and_log() {
        const REQUESTS: usize = 3000;
        let recursion = named(&"x".repeat(1 << 20), "(call $named)");
        let hook = "(if (i32.gt_u (local.get $len) (i32.const 4000)) (then (call $named)))";
        let (agent, _folder) = agent(hook, &recursion, &["--timeout-ms", "20000"]);
        let mut connection = agent.connect();
        let ask = |connection: &mut Connection, number: usize| {
            // Without a success in between the circuit would open.
            assert_eq!(module_error(&connection.get(&format!("{number} before"), "/")), None);
            let mut event = testkit::request(&number.to_string(), "/");
            event["headers"]["x-padding"] = json!(["x".repeat(5000)]);
            assert_eq!(module_error(&connection.ask(kind::REQUEST_HEADERS, &event)), Some("WASM_TRAP"));
        };
        (0..100).for_each(|number| ask(&mut connection, number));
        let before = agent.peak();
        (100..REQUESTS).for_each(|number| ask(&mut connection, number));
        let peak = agent.peak();
        assert!(peak < before + MEMORY_NOISE, "{before} {peak}");
        let traps = |entry: &&Value| entry["kind"] == json!("WASM_TRAP");
        let entries = agent.log.entries();
        let entries: Vec<_> = entries.iter().filter(traps).collect();
        assert!((1..REQUESTS / 2).contains(&entries.len()), "{}", entries.len());
        assert!(entries.iter().all(|entry| entry["message"].as_str().unwrap().chars().count() < 2000));
        drop(connection);
        agent.end_unharmed();
    }
}
