//! A limit on threads is an error at the start, and never a problem later.

use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Resource, Rlimit, Signal, prlimit};
use serde_json::json;
use testkit::{Agent, Program, decision, kind, module, module_error, request, request_body, wait_for};

const AGENT: Program = Program(env!("CARGO_BIN_EXE_zentinel-wasm-agent"));

fn threads(process: Pid) -> u64 {
    std::fs::read_dir(format!("/proc/{}/task", process.as_raw_nonzero())).unwrap().count() as u64
}

/// Starts an agent under a limit on threads. The limit does not apply to root, so root starts it as
/// another user, who has no other threads.
fn launch(user: u32, module: &std::path::Path, at_most: Option<u64>, options: &[&str]) -> Agent {
    let home = tempfile::tempdir().unwrap();
    let is_root = rustix::process::geteuid().is_root();
    if is_root {
        chown(home.path(), Some(user), Some(user)).unwrap();
    }
    AGENT.launch_in(home, "wasm.sock", module, |command| {
        command.args(options);
        if let Some(at_most) = at_most {
            let mut limited = Command::new("prlimit");
            limited.arg(format!("--nproc={at_most}")).arg("--").arg(command.get_program()).args(command.get_args());
            limited.env_clear().envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
            *command = limited;
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        }
        if is_root {
            command.uid(user).gid(user);
        }
    })
}

/// The number of threads of a serving agent.
fn needed(user: u32, module: &std::path::Path, options: &[&str]) -> u64 {
    let agent = launch(user, module, None, options);
    agent.log.wait_until_serving();
    let all = threads(agent.pid());
    agent.end();
    assert!(all > 3, "{all}");
    all
}

/// Writes a module where another user can read it.
fn shared_module(wat: &str) -> (tempfile::TempDir, std::path::PathBuf) {
    use std::os::unix::fs::PermissionsExt as _;
    let modules = tempfile::tempdir().unwrap();
    std::fs::set_permissions(modules.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let file = module::write(modules.path(), "m.wasm", wat);
    (modules, file)
}

#[test]
fn too_few_are_an_error_at_the_start() {
    const USER: u32 = 64_911;
    let (_modules, file) = shared_module(&module::choosing());
    let options = ["--decision-log", "all"];
    let all = needed(USER, &file, &options);
    // Without root, the user's other threads count as well.
    let limits = if rustix::process::geteuid().is_root() { 1..all } else { 1..2 };
    for at_most in limits {
        let mut agent = launch(USER, &file, Some(at_most), &options);
        assert_eq!(agent.wait().code(), Some(1), "{at_most} of {all}: {}", agent.log.whole());
        let log = agent.log.whole();
        // The module may have been loaded before.
        let message = log.lines().last().unwrap_or_default();
        assert!(message.starts_with("zentinel-wasm-agent: "), "{at_most} of {all}: {message}");
        assert!(message.contains("cannot start the agent's threads: raise the limit on processes and threads"), "{message}");
        assert!(message.contains("os error 11"), "{message}");
    }
}

#[test]
fn none_are_added_after_the_start() {
    const USER: u32 = 64_912;
    let answer = format!(r#"{{"decision":"block","status":403,"body":"{}"}}"#, "x".repeat(400 << 10));
    let (modules, file) = shared_module(&module::answering(&["on_request_headers"], &answer));
    // No more threads than at the end of the start; without root, no more than the user has.
    let is_root = rustix::process::geteuid().is_root();
    let cache = modules.path().join("cache");
    std::fs::create_dir(&cache).unwrap();
    if is_root {
        chown(&cache, Some(USER), Some(USER)).unwrap();
    }
    let cache = cache.to_str().unwrap();
    // A name has to be resolved.
    let observers = ["--decision-log", "all", "--otlp-endpoint", "http://localhost:1"];
    let options = [&["--watch", "--timeout-ms", "20000", "--admin-address", "127.0.0.1:0", "--cache-dir", cache], &observers[..]].concat();
    needed(USER, &file, &options);
    // This time the module comes from the cache, so no thread is started to compile it.
    let all = is_root.then(|| needed(USER, &file, &options));
    let agent = launch(USER, &file, all, &options);
    agent.log.wait_until_serving();
    let admin = agent.admin();
    if !is_root {
        prlimit(Some(agent.pid()), Resource::Nproc, Rlimit { current: Some(1), maximum: Some(1) }).unwrap();
    }
    let mut connections: Vec<_> = (0..4).map(|_| agent.connect()).collect();
    for (at, connection) in connections.iter_mut().enumerate() {
        connection.send(kind::REQUEST_HEADERS, &request(&at.to_string(), "/"));
        let answer = connection.answer_or_end().unwrap_or_else(|| panic!("no large answer: {}", agent.log.lines().join("\n")));
        assert_eq!(decision(&answer), "block");
    }
    // Reloads, by SIGHUP with a module that has to be compiled, and by the watch.
    module::write(modules.path(), "m.wasm", &module::choosing());
    agent.signal(Signal::HUP);
    admin.wait_for_metric(r#"wasm_agent_reloads_total{result="success"}"#, 1.0);
    let answer = connections[0].get("a", "/t");
    assert_eq!(module_error(&answer), Some("WASM_TRAP"));
    module::write(modules.path(), "m.wasm", &module::tagging("watched"));
    wait_for("the watched module", || (connections[0].get("b", "/")["audit"]["tags"] == json!(["watched"])).then_some(()));
    // An invalid module changes nothing.
    std::fs::write(&file, "not a module").unwrap();
    agent.signal(Signal::HUP);
    wait_for("the failed reload", || (admin.metric(r#"wasm_agent_reloads_total{result="failure"}"#) > 0.0).then_some(()));
    assert!(admin.get("/healthz").1.starts_with("degraded"), "{:?}", admin.get("/healthz"));
    // A large body, which is decoded off the connection's task.
    let body = connections[1].ask(kind::REQUEST_BODY, &request_body("c", "y".repeat(600 << 10)));
    assert_eq!(decision(&body), "allow");
    agent.end_unharmed();
}
