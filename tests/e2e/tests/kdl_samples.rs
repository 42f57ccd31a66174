//! The proxy accepts every configuration in the repository, and serves requests with the samples.

use std::path::{Path, PathBuf};
use std::process::Command;
use zentinel_wasm_e2e::Paths;
use zentinel_wasm_e2e::kdl::{ALL_EVENTS, ProxyConfig, render};
use zentinel_wasm_e2e::sample::{self, Files, SampleStack};

/// The sample for proxies before 0.6.54.
const FOR_OLD_PROXIES: &str = "before-0.6.54.kdl";

/// The warning about a setting that only those proxies need. They fail open without a failure mode
/// on the agent; later ones take the failure mode from the filter.
const WARNING_ABOUT_OLD_SETTING: &str = "'failure-mode \"closed\"' on agent";

/// The warnings of `zentinel test` and `zentinel test --strict` about a configuration.
#[track_caller]
fn warnings(name: &str, text: &str, options: &[&str]) -> Vec<String> {
    let dir = tempfile::tempdir().expect("cannot create a directory");
    let file = dir.path().join("zentinel.kdl");
    std::fs::write(&file, with_sockets_in(dir.path(), text)).expect("cannot write the configuration");
    let proxy = Paths::from_env().proxy;
    let output = Command::new(proxy).arg("test").args(options).arg("-c").arg(&file).output().expect("cannot run the proxy");
    let printed = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name}: {printed}");
    printed.lines().filter(|line| line.contains('⚠') || line.contains("WARN")).map(str::to_owned).collect()
}

/// Whether the proxy accepts a configuration, and whether the agent's `check` finds no problem in
/// it.
#[track_caller]
fn accepted(text: &str) -> (bool, bool) {
    let Paths { agent, proxy, mirror, .. } = Paths::from_env();
    let dir = tempfile::tempdir().expect("cannot create a directory");
    let file = dir.path().join("zentinel.kdl");
    std::fs::write(&file, with_sockets_in(dir.path(), text)).expect("cannot write the configuration");
    let by_proxy = Command::new(proxy).args(["test", "-c"]).arg(&file).output().expect("cannot run the proxy");
    let mut check = Command::new(agent);
    check.env_clear().arg("check").arg(mirror).arg("--cache-dir").arg(dir.path().join("cache"));
    check.arg("--socket").arg(dir.path().join("wasm.sock")).arg("--proxy-config").arg(&file);
    let by_agent = check.output().expect("cannot run the check");
    assert_ne!(by_agent.status.code(), Some(2), "{}", String::from_utf8_lossy(&by_agent.stderr));
    (by_proxy.status.success(), by_agent.status.success())
}

/// Moves sockets to `dir`, because the proxy requires that their directories exist.
fn with_sockets_in(dir: &Path, text: &str) -> String {
    let lines = text.lines().map(|line| match line.split_once("unix-socket \"") {
        Some((before, path)) => {
            let after = path.split_once('"').map_or("", |(_, after)| after);
            format!("{before}unix-socket \"{}/wasm.sock\"{after}\n", dir.display())
        }
        None => format!("{line}\n"),
    });
    lines.collect()
}

fn kdl_files(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.expect("cannot read the directory").path();
        if path.is_dir() {
            files.extend(kdl_files(&path));
        } else if path.extension() == Some("kdl".as_ref()) {
            files.push(path);
        }
    }
    files
}

/// The samples for the proxy: name and text.
fn samples() -> Vec<(String, String)> {
    let files = kdl_files(&sample::path("kdl"));
    assert!(!files.is_empty(), "deploy/kdl contains no samples");
    let named = files.into_iter().map(|file| {
        let text = std::fs::read_to_string(&file).expect("cannot read the sample");
        (file.file_name().expect("a file has a name").to_string_lossy().into_owned(), text)
    });
    named.collect()
}

fn files() -> Files {
    let Paths { agent, proxy, mirror, .. } = Paths::from_env();
    Files { agent, proxy, module: mirror }
}

#[test]
#[ignore = "needs the real proxy: cargo xtask e2e"]
fn accepts_the_samples_without_a_warning() {
    for (name, text) in samples().into_iter().filter(|(name, _)| name != FOR_OLD_PROXIES) {
        assert_eq!(warnings(&name, &text, &["--strict"]), [""; 0], "{name}");
    }
}

#[test]
#[ignore = "needs the real proxy: cargo xtask e2e"]
fn warns_about_one_setting_of_the_sample_for_old_proxies() {
    let text = sample::read(&format!("kdl/{FOR_OLD_PROXIES}"));
    let warnings = warnings(FOR_OLD_PROXIES, &text, &[]);
    assert!(matches!(&warnings[..], [warning] if warning.contains(WARNING_ABOUT_OLD_SETTING)), "{warnings:#?}");
}

#[test]
#[ignore = "needs the real proxy: cargo xtask e2e"]
fn rejects_what_the_agent_s_check_reports_as_a_problem() {
    let good = sample::read("kdl/bodies.kdl");
    for (from, to, expected) in [
        ("", "", true),
        ("\"request_body\"", "\"request-body\" \"websocket_frame\" \"log\" \"guardrail\"", true),
        // As the product page spells it.
        ("\"request_body\"", "\"request_body_chunk\"", false),
        ("\"request_body\"", "\"nonsense\"", false),
        ("request-body-mode \"stream\"", "request-body-mode \"inspect-first\"", true),
        ("request-body-mode \"stream\"", "request-body-mode \"hybrid:100\"", true),
        ("request-body-mode \"stream\"", "request-body-mode \"whole\"", false),
        // Not KDL, and a boolean of its first version.
        ("agents {", "agents", false),
        ("request-body-mode \"stream\"", "config { fail-open false; }", false),
    ] {
        let text = sample::adapt(&good, &[(from, to.to_owned())]);
        assert_eq!(accepted(&text), (expected, expected), "{from} → {to}");
    }
}

#[test]
#[ignore = "needs the real proxy: cargo xtask e2e"]
fn serves_a_request_without_a_warning_in_the_logs() {
    for (name, text) in samples() {
        let stack = SampleStack::start(&files(), &text).unwrap_or_else(|error| panic!("{name}: {error}"));
        let warnings = stack.warnings();
        let others: Vec<_> = warnings.iter().filter(|line| name != FOR_OLD_PROXIES || !line.contains("failure-mode")).collect();
        assert!(others.is_empty(), "{name}: {others:#?}");
    }
}

/// The failed requests would open the proxy's default circuit breaker for 30 s.
#[test]
#[ignore = "needs the real proxy: cargo xtask e2e"]
fn serves_again_after_a_crash_of_the_agent() {
    for name in ["kdl/wasm-agent.kdl", "kdl/grpc.kdl"] {
        let mut stack = SampleStack::start(&files(), &sample::read(name)).expect("cannot start the sample");
        stack.kill_agent();
        let meanwhile = stack.get("/").expect("no response").status();
        assert!(meanwhile >= 500, "{name}: the proxy allowed a request without its agent: {meanwhile}");
        stack.start_agent().expect("cannot start the agent again");
        stack.wait_until_ready().unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

#[test]
#[ignore = "needs the real proxy: cargo xtask e2e"]
fn accepts_the_configurations_of_these_tests() {
    for grpc_port in [None, Some(50051)] {
        let text = render(&ProxyConfig {
            port: 8080,
            upstream_port: 8081,
            socket: "/run/zentinel-agents/wasm.sock".into(),
            grpc_port,
            events: ALL_EVENTS.to_vec(),
            agent_lines: "config { fail-open #false; }".into(),
            audit_log: None,
            route_lines: String::new(),
        });
        let warnings = warnings("the tests' configuration", &text, &[]);
        let others: Vec<_> = warnings.iter().filter(|warning| !warning.contains(WARNING_ABOUT_OLD_SETTING)).collect();
        assert!(others.is_empty(), "{others:#?}");
    }
}
