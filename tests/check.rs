//! `zentinel-wasm-agent check`: its reports, and that it agrees with what serving does.

use std::fs;
use std::path::Path;
use std::process::{Output, Stdio};

use serde_json::{Value, json};
use testkit::{Program, module, wait_for};

const AGENT: Program = Program(env!("CARGO_BIN_EXE_zentinel-wasm-agent"));

/// Options with which a busy machine causes no timeouts.
const PATIENT: &str = "--start-timeout-ms=60000";

/// Runs `check` in the folder `home`.
fn check(home: &Path, options: &[&str], environment: &[(&str, &str)]) -> Output {
    let mut command = AGENT.command(home);
    command.current_dir(home).arg("check").args(options).envs(environment.iter().copied()).stdout(Stdio::piped());
    command.output().unwrap()
}

/// The report on a module in text, without the digits of its figures, and the exit status.
#[track_caller]
fn text(home: &Path, options: &[&str]) -> (i32, Vec<String>) {
    let output = check(home, options, &[]);
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    (output.status.code().unwrap(), text.lines().map(str::to_owned).collect())
}

/// The report as an object, and the exit status.
#[track_caller]
fn report(home: &Path, options: &[&str], environment: &[(&str, &str)]) -> (i32, Value) {
    let Output { status, stdout, stderr } = check(home, &[&["--json"], options].concat(), environment);
    let text = String::from_utf8(stdout).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}{}", String::from_utf8_lossy(&stderr));
    (status.code().unwrap(), serde_json::from_str(&text).unwrap())
}

/// A folder with a module.
fn folder(wat: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    module::write(folder.path(), "m.wasm", wat);
    folder
}

/// A module whose memory grows when it starts, and again when it is configured.
fn growing() -> String {
    let more = r#"
        (import "wasi_snapshot_preview1" "fd_write" (func (param i32 i32 i32 i32) (result i32)))
        (func (export "_initialize") (drop (memory.grow (i32.const 1))))
        (func (export "on_configure") (param i32 i32) (result i64) (drop (memory.grow (i32.const 2))) (i64.const 0))"#;
    module::with_hooks(&["on_request_headers", "on_response_headers"], |_| "(i64.extend8_s (i64.const 0))".into(), more)
}

mod reports {
    use super::*;

    #[test]
    fn have_everything_about_a_module() {
        let home = folder(&growing());
        let bytes = fs::read(home.path().join("m.wasm")).unwrap();
        let (status, mut report) = report(home.path(), &["m.wasm", "--config", "{}"], &[]);
        assert_eq!(status, 0, "{report}");
        let sha256 = report["sha256"].take();
        for time in ["compile_ms", "start_ms", "fresh_instance_ms"] {
            assert!(report["times"][time].take().as_f64().unwrap() > 0.0, "{time}");
        }
        let hook = "(i32, i32) -> i64";
        let page = 64 << 10;
        assert_eq!(
            report,
            json!({
                "ok": true,
                "module": "m.wasm",
                "sha256": null,
                "size_bytes": bytes.len(),
                "hooks": ["on_request_headers", "on_response_headers", "on_configure"],
                "exports": [
                    {"name": "_initialize", "type": "() -> ()"},
                    {"name": "on_configure", "type": hook},
                    {"name": "memory", "type": "memory"},
                    {"name": "alloc", "type": "(i32) -> i32"},
                    {"name": "dealloc", "type": "(i32, i32) -> ()"},
                    {"name": "on_request_headers", "type": hook},
                    {"name": "on_response_headers", "type": hook},
                ],
                "imports": [{"module": "wasi_snapshot_preview1", "name": "fd_write", "type": "(i32, i32, i32, i32) -> i32"}],
                "proposals": ["sign-extension"],
                "memory": {"start_bytes": 193 * page, "configured_bytes": 195 * page, "limit_bytes": 64 << 20},
                "times": {"compile_ms": null, "from_cache": false, "start_ms": null, "fresh_instance_ms": null},
                "problems": [],
                "warnings": [],
            })
        );
        // The digest is the one that serving accepts.
        let options = ["m.wasm", PATIENT, "--module-sha256", sha256.as_str().unwrap()];
        assert_eq!(super::report(home.path(), &options, &[]).0, 0);
    }

    #[test]
    fn are_readable() {
        let home = folder(&growing());
        let (status, lines) = text(home.path(), &["m.wasm", "--config", "{}"]);
        assert_eq!(status, 0);
        let is_figure = |c: char| c.is_ascii_digit() || c == '.';
        let shapes: Vec<String> = lines
            .iter()
            .map(|line| {
                line.split(' ')
                    .map(|word| if word.chars().all(is_figure) && !word.is_empty() { "N" } else { word })
                    .collect::<Vec<_>>()
                    .join(" ")
            })
            .collect();
        let sha256 = lines[1].rsplit(' ').next().unwrap();
        assert_eq!(sha256.len(), 64);
        assert_eq!(
            shapes,
            [
                "m.wasm: can be served",
                &format!("  SHA-256    {sha256}"),
                "  size       N bytes",
                "  hooks      on_request_headers, on_response_headers, on_configure",
                "  exports    _initialize, on_configure, memory, alloc, dealloc, on_request_headers, on_response_headers",
                "  imports    wasi_snapshot_preview1.fd_write",
                "  proposals  sign-extension",
                "  time       N ms to compile",
                "             N ms to start, N ms for a fresh instance",
                "  memory     N MiB at start, N MiB when ready, limit N MiB",
            ]
        );
    }

    #[test]
    fn have_one_line_for_each_problem_with_a_hint() {
        let home = folder(
            r#"(module (import "env" "nonsense" (func)) (import "env" "memory" (memory 1))
                (func (export "alloc") (param i64) (result i32) i32.const 0))"#,
        );
        let (status, lines) = text(home.path(), &["m.wasm"]);
        assert_eq!(status, 1);
        assert_eq!(lines[0], "m.wasm: 6 problems");
        let problems: Vec<&str> = lines.iter().filter_map(|line| line.strip_prefix("problem: ")).collect();
        assert_eq!(
            problems,
            [
                "it does not export `memory`: link it without `--import-memory` and `--no-export-memory`",
                "its export `alloc` has the type (i64) -> i32, not (i32) -> i32",
                "it does not export `dealloc`: export it with the type (i32, i32) -> (), as the SDKs do",
                "it exports none of `on_request_headers`, `on_request_body`, `on_response_headers`, `on_response_body`: export a hook \
                 with the type (i32, i32) -> i64, in Rust from a `cdylib`",
                "unknown import `env.nonsense` (link what defines it)",
                "unknown import `env.memory` (the module must define and export its memory)",
            ]
        );
        let (status, report) = report(home.path(), &["m.wasm"], &[]);
        assert_eq!((status, &report["ok"], &report["problems"]), (1, &json!(false), &json!(problems)));
        // What is known nevertheless.
        assert_eq!(report["imports"][0], json!({"module": "env", "name": "nonsense", "type": "() -> ()"}));
        assert_eq!(report["times"]["compile_ms"], Value::Null);
    }

    #[test]
    fn warn_of_what_is_probably_not_intended() {
        let home = folder(&module::hostile("misnamed-hook"));
        let (status, report) = report(home.path(), &["m.wasm"], &[]);
        assert_eq!(status, 1);
        assert_eq!(report["warnings"], json!(["its export `on_request_header` is not a hook: did you mean `on_request_headers`?"]));

        let home = folder(&module::tagging("x"));
        let options = ["m.wasm", "--config", "{}", "--start-timeout-ms=6000"];
        let (status, report) = super::report(home.path(), &options, &[("WASM_POOLSIZE", "2")]);
        assert_eq!(status, 0, "{report}");
        assert_eq!(
            report["warnings"],
            json!([
                "ignoring unknown environment variable `WASM_POOLSIZE` (did you mean `WASM_POOL_SIZE`?)",
                "`--start-timeout-ms` is 6000, but the proxy waits only 5000 ms for its configuration to be applied: with a \
                 configuration, slower starts fail",
                "the module ignores its configuration, because it does not export `on_configure`",
            ])
        );
    }

    #[test]
    fn warn_of_calls_that_would_always_exceed_their_deadline() {
        // It takes some milliseconds to start.
        let busy = r#"(func (export "_initialize") (local $left i32) (local.set $left (i32.const 30000000))
            (loop $again (br_if $again (local.tee $left (i32.sub (local.get $left) (i32.const 1))))))"#;
        let home = folder(&module::with_hooks(&["on_request_headers"], |_| "i64.const 0".into(), busy));
        let options = ["m.wasm", PATIENT, "--timeout-ms=1"];
        let warned = |isolation: &str| {
            let (status, report) = report(home.path(), &[&options[..], &[isolation]].concat(), &[]);
            assert_eq!(status, 0, "{report}");
            report["warnings"].to_string().contains("every call exceeds its deadline")
        };
        assert!(warned("--isolation=request"));
        assert!(!warned("--isolation=pooled"));
    }

    #[test]
    fn are_bounded_for_any_module() {
        let exports: String = (0..5000).map(|number| format!("(func (export \"{}{number}\"))", "x\\n".repeat(100))).collect();
        let home = folder(&(module::tagging("x").trim_end().strip_suffix(')').unwrap().to_owned() + &exports + ")"));
        let output = check(home.path(), &["m.wasm", PATIENT], &[]);
        let text = String::from_utf8(output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(0), "{text}");
        assert!(text.contains("more\n") && text.lines().all(|line| line.len() < 10_000) && text.lines().count() < 20, "{text}");
        let (_, report) = report(home.path(), &["m.wasm", PATIENT], &[]);
        assert_eq!(report["exports"].as_array().unwrap().len(), 1000);
    }
}

mod serving {
    use super::*;

    /// What is wrong with a module is the same for both, and so is which modules are right.
    #[test]
    fn has_the_same_problems() {
        for name in [
            "misnamed-hook",
            "missing-alloc",
            "mistyped-dealloc",
            "unknown-import",
            "imported-memory",
            "command",
            "gc",
            "threads",
            "large-memory",
            "many-elements",
            "start-trap",
            "initialize-trap",
            "configure-trap",
            "configure-nonsense",
            "configure-grow",
            "trap-unreachable",
        ] {
            let home = folder(&module::hostile(name));
            let (status, report) = report(home.path(), &["m.wasm", "--config", "{}", PATIENT], &[]);
            let mut agent = AGENT.launch(&home.path().join("m.wasm"), |command| {
                command.args(["--module-config", "{}", PATIENT]);
            });
            let problems: Vec<&str> = report["problems"].as_array().unwrap().iter().map(|problem| problem.as_str().unwrap()).collect();
            if problems.is_empty() {
                assert_eq!(status, 0, "{name}");
                agent.log.wait_until_serving();
                continue;
            }
            assert_eq!((status, agent.wait().code()), (1, Some(1)), "{name}: {report}");
            let log = agent.log.whole();
            for problem in problems {
                let problem = problem.trim_start_matches("it does not start: ").trim_start_matches("it rejects its configuration: ");
                let problem = problem.trim_end_matches(" (link what defines it)");
                assert!(log.contains(problem), "{name}: {problem:?} is not in {log}");
            }
        }
    }

    #[test]
    fn is_checked_with_its_own_variables_and_options() {
        let home = folder(&module::with_hooks(&["on_request_headers"], |_| "i64.const 0".into(), ""));
        let small = [("WASM_MODULE", "m.wasm"), ("WASM_MAX_MEMORY_MB", "1")];
        let (status, report) = report(home.path(), &[], &small);
        assert_eq!(status, 1);
        assert_eq!(
            report["problems"],
            json!(["it starts with 12582912 bytes of memory, more than the limit of 1048576: raise `--max-memory-mb`"])
        );
        // Whole command lines of serving are accepted.
        let options =
            ["--socket=s", "--module=m.wasm", "--max-memory-mb=12", "--watch", "--fail-open", "--admin-address=127.0.0.1:0", PATIENT];
        let (status, report) = super::report(home.path(), &options, &small);
        assert_eq!((status, &report["problems"]), (0, &json!([])), "{report}");
        assert!(!home.path().join("s").exists(), "it serves");
    }

    #[test]
    fn is_checked_with_its_files() {
        let home = folder(&module::tagging("x"));
        let problem = |options: &[&str]| {
            let (status, report) = report(home.path(), options, &[]);
            assert_eq!(status, 1, "{report}");
            report["problems"][0].as_str().unwrap().to_owned()
        };
        let missing = problem(&["nowhere.wasm"]);
        assert_eq!(missing, "No such file or directory (os error 2)");
        let digest = problem(&["m.wasm", "--module-sha256", &"0".repeat(64)]);
        assert!(digest.starts_with("its SHA-256 is ") && digest.contains("`--module-sha256`"), "{digest}");
        let tls = problem(&["m.wasm", "--grpc-address=127.0.0.1:0", "--grpc-tls-cert=nowhere.pem", "--grpc-tls-key=nowhere.pem", PATIENT]);
        assert!(tls.contains("nowhere.pem"), "{tls}");
        fs::write(home.path().join("m.wasm"), "(module)").unwrap();
        assert!(problem(&["m.wasm"]).contains("wat2wasm"));
    }

    #[test]
    fn does_not_compile_again_after_a_check() {
        let home = folder(&module::tagging("x"));
        let from_cache = || report(home.path(), &["m.wasm", PATIENT], &[]).1["times"]["from_cache"].take();
        assert_eq!(from_cache(), false);
        assert_eq!(from_cache(), true);
    }

    #[test]
    fn goes_on_during_a_check() {
        let home = folder(&module::tagging("x"));
        let agent = AGENT.start(&home.path().join("m.wasm"), &[]);
        let mut proxy = agent.connect();
        let module = home.path().join("m.wasm");
        let (status, report) = report(agent.home.path(), &["--socket", "wasm.sock", module.to_str().unwrap(), PATIENT], &[]);
        assert_eq!(status, 0, "{report}");
        assert_eq!(testkit::decision(&proxy.get("a", "/")), "allow");
    }
}

mod proxies {
    use super::*;

    /// Serves what the samples of `deploy/kdl` expect.
    fn wide(hooks: &[&str]) -> tempfile::TempDir {
        let configure = r#"(func (export "on_configure") (param i32 i32) (result i64) (i64.const 0))"#;
        folder(&module::with_hooks(hooks, |_| "i64.const 0".into(), configure))
    }

    fn sample(name: &str) -> String {
        format!("{}/deploy/kdl/{name}", env!("CARGO_MANIFEST_DIR"))
    }

    const SOCKET: &str = "--socket=/run/zentinel-agents/wasm.sock";

    #[test]
    fn samples_fit_the_agent() {
        let headers = ["on_request_headers", "on_response_headers"];
        for (name, hooks, options) in [
            ("wasm-agent.kdl", &headers[..], &[SOCKET][..]),
            ("configured.kdl", &headers[..1], &[SOCKET]),
            ("bodies.kdl", &module::PAGE_HOOKS, &[SOCKET]),
            ("grpc.kdl", &headers, &["--grpc-address=127.0.0.1:50051"]),
        ] {
            let home = wide(hooks);
            let (status, report) = report(home.path(), &[&["m.wasm", "--proxy-config", &sample(name)], options].concat(), &[]);
            assert_eq!((status, &report["problems"], &report["warnings"]), (0, &json!([]), &json!([])), "{name}");
        }
    }

    #[test]
    fn are_compared_with_the_module_and_the_options() {
        let home = wide(&module::PAGE_HOOKS);
        let (status, lines) = text(home.path(), &["m.wasm", "--timeout-ms=60", SOCKET, "--proxy-config", &sample("before-0.6.54.kdl")]);
        assert_eq!(status, 0);
        let warnings: Vec<&str> = lines.iter().filter_map(|line| line.strip_prefix("warning: ")).collect();
        assert_eq!(
            warnings,
            [
                "agent \"wasm\": `on_request_body` is never called: add \"request_body\" to its `events`",
                "agent \"wasm\": `on_response_body` is never called: add \"response_body\" to its `events`",
                "agent \"wasm\": its `failure-mode` has no effect: set that of the filter",
                "agent \"wasm\": the proxy gives up after 50 ms, before the deadline of a call (`--timeout-ms` 60), and nobody sees the \
                 agent's answer: make `--timeout-ms` smaller or `timeout-ms` larger",
            ]
        );
        let (status, report) = report(home.path(), &["m.wasm", "--proxy-config", &sample("wasm-agent.kdl")], &[]);
        assert_eq!(status, 1);
        assert_eq!(
            report["problems"],
            json!([
                "no agent of the proxy connects to the socket `/tmp/zentinel-wasm.sock`: it connects to `/run/zentinel-agents/wasm.sock`"
            ])
        );
    }

    /// The module is tried with the settings that it gets from the proxy.
    #[test]
    fn configure_the_module_that_is_tried() {
        let home = folder(&module::hostile("configure-trap"));
        let config = |block: &str| {
            let text = fs::read_to_string(sample("wasm-agent.kdl")).unwrap();
            let text = text.replacen("timeout-ms 50", &format!("timeout-ms 50\nconfig {{ {block} }}"), 1);
            fs::write(home.path().join("zentinel.kdl"), text).unwrap();
            let (status, report) = report(home.path(), &["m.wasm", SOCKET, "--proxy-config=zentinel.kdl"], &[]);
            (status, report["problems"].to_string())
        };
        assert_eq!(config("pool-size 2"), (0, "[]".into()));
        let (status, problems) = config("module-config \"{}\"");
        assert!(status == 1 && problems.contains("it does not start: WASM_TRAP: `on_configure`"), "{problems}");
        let (status, problems) = config("pool-size 0");
        assert!(status == 1 && problems.contains("the `config` block is rejected: `pool-size` is 0"), "{problems}");
    }

    #[test]
    fn are_a_problem_if_they_cannot_be_read() {
        let home = folder(&module::tagging("x"));
        fs::write(home.path().join("bad.kdl"), "agents {\n").unwrap();
        for (file, expected) in [
            ("nowhere.kdl", "cannot read the proxy's configuration `nowhere.kdl`: No such file or directory"),
            ("bad.kdl", "the proxy's configuration `bad.kdl` is invalid: line "),
        ] {
            let (status, report) = report(home.path(), &["m.wasm", "--proxy-config", file], &[]);
            assert_eq!(status, 1);
            assert!(report["problems"][0].as_str().unwrap().starts_with(expected), "{report}");
        }
    }
}

mod hostile {
    use super::*;

    #[test]
    fn modules_that_start_without_end_are_stopped() {
        for name in ["start-loop", "initialize-loop", "configure-loop"] {
            let home = folder(&module::hostile(name));
            let (status, report) = report(home.path(), &["m.wasm", "--config", "{}", "--start-timeout-ms=200"], &[]);
            assert_eq!(status, 1);
            let problem = report["problems"][0].as_str().unwrap();
            assert!(problem.starts_with("it does not start: WASM_TIMEOUT") && problem.contains("`--start-timeout-ms`"), "{problem}");
        }
    }

    /// Whatever a module logs goes to standard error, so the report stays readable by programs.
    #[test]
    fn modules_do_not_write_into_the_report() {
        let logs = r#"(import "zentinel" "log" (func $log (param i32 i32 i32))) (data (i32.const 16) "{\"ok\": true}")
            (func (export "_initialize") (call $log (i32.const 2) (i32.const 16) (i32.const 12)))"#;
        let home = folder(&module::with_hooks(&["on_request_headers"], |_| "i64.const 0".into(), logs));
        let output = check(home.path(), &["--json", "m.wasm", PATIENT], &[]);
        let lines = String::from_utf8(output.stdout).unwrap();
        assert_eq!(lines.lines().count(), 1, "{lines}");
        let logged = String::from_utf8(output.stderr).unwrap();
        let first: Value = serde_json::from_str(logged.lines().next().unwrap()).unwrap();
        assert_eq!((&first["target"], &first["message"]), (&json!("guest"), &json!(r#"{"ok": true}"#)));
    }
}

mod usage {
    use super::*;

    #[test]
    fn errors_exit_with_2_and_one_line() {
        let home = tempfile::tempdir().unwrap();
        for (options, environment, expected) in [
            (&[][..], &[][..], "error: no module: write `zentinel-wasm-agent check MODULE`, or set `WASM_MODULE`\n"),
            (&["m.wasm", "--jsn"], &[], "error: unexpected argument '--jsn' found; a similar argument exists: '--json'\n"),
            (
                &["m.wasm", "--config", "{"],
                &[],
                "error: invalid value '{' for '--module-config <JSON>': expected JSON or @FILE: EOF while parsing an object at line 1 \
                 column 1\n",
            ),
            (
                &["m.wasm"],
                &[("WASM_MAX_MEMORY_MB", "0")],
                "error: invalid value '0' for 'WASM_MAX_MEMORY_MB': expected a whole number from 1 to 4096\n",
            ),
        ] {
            let output = check(home.path(), options, environment);
            assert_eq!((output.status.code(), String::from_utf8(output.stderr).unwrap().as_str()), (Some(2), expected));
            assert!(output.stdout.is_empty());
        }
    }

    #[test]
    fn output_that_cannot_be_written_is_an_error() {
        let home = folder(&module::tagging("x"));
        let mut child =
            AGENT.command(home.path()).current_dir(home.path()).args(["check", "m.wasm", PATIENT]).stdout(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        assert_eq!(wait_for("the end of `check`", || child.try_wait().unwrap()).code(), Some(1));
    }
}
