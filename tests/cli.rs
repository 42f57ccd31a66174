//! The command line: what it takes, from where, and how it refuses.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use rustix::process::{Pid, Signal};
use testkit::{Program, decision, module, module_error, wait_for};

const AGENT: Program = Program(env!("CARGO_BIN_EXE_zentinel-wasm-agent"));

/// Runs the agent, which ends by itself.
fn run(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    let home = tempfile::tempdir().unwrap();
    AGENT.command(home.path()).args(arguments).envs(environment.iter().copied()).stdout(Stdio::piped()).output().unwrap()
}

/// The one line with which it refuses.
#[track_caller]
fn refusal(arguments: &[&str], environment: &[(&str, &str)]) -> String {
    let output = run(arguments, environment);
    let told = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{told}");
    assert!(output.stdout.is_empty());
    assert_eq!(told.lines().count(), 1, "{told}");
    told.trim_end().to_owned()
}

#[test]
fn it_tells_its_version_as_the_installer_wants_it() {
    for flag in ["--version", "-V"] {
        let output = run(&[flag], &[]);
        assert!(output.status.success() && output.stderr.is_empty());
        assert_eq!(String::from_utf8(output.stdout).unwrap(), "zentinel-wasm-agent 0.5.0\n");
    }
}

#[test]
fn the_help_stays_as_it_is() {
    let output = run(&["--help"], &[]);
    assert!(output.status.success() && output.stderr.is_empty());
    let help = String::from_utf8(output.stdout).unwrap();
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cli/help.txt");
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, &help).unwrap();
    }
    assert_eq!(help, fs::read_to_string(&file).unwrap(), "if the change is meant: UPDATE_SNAPSHOTS=1 cargo test --test cli");
}

#[test]
fn the_readme_names_every_option_its_variable_and_its_default() {
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    for argument in zentinel_agent_wasm::cli::command().get_arguments() {
        let Some(long) = argument.get_long().filter(|long| !["help", "version"].contains(long)) else { continue };
        let row = readme.lines().find(|line| line.starts_with(&format!("| `--{long}` |"))).unwrap_or_else(|| panic!("--{long} has no row"));
        let variable = argument.get_env().expect("every option has a variable").to_str().unwrap();
        assert!(row.contains(&format!("`{variable}`")), "{row}");
        for default in argument.get_default_values() {
            assert!(row.contains(&format!("`{}`", default.to_str().unwrap())), "{row}");
        }
    }
}

#[test]
fn a_bad_value_is_refused_in_one_line_that_says_what_it_takes() {
    for (arguments, expected) in [
        (&["--pool-size", "0"][..], "error: invalid value '0' for '--pool-size <N>': expected a whole number from 1 to 1024"),
        (&["--pool-size", "many"], "error: invalid value 'many' for '--pool-size <N>': expected a whole number from 1 to 1024"),
        (&["--log-format", "xml"], "error: invalid value 'xml' for '--log-format <LOG_FORMAT>' [possible values: json, text]"),
        (&["--fail-open=maybe"], "error: invalid value 'maybe' for '--fail-open[=<FAIL_OPEN>]': value was not a boolean"),
        (&["--fail-close"], "error: unexpected argument '--fail-close' found"),
        (
            &["--admin-address", "localhost"],
            "error: invalid value 'localhost' for '--admin-address <IP:PORT>': expected an IP address and a port, such as 127.0.0.1:9090",
        ),
    ] {
        assert_eq!(refusal(&[&["--module", "m.wasm"], arguments].concat(), &[]), expected);
    }
    assert_eq!(refusal(&[], &[]), "error: the following required arguments were not provided: --module <FILE>");
    let missing = refusal(&["--module", "m.wasm", "--module-config", "@/nowhere"], &[]);
    assert!(missing.contains("'@/nowhere' for '--module-config <JSON>': expected JSON or @FILE: cannot read the file"), "{missing}");
}

#[test]
fn a_bad_variable_is_refused_like_a_bad_option() {
    for (name, value, expected) in [
        ("WASM_POOL_SIZE", "x", "error: invalid value 'x' for '--pool-size <N>': expected a whole number from 1 to 1024"),
        ("FAIL_OPEN", "2", "error: invalid value '2' for '--fail-open[=<FAIL_OPEN>]': value was not a boolean"),
    ] {
        assert_eq!(refusal(&["--module", "m.wasm"], &[(name, value)]), expected);
    }
}

#[test]
fn an_empty_variable_is_an_unset_one_unless_that_would_widen_a_right() {
    const REFUSED: [&str; 3] = ["WASM_GRPC_CLIENT_CA", "WASM_MODULE_SHA256", "FAIL_OPEN"];
    let home = tempfile::tempdir().unwrap();
    let missing = home.path().join("m.wasm");
    let [socket, missing] = [home.path().join("s"), missing].map(|path| path.to_str().unwrap().to_owned());
    let command = zentinel_agent_wasm::cli::command();
    let variables = command.get_arguments().filter_map(|argument| argument.get_env()).map(|variable| variable.to_str().unwrap());
    let (mut refused, mut unset) = (0, 0);
    for variable in variables.chain(["WASM_GRPC_ADDRESS"]) {
        let given = ["--socket", &socket, "--module", &missing];
        // What is on the command line would hide its variable.
        let given = match variable {
            "AGENT_SOCKET" => &given[2..],
            "WASM_MODULE" => &given[..2],
            _ => &given,
        };
        let output = run(given, &[(variable, "")]);
        let told = String::from_utf8(output.stderr).unwrap();
        if REFUSED.contains(&variable) {
            assert_eq!(told, format!("error: the environment variable `{variable}` is empty: set it to a value or unset it\n"));
            assert_eq!(output.status.code(), Some(2));
            refused += 1;
        } else if variable == "WASM_MODULE" {
            assert_eq!(told, "error: the following required arguments were not provided: --module <FILE>\n");
        } else {
            // The options are accepted: it is the module that is missing.
            assert_eq!(output.status.code(), Some(1), "{variable}: {told}");
            // Of the default socket nobody knows who else serves it.
            assert!(told.contains("cannot serve the"), "{variable}: {told}");
            unset += 1;
        }
    }
    assert!(refused == REFUSED.len() && unset > 15, "{refused} {unset}");
    // A flag beats its variable.
    let told = run(&["--socket", &socket, "--module", &missing, "--fail-open=false"], &[("FAIL_OPEN", "")]).stderr;
    assert!(String::from_utf8(told).unwrap().contains("cannot serve the module"));
}

#[test]
fn a_module_that_cannot_be_served_is_refused_with_every_problem() {
    let modules = tempfile::tempdir().unwrap();
    let bad = module::write(
        modules.path(),
        "bad.wasm",
        r#"(module (import "env" "nonsense" (func)) (memory (export "memory") 1) (func (export "alloc") (param i64) (result i32) i32.const 0))"#,
    );
    let mut agent = AGENT.launch(&bad, |_| ());
    assert_eq!(agent.wait().code(), Some(1));
    let told = agent.log.whole();
    assert_eq!(told.lines().count(), 1, "{told}");
    for part in
        ["bad.wasm`", "`alloc` has the type (i64) -> i32", "does not export `dealloc`", "exports none of", "`env.nonsense` is not known"]
    {
        assert!(told.contains(part), "{part} in {told}");
    }
}

#[test]
fn a_module_with_another_digest_is_refused() {
    let modules = tempfile::tempdir().unwrap();
    let file = module::write(modules.path(), "m.wasm", &module::choosing());
    let mut agent = AGENT.launch(&file, |command| {
        command.args(["--module-sha256", &"0".repeat(64)]);
    });
    assert_eq!(agent.wait().code(), Some(1));
    let told = agent.log.whole();
    let digest = told.split("SHA-256 is ").nth(1).unwrap().split(',').next().unwrap().to_owned();
    // The message says what the right one is.
    AGENT.start(&file, &["--module-sha256", &digest.to_uppercase()]).end();
}

#[test]
fn a_flag_beats_the_environment_which_beats_the_default() {
    let modules = tempfile::tempdir().unwrap();
    let file = module::write(modules.path(), "m.wasm", &module::choosing());
    let has_pool = |variable: Option<&str>, flag: Option<&str>, size: f64| {
        let agent = AGENT.start_with(&file, |command| {
            command.args(["--admin-address", "127.0.0.1:0"]).args(flag.map(|value| format!("--pool-size={value}")));
            command.envs(variable.map(|value| ("WASM_POOL_SIZE", value)));
        });
        // Instances after the first are made while it serves.
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

#[test]
fn the_environment_alone_is_enough() {
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
fn it_runs_under_the_command_line_and_environment_of_the_proxy_s_installer() {
    let home = tempfile::tempdir().unwrap();
    fs::create_dir(home.path().join("run")).unwrap();
    let file = module::write(home.path(), "wasm.wasm", &module::choosing());
    let socket = home.path().join("run/wasm.sock");
    // A home that is not there and a file system that cannot be written: ProtectSystem=strict, no CacheDirectory.
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
