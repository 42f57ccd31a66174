//! The decision log: a line for each request, with what the module decided and why.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, ErrorKind, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;
use testkit::{
    Admin, Agent, Connection, Program, decision, frame, kind, module, module_error, request, request_body, response, response_body,
    wait_for,
};

const AGENT: Program = Program(env!("CARGO_BIN_EXE_zentinel-wasm-agent"));

const DROPPED: &str = "wasm_agent_decision_log_dropped_total";

const BLOCK: &str = r#"{"decision":"block","status":451,"tags":["t"],"rule_ids":["r-1","r-2"],"reason_codes":["c"],"confidence":0.5}"#;

/// A module that blocks every request with its reasons.
fn blocking() -> String {
    module::answering(&["on_request_headers"], BLOCK)
}

/// An agent with a decision log in a file.
struct Logged {
    agent: Agent,
    admin: Admin,
    path: PathBuf,
    folder: TempDir,
}

impl Logged {
    #[track_caller]
    fn start(wat: &str, options: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("decisions.log");
        Self::start_at(path, folder, wat, options)
    }

    #[track_caller]
    fn start_at(path: PathBuf, folder: TempDir, wat: &str, options: &[&str]) -> Self {
        let module = module::write(folder.path(), "m.wasm", wat);
        let agent = AGENT.start_with(&module, |command| {
            command.args(["--admin-address", "127.0.0.1:0", "--timeout-ms", "20000"]).args(options);
            command.arg("--decision-log-file").arg(&path);
        });
        let admin = agent.admin();
        Self { agent, admin, path, folder }
    }

    fn connect(&self) -> Connection {
        self.agent.connect()
    }

    /// The lines so far.
    #[track_caller]
    fn lines(&self) -> Vec<Value> {
        lines(&self.path)
    }

    /// Waits until there are `count` lines, and returns them.
    #[track_caller]
    fn wait_for_lines(&self, count: usize) -> Vec<Value> {
        wait_for(&format!("{count} lines"), || Some(self.lines()).filter(|lines| lines.len() >= count))
    }

    /// Ends the agent, and returns all lines.
    #[track_caller]
    fn end(self) -> Vec<Value> {
        self.agent.end_unharmed();
        lines(&self.path)
    }
}

/// The whole lines of a file. None of them is anything but an object.
#[track_caller]
fn lines(path: &Path) -> Vec<Value> {
    let text = match fs::read_to_string(path) {
        // It is being rotated.
        Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
        text => text.unwrap(),
    };
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let parse = |line: &str| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
    let lines: Vec<Value> = whole.lines().map(parse).collect();
    assert!(lines.iter().all(Value::is_object), "{lines:?}");
    lines
}

/// The ids of lines.
fn ids(lines: &[Value]) -> Vec<&str> {
    lines.iter().map(|line| line["correlation_id"].as_str().unwrap_or_default()).collect()
}

mod line {
    use super::*;

    #[test]
    fn says_why_a_request_was_refused() {
        let logged = Logged::start(&blocking(), &["--decision-log", "refused"]);
        let mut event = request("a", "/cart?secret=1");
        event["metadata"]["traceparent"] = json!("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
        assert_eq!(decision(&logged.connect().ask(kind::REQUEST_HEADERS, &event)), "block");
        let mut line = logged.wait_for_lines(1).remove(0);
        assert!(line["timestamp"].as_str().unwrap().ends_with('Z'), "{line}");
        let hook = line["hooks"][0].as_object_mut().unwrap();
        assert!(hook["guest_ms"].as_f64() <= hook["total_ms"].as_f64() && hook["waiting_ms"].is_f64(), "{hook:?}");
        assert_eq!(hook["module"].as_str().map(str::len), Some(64));
        hook.retain(|name, _| !name.ends_with("_ms") && name != "module");
        line["timestamp"].take();
        let expected = json!({
            "timestamp": null, "correlation_id": "a", "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "route": "all", "method": "GET", "path": "/cart", "client": "192.0.2.0/24", "decision": "block", "status": 451,
            "hooks": [{
                "hook": "on_request_headers", "decision": "block", "status": 451, "tags": ["t"], "rule_ids": ["r-1", "r-2"],
                "reason_codes": ["c"], "confidence": 0.5,
            }],
        });
        assert_eq!(line, expected);
    }

    #[test]
    fn of_an_allowed_request_is_written_with_all() {
        for (mode, expected) in [("refused", &["/blocked"][..]), ("all", &["/", "/blocked", "/slow"])] {
            let logged = Logged::start(&module::judging(), &["--decision-log", mode]);
            let mut proxy = logged.connect();
            for uri in ["/", "/blocked", "/slow"] {
                proxy.get(uri, uri);
            }
            let mut lines = logged.end();
            // The module has a hook for the response, which these requests are still waiting for.
            lines.sort_by_key(|line| line["correlation_id"].to_string());
            assert_eq!(ids(&lines), expected, "{mode}");
            for line in &lines {
                let is_refused = line["correlation_id"] == "/blocked";
                assert_eq!(line["decision"], if is_refused { "block" } else { "allow" });
                assert_eq!(line["complete"], if is_refused { Value::Null } else { json!(false) });
            }
        }
    }

    #[test]
    fn joins_the_events_of_a_request() {
        let logged = Logged::start(&module::answering(&module::PAGE_HOOKS, r#"{"tags":["t"]}"#), &["--decision-log", "all"]);
        let mut proxy = logged.connect();
        for id in ["a", "b"] {
            proxy.get(id, &format!("/{id}"));
        }
        for id in ["b", "a"] {
            proxy.ask(kind::REQUEST_BODY, &request_body(id, "body"));
            proxy.ask(kind::RESPONSE_HEADERS, &response(id, 200));
            proxy.ask(kind::RESPONSE_BODY, &response_body(id, "body"));
        }
        let lines = logged.wait_for_lines(2);
        assert_eq!(ids(&lines), ["b", "a"]);
        for line in &lines {
            assert_eq!(line["path"], format!("/{}", line["correlation_id"].as_str().unwrap()));
            assert_eq!((&line["complete"], &line["decision"]), (&Value::Null, &json!("allow")));
            let hooks: Vec<_> = line["hooks"].as_array().unwrap().iter().map(|hook| hook["hook"].as_str().unwrap()).collect();
            assert_eq!(hooks, module::PAGE_HOOKS);
        }
        assert_eq!(logged.end().len(), 2);
    }

    #[test]
    fn of_a_response_without_a_body_waits_for_none() {
        let logged = Logged::start(&module::answering(&module::PAGE_HOOKS, "{}"), &["--decision-log", "all"]);
        let mut proxy = logged.connect();
        for (id, method, status) in [("a", "HEAD", 200), ("b", "GET", 204), ("c", "GET", 200)] {
            let mut event = request(id, "/");
            event["method"] = json!(method);
            proxy.ask(kind::REQUEST_HEADERS, &event);
            proxy.ask(kind::RESPONSE_HEADERS, &response(id, status));
        }
        let complete: Vec<_> = logged.end().iter().map(|line| line["complete"].clone()).collect();
        assert_eq!(complete, [Value::Null, Value::Null, json!(false)]);
    }

    #[test]
    fn of_a_refused_response_says_what_was_requested() {
        let wat = module::with_hooks(
            &["on_request_headers", "on_response_headers"],
            |hook| if hook == "on_response_headers" { "i64.const 0x40_00000014".into() } else { "i64.const 0".into() },
            r#"(data (i32.const 64) "{\"decision\":\"block\"}")"#,
        );
        let logged = Logged::start(&wat, &["--decision-log", "refused"]);
        let mut proxy = logged.connect();
        proxy.get("allowed", "/");
        proxy.get("a", "/leak");
        assert_eq!(decision(&proxy.ask(kind::RESPONSE_HEADERS, &response("a", 200))), "block");
        let line = &logged.wait_for_lines(1)[0];
        assert_eq!((&line["path"], &line["decision"], &line["status"]), (&json!("/leak"), &json!("block"), &json!(403)));
        assert_eq!((&line["hooks"][0]["decision"], &line["hooks"][1]["decision"]), (&json!("allow"), &json!("block")));
        // The request that was allowed is none of its business.
        assert_eq!(logged.end().len(), 1);
    }

    #[test]
    fn names_the_module_error() {
        for (fail_open, decided) in [("--fail-open=false", "block"), ("--fail-open", "allow")] {
            let logged = Logged::start(&module::choosing(), &["--decision-log", "refused", fail_open]);
            let mut proxy = logged.connect();
            proxy.get("good", "/");
            assert_eq!(module_error(&proxy.get("a", "/trap")), Some("WASM_TRAP"));
            let lines = logged.end();
            assert_eq!(ids(&lines), ["a"]);
            let line = &lines[0];
            assert_eq!((&line["decision"], &line["error"], &line["path"]), (&json!(decided), &json!("WASM_TRAP"), &json!("/trap")));
            let is_open = if decided == "allow" { json!(true) } else { Value::Null };
            assert_eq!((&line["fail_open"], &line["hooks"][0]["fail_open"]), (&is_open, &is_open));
            assert_eq!(line["hooks"][0]["reason_codes"], json!(["WASM_TRAP"]));
        }
    }

    #[test]
    fn of_a_body_over_the_limit_belongs_to_its_request() {
        let options = ["--decision-log", "refused", "--max-body-bytes", "3"];
        let logged = Logged::start(&module::answering(&["on_request_headers", "on_request_body"], "{}"), &options);
        let mut proxy = logged.connect();
        let mut event = request("a", "/upload");
        event["method"] = json!("POST");
        proxy.ask(kind::REQUEST_HEADERS, &event);
        assert_eq!(module_error(&proxy.ask(kind::REQUEST_BODY, &request_body("a", "long"))), Some("WASM_BODY_LIMIT"));
        let line = &logged.wait_for_lines(1)[0];
        assert_eq!((&line["path"], &line["method"], &line["error"]), (&json!("/upload"), &json!("POST"), &json!("WASM_BODY_LIMIT")));
    }

    #[test]
    fn is_as_private_as_configured() {
        for (options, query, client) in [
            (&["--decision-log-query", "--decision-log-client", "full"][..], json!("secret=1"), json!("192.0.2.7")),
            (&["--decision-log-client", "off"], Value::Null, Value::Null),
        ] {
            let logged = Logged::start(&blocking(), &[&["--decision-log", "refused"], options].concat());
            logged.connect().get("a", "/cart?secret=1");
            let line = &logged.wait_for_lines(1)[0];
            assert_eq!((&line["query"], &line["client"], &line["path"]), (&query, &client, &json!("/cart")));
        }
    }

    #[test]
    fn of_requests_with_one_id_stay_apart() {
        let logged = Logged::start(&module::answering(&module::PAGE_HOOKS, "{}"), &["--decision-log", "all"]);
        let mut proxy = logged.connect();
        proxy.get("same", "/first");
        proxy.get("same", "/second");
        proxy.ask(kind::RESPONSE_HEADERS, &response("same", 200));
        let lines = logged.end();
        let seen: Vec<_> = lines.iter().map(|line| (line["path"].as_str(), line["hooks"][0]["hook"].as_str().unwrap())).collect();
        let expected = [(Some("/second"), "on_request_headers"), (None, "on_response_headers"), (Some("/first"), "on_request_headers")];
        assert_eq!(seen, expected);
    }
}

mod sample {
    use super::*;

    #[test]
    fn applies_to_allowed_requests_alone() {
        let logged = Logged::start(&module::choosing(), &["--decision-log", "all", "--decision-log-sample", "0"]);
        let mut proxy = logged.connect();
        for at in 0..100 {
            proxy.get(&at.to_string(), "/");
        }
        proxy.get("error", "/t");
        assert_eq!(ids(&logged.end()), ["error"]);
    }

    #[test]
    fn is_about_as_large_as_configured() {
        let logged = Logged::start(&module::choosing(), &["--decision-log", "all", "--decision-log-sample", "0.5"]);
        let mut proxy = logged.connect();
        for at in 0..1000 {
            proxy.get(&at.to_string(), "/");
        }
        // 500 with a standard deviation of 16.
        let count = logged.end().len();
        assert!((340..660).contains(&count), "{count}");
    }
}

mod without_a_file {
    use super::*;

    fn line_of(format: &str) -> Value {
        let folder = tempfile::tempdir().unwrap();
        let module = module::write(folder.path(), "m.wasm", &blocking());
        let agent = AGENT.start(&module, &["--decision-log", "refused", "--log-format", format]);
        agent.connect().get("a", "/");
        let line = agent.log.wait_for_entry("the decision", |entry| entry["target"] == "decision");
        agent.end();
        line
    }

    #[test]
    fn lines_are_part_of_the_log() {
        for format in ["json", "text"] {
            let line = line_of(format);
            assert_eq!((&line["level"], &line["correlation_id"], &line["decision"]), (&json!("INFO"), &json!("a"), &json!("block")));
        }
    }
}

mod file {
    use super::*;

    #[test]
    fn is_readable_by_its_group_at_most() {
        let logged = Logged::start(&blocking(), &["--decision-log", "refused"]);
        assert_eq!(fs::metadata(&logged.path).unwrap().permissions().mode() & 0o777 & !0o640, 0);
    }

    #[test]
    fn is_rotated() {
        let options = ["--decision-log", "refused", "--decision-log-max-bytes", "4096", "--decision-log-files", "3"];
        let logged = Logged::start(&blocking(), &options);
        let mut proxy = logged.connect();
        let path = |number: usize| logged.folder.path().join(format!("decisions.log.{number}"));
        for at in 0..100 {
            proxy.get(&at.to_string(), "/");
        }
        wait_for("the last line", || logged.lines().iter().any(|line| line["correlation_id"] == "99").then_some(()));
        let files = [path(2), path(1), logged.path.clone()];
        let mut last = None;
        for file in &files {
            assert!(fs::metadata(file).unwrap().len() <= 4096, "{}", file.display());
            for line in lines(file) {
                let id: u32 = line["correlation_id"].as_str().unwrap().parse().unwrap();
                assert!(last.is_none_or(|last| id == last + 1), "{id} after {last:?}");
                last = Some(id);
            }
        }
        assert!(last == Some(99) && !path(3).exists());
        assert_eq!(logged.admin.metric(DROPPED), 0.0);
    }

    #[test]
    fn is_opened_again_on_sighup() {
        let logged = Logged::start(&blocking(), &["--decision-log", "refused"]);
        let mut proxy = logged.connect();
        proxy.get("before", "/");
        logged.wait_for_lines(1);
        let moved = logged.folder.path().join("moved");
        fs::rename(&logged.path, &moved).unwrap();
        logged.agent.signal(Signal::HUP);
        wait_for("the new file", || logged.path.exists().then_some(()));
        proxy.get("after", "/");
        assert_eq!(ids(&logged.wait_for_lines(1)), ["after"]);
        assert_eq!(ids(&lines(&moved)), ["before"]);
    }

    #[test]
    fn is_appended_to_after_a_restart() {
        let first = Logged::start(&blocking(), &["--decision-log", "refused"]);
        first.connect().get("first", "/");
        let Logged { agent, path, folder, .. } = first;
        agent.end_unharmed();
        let second = Logged::start_at(path, folder, &blocking(), &["--decision-log", "refused"]);
        second.connect().get("second", "/");
        assert_eq!(ids(&second.end()), ["first", "second"]);
    }

    #[test]
    fn in_a_missing_folder_is_an_error_at_the_start_and_in_a_check() {
        let folder = tempfile::tempdir().unwrap();
        let module = module::write(folder.path(), "m.wasm", &blocking());
        let missing = folder.path().join("missing");
        let path = missing.join("decisions.log");
        let expected = format!(
            "cannot open the decision log `{}`: No such file or directory (os error 2); create the folder `{}`",
            path.display(),
            missing.display()
        );
        let mut agent = AGENT.launch(&module, |command| {
            command.args(["--decision-log", "all", "--decision-log-file"]).arg(&path);
        });
        assert_eq!(agent.wait().code(), Some(1));
        assert_eq!(agent.log.whole(), format!("zentinel-wasm-agent: {expected}"));
        let mut check = AGENT.command(folder.path());
        check.arg("check").arg(&module).args(["--json", "--decision-log", "all", "--decision-log-file"]).arg(&path);
        let output = check.stdout(Stdio::piped()).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(report["problems"], json!([expected]));
        assert!(!missing.exists());
    }

    #[test]
    fn is_ignored_with_a_warning_when_the_log_is_off() {
        let logged = Logged::start(&blocking(), &[]);
        logged.agent.log.wait_for_entry("the warning", |entry| {
            entry["message"].as_str().is_some_and(|message| message.contains("ignoring `--decision-log-file`"))
        });
        logged.connect().get("a", "/");
        assert!(!logged.path.exists());
    }
}

mod unwritable {
    use super::*;

    #[track_caller]
    fn load(logged: &Logged, count: usize) {
        let mut proxy = logged.connect();
        for at in 0..count {
            assert_eq!(decision(&proxy.get(&at.to_string(), "/")), "block");
        }
        assert_eq!(logged.admin.get("/healthz"), (200, "healthy\n".into()));
    }

    #[test]
    fn full_disk_costs_only_lines() {
        let folder = tempfile::tempdir().unwrap();
        let logged = Logged::start_at("/dev/full".into(), folder, &blocking(), &["--decision-log", "refused"]);
        load(&logged, 100);
        logged.admin.wait_for_metric(DROPPED, 100.0);
        logged.agent.end_unharmed();
    }

    /// A pipe, and an agent that writes to it. It is full after some hundred lines.
    fn pipe() -> Logged {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pipe");
        assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
        // Long lines, so the pipe and the queue are full soon.
        let answer = json!({"decision": "block", "tags": vec!["x".repeat(256); 16]}).to_string();
        let wat = module::answering(&["on_request_headers"], &answer);
        Logged::start_at(path, folder, &wat, &["--decision-log", "refused"])
    }

    #[test]
    fn pipe_without_a_reader_costs_only_lines() {
        let logged = pipe();
        // More than pipe, lines and queue hold: 64 KiB, some hundred KiB and 8 MiB.
        load(&logged, 3000);
        assert!(logged.admin.metric(DROPPED) > 0.0);
        logged.agent.end_unharmed();
    }

    #[test]
    fn reader_of_a_pipe_learns_what_it_missed() {
        let logged = pipe();
        load(&logged, 3000);
        let dropped = logged.admin.metric(DROPPED);
        let reader = File::open(&logged.path).unwrap();
        let mut lost = 0.0;
        for line in BufReader::new(reader).lines() {
            let line: Value = serde_json::from_str(&line.unwrap()).unwrap();
            if let Some(missing) = line["lost"].as_f64() {
                lost += missing;
                break;
            }
            assert_eq!(line["decision"], "block");
        }
        assert!(dropped > 0.0 && lost == dropped, "{lost} of {dropped}");
    }
}

mod hostile {
    use super::*;

    #[test]
    fn texts_stay_within_their_line() {
        let rule = "r\"\\".repeat((1 << 20) / 3 + 1);
        let answer = json!({"decision": "block", "rule_ids": [rule], "tags": ["\"},{\"correlation_id\":\"forged\""]}).to_string();
        // Longer than the pages that the usual module has.
        let data: String = answer.bytes().map(|byte| format!("\\{byte:02x}")).collect();
        let wat = module::with_hooks(
            &["on_request_headers"],
            |_| format!("i64.const {}", 8_u64 << 20 << 32 | answer.len() as u64),
            &format!("(data (i32.const {}) \"{data}\")", 8 << 20),
        );
        let options = ["--decision-log", "refused", "--decision-log-client", "full", "--decision-log-query"];
        let logged = Logged::start(&wat, &options);
        let mut proxy = logged.connect();
        let id = "i\n\"d\u{2028}";
        let mut event = request(id, "/\n\"},{\"path\":\"/forged?\n");
        event["method"] = json!("GET\n\0");
        event["metadata"]["route_id"] = json!("\u{7f}\r\n".repeat(1000));
        event["metadata"]["client_ip"] = json!("nobody\n");
        assert_eq!(decision(&proxy.ask(kind::REQUEST_HEADERS, &event)), "block");
        let mut line = logged.wait_for_lines(1).remove(0);
        assert_eq!(
            (&line["correlation_id"], &line["path"], &line["query"]),
            (&json!(id), &json!("/\n\"},{\"path\":\"/forged"), &json!("\n"))
        );
        assert_eq!((&line["method"], &line["client"]), (&json!("GET\n\0"), &json!("nobody\n")));
        let route = line["route"].take();
        assert!(route.as_str().is_some_and(|route| route.len() < 300 && route.ends_with('…')), "{route}");
        let rule = line["hooks"][0]["rule_ids"][0].as_str().unwrap();
        assert!(rule.starts_with("r\"\\r") && rule.len() < 300 && rule.ends_with('…'), "{rule}");
        assert_eq!(line["hooks"][0]["tags"], json!(["\"},{\"correlation_id\":\"forged\""]));
        assert_eq!(logged.end().len(), 1);
    }

    #[test]
    fn undecodable_events_are_recorded() {
        let logged = Logged::start(&module::choosing(), &["--decision-log", "refused"]);
        let mut proxy = logged.connect();
        // Its id cannot be read, so it is not answered.
        let event = request("unreadable", "/PATH").to_string();
        let mut bytes = frame(kind::REQUEST_HEADERS, event.as_bytes());
        let at = bytes.windows(4).position(|part| part == b"PATH").unwrap();
        bytes[at] = 0xff;
        proxy.send_raw(&bytes);
        let mut event = request("a", "/");
        event["uri"] = json!(1);
        assert_eq!(module_error(&proxy.ask(kind::REQUEST_HEADERS, &event)), Some("WASM_INVALID_EVENT"));
        let lines = logged.end();
        assert_eq!(ids(&lines), ["a"]);
        assert_eq!((&lines[0]["error"], &lines[0]["path"]), (&json!("WASM_INVALID_EVENT"), &Value::Null));
    }

    /// Sends `count` requests whose responses never arrive.
    fn begin(proxy: &mut Connection, count: usize, name: &str, uri: &str) {
        let mut writer = proxy.writer();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                for at in 0..count {
                    let event = request(&format!("{name}{at}"), uri).to_string();
                    writer.write_all(&frame(kind::REQUEST_HEADERS, event.as_bytes())).unwrap();
                }
            });
            for _ in 0..count {
                assert_eq!(decision(&proxy.answer()), "allow");
            }
        });
    }

    #[test]
    fn requests_that_never_end_are_bounded() {
        /// With their paths, they take more than the awaited ones may.
        const REQUESTS: usize = 15_000;
        let wat = module::answering(&["on_request_headers", "on_response_headers"], "{}");
        let logged = Logged::start(&wat, &["--decision-log", "all", "--decision-log-files", "1"]);
        let mut proxy = logged.connect();
        let uri = format!("/{}", "x".repeat(4000));
        begin(&mut proxy, REQUESTS, "first", &uri);
        let early = wait_for("lines of requests that have no room", || Some(logged.lines()).filter(|lines| !lines.is_empty()));
        assert!(early.iter().all(|line| line["complete"] == false), "{:?}", early[0]);
        // The 2 KiB that are recorded of each path would be 90 MiB.
        let before = logged.agent.resident();
        begin(&mut proxy, 3 * REQUESTS, "second", &uri);
        let grown = logged.agent.resident().saturating_sub(before);
        assert!(grown < 64 << 20, "{grown}");
        logged.agent.end_unharmed();
    }
}

mod documentation {
    use super::*;

    /// The commands of the documentation with this program.
    fn commands(program: &str) -> Vec<String> {
        let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/operations.md")).unwrap();
        let section = text.split("\n## ").find(|section| section.starts_with("Decision log\n")).expect("no section on the decision log");
        let lines = section.lines().filter_map(|line| line.strip_prefix("    "));
        lines.filter(|line| line.contains(program)).map(str::to_owned).collect()
    }

    #[track_caller]
    fn run(command: &str) -> Vec<Value> {
        let output = Command::new("sh").arg("-c").arg(command).output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{command}: {output:?}");
        String::from_utf8(output.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn tells_by_one_command_why_a_request_was_refused() {
        if Command::new("jq").arg("--version").output().is_err() {
            eprintln!("skipped: jq is missing (Debian: apt-get install jq)");
            return;
        }
        let commands = commands("jq -");
        let [of_file, of_log] = commands.as_slice() else { panic!("{commands:?}") };
        let logged = Logged::start(&blocking(), &["--decision-log", "all"]);
        let mut proxy = logged.connect();
        proxy.get("other", "/");
        proxy.get("wanted", "/");
        logged.wait_for_lines(2);
        let command = of_file.replace("ID", "wanted").replace("/var/log/zentinel-wasm-agent/decisions.log", logged.path.to_str().unwrap());
        assert!(command.contains(logged.path.to_str().unwrap()), "{command}");
        let shown = run(&command);
        assert_eq!((shown.len(), &shown[0]["rule_ids"]), (1, &json!(["r-1", "r-2"])));

        // The log has other lines as well, here of both formats.
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let line = fs::read_to_string(&logged.path).unwrap().replace("{\"timestamp\"", "{\"target\":\"decision\",\"timestamp\"");
        fs::write(&log, format!("2026-01-01 INFO serving\n{{\"message\":\"x\"}}\n{line}")).unwrap();
        let (journal, rest) = of_log.split_once(" | ").unwrap();
        assert!(journal.starts_with("journalctl "), "{journal}");
        let shown = run(&format!("cat '{}' | {}", log.display(), rest.replace("ID", "wanted")));
        assert_eq!(ids(&shown), ["wanted"]);
    }
}

mod metrics {
    use super::*;

    fn start(wat: &str, options: &[&str]) -> (Agent, Admin) {
        let folder = tempfile::tempdir().unwrap();
        let agent = AGENT.start(&module::write(folder.path(), "m.wasm", wat), &[&["--admin-address", "127.0.0.1:0"], options].concat());
        let admin = agent.admin();
        (agent, admin)
    }

    #[test]
    fn count_decisions_by_hook() {
        let (agent, admin) = start(&module::judging(), &["--timeout-ms", "20000"]);
        let series =
            |hook: &str, decision: &str| admin.metric(&format!("wasm_agent_decisions_total{{decision=\"{decision}\",hook=\"{hook}\"}}"));
        let exists = |series: &str| admin.get("/metrics").1.lines().any(|line| line == format!("{series} 0"));
        assert!(exists(r#"wasm_agent_decisions_total{decision="redirect",hook="on_response_body"}"#));
        assert!(exists(r#"wasm_agent_decisions_total{decision="close",hook="on_websocket_frame"}"#));
        assert!(!exists(r#"wasm_agent_decisions_total{decision="close",hook="on_request_headers"}"#));
        let mut proxy = agent.connect();
        proxy.get("a", "/");
        proxy.get("b", "/blocked");
        proxy.ask(kind::RESPONSE_HEADERS, &response("a", 200));
        // The module has no hook for it.
        proxy.ask(kind::RESPONSE_BODY, &response_body("a", "x"));
        proxy.send_raw(&frame(kind::REQUEST_HEADERS, br#"{"correlation_id":"w","uri":1}"#));
        assert_eq!(module_error(&proxy.answer()), Some("WASM_INVALID_EVENT"));
        let counted = [
            ("on_request_headers", "allow", 1.0),
            ("on_request_headers", "block", 2.0),
            ("on_response_headers", "allow", 1.0),
            ("on_response_body", "allow", 1.0),
        ];
        for (hook, decision, expected) in counted {
            assert_eq!(series(hook, decision), expected, "{hook} {decision}");
        }
        let total: f64 = admin
            .get("/metrics")
            .1
            .lines()
            .filter(|line| line.starts_with("wasm_agent_decisions_total{"))
            .map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap())
            .sum();
        assert_eq!(total, admin.metric("wasm_agent_requests_total"));
    }

    #[test]
    fn have_a_bounded_number_of_rules() {
        // Names a rule by the three characters behind the slash of a request's path.
        const ANSWER: &str = r#"{"rule_ids":["rule-000","r\u00e8gle"]}"#;
        let digits = 1024 + ANSWER.find("000").unwrap();
        let data: String = ANSWER.bytes().map(|byte| format!("\\{byte:02x}")).collect();
        let from = r#"{"method":"GET","uri":"/"#.len();
        let code = format!(
            "(memory.copy (i32.const {digits}) (i32.add (local.get $ptr) (i32.const {from})) (i32.const 3)) i64.const {}",
            1024_u64 << 32 | ANSWER.len() as u64
        );
        let wat = module::with_hooks(&["on_request_headers"], |_| code.clone(), &format!("(data (i32.const 1024) \"{data}\")"));
        let (agent, admin) = start(&wat, &["--timeout-ms", "20000"]);
        let mut proxy = agent.connect();
        for rule in 100..400 {
            proxy.get("a", &format!("/{rule}"));
        }
        proxy.get("a", "/100");
        let hits = |rule: &str| admin.metric(&format!("wasm_agent_rule_hits_total{{rule_id=\"{rule}\"}}"));
        assert_eq!([hits("rule-100"), hits("rule-299"), hits("rule-300")], [2.0, 1.0, 0.0]);
        // Those that came too late, and the one that is no label.
        assert_eq!(hits("other"), 100.0 + 301.0);
        let series = admin.get("/metrics").1.lines().filter(|line| line.starts_with("wasm_agent_rule_hits_total{")).count();
        assert_eq!(series, 201);
    }
}
