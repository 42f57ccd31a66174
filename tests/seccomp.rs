//! The agent under the profile in `SECURITY.md`: the kernel kills it at any system call that is not
//! listed there.

#![cfg(target_arch = "x86_64")]

#[path = "common/grpc.rs"]
mod client;

use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

use client::{Client, get, is_allow};
use rustix::process::Signal;
use seccompiler::TargetArch;
use serde_json::{Value, json};
use testkit::{Agent, Collector, Program, decision, module, module_error};

const AGENT: Program = Program(env!("CARGO_BIN_EXE_zentinel-wasm-agent"));

/// System calls of the thread that starts the agent. They are allowed in addition to the listed
/// ones, because the filter cannot be installed any later.
const LAUNCHING: [&str; 7] = ["clone", "close_range", "dup2", "pidfd_open", "pipe2", "vfork", "wait4"];

/// The body of a hook that grows the memory to its limit, touches it, and traps.
const GROWING: &str = "(loop $more (br_if $more (i32.ne (memory.grow (i32.const 1)) (i32.const -1))))
    (memory.fill (i32.const 0) (i32.const 1) (i32.shl (memory.size) (i32.const 16))) unreachable";

/// The system calls in the lists of `SECURITY.md`.
fn listed() -> BTreeSet<&'static str> {
    let (_, confinement) = include_str!("../SECURITY.md").split_once("## Confinement").expect("no section on confinement");
    let (confinement, _) = confinement.split_once("\n## ").expect("no section after it");
    confinement.lines().filter_map(|line| line.strip_prefix("    ")).flat_map(str::split_whitespace).collect()
}

/// Runs something on a thread that may make the listed system calls only. That holds for the
/// processes and threads that it starts as well.
fn confined<T: Send>(launch: impl FnOnce() -> T + Send) -> T {
    let rules: Vec<Value> = listed().union(&BTreeSet::from(LAUNCHING)).map(|name| json!({"syscall": name})).collect();
    let profile = json!({"agent": {"mismatch_action": "kill_process", "match_action": "allow", "filter": rules}});
    let profiles = seccompiler::compile_from_json(profile.to_string().as_bytes(), TargetArch::x86_64).unwrap();
    thread::scope(|scope| {
        let launched = scope.spawn(|| {
            seccompiler::apply_filter(&profiles["agent"]).unwrap();
            launch()
        });
        launched.join().unwrap()
    })
}

#[test]
fn a_takeover_works_under_the_profile() {
    let folder = tempfile::tempdir().unwrap();
    let module = module::write(folder.path(), "m.wasm", &module::judging());
    let start = || {
        let agent = confined(|| {
            AGENT.launch_in(tempfile::tempdir().unwrap(), folder.path().join("wasm.sock"), &module, |command| {
                command.args(["--takeover", "--timeout-ms", "20000", "--socket-mode", "660"]);
            })
        });
        agent.log.wait_until_serving();
        agent
    };
    let mut old = start();
    let mut connection = old.connect();
    assert_eq!(decision(&connection.get("a", "/")), "allow");
    let new = start();
    assert_eq!(old.wait().code(), Some(0), "{}", old.log.whole());
    assert_eq!(decision(&connection.get("b", "/blocked")), "block");
    new.end_unharmed();
}

fn launch(module: &Path, options: &[&str]) -> Agent {
    confined(|| {
        AGENT.start_with(module, |command| {
            command.args(["--grpc-address", "127.0.0.1:0", "--admin-address", "127.0.0.1:0", "--socket-mode", "660"]).args(options);
        })
    })
}

#[test]
fn the_profile_is_enforced() {
    assert!(listed().len() > 50, "{:?}", listed());
    let ended = |program: &str| confined(|| Command::new(program).stdout(Stdio::null()).status().unwrap());
    assert!(ended("/bin/true").success());
    // It makes the system call of its name, which is not listed.
    assert_eq!(ended("/bin/uname").signal(), Some(Signal::SYS.as_raw()));
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_works_under_the_profile() {
    let folder = tempfile::tempdir().unwrap();
    let decisions = folder.path().join("decisions.log");
    let collector = Collector::start();
    let url = collector.url();
    let to_file = ["--decision-log", "all", "--decision-log-max-bytes", "1000", "--decision-log-file", decisions.to_str().unwrap()];
    let recorded = [&to_file[..], &["--otlp-endpoint", &url]].concat();
    for options in [&["--isolation", "request"][..], &["--log-format", "text", "--watch"], &recorded] {
        let module = module::write(folder.path(), "m.wasm", &module::judging());
        let agent = launch(&module, &[&["--timeout-ms", "20000"], options].concat());
        let mut connection = agent.connect();
        assert_eq!(decision(&connection.get("a", "/")), "allow");
        assert_eq!(decision(&connection.get("b", "/blocked")), "block");
        assert_eq!(decision(&connection.get("s", "/slow")), "allow");
        connection.send(testkit::kind::REQUEST_HEADERS, &json!({"correlation_id": "w", "uri": 1}));
        assert_eq!(module_error(&connection.answer()), Some("WASM_INVALID_EVENT"));
        // From now on, calls may miss their deadline.
        connection.configure(&json!({"pool-size": 3, "fail-open": true, "timeout-ms": 40})).unwrap();
        let mut stream = Client::connect(&agent).await.process().await;
        assert!(is_allow(&stream.ask(get("a", "/")).await));
        let admin = agent.admin();
        assert_eq!(admin.get("/readyz").0, 200);

        // Instances that fail are discarded and replaced.
        for (number, code) in ["unreachable", "(loop $for_ever (br $for_ever)) unreachable", GROWING].into_iter().enumerate() {
            module::write(folder.path(), "m.wasm", &module::with_hooks(&["on_request_headers"], |_| code.into(), ""));
            agent.signal(Signal::HUP);
            admin.wait_for_metric(r#"wasm_agent_reloads_total{result="success"}"#, number as f64 + 2.0);
            for _ in 0..10 {
                assert!(module_error(&connection.get("m", "/")).is_some());
            }
        }
        drop((connection, stream));
        agent.end_unharmed();
        // The decision log was rotated.
        assert_eq!(folder.path().join("decisions.log.1").exists(), options == recorded);
    }
    collector.wait_for_post("/v1/traces");
}
