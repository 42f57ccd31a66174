//! The command line: values, where they come from, and error messages.

use std::fs;
use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use rustix::process::{Pid, Signal};
use serde_json::Value;
use testkit::{Program, decision, module, module_error, wait_for};

const AGENT: Program = Program(env!("CARGO_BIN_EXE_zentinel-wasm-agent"));

/// Runs the agent with arguments with which it ends by itself.
fn run(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    let home = tempfile::tempdir().unwrap();
    AGENT.command(home.path()).args(arguments).envs(environment.iter().copied()).stdout(Stdio::piped()).output().unwrap()
}

/// The one line of the error about invalid arguments.
#[track_caller]
fn rejection(arguments: &[&str], environment: &[(&str, &str)]) -> String {
    let output = run(arguments, environment);
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(output.stdout.is_empty());
    assert_eq!(message.lines().count(), 1, "{message}");
    message.trim_end().to_owned()
}

mod output {
    use super::*;

    #[test]
    fn version_has_the_form_that_the_installer_expects() {
        for flag in ["--version", "-V"] {
            let output = run(&[flag], &[]);
            assert!(output.status.success() && output.stderr.is_empty());
            assert_eq!(String::from_utf8(output.stdout).unwrap(), "zentinel-wasm-agent 0.5.0\n");
        }
    }

    #[test]
    fn matches_its_snapshots() {
        for (arguments, name) in [
            (&[][..], "overview.txt"),
            (&["--help"], "help.txt"),
            (&["check", "--help"], "check.txt"),
            (&["health", "--help"], "health.txt"),
        ] {
            let Output { status, stdout, stderr } = run(arguments, &[]);
            let is_help = arguments.contains(&"--help");
            let (printed, other) = if is_help { (stdout, stderr) } else { (stderr, stdout) };
            assert!(other.is_empty(), "{}", String::from_utf8_lossy(&other));
            assert_eq!(status.code(), Some(if is_help { 0 } else { 2 }));
            let printed = String::from_utf8(printed).unwrap();
            let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cli").join(name);
            if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
                fs::create_dir_all(file.parent().unwrap()).unwrap();
                fs::write(&file, &printed).unwrap();
            }
            assert_eq!(printed, fs::read_to_string(&file).unwrap(), "if the change is intended: UPDATE_SNAPSHOTS=1 cargo test --test cli");
        }
    }

    #[test]
    fn without_anything_is_ten_lines() {
        let overview = String::from_utf8(run(&[], &[]).stderr).unwrap();
        assert!(overview.lines().count() <= 10, "{overview}");
        for command in zentinel_agent_wasm::cli::command().get_subcommands() {
            assert!(overview.contains(&format!("zentinel-wasm-agent {} ", command.get_name())), "{overview}");
        }
    }

    #[test]
    fn readme_has_every_option() {
        let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
        for argument in zentinel_agent_wasm::cli::command().get_arguments() {
            let Some(long) = argument.get_long().filter(|long| !["help", "version"].contains(long)) else { continue };
            let row =
                readme.lines().find(|line| line.starts_with(&format!("| `--{long}` |"))).unwrap_or_else(|| panic!("--{long} has no row"));
            let variable = argument.get_env().expect("every option has a variable").to_str().unwrap();
            assert!(row.contains(&format!("`{variable}`")), "{row}");
            for default in argument.get_default_values() {
                assert!(row.contains(&format!("`{}`", default.to_str().unwrap())), "{row}");
            }
        }
    }
}

mod values {
    use super::*;

    #[test]
    fn invalid_in_an_option_are_rejected_in_one_line() {
        for (arguments, expected) in [
            (&["--pool-size", "0"][..], "error: invalid value '0' for '--pool-size <N>': expected a whole number from 1 to 1024"),
            (&["--pool-size", "many"], "error: invalid value 'many' for '--pool-size <N>': expected a whole number from 1 to 1024"),
            (&["--log-format", "xml"], "error: invalid value 'xml' for '--log-format <LOG_FORMAT>' [possible values: json, text]"),
            (&["--fail-open=maybe"], "error: invalid value 'maybe' for '--fail-open[=<FAIL_OPEN>]': value was not a boolean"),
            (&["--fail-close"], "error: unexpected argument '--fail-close' found; a similar argument exists: '--fail-open'"),
            (&["--modul", "m.wasm"], "error: unexpected argument '--modul' found; a similar argument exists: '--module'"),
            (
                &["--admin-address", "localhost"],
                "error: invalid value 'localhost' for '--admin-address <IP:PORT>': expected an IP address and a port, such as 127.0.0.1:9090",
            ),
        ] {
            assert_eq!(rejection(&[&["--module", "m.wasm"], arguments].concat(), &[]), expected);
        }
        assert_eq!(rejection(&["--watch"], &[]), "error: the following required arguments were not provided: --module <FILE>");
        let missing = rejection(&["--module", "m.wasm", "--module-config", "@/nowhere"], &[]);
        assert!(missing.contains("'@/nowhere' for '--module-config <JSON>': expected JSON or @FILE: cannot read the file"), "{missing}");
    }

    #[test]
    fn invalid_in_a_variable_are_rejected_with_its_name() {
        for (name, value, expected) in [
            ("WASM_POOL_SIZE", "x", "error: invalid value 'x' for 'WASM_POOL_SIZE': expected a whole number from 1 to 1024"),
            ("FAIL_OPEN", "2", "error: invalid value '2' for 'FAIL_OPEN': value was not a boolean"),
            ("WASM_FAIL_OPEN", "2", "error: invalid value '2' for 'WASM_FAIL_OPEN': value was not a boolean"),
        ] {
            assert_eq!(rejection(&["--module", "m.wasm"], &[(name, value)]), expected);
        }
        assert_eq!(
            rejection(&["--module", "m.wasm"], &[("FAIL_OPEN", "true"), ("WASM_FAIL_OPEN", "false")]),
            "error: the environment variables `FAIL_OPEN` and `WASM_FAIL_OPEN` differ: unset one of them, or give both the same value"
        );
    }

    #[test]
    fn of_unknown_variables_are_ignored_with_one_warning() {
        let modules = tempfile::tempdir().unwrap();
        let file = module::write(modules.path(), "m.wasm", &module::choosing());
        let agent = AGENT.start_with(&file, |command| {
            command.args(["--admin-address", "127.0.0.1:0"]).env("WASM_POOLSIZE", "secret").env("WASM_XYZ", "secret");
        });
        let is_warning = |entry: &Value| entry["level"] == "WARN";
        let warning = agent.log.wait_for_entry("the warning", is_warning);
        assert_eq!(
            warning["message"],
            "ignoring unknown environment variables `WASM_POOLSIZE` (did you mean `WASM_POOL_SIZE`?), `WASM_XYZ`"
        );
        agent.signal(Signal::HUP);
        agent.admin().wait_for_metric(r#"wasm_agent_reloads_total{result="success"}"#, 1.0);
        assert_eq!(agent.log.entries().iter().filter(|entry| is_warning(entry)).count(), 1);
        assert!(agent.log.lines().iter().all(|line| !line.contains("secret")));
    }

    #[test]
    fn may_come_from_a_pipe() {
        let home = tempfile::tempdir().unwrap();
        let missing = home.path().join("m.wasm");
        for variable in [false, true] {
            let mut command = AGENT.command(home.path());
            command.arg("--socket").arg(home.path().join("s")).arg("--module").arg(&missing);
            if variable {
                command.env("WASM_MODULE_CONFIG", "@/dev/stdin");
            } else {
                command.args(["--module-config", "@/dev/stdin"]);
            }
            let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
            child.stdin.take().unwrap().write_all(b"{}").unwrap();
            let output = child.wait_with_output().unwrap();
            let message = String::from_utf8(output.stderr).unwrap();
            assert!(message.contains("cannot serve the module"), "{message}");
        }
    }

    #[test]
    fn empty_in_a_variable_count_as_unset_unless_that_would_widen_rights() {
        const REJECTED: [&str; 4] = ["WASM_GRPC_CLIENT_CA", "WASM_MODULE_SHA256", "FAIL_OPEN", "WASM_FAIL_OPEN"];
        let home = tempfile::tempdir().unwrap();
        let missing = home.path().join("m.wasm");
        let [socket, missing] = [home.path().join("s"), missing].map(|path| path.to_str().unwrap().to_owned());
        let command = zentinel_agent_wasm::cli::command();
        let variables = command.get_arguments().filter_map(|argument| argument.get_env()).map(|variable| variable.to_str().unwrap());
        let (mut rejected, mut unset) = (0, 0);
        for variable in variables.chain(["WASM_GRPC_ADDRESS", "WASM_FAIL_OPEN"]) {
            let given = ["--socket", &socket, "--module", &missing];
            // An option on the command line would hide its variable.
            let given = match variable {
                "AGENT_SOCKET" => &given[2..],
                "WASM_MODULE" => &given[..2],
                _ => &given,
            };
            let output = run(given, &[(variable, "")]);
            let message = String::from_utf8(output.stderr).unwrap();
            if REJECTED.contains(&variable) {
                assert_eq!(message, format!("error: the environment variable `{variable}` is empty: set it to a value or unset it\n"));
                assert_eq!(output.status.code(), Some(2));
                rejected += 1;
            } else if variable == "WASM_MODULE" {
                assert_eq!(message, "error: the following required arguments were not provided: --module <FILE>\n");
            } else {
                // The options are accepted. Only the module is missing.
                assert_eq!(output.status.code(), Some(1), "{variable}: {message}");
                // Another process may serve the default socket, so either may be at fault.
                assert!(message.contains("cannot serve the"), "{variable}: {message}");
                unset += 1;
            }
        }
        assert!(rejected == REJECTED.len() && unset > 15, "{rejected} {unset}");
        // A flag has precedence over its variable.
        let message = run(&["--socket", &socket, "--module", &missing, "--fail-open=false"], &[("FAIL_OPEN", "")]).stderr;
        assert!(String::from_utf8(message).unwrap().contains("cannot serve the module"));
    }

    #[test]
    fn come_from_the_flag_then_the_variable_then_the_default() {
        let modules = tempfile::tempdir().unwrap();
        let file = module::write(modules.path(), "m.wasm", &module::choosing());
        let has_pool = |variable: Option<&str>, flag: Option<&str>, size: f64| {
            let agent = AGENT.start_with(&file, |command| {
                command.args(["--admin-address", "127.0.0.1:0"]).args(flag.map(|value| format!("--pool-size={value}")));
                command.envs(variable.map(|value| ("WASM_POOL_SIZE", value)));
            });
            // Instances after the first are made while the agent serves.
            agent.admin().wait_for_metric("wasm_agent_pool_available", size);
        };
        has_pool(None, None, 4.0);
        has_pool(Some("2"), None, 2.0);
        has_pool(Some("2"), Some("3"), 3.0);

        let allows = |variable: Option<&str>, flag: Option<&str>| {
            let agent = AGENT.start_with(&file, |command| {
                command.args(flag).envs(variable.map(|value| ("FAIL_OPEN", value)));
            });
            let answer = agent.connect().get("a", "/t");
            assert_eq!(module_error(&answer), Some("WASM_TRAP"));
            decision(&answer) == "allow"
        };
        assert!(!allows(None, None));
        assert!(allows(None, Some("--fail-open")));
        for yes in ["true", "1", "yes", "on"] {
            assert!(allows(Some(yes), None), "{yes}");
        }
        for no in ["false", "0", "no", "off"] {
            assert!(!allows(Some(no), None), "{no}");
        }
        assert!(!allows(Some("true"), Some("--fail-open=false")));
    }
}

mod modules {
    use super::*;

    #[test]
    fn are_rejected_with_every_problem() {
        let modules = tempfile::tempdir().unwrap();
        let bad = module::write(
            modules.path(),
            "bad.wasm",
            r#"(module (import "env" "nonsense" (func)) (memory (export "memory") 1) (func (export "alloc") (param i64) (result i32) i32.const 0))"#,
        );
        let mut agent = AGENT.launch(&bad, |_| ());
        assert_eq!(agent.wait().code(), Some(1));
        let message = agent.log.whole();
        assert_eq!(message.lines().count(), 1, "{message}");
        for part in [
            "bad.wasm`",
            "`alloc` has the type (i64) -> i32",
            "does not export `dealloc`",
            "exports none of",
            "unknown import `env.nonsense`",
        ] {
            assert!(message.contains(part), "{part} in {message}");
        }
    }

    #[test]
    fn with_another_digest_are_rejected() {
        let modules = tempfile::tempdir().unwrap();
        let file = module::write(modules.path(), "m.wasm", &module::choosing());
        let mut agent = AGENT.launch(&file, |command| {
            command.args(["--module-sha256", &"0".repeat(64)]);
        });
        assert_eq!(agent.wait().code(), Some(1));
        let message = agent.log.whole();
        let digest = message.split("SHA-256 is ").nth(1).unwrap().split(',').next().unwrap().to_owned();
        // The message has the right digest.
        AGENT.start(&file, &["--module-sha256", &digest.to_uppercase()]).end();
    }
}

mod starts {
    use super::*;

    #[test]
    fn with_the_environment_alone() {
        let home = tempfile::tempdir().unwrap();
        let socket = home.path().join("by-environment.sock");
        let file = module::write(home.path(), "m.wasm", &module::choosing());
        let mut child =
            AGENT.command(home.path()).env("AGENT_SOCKET", &socket).env("WASM_MODULE", &file).stderr(Stdio::null()).spawn().unwrap();
        wait_for("the socket", || UnixStream::connect(&socket).ok());
        let answer = testkit::Connection::open(&socket).get("a", "/");
        rustix::process::kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
        assert_eq!(wait_for("the end", || child.try_wait().unwrap()).code(), Some(0));
        assert_eq!(decision(&answer), "allow");
    }

    #[test]
    fn as_the_proxys_installer_runs_it() {
        let home = tempfile::tempdir().unwrap();
        fs::create_dir(home.path().join("run")).unwrap();
        let file = module::write(home.path(), "wasm.wasm", &module::choosing());
        let socket = home.path().join("run/wasm.sock");
        // The unit has ProtectSystem=strict and no CacheDirectory, so the home cannot be created.
        let mut child = Command::new(AGENT.0)
            .arg("--socket")
            .arg(&socket)
            .arg("--module")
            .arg(&file)
            .env_clear()
            .env("RUST_LOG", "info")
            .env("HOME", "/nonexistent/home")
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        wait_for("the socket", || UnixStream::connect(&socket).ok());
        let answer = testkit::Connection::open(&socket).get("a", "/");
        rustix::process::kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
        assert_eq!(wait_for("the end", || child.try_wait().unwrap()).code(), Some(0));
        assert_eq!(decision(&answer), "allow");
    }
}
