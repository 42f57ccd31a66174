//! A limit on threads: an error at start, and nothing that a running agent notices.

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

/// Starts an agent whose threads the system counts: root's are not, and of another user only those of this agent, if the user has no others.
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

/// Threads of an agent that serves.
fn needed(user: u32, module: &std::path::Path, options: &[&str]) -> u64 {
    let agent = launch(user, module, None, options);
    agent.log.wait_for_line("that it serves", |line| line.contains("serving the socket"));
    let all = threads(agent.pid());
    agent.end();
    assert!(all > 3, "{all}");
    all
}

/// Where another user may read it.
fn shared_module(wat: &str) -> (tempfile::TempDir, std::path::PathBuf) {
    use std::os::unix::fs::PermissionsExt as _;
    let modules = tempfile::tempdir().unwrap();
    std::fs::set_permissions(modules.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let file = module::write(modules.path(), "m.wasm", wat);
    (modules, file)
}

#[test]
fn an_agent_that_gets_too_few_threads_does_not_start_and_says_what_to_do() {
    const USER: u32 = 64_911;
    let (_modules, file) = shared_module(&module::choosing());
    let all = needed(USER, &file, &[]);
    // Others of this user count too where this is not root.
    let limits = if rustix::process::geteuid().is_root() { 1..all } else { 1..2 };
    for at_most in limits {
        let mut agent = launch(USER, &file, Some(at_most), &[]);
        assert_eq!(agent.wait().code(), Some(1), "{at_most} of {all}: {}", agent.log.whole());
        let told = agent.log.whole();
        // The module may have been loaded by then.
        let told = told.lines().last().unwrap_or_default();
        assert!(told.starts_with("zentinel-wasm-agent: "), "{at_most} of {all}: {told}");
        assert!(told.contains("cannot start the agent's threads: raise the limit on processes and threads"), "{told}");
        assert!(told.contains("os error 11"), "{told}");
    }
}

#[test]
fn a_running_agent_needs_no_more_threads() {
    const USER: u32 = 64_912;
    let answer = format!(r#"{{"decision":"block","status":403,"body":"{}"}}"#, "x".repeat(400 << 10));
    let (modules, file) = shared_module(&module::answering(&["on_request_headers"], &answer));
    // As many as it has at the end of its start, or as many as somebody has who is not root: not one more.
    let is_root = rustix::process::geteuid().is_root();
    let cache = modules.path().join("cache");
    std::fs::create_dir(&cache).unwrap();
    if is_root {
        chown(&cache, Some(USER), Some(USER)).unwrap();
    }
    let cache = cache.to_str().unwrap();
    let options = ["--watch", "--timeout-ms", "20000", "--admin-address", "127.0.0.1:0", "--cache-dir", cache];
    needed(USER, &file, &options);
    // This time it need not compile the module, and does not start what it would do so with.
    let all = is_root.then(|| needed(USER, &file, &options));
    let agent = launch(USER, &file, all, &options);
    agent.log.wait_for_line("that it serves", |line| line.contains("serving the socket"));
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
    // By SIGHUP, with a module that has to be compiled, and by the watch.
    module::write(modules.path(), "m.wasm", &module::choosing());
    agent.signal(Signal::HUP);
    admin.wait_for_metric(r#"wasm_agent_reloads_total{result="success"}"#, 1.0);
    let answer = connections[0].get("a", "/t");
    assert_eq!(module_error(&answer), Some("WASM_TRAP"));
    module::write(modules.path(), "m.wasm", &module::tagging("watched"));
    wait_for("the watch", || (connections[0].get("b", "/")["audit"]["tags"] == json!(["watched"])).then_some(()));
    // What is not a module changes nothing.
    std::fs::write(&file, "not a module").unwrap();
    agent.signal(Signal::HUP);
    wait_for("a failure", || (admin.metric(r#"wasm_agent_reloads_total{result="failure"}"#) > 0.0).then_some(()));
    assert!(admin.get("/healthz").1.starts_with("degraded"), "{:?}", admin.get("/healthz"));
    // A large body, whose event is decoded off the connection's way.
    let body = connections[1].ask(kind::REQUEST_BODY, &request_body("c", &"y".repeat(600 << 10)));
    assert_eq!(decision(&body), "allow");
    agent.end_unharmed();
}
