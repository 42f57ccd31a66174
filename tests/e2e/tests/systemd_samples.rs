//! The installation in `docs/operations.md`, in a scratch folder instead of `/`: its commands, the
//! unit, and the unit's command behind the real proxy.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;
use zentinel_wasm_e2e::sample::{self, adapt, patient, without_metrics};
use zentinel_wasm_e2e::upstream::Upstream;
use zentinel_wasm_e2e::{Agent, HttpRequest, Paths, Proxy, free_port, wait};

const UNIT: &str = "etc/systemd/system/zentinel-wasm-agent.service";

const CHECK: &str = "etc/systemd/system/zentinel-wasm-agent.service.d/check.conf";

/// The file names in the documentation that stand for the operator's own.
const MODULE: &str = "policy.wasm";

/// The units that the unit depends on and that a scratch folder lacks.
const OTHER_UNITS: [&str; 5] = ["basic.target", "multi-user.target", "shutdown.target", "sysinit.target", "system.slice"];

/// The first version that knows the type of the drop-in.
const NOTIFY_RELOAD: u32 = 253;

/// The commands of the documentation's section `Installation`, and those of `Check` that install
/// files.
fn commands() -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/operations.md");
    let text = std::fs::read_to_string(path).expect("cannot read the documentation");
    let section = |name: &str| {
        let section = text.split("\n## ").find(|section| section.lines().next() == Some(name));
        section.unwrap_or_else(|| panic!("no section `{name}`")).lines().filter_map(|line| line.strip_prefix("    "))
    };
    let lines = section("Installation").chain(section("Check").filter(|line| line.starts_with("install ")));
    lines.map(|line| line.split('#').next().unwrap_or_default().trim().to_owned()).filter(|line| !line.is_empty()).collect()
}

/// A folder with the files of the archive.
fn archive() -> TempDir {
    let dir = TempDir::new().expect("cannot create a directory");
    let paths = Paths::from_env();
    let link = |from: &Path, to: &str| {
        let from = from.canonicalize().unwrap_or_else(|error| panic!("{}: {error}", from.display()));
        std::os::unix::fs::symlink(from, dir.path().join(to)).expect("cannot link");
    };
    link(&sample::path(""), "deploy");
    link(&paths.agent, "zentinel-wasm-agent");
    link(&paths.mirror, MODULE);
    dir
}

/// Whether a program of systemd exists. Without it, a test prints why it checks less.
fn has(program: &str) -> bool {
    let found = Command::new(program).arg("--version").output().is_ok();
    if !found {
        // Not `eprintln!`, which tests that pass do not show.
        writeln!(std::io::stderr(), "skipped a check: `{program}` is not installed").expect("cannot write to stderr");
    }
    found
}

/// The version of systemd, whose `--version` prints `systemd 252 (252.38-1)`.
fn systemd_version() -> u32 {
    let output = Command::new("systemd-analyze").arg("--version").output().expect("cannot run systemd-analyze");
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    let version = printed.split_whitespace().nth(1).and_then(|version| version.parse().ok());
    version.unwrap_or_else(|| panic!("no version in {printed:?}"))
}

#[track_caller]
fn run_quietly(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let printed = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    // systemd-sysusers reports what it creates.
    let warnings: Vec<&str> = printed.lines().filter(|line| !line.starts_with("Creating ")).collect();
    assert!(output.status.success() && warnings.is_empty(), "{command:?}: {}: {printed}", output.status);
}

/// Runs the documentation's commands with `root` instead of `/`, except those that need a running
/// system or other machines.
#[track_caller]
fn install(root: &Path) {
    let archive = archive();
    // The folder of the module belongs to tmpfiles.d, and that of the binary to every system.
    std::fs::create_dir_all(root.join("usr/local/bin")).expect("cannot create a directory");
    for command in commands() {
        let words: Vec<&str> = command.split_whitespace().collect();
        match words[..] {
            ["install", ref args @ .., to] => {
                // Without tmpfiles.d, the folder of the module does not exist.
                let args = args.iter().filter(|arg| **arg != "--group=zentinel");
                let to = root.join(to.strip_prefix('/').expect("an absolute path"));
                run_quietly(Command::new("install").args(args).arg(to).current_dir(archive.path()));
            }
            [program @ ("systemd-sysusers" | "systemd-tmpfiles"), ref args @ ..] => {
                if has(program) {
                    run_quietly(Command::new(program).arg("--root").arg(root).args(args));
                } else {
                    std::fs::create_dir_all(root.join("etc/zentinel/agents")).expect("cannot create a directory");
                }
            }
            ["tar" | "systemctl" | "curl" | "zentinel" | "zentinel-wasm-agent", ..] => {}
            _ => panic!("unknown command: {command}"),
        }
    }
}

/// The values of a setting in an installed unit or drop-in.
fn settings(root: &Path, file: &str, name: &str) -> Vec<String> {
    let unit = std::fs::read_to_string(root.join(file)).expect("the unit is not installed");
    let lines = unit.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    lines.map(str::to_owned).collect()
}

mod systemd {
    use super::*;

    #[test]
    #[ignore = "needs the real proxy: cargo xtask e2e"]
    fn installs_without_a_warning() {
        let root = TempDir::new().expect("cannot create a directory");
        install(root.path());
        if has("systemd-tmpfiles") {
            assert!(root.path().join("run/zentinel-agents").is_dir(), "tmpfiles.d does not create the folder of the sockets");
        }
        if has("systemd-sysusers") {
            let users = std::fs::read_to_string(root.path().join("etc/passwd")).expect("sysusers.d creates no user");
            assert!(users.contains("zentinel:"), "{users}");
        }
        let unit = root.path().join(UNIT);
        for name in OTHER_UNITS {
            std::fs::write(unit.with_file_name(name), "[Unit]\nDescription=empty\n").expect("cannot write a unit");
        }
        // Named by `ExecReload=`.
        std::fs::create_dir_all(root.path().join("bin")).expect("cannot create a directory");
        std::fs::copy("/bin/kill", root.path().join("bin/kill")).expect("cannot copy `kill`");
        if has("systemd-analyze") {
            if systemd_version() < NOTIFY_RELOAD {
                let drop_in = unit.with_extension("service.d").join("notify-reload.conf");
                std::fs::remove_file(drop_in).expect("the drop-in is not installed");
            }
            run_quietly(Command::new("systemd-analyze").arg("verify").arg("--man=no").arg("--root").arg(root.path()).arg(&unit));
        }
    }

    #[test]
    #[ignore = "needs the real proxy: cargo xtask e2e"]
    fn serves_a_request_with_the_unit_s_command() {
        let root = TempDir::new().expect("cannot create a directory");
        install(root.path());
        let sockets = root.path().join("run/zentinel-agents");
        std::fs::create_dir_all(&sockets).expect("cannot create a directory");
        let (port, admin_port) = (free_port(), free_port());
        let moved = |text: &str| {
            let root = root.path().display().to_string();
            text.replace("=/", &format!("={root}/")).replace("127.0.0.1:9191", &format!("127.0.0.1:{admin_port}"))
        };

        // A command of the unit or a drop-in, with the unit's variables.
        let in_unit = |commands: Vec<String>| {
            let [command] = &commands[..] else { panic!("not one command: {commands:?}") };
            let words: Vec<&str> = command.split_whitespace().collect();
            let program: PathBuf = root.path().join(words[0].trim_start_matches('-').strip_prefix('/').expect("an absolute path"));
            let mut command = Command::new(program);
            command.args(&words[1..]).env_clear().env("CACHE_DIRECTORY", root.path().join("cache")).env("WASM_TIMEOUT_MS", "3000");
            for variable in settings(root.path(), UNIT, "Environment") {
                let variable = moved(&variable);
                let (name, value) = variable.split_once('=').expect("a variable has a value");
                command.env(name, value);
            }
            command
        };
        let check = in_unit(settings(root.path(), CHECK, "ExecStartPre")).output().expect("cannot run the check");
        let report: serde_json::Value = serde_json::from_slice(&check.stdout).expect("the journal would not be JSON");
        assert!(check.status.success() && report["ok"] == true && report["warnings"] == serde_json::json!([]), "{report}");
        assert!(check.stderr.is_empty() && !sockets.join("wasm.sock").exists());

        let mut agent = in_unit(settings(root.path(), UNIT, "ExecStart"));
        let _agent = Agent::start_command(&mut agent, sockets.join("wasm.sock"), None, root.path()).expect("cannot start the agent");
        wait::until("the agent is ready", || {
            let response = HttpRequest::get("/readyz").send(admin_port).ok()?;
            (response.status() == 200).then_some(())
        });

        let upstream = Upstream::start().expect("cannot start the upstream");
        let config = std::fs::read_to_string(root.path().join("etc/zentinel/zentinel.kdl")).expect("the configuration is not installed");
        let config = adapt(
            &config,
            &[
                ("/run/zentinel-agents", sockets.display().to_string()),
                ("127.0.0.1:8080", format!("127.0.0.1:{port}")),
                ("127.0.0.1:8081", format!("127.0.0.1:{}", upstream.port())),
            ],
        );
        let proxy = Proxy::start_with(&Paths::from_env().proxy, port, &patient(&without_metrics(&config)), root.path());
        let proxy = proxy.expect("cannot start the proxy");
        wait::until("a request succeeds", || {
            let response = HttpRequest::get("/").send(proxy.port()).ok()?;
            (response.status() == 200).then_some(())
        });
    }

    /// A restart keeps the connections in the store, and the socket where the proxies look for it.
    #[test]
    #[ignore = "needs the real proxy: cargo xtask e2e"]
    fn keeps_connections_over_a_restart() {
        let unit = sample::read("systemd/zentinel-wasm-agent.service");
        for setting in ["Type=notify", "FileDescriptorStoreMax=4", "RuntimeDirectoryPreserve=yes"] {
            assert!(unit.lines().any(|line| line == setting), "no {setting} in {unit}");
        }
    }

    /// The drop-in replaces settings of the unit, so they must exist there.
    #[test]
    #[ignore = "needs the real proxy: cargo xtask e2e"]
    fn replaces_the_type_of_the_unit_in_the_drop_in() {
        let unit = sample::read("systemd/zentinel-wasm-agent.service");
        let drop_in = sample::read("systemd/zentinel-wasm-agent.service.d/notify-reload.conf");
        assert!(unit.contains("\nType=notify\n") && unit.contains("\nExecReload="), "{unit}");
        assert!(drop_in.contains("\nType=notify-reload\nExecReload=\n"), "{drop_in}");
    }
}
