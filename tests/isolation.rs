//! What a request leaves in a module's memory, and which requests can read it. The module is
//! `fixtures/hostile/remember.wat`.

use serde_json::{Value, json};
use testkit::{Agent, Connection, Program, kind, module, module_error};

const AGENT: Program = Program(env!("CARGO_BIN_EXE_zentinel-wasm-agent"));

/// Long enough to scan 48 MB on a busy machine.
const TIMEOUT_MS: &str = "10000";

fn start(options: &[&str]) -> (Agent, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let module = module::write(folder.path(), "remember.wasm", &module::hostile("remember"));
    let mut all = vec!["--timeout-ms", TIMEOUT_MS];
    all.extend(options);
    (AGENT.start(&module, &all), folder)
}

/// Sends a request that the module remembers.
fn remember(connection: &mut Connection, uri: &str) -> Value {
    let mut event = testkit::request("secret", uri);
    event["method"] = json!("EVIL");
    // The memory of the input must be reset as well.
    event["headers"]["x-secret"] = json!(["\u{5e}".repeat(100_000)]);
    connection.ask(kind::REQUEST_HEADERS, &event)
}

/// Lets the module search its memory for an earlier request: `clean` or `found`.
#[track_caller]
fn search(connection: &mut Connection) -> String {
    let answer = connection.get("later", "/");
    answer["audit"]["tags"][0].as_str().unwrap_or_else(|| panic!("{answer}")).to_owned()
}

#[test]
fn pooled_instances_remember() {
    // The search of the other tests works.
    let (agent, _folder) = start(&["--pool-size", "1"]);
    let mut connection = agent.connect();
    for uri in ["/small", "/large"] {
        remember(&mut connection, uri);
        assert_eq!(search(&mut connection), "found");
    }
}

#[test]
fn isolated_requests_share_nothing() {
    for pool_size in ["1", "4"] {
        let (agent, _folder) = start(&["--isolation", "request", "--pool-size", pool_size]);
        let mut connection = agent.connect();
        assert_eq!(search(&mut connection), "clean");
        for round in 0..10 {
            // Memories of every size, and instances that trap in the middle of a call.
            for uri in ["/small", "/large", "/trap", "/small"] {
                let answer = remember(&mut connection, uri);
                assert_eq!(module_error(&answer), (uri == "/trap").then_some("WASM_TRAP"), "{answer}");
                assert_eq!(search(&mut connection), "clean", "round {round}, after {uri}");
            }
        }
    }
}

#[test]
fn isolated_requests_share_nothing_while_they_run_together() {
    let (agent, _folder) = start(&["--isolation", "request", "--pool-size", "4"]);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            let (mut secret, mut later) = (agent.connect(), agent.connect());
            scope.spawn(move || {
                for uri in ["/small", "/large", "/trap"].iter().cycle().take(30) {
                    remember(&mut secret, uri);
                }
            });
            scope.spawn(move || {
                for _ in 0..30 {
                    assert_eq!(search(&mut later), "clean");
                }
            });
        }
    });
}

#[test]
fn a_discarded_instance_leaves_nothing() {
    let (agent, _folder) = start(&["--pool-size", "1"]);
    let mut connection = agent.connect();
    for _ in 0..10 {
        // A trap, or a memory error because the search before has taken the memory already.
        assert!(module_error(&remember(&mut connection, "/trap")).is_some());
        assert_eq!(search(&mut connection), "clean");
    }
}
