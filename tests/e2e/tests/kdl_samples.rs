//! The proxy accepts every configuration in the repository.

use std::path::{Path, PathBuf};
use std::process::Command;
use zentinel_wasm_e2e::Paths;
use zentinel_wasm_e2e::kdl::{ALL_EVENTS, ProxyConfig, render};

/// Asserts that `zentinel test` accepts the configuration and ignores none of its settings.
#[track_caller]
fn assert_accepted(name: &str, text: &str) {
    let dir = tempfile::tempdir().expect("cannot create a directory");
    let file = dir.path().join("zentinel.kdl");
    std::fs::write(&file, with_sockets_in(dir.path(), text)).expect("cannot write the configuration");
    let proxy = Paths::from_env().proxy;
    let output = Command::new(proxy).args(["test", "-c"]).arg(&file).output().expect("cannot run the proxy");
    let printed = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name}: {printed}");
    let ignored: Vec<&str> = printed.lines().filter(|line| line.contains('⚠') && !line.contains(FOR_OLD_PROXIES)).collect();
    assert!(ignored.is_empty(), "{name}: {ignored:#?}");
}

/// The warning about a setting that only 0.6.45 needs. It fails open without a failure mode on the
/// agent; later proxies take the failure mode from the filter.
const FOR_OLD_PROXIES: &str = "'failure-mode \"closed\"' on agent";

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

#[test]
#[ignore = "needs the real proxy: cargo xtask e2e"]
fn accepts_the_samples_for_operators() {
    let files = kdl_files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy"));
    assert!(!files.is_empty(), "deploy/ contains no samples");
    for file in files {
        let text = std::fs::read_to_string(&file).expect("cannot read the sample");
        assert_accepted(&file.display().to_string(), &text);
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
        assert_accepted("the tests' configuration", &text);
    }
}
