//! Starts, reloads and shutdowns that clients do not notice, and sockets that belong to one
//! process.

use std::collections::HashMap;

use rustix::process::Signal;
use serde_json::{Value, json};
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::thread;
use testkit::{Agent, Connection, PATIENCE, Program, decision, frame, id_of, kind, module, module_error, request, wait_for};

const AGENT: Program = Program(env!("CARGO_BIN_EXE_zentinel-wasm-agent"));

/// Connections of the load: as many as a proxy opens.
const CONNECTIONS: usize = 4;

/// Events in flight on each connection of the load.
const IN_FLIGHT: usize = 16;

/// A deadline that calls meet under load, on a busy machine too.
const AMPLE: [&str; 2] = ["--timeout-ms", "20000"];

const RELOADED: &str = r#"wasm_agent_reloads_total{result="success"}"#;

const NOT_RELOADED: &str = r#"wasm_agent_reloads_total{result="failure"}"#;

/// The tag of a [`module::tagging`].
#[track_caller]
fn tag(answer: &Value) -> &str {
    assert_eq!(module_error(answer), None, "{answer}");
    answer["audit"]["tags"][0].as_str().unwrap_or_else(|| panic!("no tag in {answer}"))
}

/// Keeps [`IN_FLIGHT`] events in flight on one connection until `stop`, and then waits for the
/// rest. Checks that every event is answered once. Returns the number of events.
///
/// Calls `sent` before it sends an event, and `answered` with the result of that and the answer.
fn load<T>(connection: &mut Connection, name: usize, stop: &AtomicBool, sent: impl Fn() -> T, answered: impl Fn(T, &Value)) -> usize {
    let mut in_flight = HashMap::new();
    let mut number = 0;
    loop {
        while in_flight.len() < IN_FLIGHT && !stop.load(SeqCst) {
            let id = format!("{name}-{number}");
            number += 1;
            let mark = sent();
            connection.send(kind::REQUEST_HEADERS, &request(&id, "/"));
            in_flight.insert(id, mark);
        }
        if in_flight.is_empty() {
            return number;
        }
        let answer = connection.answer();
        let mark = in_flight.remove(id_of(&answer)).unwrap_or_else(|| panic!("unexpected answer: {answer}"));
        answered(mark, &answer);
    }
}

fn wait_for_pong(connection: &mut Connection) {
    wait_for("the pong", || (connection.receive_raw().expect("the agent closed the connection").0 == kind::PONG).then_some(()));
}

mod starting {
    use super::*;

    /// A [`module::tagging`] whose instances take long to start.
    fn slow_to_start(tag: &str) -> String {
        let start = r#"(module (start $slow)
        (func $slow (local $at i32)
            (loop $again
                (local.set $at (i32.add (local.get $at) (i32.const 1)))
                (br_if $again (i32.lt_u (local.get $at) (i32.const 30000000)))))"#;
        module::tagging(tag).replacen("(module", start, 1)
    }

    #[test]
    fn announces_the_events_of_the_module() {
        let modules = tempfile::tempdir().unwrap();
        let module = module::write(modules.path(), "m.wasm", &module::echo(&["on_request_headers", "on_response_body"]));
        let agent = AGENT.start(&module, &["--max-body-bytes", "1000"]);
        let handshake = agent.connect().handshake;
        assert_eq!(
            (&handshake["success"], &handshake["protocol_version"], &handshake["encoding"]),
            (&json!(true), &json!(2), &json!("json"))
        );
        let capabilities = &handshake["capabilities"];
        assert_eq!((&capabilities["agent_id"], &capabilities["version"]), (&json!("zentinel-wasm-agent"), &json!("0.5.0")));
        assert_eq!(capabilities["supported_events"], json!([1, 4]));
        assert_eq!(capabilities["limits"]["max_body_size"], 1000);
    }

    #[test]
    fn waits_for_a_slow_module() {
        // 1.5 s: longer than the fixed limit before the option existed.
        let initialize = r#"(import "wasi_snapshot_preview1" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))
        (func (export "_initialize")
            (i64.store (i32.const 88) (i64.const 1_500_000_000))
            (drop (call $poll (i32.const 64) (i32.const 256) (i32.const 1) (i32.const 512))))"#;
        let modules = tempfile::tempdir().unwrap();
        let slow = module::with_hooks(&["on_request_headers"], |_| "i64.const 0".into(), initialize);
        let module = module::write(modules.path(), "m.wasm", &slow);
        let agent = AGENT.start(&module, &["--start-timeout-ms", "50000", "--admin-address", "127.0.0.1:0"]);
        agent.log.wait_for_entry("the warning", |entry| {
            entry["level"] == "WARN"
                && entry["message"].as_str().unwrap().starts_with("`--start-timeout-ms` is 50000, but the proxy waits only 5000")
        });
        let admin = agent.admin();
        assert_eq!(admin.get("/readyz").0, 200);
        assert_eq!(decision(&agent.connect().get("a", "/")), "allow");
        admin.wait_for_metric("wasm_agent_pool_available", 4.0);
        assert_eq!(admin.metric("wasm_agent_instance_start_failures_total"), 0.0);
        assert_eq!(admin.metric("wasm_agent_guest_memory_max_bytes"), 192.0 * 65536.0);
        agent.end_unharmed();
    }

    #[test]
    fn can_be_ended_by_a_signal() {
        let modules = tempfile::tempdir().unwrap();
        let file = module::write(modules.path(), "m.wasm", &slow_to_start("x"));
        let mut agent = AGENT.launch(&file, |_| ());
        wait_for("the socket", || agent.socket.exists().then_some(()));
        agent.signal(Signal::TERM);
        assert_eq!(agent.wait().code(), Some(0));
        assert!(!agent.socket.exists());
        assert_eq!(agent.log.whole(), "");
    }

    #[test]
    fn does_not_miss_a_change_of_a_watched_module() {
        let modules = tempfile::tempdir().unwrap();
        // The start takes so long that the file changes while the first module is being prepared.
        let slow = slow_to_start("first");
        let file = module::write(modules.path(), "m.wasm", &slow);
        let agent = AGENT.launch(&file, |command| {
            command.arg("--watch").env("RUST_LOG", "debug");
        });
        agent.log.wait_for_line("the cached module", |line| line.contains("stored the compiled module"));
        module::write(modules.path(), "m.wasm", &module::tagging("second"));
        agent.log.wait_until_serving();
        let mut connection = agent.connect();
        wait_for("the new module", || (tag(&connection.get("a", "/")) == "second").then_some(()));
    }

    #[test]
    fn leaves_no_socket_after_a_failure() {
        let home = tempfile::tempdir().unwrap();
        let mut agent = AGENT.launch(&home.path().join("missing.wasm"), |_| ());
        assert_eq!(agent.wait().code(), Some(1));
        assert!(!agent.socket.exists());
        let log = agent.log.whole();
        assert_eq!(log.lines().count(), 1, "{log}");
        assert!(log.starts_with("zentinel-wasm-agent: cannot serve the module `") && log.contains("missing.wasm"), "{log}");
    }

    #[test]
    fn raises_a_low_limit_of_open_files() {
        let modules = tempfile::tempdir().unwrap();
        let module = module::write(modules.path(), "m.wasm", &module::tagging("x"));
        let agent = AGENT.start_with(&module, |command| {
            let mut shell = Command::new("sh");
            shell.args(["-c", "ulimit -Sn 256 && exec \"$0\" \"$@\""]).arg(command.get_program()).args(command.get_args());
            shell.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
            *command = shell;
        });
        let limits = std::fs::read_to_string(format!("/proc/{}/limits", agent.pid().as_raw_nonzero())).unwrap();
        let files: Vec<u64> = limits
            .lines()
            .find_map(|line| line.strip_prefix("Max open files"))
            .unwrap()
            .split_whitespace()
            .filter_map(|limit| limit.parse().ok())
            .collect();
        assert_eq!(files[0], files.get(1).map_or(4096, |hard| 4096.min(*hard)), "{limits}");
    }
}

mod reloading {
    use super::*;

    #[test]
    fn a_hundred_times_under_load_loses_no_answer() {
        const RELOADS: usize = 100;
        let modules = tempfile::tempdir().unwrap();
        // Module n is "even" or "odd" as n is. 0 is the first.
        let wat = [module::tagging("even"), module::tagging("odd")];
        let name = |number: usize| ["even", "odd"][number % 2];
        let file = module::write(modules.path(), "m.wasm", &wat[0]);
        let agent = AGENT.start(&file, &[&AMPLE[..], &["--admin-address", "127.0.0.1:0"]].concat());
        let admin = agent.admin();

        let (begun, completed, stop, answers) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicBool::new(false), AtomicUsize::new(0));
        thread::scope(|scope| {
            for number in 0..CONNECTIONS {
                let mut connection = agent.connect();
                let (begun, completed, stop, answers) = (&begun, &completed, &stop, &answers);
                scope.spawn(move || {
                    load(
                        &mut connection,
                        number,
                        stop,
                        || completed.load(SeqCst),
                        |oldest, answer| {
                            let newest = begun.load(SeqCst);
                            let found = tag(answer);
                            assert!(
                                (oldest..=newest).any(|number| name(number) == found),
                                "{found}, which none of the modules {oldest} to {newest} returns"
                            );
                            answers.fetch_add(1, SeqCst);
                        },
                    );
                });
            }
            for number in 1..=RELOADS {
                module::write(modules.path(), "m.wasm", &wat[number % 2]);
                begun.store(number, SeqCst);
                agent.signal(Signal::HUP);
                admin.wait_for_metric(RELOADED, number as f64);
                completed.store(number, SeqCst);
                // Wait for answers, so the load goes on during each reload.
                let before = answers.load(SeqCst);
                wait_for("the load to go on", || (answers.load(SeqCst) >= before + 2 * CONNECTIONS * IN_FLIGHT).then_some(()));
            }
            stop.store(true, SeqCst);
        });
        let total = answers.load(SeqCst);
        assert!(total >= RELOADS * 2 * CONNECTIONS * IN_FLIGHT, "{total}");
        assert_eq!(admin.metric("wasm_agent_requests_total"), total as f64);
        assert_eq!(admin.metric(NOT_RELOADED), 0.0);
        assert_eq!(admin.metric("wasm_agent_in_flight"), 0.0);
        agent.end();
    }

    #[test]
    fn lets_running_calls_finish_on_the_old_module() {
        let modules = tempfile::tempdir().unwrap();
        let file = module::write(modules.path(), "m.wasm", &module::busy(1000, "old"));
        let agent = AGENT.start(&file, &[&AMPLE[..], &["--admin-address", "127.0.0.1:0"]].concat());
        let mut connection = agent.connect();
        connection.send(kind::REQUEST_HEADERS, &request("slow", "/"));
        connection.send_raw(&frame(kind::PING, b"1"));
        wait_for_pong(&mut connection);
        module::write(modules.path(), "m.wasm", &module::tagging("new"));
        agent.signal(Signal::HUP);
        agent.admin().wait_for_metric(RELOADED, 1.0);
        assert_eq!(tag(&agent.connect().get("quick", "/")), "new");
        assert_eq!(tag(&connection.answer()), "old");
    }

    #[test]
    fn an_invalid_module_keeps_the_current_one_and_degrades_health() {
        let modules = tempfile::tempdir().unwrap();
        let file = module::write(modules.path(), "m.wasm", &module::tagging("good"));
        let agent = AGENT.start(&file, &["--admin-address", "127.0.0.1:0"]);
        let admin = agent.admin();
        let mut connection = agent.connect();
        let healthy = connection.report(kind::HEALTH_STATUS);
        assert_eq!(healthy["health_state"]["status"], "healthy");
        assert_eq!(admin.get("/healthz"), (200, "healthy\n".into()));

        for (round, bad) in [&b"not a module"[..], b"\0asm\x01\0\0\0"].into_iter().enumerate() {
            std::fs::write(&file, bad).unwrap();
            agent.signal(Signal::HUP);
            admin.wait_for_metric(NOT_RELOADED, (round + 1) as f64);
            assert_eq!(tag(&connection.get("a", "/")), "good");
            let (status, health) = admin.get("/healthz");
            assert_eq!(status, 200);
            assert!(health.starts_with("degraded: reload failed: cannot serve the module `"), "{health}");
            assert_eq!(admin.get("/readyz"), (200, "ready\n".into()));
            wait_for("the report of the degraded health", || {
                let report = connection.report(kind::HEALTH_STATUS);
                (report["health_state"]["status"] == "degraded" && report["message"].as_str()?.contains("cannot serve the module"))
                    .then_some(())
            });
        }
        let entry = agent.log.wait_for_entry("the failed reload", |entry| {
            entry["message"].as_str().unwrap().contains("reload failed, keeping the current module")
        });
        assert_eq!(entry["level"], "WARN");
        assert!(
            entry["message"].as_str().unwrap().contains("it does not export `memory`")
                || entry["message"].as_str().unwrap().contains("not Wasm")
        );

        module::write(modules.path(), "m.wasm", &module::tagging("better"));
        agent.signal(Signal::HUP);
        admin.wait_for_metric(RELOADED, 1.0);
        assert_eq!(tag(&connection.get("b", "/")), "better");
        assert_eq!(admin.get("/healthz"), (200, "healthy\n".into()));
        agent.end();
    }

    #[test]
    fn a_missing_module_keeps_the_current_one() {
        let modules = tempfile::tempdir().unwrap();
        let file = module::write(modules.path(), "m.wasm", &module::tagging("good"));
        let agent = AGENT.start(&file, &["--admin-address", "127.0.0.1:0"]);
        std::fs::remove_file(file).unwrap();
        agent.signal(Signal::HUP);
        agent.admin().wait_for_metric(NOT_RELOADED, 1.0);
        assert_eq!(tag(&agent.connect().get("a", "/")), "good");
    }

    #[test]
    fn follows_a_watched_file() {
        let modules = tempfile::tempdir().unwrap();
        let file = module::write(modules.path(), "m.wasm", &module::tagging("first"));
        let agent = AGENT.start(&file, &["--watch"]);
        let mut connection = agent.connect();
        assert_eq!(tag(&connection.get("a", "/")), "first");
        module::write(modules.path(), "m.wasm", &module::tagging("second"));
        wait_for("the new module", || (tag(&connection.get("b", "/")) == "second").then_some(()));
        // A file written in place, as compilers do.
        let third = module::write(modules.path(), "other.wasm", &module::tagging("third"));
        let mut writing = std::fs::File::create(&file).unwrap();
        let bytes = std::fs::read(third).unwrap();
        let (beginning, rest) = bytes.split_at(bytes.len() / 2);
        writing.write_all(beginning).unwrap();
        writing.write_all(rest).unwrap();
        drop(writing);
        wait_for("the third module", || (tag(&connection.get("c", "/")) == "third").then_some(()));
    }

    #[test]
    fn follows_a_watched_symlink() {
        let modules = tempfile::tempdir().unwrap();
        let link = modules.path().join("m.wasm");
        let point = |to: &Path| {
            let next = modules.path().join("next");
            std::os::unix::fs::symlink(to, &next).unwrap();
            std::fs::rename(next, &link).unwrap();
        };
        point(&module::write(modules.path(), "1.wasm", &module::tagging("first")));
        let agent = AGENT.start(&link, &["--watch"]);
        let mut connection = agent.connect();
        assert_eq!(tag(&connection.get("a", "/")), "first");
        point(&module::write(modules.path(), "2.wasm", &module::tagging("second")));
        wait_for("the new module", || (tag(&connection.get("b", "/")) == "second").then_some(()));
    }
}

mod ending {
    use super::*;

    fn end_under_load(signal: Signal) {
        let modules = tempfile::tempdir().unwrap();
        let mut agent = AGENT.start(&module::write(modules.path(), "m.wasm", &module::tagging("served")), &AMPLE);
        let (ending, answers) = (AtomicBool::new(false), AtomicUsize::new(0));
        thread::scope(|scope| {
            for number in 0..CONNECTIONS {
                let mut connection = agent.connect();
                let (ending, answers) = (&ending, &answers);
                scope.spawn(move || {
                    let sent = load(
                        &mut connection,
                        number,
                        ending,
                        || (),
                        |(), answer| {
                            assert_eq!(tag(answer), "served");
                            answers.fetch_add(1, SeqCst);
                        },
                    );
                    // A proxy that has not noticed the drain goes on for a while.
                    assert!(sent > IN_FLIGHT);
                    let rest = AtomicBool::new(false);
                    let left = AtomicUsize::new(10 * IN_FLIGHT);
                    load(
                        &mut connection,
                        CONNECTIONS + number,
                        &rest,
                        || {
                            if left.fetch_sub(1, SeqCst) == 1 {
                                rest.store(true, SeqCst);
                            }
                        },
                        |(), answer| assert_eq!(tag(answer), "served"),
                    );
                    // The agent closes the connection only when nothing is in flight.
                    assert_eq!(connection.answer_or_end(), None);
                });
            }
            wait_for("the load to begin", || (answers.load(SeqCst) > 1000).then_some(()));
            agent.signal(signal);
            agent.log.wait_for_line("the shutdown", |line| line.contains("shutting down: finishing in-flight events"));
            ending.store(true, SeqCst);
        });
        assert_eq!(agent.wait().code(), Some(0));
        assert!(!agent.socket.exists());
        let log = agent.log.whole();
        assert!(!log.contains("WARN") && !log.contains("ERROR"), "{log}");
    }

    #[test]
    fn by_sigterm_under_load_loses_no_answer() {
        end_under_load(Signal::TERM);
    }

    #[test]
    fn by_sigint_under_load_loses_no_answer() {
        end_under_load(Signal::INT);
    }

    #[test]
    fn waits_for_a_running_call() {
        let modules = tempfile::tempdir().unwrap();
        let mut agent = AGENT.start(&module::write(modules.path(), "m.wasm", &module::busy(500, "finished")), &AMPLE);
        let mut connection = agent.connect();
        connection.send(kind::REQUEST_HEADERS, &request("slow", "/"));
        // The answer to the ping means that the event before it was read.
        connection.send_raw(&frame(kind::PING, b"1"));
        wait_for_pong(&mut connection);
        agent.signal(Signal::TERM);
        assert_eq!(tag(&connection.answer()), "finished");
        assert_eq!(connection.answer_or_end(), None);
        assert_eq!(agent.wait().code(), Some(0));
    }

    #[test]
    fn is_bounded_by_the_grace_period() {
        let modules = tempfile::tempdir().unwrap();
        let module = module::write(modules.path(), "m.wasm", &module::choosing());
        let mut agent = AGENT.start(&module, &["--timeout-ms", "60000", "--shutdown-grace-ms", "200"]);
        let mut connection = agent.connect();
        connection.send(kind::REQUEST_HEADERS, &request("loop", "/l"));
        connection.send_raw(&frame(kind::PING, b"1"));
        wait_for_pong(&mut connection);
        agent.signal(Signal::TERM);
        assert_eq!(agent.wait().code(), Some(0));
        assert_eq!(connection.answer_or_end(), None);
        agent.log.wait_for_line("the end of the grace period", |line| line.contains("grace period expired; rejecting new events"));
        assert!(!agent.socket.exists());
    }

    #[test]
    fn does_not_wait_for_idle_connections() {
        let modules = tempfile::tempdir().unwrap();
        let mut agent = AGENT.start(&module::write(modules.path(), "m.wasm", &module::tagging("x")), &["--shutdown-grace-ms", "3600000"]);
        let mut idle = agent.connect();
        assert_eq!(decision(&idle.get("a", "/")), "allow");
        agent.signal(Signal::TERM);
        assert_eq!(idle.answer_or_end(), None);
        assert_eq!(agent.wait().code(), Some(0));
    }

    #[test]
    fn still_decides_requests_that_arrive_meanwhile() {
        let modules = tempfile::tempdir().unwrap();
        let wat = module::answering(&["on_request_headers"], r#"{"decision":"block","status":451}"#);
        let agent = AGENT.start(&module::write(modules.path(), "m.wasm", &wat), &AMPLE);
        let mut connection = agent.connect();
        connection.get("first", "/");
        agent.signal(Signal::TERM);
        wait_for("the report of the drain", || {
            (connection.report(kind::HEALTH_STATUS)["health_state"]["status"] == "draining").then_some(())
        });
        assert_eq!(connection.get("late", "/")["decision"]["block"]["status"], 451);
    }
}

mod socket {
    use super::*;

    fn permissions(socket: &Path) -> u32 {
        let metadata = std::fs::metadata(socket).unwrap();
        assert!(metadata.file_type().is_socket());
        metadata.permissions().mode() & 0o777
    }

    #[test]
    fn in_use_is_not_taken_over() {
        let modules = tempfile::tempdir().unwrap();
        let module = module::write(modules.path(), "m.wasm", &module::tagging("first"));
        let first = AGENT.start(&module, &[]);
        let mut second = AGENT.launch_in(tempfile::tempdir().unwrap(), &first.socket, &module, |_| ());
        assert_eq!(second.wait().code(), Some(1));
        let log = second.log.whole();
        assert!(log.contains("already served by another process"), "{log}");
        assert_eq!(tag(&first.connect().get("a", "/")), "first");
        first.end();
    }

    #[test]
    fn stale_is_replaced() {
        let modules = tempfile::tempdir().unwrap();
        let module = module::write(modules.path(), "m.wasm", &module::tagging("served"));
        let home = tempfile::tempdir().unwrap();
        // A dropped listener leaves its file, as a killed process does.
        drop(UnixListener::bind(home.path().join("wasm.sock")).unwrap());
        let agent = AGENT.launch_in(home, "wasm.sock", &module, |_| ());
        agent.log.wait_until_serving();
        assert_eq!(tag(&agent.connect().get("a", "/")), "served");
    }

    #[test]
    fn path_with_another_kind_of_file_is_left_alone() {
        let modules = tempfile::tempdir().unwrap();
        let module = module::write(modules.path(), "m.wasm", &module::tagging("x"));
        let file = modules.path().join("precious");
        std::fs::write(&file, "precious").unwrap();
        for path in [&file, modules.path()] {
            let mut agent = AGENT.launch_in(tempfile::tempdir().unwrap(), path, &module, |_| ());
            assert_eq!(agent.wait().code(), Some(1));
            let log = agent.log.whole();
            assert!(log.contains("the path exists and is not a socket"), "{log}");
        }
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");
    }

    #[test]
    fn of_another_process_is_not_removed_at_the_end() {
        let modules = tempfile::tempdir().unwrap();
        let module = module::write(modules.path(), "m.wasm", &module::tagging("x"));
        let mut agent = AGENT.start(&module, &[]);
        // Renamed into place, because the agent would bind a path that is free again.
        let elsewhere = modules.path().join("other.sock");
        let _other = UnixListener::bind(&elsewhere).unwrap();
        let inode = std::fs::symlink_metadata(&elsewhere).unwrap().ino();
        std::fs::rename(&elsewhere, &agent.socket).unwrap();
        agent.signal(Signal::TERM);
        assert_eq!(agent.wait().code(), Some(0));
        assert_eq!(std::fs::symlink_metadata(&agent.socket).unwrap().ino(), inode);
    }

    #[test]
    fn gets_the_configured_mode() {
        let modules = tempfile::tempdir().unwrap();
        let module = module::write(modules.path(), "m.wasm", &module::tagging("x"));
        for mode in [0o660, 0o600, 0o777] {
            let agent = AGENT.start(&module, &["--socket-mode", &format!("{mode:o}")]);
            assert_eq!(permissions(&agent.socket), mode);
        }
    }

    #[test]
    fn gets_its_mode_from_the_umask_by_default() {
        let modules = tempfile::tempdir().unwrap();
        let module = module::write(modules.path(), "m.wasm", &module::tagging("x"));
        let home = tempfile::tempdir().unwrap();
        let socket = home.path().join("wasm.sock");
        // The umask of the unit that the proxy's installer writes.
        let mut child = Command::new("sh")
            .args(["-c", "umask 0007 && exec \"$0\" --socket \"$1\" --module \"$2\"", AGENT.0])
            .args([&socket, &module])
            .env("HOME", home.path())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        wait_for("the socket", || socket.exists().then_some(()));
        let mode = permissions(&socket);
        rustix::process::kill_process(rustix::process::Pid::from_child(&child), Signal::TERM).unwrap();
        assert_eq!(wait_for("the end", || child.try_wait().unwrap()).code(), Some(0));
        assert_eq!(mode, 0o770);
    }
}

mod systemd {
    use super::*;

    /// The socket on which systemd receives notifications.
    struct Systemd(UnixDatagram);

    impl Systemd {
        fn listen(at: &Path) -> Self {
            let socket = UnixDatagram::bind(at).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            Self(socket)
        }

        /// Waits for a message with this line.
        #[track_caller]
        fn wait_for(&self, line: &str) -> String {
            wait_for(line, || {
                let mut buffer = [0; 1024];
                let len = self.0.recv(&mut buffer).expect("no notification");
                let message = String::from_utf8_lossy(&buffer[..len]).into_owned();
                message.lines().any(|found| found == line).then_some(message)
            })
        }
    }

    #[test]
    fn is_notified_of_start_watchdog_reload_and_end() {
        let modules = tempfile::tempdir().unwrap();
        let module = module::write(modules.path(), "m.wasm", &module::tagging("x"));
        let run = tempfile::tempdir().unwrap();
        let notify = run.path().join("notify");
        let systemd = Systemd::listen(&notify);
        let home = tempfile::tempdir().unwrap();
        let socket = home.path().join("wasm.sock");
        // The watchdog is for the process with this id.
        let mut command = Program("/bin/sh").command(home.path());
        command.args(["-c", r#"WATCHDOG_PID=$$ exec "$0" --socket "$1" --module "$2""#, AGENT.0]).args([&socket, &module]);
        command.env("NOTIFY_SOCKET", &notify).env("WATCHDOG_USEC", "100000");
        let mut agent = Agent::spawn(home, socket, command);
        systemd.wait_for("READY=1");
        // Ready means that connections are accepted.
        let mut connection = agent.connect();
        systemd.wait_for("WATCHDOG=1");
        systemd.wait_for("WATCHDOG=1");
        agent.signal(Signal::HUP);
        let reloading = systemd.wait_for("RELOADING=1");
        let since = reloading.lines().find_map(|line| line.strip_prefix("MONOTONIC_USEC=")).expect("the time of the reload");
        assert!(since.parse::<u64>().unwrap() > 0);
        systemd.wait_for("READY=1");
        assert_eq!(tag(&connection.get("a", "/")), "x");
        agent.signal(Signal::TERM);
        systemd.wait_for("STOPPING=1");
        assert_eq!(agent.wait().code(), Some(0));
    }

    #[test]
    fn is_notified_of_the_end_of_a_failed_reload() {
        let modules = tempfile::tempdir().unwrap();
        let module = module::write(modules.path(), "m.wasm", &module::tagging("x"));
        let run = tempfile::tempdir().unwrap();
        let notify = run.path().join("notify");
        let systemd = Systemd::listen(&notify);
        let agent = AGENT.launch(&module, |command| {
            command.env("NOTIFY_SOCKET", &notify);
        });
        systemd.wait_for("READY=1");
        std::fs::write(&module, "not a module").unwrap();
        agent.signal(Signal::HUP);
        systemd.wait_for("RELOADING=1");
        systemd.wait_for("READY=1");
    }
}

mod cache {
    use super::*;

    #[test]
    fn serves_a_second_start() {
        let modules = tempfile::tempdir().unwrap();
        let module = module::write(modules.path(), "m.wasm", &module::tagging("x"));
        let cache = modules.path().join("cache");
        for _ in 0..2 {
            let agent = AGENT.start_with(&module, |command| {
                command.arg("--cache-dir").arg(&cache);
            });
            assert_eq!(tag(&agent.connect().get("a", "/")), "x");
            let files: Vec<_> = std::fs::read_dir(&cache).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            assert_eq!(files.len(), 1, "{files:?}");
        }
    }

    #[test]
    fn unwritable_is_only_a_warning() {
        let modules = tempfile::tempdir().unwrap();
        let module = module::write(modules.path(), "m.wasm", &module::tagging("x"));
        let agent = AGENT.start_with(&module, |command| {
            command.env("HOME", "/proc/nowhere");
        });
        let entry =
            agent.log.wait_for_entry("the warning", |entry| entry["message"].as_str().unwrap().contains("compiled modules are not cached"));
        assert_eq!(entry["level"], "WARN");
        assert_eq!(tag(&agent.connect().get("a", "/")), "x");
    }

    #[test]
    fn is_a_private_folder_within_a_shared_directory() {
        let modules = tempfile::tempdir().unwrap();
        let module = module::write(modules.path(), "m.wasm", &module::tagging("x"));
        let cache = modules.path().join("cache");
        std::fs::create_dir(&cache).unwrap();
        std::fs::set_permissions(&cache, std::fs::Permissions::from_mode(0o777)).unwrap();
        let start = || {
            AGENT.start_with(&module, |command| {
                command.arg("--cache-dir").arg(&cache);
            })
        };
        let names = |folder: &Path| std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>();
        let folder = cache.join(format!("zentinel-wasm-agent-{}", rustix::process::geteuid().as_raw()));
        for _ in 0..2 {
            assert_eq!(tag(&start().connect().get("a", "/")), "x");
            assert_eq!((names(&cache), names(&folder).len()), (vec![folder.file_name().unwrap().to_owned()], 1));
        }
        // Code that others may have written is never run.
        std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o770)).unwrap();
        let agent = start();
        agent.log.wait_for_line("the warning", |line| line.contains("other users can write to it"));
        assert_eq!(tag(&agent.connect().get("a", "/")), "x");
    }
}
