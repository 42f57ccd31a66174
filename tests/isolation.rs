//! What one request leaves in a module's memory, and who can read it. The module is `fixtures/hostile/remember.wat`.

use serde_json::{Value, json};
use testkit::{Agent, Connection, Program, kind, module, module_error};

const AGENT: Program = Program(env!("CARGO_BIN_EXE_zentinel-wasm-agent"));

/// Long enough for a look at 48 MB on a busy machine.
const TIMEOUT_MS: &str = "10000";

fn start(options: &[&str]) -> (Agent, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let module = module::write(folder.path(), "remember.wasm", &module::hostile("remember"));
    let mut all = vec!["--timeout-ms", TIMEOUT_MS];
    all.extend(options);
    (AGENT.start(&module, &all), folder)
}

/// The module remembers this request.
fn remember(connection: &mut Connection, uri: &str) -> Value {
    let mut event = testkit::request("secret", uri);
    event["method"] = json!("EVIL");
    // The input's own place in the memory must come back empty too.
    event["headers"]["x-secret"] = json!(["\u{5e}".repeat(100_000)]);
    connection.ask(kind::REQUEST_HEADERS, &event)
}

/// Whether a later request finds anything of an earlier one: `clean` or `found`.
#[track_caller]
fn look(connection: &mut Connection) -> String {
    let answer = connection.get("later", "/");
    answer["audit"]["tags"][0].as_str().unwrap_or_else(|| panic!("{answer}")).to_owned()
}

#[test]
fn a_pooled_instance_remembers() {
    // What the other tests look for can be found.
    let (agent, _folder) = start(&["--pool-size", "1"]);
    let mut connection = agent.connect();
    for uri in ["/small", "/large"] {
        remember(&mut connection, uri);
        assert_eq!(look(&mut connection), "found");
    }
}

#[test]
fn isolated_requests_find_nothing_of_each_other() {
    for pool_size in ["1", "4"] {
        let (agent, _folder) = start(&["--isolation", "request", "--pool-size", pool_size]);
        let mut connection = agent.connect();
        assert_eq!(look(&mut connection), "clean");
        for round in 0..10 {
            // Slots of every size, whole and torn down in the middle of a call.
            for uri in ["/small", "/large", "/trap", "/small"] {
                let answer = remember(&mut connection, uri);
                assert_eq!(module_error(&answer), (uri == "/trap").then_some("WASM_TRAP"), "{answer}");
                assert_eq!(look(&mut connection), "clean", "round {round}, after {uri}");
            }
        }
    }
}

#[test]
fn isolated_requests_find_nothing_of_each_other_while_they_run_together() {
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
                    assert_eq!(look(&mut later), "clean");
                }
            });
        }
    });
}

#[test]
fn nothing_is_left_of_an_instance_that_was_thrown_away() {
    let (agent, _folder) = start(&["--pool-size", "1"]);
    let mut connection = agent.connect();
    for _ in 0..10 {
        // A trap, or a refusal of the memory that the look before has taken already.
        assert!(module_error(&remember(&mut connection, "/trap")).is_some());
        assert_eq!(look(&mut connection), "clean");
    }
}
