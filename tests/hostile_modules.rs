//! Modules that misbehave, one way each: `fixtures/hostile`. Whatever a module does, its request
//! gets the documented answer, other requests are unaffected, the next one succeeds, and the memory
//! that it took is released.

use std::collections::HashMap;

use rustix::process::Signal;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use testkit::{Agent, Connection, Program, decision, id_of, kind, module, module_error, wait_for};
use zentinel_wasm_contract::Hook;

const AGENT: Program = Program(env!("CARGO_BIN_EXE_zentinel-wasm-agent"));

/// Deadline for modules whose calls never end: long enough for good requests on a machine that is
/// busy with those.
const TIMEOUT_MS: &str = "1000";

/// Deadline for all others, long enough for any machine.
const LONG_TIMEOUT_MS: &str = "20000";

/// Less than by default, so modules that loop at their start fail soon.
const SHORT_START: [&str; 2] = ["--start-timeout-ms", "1000"];

/// How far the agent's resident memory may stay above its old value after a module's memory was
/// released, in bytes: less than any of the growing modules takes.
const MEMORY_NOISE: u64 = 32 << 20;

fn write(folder: &Path, name: &str) -> PathBuf {
    module::write(folder, &format!("{name}.wasm"), &module::hostile(name))
}

/// A request that every module answers correctly.
fn good(id: &str) -> Value {
    testkit::request(id, "/")
}

/// A request that makes modules misbehave: by its method, or by its size of more than 4 kB.
fn bad(id: &str, uri: &str) -> Value {
    let mut event = testkit::request(id, uri);
    event["method"] = json!("EVIL");
    event["headers"]["x-padding"] = json!(["x".repeat(5000)]);
    event
}

#[track_caller]
fn assert_good(answer: &Value) {
    assert_eq!(decision(answer), "allow", "{answer}");
    assert_eq!(answer["audit"]["tags"], json!(["good"]), "{answer}");
}

/// The documented answer to a module error of the kind `code`.
#[track_caller]
fn assert_module_error(answer: &Value, code: &str, fail_open: bool) {
    let (decision, tags) = if fail_open {
        (json!("allow"), json!(["wasm-error", "fail-open"]))
    } else {
        (json!({"block": {"status": 500, "body": null, "headers": null}}), json!(["wasm-error"]))
    };
    // The answer contains nothing else, whatever the module has returned.
    let audit = json!({"tags": tags, "reason_codes": [code], "custom": {"correlation_id": id_of(answer)}});
    let mut rest = answer.clone();
    let websocket = rest.as_object_mut().unwrap().remove("websocket_decision");
    assert_eq!(rest, json!({"version": 2, "decision": decision, "audit": audit}), "{answer}");
    assert!(websocket.is_none_or(|decision| fail_open == (decision == "allow")), "{answer}");
}

/// Sends all events at once and returns the answers by id.
#[track_caller]
fn ask_all(connection: &mut Connection, events: &[Value]) -> HashMap<String, Value> {
    let mut bytes = Vec::new();
    for event in events {
        bytes.extend(testkit::frame(kind::REQUEST_HEADERS, &serde_json::to_vec(event).unwrap()));
    }
    connection.send_raw(&bytes);
    let answers: HashMap<_, _> = events
        .iter()
        .map(|_| {
            let answer = connection.answer();
            (id_of(&answer).to_owned(), answer)
        })
        .collect();
    assert_eq!(answers.len(), events.len(), "an event was answered twice");
    answers
}

/// The isolation modes, each without and with `--fail-open`.
const MODES: [(&str, bool); 4] = [("pooled", false), ("pooled", true), ("request", false), ("request", true)];

/// Runs `check` in both failure modes and both isolation modes.
fn in_every_mode(module: &Path, timeout_ms: &str, check: impl Fn(&Agent, &mut Connection, &str, bool)) {
    for mode in MODES {
        in_mode(mode, module, timeout_ms, &check);
    }
}

fn in_mode((isolation, fail_open): (&str, bool), module: &Path, timeout_ms: &str, check: impl Fn(&Agent, &mut Connection, &str, bool)) {
    println!("--isolation {isolation}, fail-open {fail_open}");
    let cache = module.with_extension("cache");
    let mut options = vec!["--isolation", isolation, "--timeout-ms", timeout_ms, "--cache-dir", cache.to_str().unwrap()];
    if fail_open {
        options.push("--fail-open");
    }
    let agent = AGENT.start(module, &options);
    let mut connection = agent.connect();
    check(&agent, &mut connection, isolation, fail_open);
    drop(connection);
    let log = agent.log.clone();
    agent.end();
    let log = log.whole();
    assert!(!log.contains("panicked"), "{log}");
    // Far more than the rate limit allows in the longest run, far less than a module can write.
    assert!(log.lines().count() < 20_000, "{} lines", log.lines().count());
    for line in log.lines() {
        serde_json::from_str::<Value>(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        assert!(line.len() < 20_000, "a line of {} bytes", line.len());
    }
}

/// The outcome of a request that makes the module misbehave.
#[derive(Clone, Copy)]
enum Outcome {
    /// A module error of this kind.
    Error(&'static str),
    /// The module's own answer.
    Good,
    /// An allow, as from a module without an opinion.
    NoOpinion,
}

fn misbehaves(name: &str, outcome: Outcome) {
    let folder = tempfile::tempdir().unwrap();
    let module = write(folder.path(), name);
    let check = |agent: &Agent, connection: &mut Connection, _: &str, fail_open: bool| {
        assert_good(&connection.ask(kind::REQUEST_HEADERS, &good("first")));
        let before = agent.resident();
        let answers = ask_all(connection, &[good("g1"), bad("b1", "/"), good("g2"), bad("b2", "/"), good("g3")]);
        for (id, answer) in &answers {
            match outcome {
                _ if id.starts_with('g') => assert_good(answer),
                Error(code) => assert_module_error(answer, code, fail_open),
                Good => assert_good(answer),
                NoOpinion => {
                    assert_eq!(decision(answer), "allow", "{answer}");
                    assert_eq!(answer["audit"].get("tags").unwrap_or(&json!([])), &json!([]), "{answer}");
                }
            }
        }
        if let Error(code) = outcome {
            for id in ["b1", "b2"] {
                let entry = agent.log.wait_for_entry("the module error", |entry| entry["correlation_id"] == id && entry["kind"] == code);
                let message = entry["message"].as_str().unwrap();
                assert!(message.chars().count() < 1100 && !message.contains(char::is_control), "{message:?}");
            }
        }
        assert_good(&connection.ask(kind::REQUEST_HEADERS, &good("last")));
        wait_for("the memory to be released", || (agent.resident() < before + MEMORY_NOISE).then_some(()));
    };
    if matches!(outcome, Error("WASM_TIMEOUT")) {
        // All modes wait for their deadlines at once.
        let (module, check) = (&module, &check);
        std::thread::scope(|scope| {
            for mode in MODES {
                scope.spawn(move || in_mode(mode, module, TIMEOUT_MS, check));
            }
        });
    } else {
        in_every_mode(&module, LONG_TIMEOUT_MS, check);
    }
}

use Outcome::{Error, Good, NoOpinion};

/// A test for each fixture, and the list of the fixtures.
macro_rules! misbehaviours {
    ($($name:ident: $file:literal => $outcome:expr,)*) => {
        pub(super) const FIXTURES: &[&str] = &[$($file),*];

        $(#[test]
        fn $name() {
            misbehaves($file, $outcome);
        })*
    };
}

/// Starts the agent with the module at `path`, which it must reject, and returns its message.
fn rejection(path: &Path, options: &[&str]) -> String {
    let mut agent = AGENT.launch(path, |command| {
        command.args(options).stdout(Stdio::null());
    });
    assert_eq!(agent.wait().code(), Some(1), "{}", agent.log.whole());
    assert!(!agent.socket.exists(), "the socket was not removed");
    let log = agent.log.whole();
    assert!(!log.contains("panicked"), "{log}");
    let messages: Vec<_> = log.lines().filter(|line| !line.starts_with('{')).collect();
    let [message] = messages[..] else { panic!("not exactly one message: {log}") };
    assert!(message.len() < 4200 && !message.contains(char::is_control), "a message of {} bytes: {message:?}", message.len());
    message.to_owned()
}

mod deadline {
    use super::*;

    misbehaviours! {
        interrupts_a_loop: "loop" => Error("WASM_TIMEOUT"),
        interrupts_endless_tail_calls: "loop-recursive" => Error("WASM_TIMEOUT"),
        interrupts_endless_logging: "loop-log" => Error("WASM_TIMEOUT"),
        interrupts_endless_output: "loop-write" => Error("WASM_TIMEOUT"),
        interrupts_huge_output: "loop-write-once" => Error("WASM_TIMEOUT"),
        interrupts_endless_random_numbers: "loop-random" => Error("WASM_TIMEOUT"),
        interrupts_a_row_of_random_numbers: "row-random" => Error("WASM_TIMEOUT"),
        interrupts_a_row_of_seeds: "row-seed" => Error("WASM_TIMEOUT"),
        interrupts_endless_yielding: "loop-yield" => Error("WASM_TIMEOUT"),
        interrupts_endless_filling: "loop-fill" => Error("WASM_TIMEOUT"),
        interrupts_sleep: "sleep" => Error("WASM_TIMEOUT"),
        interrupts_a_loop_in_alloc: "loop-alloc" => Error("WASM_TIMEOUT"),
        interrupts_a_loop_in_dealloc: "loop-dealloc" => Error("WASM_TIMEOUT"),
    }
}

mod host_functions {
    use super::*;

    misbehaviours! {
        a_million_log_lines_change_no_answer: "log-million" => Good,
        many_assemblyscript_strings_change_no_answer: "console-many" => Good,
        a_row_of_assemblyscript_strings_changes_no_answer: "row-console" => Good,
        a_row_of_writes_changes_no_answer: "row-write" => Good,
        many_timers_are_not_kept: "timers-many" => Good,
        wasi_reports_pointers_out_of_bounds: "wasi-pointers" => Good,
    }
}

mod traps {
    use super::*;

    misbehaviours! {
        in_alloc: "trap-alloc" => Error("WASM_TRAP"),
        in_dealloc: "trap-dealloc" => Error("WASM_TRAP"),
        in_dealloc_of_the_result: "trap-dealloc-result" => Error("WASM_TRAP"),
        unreachable: "trap-unreachable" => Error("WASM_TRAP"),
        division_by_zero: "trap-divide" => Error("WASM_TRAP"),
        integer_overflow: "trap-overflow" => Error("WASM_TRAP"),
        conversion_of_nan: "trap-conversion" => Error("WASM_TRAP"),
        load_out_of_bounds: "trap-load" => Error("WASM_TRAP"),
        store_out_of_bounds: "trap-store" => Error("WASM_TRAP"),
        copy_out_of_bounds: "trap-copy" => Error("WASM_TRAP"),
        dropped_data_segment: "trap-init" => Error("WASM_TRAP"),
        call_out_of_bounds: "trap-table" => Error("WASM_TRAP"),
        call_of_a_null_function: "trap-null-function" => Error("WASM_TRAP"),
        call_with_a_wrong_type: "trap-signature" => Error("WASM_TRAP"),
        table_set_out_of_bounds: "trap-table-set" => Error("WASM_TRAP"),
        stack_overflow: "trap-stack" => Error("WASM_TRAP"),
        stack_overflow_around_host_calls: "trap-stack-log" => Error("WASM_TRAP"),
        exit: "trap-exit" => Error("WASM_TRAP"),
        abort_with_an_invalid_message: "trap-abort" => Error("WASM_TRAP"),
        string_across_the_end: "trap-console" => Error("WASM_TRAP"),
        string_of_4_gb: "trap-console-huge" => Error("WASM_TRAP"),
        string_at_a_negative_address: "trap-console-negative" => Error("WASM_TRAP"),
        string_without_a_length: "trap-trace" => Error("WASM_TRAP"),
        timer_label_out_of_bounds: "trap-timer" => Error("WASM_TRAP"),
        log_message_out_of_bounds: "trap-log" => Error("WASM_TRAP"),
        long_function_names_are_truncated: "trap-long-name" => Error("WASM_TRAP"),
    }

    #[test]
    fn in_any_hook() {
        let hooks: Vec<&str> = Hook::ALL.iter().filter(|hook| **hook != Hook::Configure).map(|hook| hook.export()).collect();
        let folder = tempfile::tempdir().unwrap();
        let module = module::write(folder.path(), "m.wasm", &module::with_hooks(&hooks, |_| "unreachable".into(), ""));
        let data = testkit::base64(b"x");
        let events = [
            (kind::REQUEST_HEADERS, testkit::request("request", "/")),
            (kind::REQUEST_BODY, testkit::request_body("request-body", "x")),
            (kind::RESPONSE_HEADERS, testkit::response("response", 200)),
            (kind::RESPONSE_BODY, testkit::response_body("response-body", "x")),
            (kind::WEBSOCKET_FRAME, json!({"correlation_id": "frame", "opcode": "text", "data": data, "client_to_server": true})),
            (kind::GUARDRAIL_INSPECT, json!({"correlation_id": "guardrail", "inspection_type": "prompt_injection", "content": "x"})),
            (kind::REQUEST_COMPLETE, json!({"correlation_id": "complete", "status": 200})),
        ];
        assert_eq!(hooks.len(), events.len());
        in_every_mode(&module, LONG_TIMEOUT_MS, |_, connection, _, fail_open| {
            for (kind, event) in &events {
                let mut answer = connection.ask(*kind, event);
                if *kind == kind::GUARDRAIL_INSPECT {
                    // Of an answer about a text, the proxy reads nothing but this.
                    let metadata = answer.as_object_mut().unwrap().remove("routing_metadata").unwrap();
                    let found: Value = serde_json::from_str(metadata["guardrail_response"].as_str().unwrap()).unwrap();
                    assert_eq!(found["detected"], !fail_open, "{metadata}");
                }
                assert_module_error(&answer, "WASM_TRAP", fail_open);
                if *kind == kind::WEBSOCKET_FRAME && !fail_open {
                    assert_eq!(answer["websocket_decision"]["close"]["code"], 1011, "{answer}");
                }
            }
        });
    }
}

mod memory {
    use super::*;

    misbehaviours! {
        growing_reaches_the_limit: "grow-memory" => Error("WASM_MEMORY_LIMIT"),
        growing_and_writing_reaches_the_limit: "grow-memory-touched" => Error("WASM_MEMORY_LIMIT"),
        a_module_may_survive_a_failed_grow: "grow-memory-refused" => Good,
        an_instance_gets_its_limit_and_not_a_page_more: "grow-memory-exact" => Good,
        a_huge_table_reaches_the_limit: "grow-table" => Error("WASM_MEMORY_LIMIT"),
        filling_tables_reaches_the_limit: "grow-table-touched" => Error("WASM_MEMORY_LIMIT"),
    }

    #[test]
    fn recycles_a_leaking_instance_at_its_limit() {
        let folder = tempfile::tempdir().unwrap();
        in_every_mode(&write(folder.path(), "grow-memory-leaking"), LONG_TIMEOUT_MS, |agent, connection, isolation, fail_open| {
            assert_good(&connection.ask(kind::REQUEST_HEADERS, &good("first")));
            let before = agent.resident();
            let mut limits = 0;
            // At 1 MB a round, this is far more than all instances together may have.
            for round in 0..600 {
                let answer = connection.ask(kind::REQUEST_HEADERS, &bad("leak", "/"));
                match module_error(&answer) {
                    None => assert_good(&answer),
                    Some(_) => {
                        assert_module_error(&answer, "WASM_MEMORY_LIMIT", fail_open);
                        limits += 1;
                    }
                }
                // The limit of an instance, times the instances.
                assert!(agent.resident() < before + 4 * (64 << 20) + MEMORY_NOISE, "round {round}");
            }
            // A fresh instance never leaks much; a pooled one reaches its limit after 16 rounds.
            assert_eq!(limits > 20, isolation == "pooled", "reached the limit {limits} times");
        });
    }
}

mod allocations {
    use super::*;

    misbehaviours! {
        at_null: "alloc-null" => Error("WASM_ALLOC_FAILED"),
        out_of_bounds: "alloc-out-of-bounds" => Error("WASM_ALLOC_FAILED"),
        across_the_end: "alloc-straddling" => Error("WASM_ALLOC_FAILED"),
        at_a_negative_address: "alloc-negative" => Error("WASM_ALLOC_FAILED"),
        over_the_answer_harm_that_answer_alone: "alloc-overlapping" => Error("WASM_INVALID_RESULT"),
    }
}

mod results {
    use super::*;

    misbehaviours! {
        out_of_bounds_are_invalid: "result-out-of-bounds" => Error("WASM_INVALID_RESULT"),
        across_the_end_are_invalid: "result-straddling" => Error("WASM_INVALID_RESULT"),
        without_an_address_are_invalid: "result-null" => Error("WASM_INVALID_RESULT"),
        inside_the_input_are_invalid: "result-inside-input" => Error("WASM_INVALID_RESULT"),
        that_are_the_input_are_read_as_answers: "result-input" => NoOpinion,
        that_are_zero_mean_no_opinion: "result-zero" => NoOpinion,
        without_a_length_mean_no_opinion: "result-smallest" => NoOpinion,
        as_long_as_possible_are_too_large: "result-huge" => Error("WASM_OUTPUT_LIMIT"),
        that_are_negative_are_too_large: "result-negative" => Error("WASM_OUTPUT_LIMIT"),
        of_20_mb_are_too_large: "result-20mb" => Error("WASM_OUTPUT_LIMIT"),
        at_the_limit_are_accepted: "result-limit" => Good,
        one_byte_over_the_limit_are_too_large: "result-over-limit" => Error("WASM_OUTPUT_LIMIT"),
    }

    #[test]
    fn that_fit_no_frame_are_too_large() {
        // A body of 13 million bytes takes a third more in base64.
        const LENGTH: u32 = 13_000_000;
        let (before, after) = (r#"{"response_body_mutation":{"action":"replace","data":""#, r#""}}"#);
        let quoted = |text: &str| text.replace('"', "\\22");
        let code = format!(
            "(drop (memory.grow (i32.const 64)))
        (memory.fill (i32.const 0x200000) (i32.const 0x78) (i32.const {LENGTH}))
        (memory.copy (i32.const 0x200000) (i32.const 16) (i32.const {}))
        (memory.copy (i32.const {}) (i32.const 256) (i32.const {}))
        (i64.or (i64.const 0x200000_00000000) (i64.const {LENGTH}))",
            before.len(),
            0x20_0000 + LENGTH as usize - after.len(),
            after.len(),
        );
        let data = format!(r#"(data (i32.const 16) "{}") (data (i32.const 256) "{}")"#, quoted(before), quoted(after));
        let folder = tempfile::tempdir().unwrap();
        let wat = module::with_hooks(
            &["on_request_headers", "on_response_body"],
            |hook| {
                if hook == "on_response_body" { code.clone() } else { "i64.const 0".into() }
            },
            &data,
        );
        let module = module::write(folder.path(), "m.wasm", &wat);
        let agent = AGENT.start(&module, &["--max-output-bytes", "16777216", "--timeout-ms", LONG_TIMEOUT_MS]);
        let mut connection = agent.connect();
        let answer = connection.ask(kind::RESPONSE_BODY, &testkit::response_body("large", "x"));
        assert_module_error(&answer, "WASM_OUTPUT_LIMIT", false);
        assert_eq!(decision(&connection.get("after", "/")), "allow");
        agent.end_unharmed();
    }
}

mod answers {
    use super::*;

    /// Makes the module return `answer`, and returns what the agent makes of it.
    fn echo(connection: &mut Connection, id: &str, answer: &[u8]) -> Value {
        let hex: String = answer.iter().map(|byte| format!("{byte:02x}")).collect();
        connection.ask(kind::REQUEST_HEADERS, &bad(id, &format!("/{hex}")))
    }

    /// Invalid answers.
    fn invalid_answers() -> Vec<Vec<u8>> {
        let mut invalid: Vec<Vec<u8>> = [
            &b"\xff\xfe"[..],
            b"{\"body\":\"\xc3\x28\"}",
            b"{\"ignored\":\"\xed\xa0\x80\"}",
            b"{\"body\":\"\\ud800\"}",
            b"{",
            b"null",
            b"[]",
            b"\"allow\"",
            b"0",
            b"\0",
            b"{}{}",
            b"{}\0",
            b"{\"decision\":\"allow\",}",
            b"{'decision':'allow'}",
            b"{\"confidence\":NaN}",
            b"{\"confidence\":Infinity}",
            b"{\"decision\":\"block\",\"decision\":\"allow\"}",
            b"{\"status\":403,\"decision\":\"block\",\"status\":200}",
        ]
        .map(<[u8]>::to_vec)
        .into();
        let mut add = |value: Value| invalid.push(value.to_string().into_bytes());

        // Wrong types, in every field.
        let wrong = |fields: &[&str], values: &[Value], add: &mut dyn FnMut(Value)| {
            for field in fields {
                for value in values {
                    add(json!({*field: value}));
                }
            }
        };
        let (number, text, list, object, yes) = (json!(1), json!("x"), json!([1]), json!({"a": [1]}), json!(true));
        wrong(&["decision", "body", "challenge_type"], &[number.clone(), list.clone(), object.clone(), yes.clone()], &mut add);
        wrong(
            &["status"],
            &[text.clone(), list.clone(), object.clone(), yes.clone(), json!(-1), json!(403.5), json!(65536), json!(1e300)],
            &mut add,
        );
        let appending = ["append_request_headers", "append_response_headers"];
        let maps = ["add_request_headers", "add_response_headers", appending[0], appending[1], "challenge_params", "routing_metadata"];
        wrong(&maps, &[number.clone(), text.clone(), list.clone(), yes.clone(), json!({"a": {"b": "c"}}), json!({"a": null})], &mut add);
        wrong(
            &["add_request_headers", "add_response_headers", appending[0], appending[1], "routing_metadata"],
            &[json!({"a": 1}), object.clone()],
            &mut add,
        );
        let lists = ["remove_request_headers", "remove_response_headers", "tags", "rule_ids", "reason_codes"];
        wrong(&lists, &[number.clone(), text.clone(), list.clone(), object.clone(), yes.clone(), json!([["a"]]), json!([null])], &mut add);
        wrong(
            &["confidence"],
            &[text.clone(), list.clone(), yes.clone(), json!(-0.1), json!(1.1), json!(1e308), json!(u64::MAX)],
            &mut add,
        );
        wrong(&["needs_more"], &[number.clone(), text.clone(), list.clone(), object.clone()], &mut add);
        let mutations = ["request_body_mutation", "response_body_mutation"];
        let bad_mutations = [
            number.clone(),
            text.clone(),
            yes.clone(),
            json!({}),
            json!({"action": "explode"}),
            json!({"action": "replace"}),
            json!({"action": "replace", "data": 1}),
            json!({"action": "replace", "data": "a", "data_base64": "YQ=="}),
            json!({"action": "replace", "data_base64": "%"}),
            json!({"action": "drop", "chunk_index": -1}),
            json!({"action": "drop", "chunk_index": 4_294_967_296_u64}),
        ];
        wrong(&mutations, &bad_mutations, &mut add);
        let bad_frames = [
            number.clone(),
            text.clone(),
            yes,
            json!({"close": {}}),
            json!({"close": {"code": 999}}),
            json!({"close": {"code": 1006}}),
            json!({"close": {"code": 1008, "reason": "x".repeat(124)}}),
            json!({"close": {"code": 1008, "reason": "a\r\nb"}}),
        ];
        wrong(&["websocket_decision"], &bad_frames, &mut add);
        wrong(
            &["guardrail_response"],
            &[number, text, list, json!({}), json!({"detected": 1}), json!({"detected": true, "confidence": 2})],
            &mut add,
        );

        // Unknown decisions, statuses out of range.
        for decision in ["", "alow", "allow ", "refuse", "ALLOW\0", "block,allow"] {
            add(json!({"decision": decision}));
        }
        for status in [0, 99, 100, 101, 103, 199, 600, 999, 65535] {
            add(json!({"decision": "block", "status": status}));
        }
        for status in [200, 300, 304, 306, 309, 400] {
            add(json!({"decision": "redirect", "body": "/", "status": status}));
        }
        add(json!({"decision": "challenge"}));
        add(json!({"decision": "challenge", "challenge_type": ""}));

        // Injection through every string.
        for evil in ["a\r\nSet-Cookie: x=1", "a\nb", "a\rb", "a\0b", "a\u{7f}b", "a\u{1b}[31mb"] {
            for field in ["add_request_headers", "add_response_headers", appending[0], appending[1]] {
                add(json!({field: {"X-A": evil}}));
                add(json!({field: {"X-A": ["good", evil]}}));
                add(json!({field: {evil: "good"}}));
                add(json!({"decision": "block", field: {"X-A": evil}}));
                add(json!({"decision": "block", field: {"X-A": ["good", evil]}}));
            }
            for field in ["remove_request_headers", "remove_response_headers", "tags", "rule_ids", "reason_codes"] {
                add(json!({field: ["good", evil]}));
            }
            add(json!({"decision": "redirect", "body": evil}));
            add(json!({"decision": "challenge", "challenge_type": evil}));
            add(json!({"decision": "challenge", "challenge_type": "x", "challenge_params": {"www-authenticate": evil}}));
            add(json!({"decision": "challenge", "challenge_type": "x", "challenge_params": {evil: "good"}}));
            add(json!({"routing_metadata": {"a": evil}}));
            add(json!({"routing_metadata": {evil: "a"}}));
        }
        for name in ["", " ", "a b", "a:b", ":path", "a\u{e4}", "a,b", "(a)", "a/b", "a;b"] {
            for field in ["add_request_headers", "add_response_headers", appending[0], appending[1]] {
                add(json!({field: {name: "x"}}));
            }
            for field in ["remove_request_headers", "remove_response_headers"] {
                add(json!({field: [name]}));
            }
        }
        // Only the proxy may set headers that frame a message, and a request has one host.
        let framing = [
            "Content-Length",
            "transfer-encoding",
            "CONNECTION",
            "Keep-Alive",
            "Proxy-Connection",
            "TE",
            "Trailer",
            "Upgrade",
            "HTTP2-Settings",
        ];
        for name in framing {
            for field in ["add_request_headers", "add_response_headers", appending[0], appending[1]] {
                for decision in ["allow", "block", "redirect", "challenge"] {
                    add(json!({"decision": decision, "body": "/", "challenge_type": "x", field: {name: "30"}}));
                }
                add(json!({field: {"X-A": "good", name: ["1", "2"]}}));
            }
            add(json!({"remove_request_headers": ["X-A", name]}));
        }
        for host in [json!(""), json!("a b"), json!("a,b"), json!("a/b"), json!("a:b"), json!([]), json!(["a", "b"])] {
            add(json!({"add_request_headers": {"Host": host}}));
        }
        add(json!({"append_request_headers": {"host": "a"}}));
        add(json!({"remove_request_headers": ["Host"]}));
        add(json!({"decision": "block", "add_response_headers": {"Set-Cookie": ["a=1", "b=2"]}}));
        add(json!({"decision": "block", "add_response_headers": {"Set-Cookie": "a=1"}, appending[1]: {"set-cookie": "b=2"}}));
        for url in ["https://[::1/", "https://[x]/", "https://shop.example:http/", "/a\u{7f}"] {
            add(json!({"decision": "redirect", "body": url}));
        }
        for url in ["", " ", "javascript:alert(1)", "  JavaScript:alert(1)", "java\tscript:alert(1)", "data:text/html,x", "vbscript:x"] {
            add(json!({"decision": "redirect", "body": url}));
            if !url.trim().is_empty() {
                add(json!({"decision": "block", "status": 302, "add_response_headers": {"location": url}}));
                add(json!({"add_response_headers": {"Location": url}}));
            }
        }
        add(json!({"add_response_headers": {"Location": ["/a", "/b"]}}));
        add(json!({"append_response_headers": {"Location": "/a"}}));
        add(json!({"guardrail_response": {"detected": true, "detections": [{"category": "ssn"}]}}));

        for twice in [
            r#"{"add_request_headers":{"X-A":"1","X-A":"2"}}"#,
            r#"{"add_response_headers":{"X-A":"1","x-a":"2"}}"#,
            r#"{"append_request_headers":{"X-A":"1","X-A":"1"}}"#,
            r#"{"append_response_headers":{"X-A":"1","X-A":"1"}}"#,
            r#"{"decision":"challenge","challenge_type":"x","challenge_params":{"body":"a","body":"b"}}"#,
            r#"{"routing_metadata":{"a":"1","a":"2"}}"#,
            r#"{"websocket_decision":{"close":{"code":1000},"close":{"code":1008}}}"#,
            r#"{"websocket_decision":{"close":{"code":1000,"code":1008}}}"#,
            r#"{"response_body_mutation":{"action":"drop","action":"pass_through"}}"#,
        ] {
            invalid.push(twice.into());
        }

        for depth in [200, 5000] {
            invalid.push(format!("{{\"tags\":{}{}}}", "[".repeat(depth), "]".repeat(depth)).into_bytes());
            invalid.push(format!("{}{}", "{\"a\":".repeat(depth), "}").into_bytes());
        }
        invalid.push(format!("{{\"status\":{}}}", "9".repeat(10_000)).into_bytes());
        invalid.push(format!("{{\"confidence\":0.{}e400}}", "9".repeat(1000)).into_bytes());
        invalid.push(
            format!(
                "{{\"guardrail_response\":{{\"detected\":true,\"detections\":[{}]}}}}",
                r#"{"category":"a","description":"b"},"#.repeat(300) + "1"
            )
            .into_bytes(),
        );
        invalid
    }

    #[test]
    fn invalid_ones_are_module_errors() {
        let folder = tempfile::tempdir().unwrap();
        in_every_mode(&write(folder.path(), "echo"), LONG_TIMEOUT_MS, |_, connection, _, fail_open| {
            for answer in invalid_answers() {
                println!("{}", String::from_utf8_lossy(&answer[..answer.len().min(100)]));
                assert_module_error(&echo(connection, "bad", &answer), "WASM_INVALID_RESULT", fail_open);
            }
            assert_good(&connection.ask(kind::REQUEST_HEADERS, &good("last")));
        });
    }

    #[test]
    fn odd_but_valid_ones_take_effect() {
        let folder = tempfile::tempdir().unwrap();
        in_every_mode(&write(folder.path(), "echo"), LONG_TIMEOUT_MS, |_, connection, _, _| {
            for (answer, expected) in [
                (json!({"DECISION": "block"}), "allow"),
                (json!({"decision": "BLOCK"}), "block"),
                (json!({"decision": null, "tags": null, "status": null}), "allow"),
                (json!({"decision": "block", "body": "a\r\n\r\nb\u{0}"}), "block"),
                (json!({"unknown": {"deep": [[[[[[[[[[{}]]]]]]]]]]}}), "allow"),
                (json!({"confidence": 0}), "allow"),
                (json!({"confidence": -0.0}), "allow"),
                (json!({"add_request_headers": {"X-A": []}}), "allow"),
                (json!({"add_request_headers": {"Host": "[::1]:80"}}), "allow"),
                (json!({"append_request_headers": {"Cookie": ["a=1", "b=2"]}}), "allow"),
                (json!({"append_response_headers": {"Set-Cookie": ["a=1", "b=2"]}}), "allow"),
                (json!({"remove_response_headers": ["Content-Length"]}), "allow"),
                (json!({"decision": "block", "status": 204, "body": "none"}), "block"),
                (json!({"decision": "block", "append_response_headers": {"Set-Cookie": "a=1"}}), "block"),
            ] {
                let got = echo(connection, "strange", answer.to_string().as_bytes());
                assert_eq!(module_error(&got), None, "{answer}: {got}");
                assert_eq!(decision(&got), expected, "{answer}: {got}");
            }
            let redirect = echo(connection, "url", r#"{"decision":"redirect","body":"/caf\u00e9 x?a=%2F"}"#.as_bytes());
            assert_eq!(redirect["decision"], json!({"redirect": {"url": "/caf%C3%A9%20x?a=%2F", "status": 302}}));
            let sent =
                echo(connection, "location", r#"{"decision":"block","status":302,"add_response_headers":{"Location":"/a b"}}"#.as_bytes());
            assert_eq!(sent["decision"]["block"]["headers"], json!({"Location": "/a%20b"}));
            let no_content = echo(connection, "none", br#"{"decision":"block","status":304}"#);
            assert_eq!(no_content["decision"], json!({"block": {"status": 304, "body": "", "headers": null}}));
            let appended = echo(
                connection,
                "appended",
                br#"{"append_response_headers":{"Set-Cookie":"b=2"},"add_response_headers":{"Set-Cookie":"a=1"}}"#,
            );
            let cookies = json!([{"set": {"name": "Set-Cookie", "value": "a=1"}}, {"add": {"name": "Set-Cookie", "value": "b=2"}}]);
            assert_eq!(appended["response_headers"], cookies);
            // An ignored value is not looked into, however deep it is.
            let deep = format!("{{\"ignored\":{}{}}}", "[".repeat(5000), "]".repeat(5000));
            assert_eq!(decision(&echo(connection, "deep", deep.as_bytes())), "allow");
        });
    }

    #[test]
    fn nesting_within_texts_is_harmless() {
        let answer = format!(
            r#"{{"guardrail_response":{{"detected":true,"detections":[{{"category":"a","description":"b","a":{}}}]}}}}"#,
            testkit::nested_texts()
        );
        let folder = tempfile::tempdir().unwrap();
        let module = module::write(folder.path(), "m.wasm", &module::answering(&["on_request_headers"], &answer));
        let agent = AGENT.start(&module, &["--timeout-ms", LONG_TIMEOUT_MS]);
        let mut connection = agent.connect();
        assert_eq!(decision(&connection.get("a", "/")), "allow");
        agent.end_unharmed();
    }
}

mod loading {
    use super::*;

    /// Modules that are rejected, each with a part of the reason.
    pub(super) const REJECTED: &[(&str, &str)] = &[
        ("missing-memory", "does not export `memory`"),
        ("missing-alloc", "does not export `alloc`"),
        ("missing-dealloc", "does not export `dealloc`"),
        ("missing-hook", "exports none of `on_request_headers`"),
        ("misnamed-hook", "exports none of `on_request_headers`"),
        ("mistyped-memory", "`memory` is not a memory"),
        ("mistyped-alloc", "`alloc` has the type (i64) -> i64, not (i32) -> i32"),
        ("mistyped-dealloc", "`dealloc` is not a function"),
        ("mistyped-hook", "`on_request_headers` has the type (i32, i32, i32) -> i32, not (i32, i32) -> i64"),
        ("mistyped-initialize", "`_initialize` has the type (i32) -> ()"),
        ("duplicate-export", "invalid module"),
        (
            "unknown-import",
            "unknown import `env.open`; unknown import `wasi_snapshot_preview1.path_open_all`; unknown import `env.heap`; unknown import `env.table`",
        ),
        ("mistyped-import", "`wasi_snapshot_preview1.fd_write` has the type (i64) -> i64"),
        ("imported-memory", "must define and export its memory"),
        // These would abort the process if wasmtime compiled them.
        ("subtyping-call-indirect", "it uses the proposal `gc`"),
        ("subtyping-initialize", "it uses the proposal `gc`"),
        ("subtyping-ref-test", "it uses the proposal `gc`"),
        // One for each proposal that is off; a test of the runtime checks that none is missing.
        ("memory64", "it uses the proposal `memory64`, which the agent does not support: build for `wasm32`"),
        ("shared-memory", "it uses the proposal `threads`, which the agent does not support: build without threads"),
        ("threads", "`threads`"),
        ("shared-everything-threads", "`shared-everything-threads`"),
        ("relaxed-simd", "`relaxed-simd`"),
        ("multi-memory", "`multi-memory`"),
        ("custom-page-sizes", "`custom-page-sizes`"),
        ("memory-control", "`memory-control`"),
        ("exceptions", "it uses the proposal `exceptions`, which the agent does not support: build without exceptions"),
        ("legacy-exceptions", "`legacy-exceptions`"),
        ("gc", "`gc`"),
        ("function-references", "`function-references`"),
        ("externref", "`externref`"),
        ("custom-descriptors", "`custom-descriptors`"),
        ("stack-switching", "`stack-switching`"),
        ("wide-arithmetic", "`wide-arithmetic`"),
        ("compact-import-section", "`compact-import-section`"),
        ("large-memory", "raise `--max-memory-mb`"),
        ("large-table", "invalid module"),
        ("many-elements", "its element segments have 100100 elements, more than the limit of 100000"),
        ("many-tables", "invalid module"),
        ("start-trap", "WASM_TRAP"),
        ("start-loop", "WASM_TIMEOUT: its start function did not end within 1000 ms: raise `--start-timeout-ms`"),
        ("start-grow", "WASM_MEMORY_LIMIT"),
        ("initialize-trap", "WASM_TRAP"),
        ("initialize-loop", "WASM_TIMEOUT: `_initialize` did not end within 1000 ms: raise `--start-timeout-ms`"),
        ("data-out-of-bounds", "WASM_TRAP"),
        ("command", "build a reactor"),
    ];

    /// Files that are not modules at all, each with a part of the reason.
    fn not_modules(folder: &Path) -> Vec<(PathBuf, &'static str)> {
        let good = wat::parse_str(module::hostile("result-zero")).unwrap();
        let file = |name: &str, bytes: &[u8]| {
            let path = folder.join(name);
            std::fs::write(&path, bytes).unwrap();
            path
        };
        let fifo = folder.join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0).unwrap();
        let large = folder.join("large.wasm");
        let sparse = std::fs::File::create(&large).unwrap();
        sparse.set_len(100 << 20).unwrap();
        let mut many_imports = String::from("(module ");
        for at in 0..50_000 {
            many_imports.push_str(&format!("(import \"env\" \"unknown{at}\" (func))"));
        }
        many_imports.push(')');
        vec![
            (folder.join("missing.wasm"), "No such file"),
            (folder.to_owned(), "not a regular file"),
            (PathBuf::from("/dev/zero"), "not a regular file"),
            (fifo, "not a regular file"),
            (large, "more than the limit of 67108864"),
            (file("empty.wasm", b""), "it is empty"),
            (file("text.wasm", b"(module)"), "text format"),
            (file("noise.wasm", b"\x7fELF\x02"), "not Wasm"),
            (file("component.wasm", b"\0asm\x0d\0\x01\0"), "component"),
            (file("version.wasm", b"\0asm\x02\0\0\0"), "version"),
            (file("truncated.wasm", &good[..good.len() / 2]), "invalid module"),
            (file("garbage.wasm", &[good.as_slice(), b"\xff\xff\xff\xff\xff\xff"].concat()), "invalid module"),
            (file("imports.wasm", &wat::parse_str(many_imports).unwrap()), "unknown import"),
        ]
    }

    #[test]
    fn rejects_with_the_reason() {
        let folder = tempfile::tempdir().unwrap();
        let modules = REJECTED.iter().map(|(name, reason)| (write(folder.path(), name), *reason));
        for (path, reason) in modules.chain(not_modules(folder.path())) {
            let message = rejection(&path, &SHORT_START);
            assert!(message.contains(reason), "{}: {message}", path.display());
        }
        // With fresh instances for each call, the start makes one as well, and no failure mode
        // accepts a bad module.
        for (name, reason) in REJECTED.iter().filter(|(name, _)| name.starts_with("start-") || name.starts_with("initialize-")) {
            let message = rejection(&write(folder.path(), name), &[&SHORT_START[..], &["--isolation", "request", "--fail-open"]].concat());
            assert!(message.contains(reason), "{name}: {message}");
        }
    }

    #[test]
    fn failed_reload_keeps_the_current_module() {
        let folder = tempfile::tempdir().unwrap();
        let served = folder.path().join("served.wasm");
        std::fs::copy(write(folder.path(), "loop"), &served).unwrap();
        let agent = AGENT.start(&served, &[&SHORT_START[..], &["--timeout-ms", LONG_TIMEOUT_MS]].concat());
        let mut connection = agent.connect();
        let modules = REJECTED.iter().map(|(name, reason)| (write(folder.path(), name), *reason));
        let rejections = || agent.log.lines().iter().filter(|line| line.contains("reload failed, keeping the current module")).count();
        for (path, reason) in modules.chain(not_modules(folder.path())) {
            let next = folder.path().join("next");
            let _ = std::fs::remove_file(&next);
            std::os::unix::fs::symlink(&path, &next).unwrap();
            std::fs::rename(&next, &served).unwrap();
            let before = rejections();
            agent.signal(Signal::HUP);
            let mut asked = 0;
            wait_for("the module to be rejected", || {
                assert_good(&connection.ask(kind::REQUEST_HEADERS, &good(&format!("during-{asked}"))));
                asked += 1;
                (rejections() > before).then_some(())
            });
            let lines = agent.log.lines();
            let last = lines.iter().rfind(|line| line.contains("reload failed, keeping the current module")).unwrap();
            assert!(
                serde_json::from_str::<Value>(last).unwrap()["message"].as_str().unwrap().contains(reason),
                "{}: {last}",
                path.display()
            );
        }
        agent.end();
    }

    #[test]
    fn long_names_are_truncated() {
        let folder = tempfile::tempdir().unwrap();
        let long = "\\1b[31m".repeat(20_000);
        let params = "i64 ".repeat(1000);
        let frame = |more: &str| format!(r#"(module {more} (memory (export "memory") 1))"#);
        for wat in [
            frame(&format!(r#"(import "{long}" "{long}" (func))"#)),
            frame(&format!(r#"(func (export "alloc") (param {params})) (func (export "on_request_headers") (param {params}))"#)),
        ] {
            rejection(&module::write(folder.path(), "m.wasm", &wat), &[]);
        }
    }
}

mod configuring {
    use super::*;

    /// Modules that misbehave in `on_configure`, each with a part of the reason.
    pub(super) const UNCONFIGURABLE: &[(&str, &str)] = &[
        ("configure-loop", "WASM_TIMEOUT: `on_configure` did not end within 1000 ms: raise `--start-timeout-ms`"),
        ("configure-trap", "WASM_TRAP"),
        ("configure-grow", "WASM_MEMORY_LIMIT"),
        ("configure-nonsense", "WASM_INVALID_RESULT"),
        ("configure-large", "WASM_OUTPUT_LIMIT"),
    ];

    #[test]
    fn failure_rejects_the_module_or_keeps_the_configuration() {
        let folder = tempfile::tempdir().unwrap();
        for (name, reason) in UNCONFIGURABLE {
            let module = write(folder.path(), name);
            for isolation in ["pooled", "request"] {
                let message = rejection(&module, &[&SHORT_START[..], &["--isolation", isolation, "--module-config", "{}"]].concat());
                assert!(message.contains(reason), "{name}: {message}");
                let agent =
                    AGENT.start(&module, &[&SHORT_START[..], &["--isolation", isolation, "--timeout-ms", LONG_TIMEOUT_MS]].concat());
                let mut connection = agent.connect();
                let rejected = connection.configure(&json!({"module-config": {"a": 1}})).unwrap_err();
                assert!(rejected.contains(reason), "{name}: {rejected}");
                assert_good(&connection.ask(kind::REQUEST_HEADERS, &good("after")));
                agent.end_unharmed();
            }
        }
    }
}

mod instances {
    use super::*;

    /// Modules of which instances can be made at first, but not later.
    pub(super) const FAIL_LATER: &[&str] = &["start-loop-later", "initialize-trap-later"];

    #[test]
    fn that_can_no_longer_be_made_fail_calls_until_a_reload() {
        let folder = tempfile::tempdir().unwrap();
        for name in FAIL_LATER {
            for isolation in ["pooled", "request"] {
                println!("{name}, --isolation {isolation}");
                let module = write(folder.path(), name);
                let agent = AGENT.start(
                    &module,
                    &["--isolation", isolation, "--timeout-ms", TIMEOUT_MS, "--pool-size", "2", "--start-timeout-ms", "1000"],
                );
                let mut connection = agent.connect();
                assert_good(&connection.ask(kind::REQUEST_HEADERS, &good("first")));
                // Each module error costs an instance, until none is left or can be made.
                wait_for("good requests to fail", || {
                    assert!(module_error(&connection.ask(kind::REQUEST_HEADERS, &bad("b", "/"))).is_some());
                    module_error(&connection.ask(kind::REQUEST_HEADERS, &good("g"))).map(str::to_owned)
                });
                if isolation == "pooled" {
                    agent.log.wait_for_line("the next try", |line| line.contains("cannot create an instance, retrying"));
                }
                // A reload ends it.
                module::write(folder.path(), &format!("{name}.wasm"), &module::hostile("result-zero"));
                agent.signal(Signal::HUP);
                wait_for("the other module to serve", || {
                    module_error(&connection.ask(kind::REQUEST_HEADERS, &good("g"))).is_none().then_some(())
                });
                agent.end_unharmed();
            }
        }
    }
}

mod fixtures {
    use super::*;

    #[test]
    fn all_have_a_test() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/hostile");
        let elsewhere = ["frame", "echo", "grow-memory-leaking", "remember"];
        let tried =
            [deadline::FIXTURES, host_functions::FIXTURES, traps::FIXTURES, memory::FIXTURES, allocations::FIXTURES, results::FIXTURES];
        let rejected = loading::REJECTED.iter().chain(configuring::UNCONFIGURABLE).map(|(name, _)| *name);
        let named: Vec<&str> =
            tried.concat().into_iter().chain(instances::FAIL_LATER.iter().copied()).chain(elsewhere).chain(rejected).collect();
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_none_or(|extension| extension != "wat") {
                continue;
            }
            let name = path.file_stem().unwrap().to_str().unwrap();
            assert!(named.contains(&name), "no test uses the fixture `{name}`");
        }
    }
}
