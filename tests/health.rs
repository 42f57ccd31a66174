//! `zentinel-wasm-agent health`: what it prints about agents in every state, and how it ends with
//! servers that are no agent.

#[path = "common/short_timeouts.rs"]
mod short_timeouts;

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::json;
use socket2::{Domain, SockAddr, Socket, Type};
use testkit::{Agent, PATIENCE, Program, frame, kind, module, wait_for};

const AGENT: Program = Program(env!("CARGO_BIN_EXE_zentinel-wasm-agent"));

const ADMIN: [&str; 2] = ["--admin-address", "127.0.0.1:0"];

/// The exit status and the one line of `health`, which must be on the right stream.
#[track_caller]
fn health(options: &[&str], environment: &[(&str, &str)]) -> (i32, String) {
    let home = tempfile::tempdir().unwrap();
    let mut command = AGENT.command(home.path());
    command.arg("health").args(options).envs(environment.iter().copied()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let status = wait_for("the end of `health`", || child.try_wait().unwrap()).code().unwrap();
    let output = child.wait_with_output().unwrap();
    let (line, other) = if status == 0 { (output.stdout, output.stderr) } else { (output.stderr, output.stdout) };
    assert!(other.is_empty(), "{}", String::from_utf8_lossy(&other));
    let line = String::from_utf8(line).unwrap();
    assert_eq!(line.lines().count(), 1, "{line}");
    (status, line.trim_end().to_owned())
}

/// What `health` prints about an agent by its socket, and by its admin address.
#[track_caller]
fn by_both_ways(agent: &Agent) -> [(i32, String); 2] {
    let patient = "--timeout-ms=60000";
    let admin = agent.admin().0.to_string();
    [health(&["--socket", agent.socket.to_str().unwrap(), patient], &[]), health(&["--admin-address", &admin, patient], &[])]
}

fn start(wat: &str, options: &[&str]) -> Agent {
    let modules = tempfile::tempdir().unwrap();
    AGENT.start(&module::write(modules.path(), "m.wasm", wat), &[&ADMIN[..], options].concat())
}

mod agents {
    use super::*;

    #[test]
    fn that_decide_are_ready() {
        let agent = start(&module::choosing(), &[]);
        assert_eq!(by_both_ways(&agent), [(0, "ready".into()), (0, "ready".into())]);
    }

    #[test]
    fn are_found_by_their_own_variables() {
        let agent = start(&module::choosing(), &[]);
        let (socket, admin) = (agent.socket.to_str().unwrap(), agent.admin().0.to_string());
        let patient = ["--timeout-ms=60000"];
        assert_eq!(health(&patient, &[("AGENT_SOCKET", socket)]), (0, "ready".into()));
        // The admin address knows more, so it is asked if there is one.
        assert_eq!(health(&patient, &[("AGENT_SOCKET", "/nowhere"), ("WASM_ADMIN_ADDRESS", &admin)]), (0, "ready".into()));
        let everywhere = admin.replace("127.0.0.1", "0.0.0.0");
        assert_eq!(health(&patient, &[("WASM_ADMIN_ADDRESS", &everywhere)]), (0, "ready".into()));
        // Those of serving do not matter, even if they are invalid.
        assert_eq!(health(&patient, &[("AGENT_SOCKET", socket), ("WASM_POOL_SIZE", "x"), ("WASM_TIMEOUT_MS", "1")]), (0, "ready".into()));
    }

    #[test]
    fn that_failed_to_reload_are_ready_with_the_reason() {
        let modules = tempfile::tempdir().unwrap();
        let file = module::write(modules.path(), "m.wasm", &module::choosing());
        let agent = AGENT.start(&file, &ADMIN);
        std::fs::write(&file, "nonsense").unwrap();
        agent.signal(Signal::HUP);
        agent.admin().wait_for_metric(r#"wasm_agent_reloads_total{result="failure"}"#, 1.0);
        let [(status, line), by_admin] = by_both_ways(&agent);
        assert_eq!(status, 0);
        assert!(
            line.starts_with("ready, but degraded: reload failed: cannot serve the module `") && line.contains("it is not Wasm"),
            "{line}"
        );
        assert_eq!(by_admin, (status, line));
    }

    #[test]
    fn whose_circuit_is_open_are_not_ready() {
        let trapping = module::with_hooks(&["on_request_headers"], |_| "unreachable".into(), "");
        let modules = tempfile::tempdir().unwrap();
        let file = module::write(modules.path(), "m.wasm", &trapping);
        let agent = short_timeouts::start_with_short_breaker(&file, &ADMIN, PATIENCE);
        let mut proxy = agent.connect();
        let mut number = 0;
        wait_for("the circuit to open", || {
            number += 1;
            proxy.get(&format!("id-{number}"), "/");
            (agent.admin().get("/readyz").0 == 503).then_some(())
        });
        for (status, line) in by_both_ways(&agent) {
            assert_eq!(status, 1);
            assert!(line.starts_with("not ready: ") && line.contains("circuit open for on_request_headers"), "{line}");
        }
    }

    #[test]
    fn that_drain_are_not_ready() {
        let agent = start(&module::choosing(), &["--shutdown-grace-ms", "3600000"]);
        let admin = agent.admin().0.to_string();
        // Keeps the agent from ending.
        let mut stuck = UnixStream::connect(&agent.socket).unwrap();
        stuck.write_all(&[0]).unwrap();
        agent.admin().wait_for_metric("wasm_agent_connections", 1.0);
        agent.signal(Signal::TERM);
        wait_for("the drain", || (agent.admin().get("/readyz").0 == 503).then_some(()));
        assert_eq!(health(&["--admin-address", &admin, "--timeout-ms=60000"], &[]), (1, "not ready: draining".into()));
    }

    #[test]
    fn that_start_are_not_ready() {
        let modules = tempfile::tempdir().unwrap();
        let file = module::write(modules.path(), "m.wasm", &module::hostile("initialize-loop"));
        let agent = AGENT.launch(&file, |command| {
            command.args(ADMIN).args(["--start-timeout-ms", "60000"]);
        });
        let admin = agent.admin().0.to_string();
        assert_eq!(health(&["--admin-address", &admin, "--timeout-ms=60000"], &[]), (1, "not ready: starting".into()));
        let socket = agent.socket.to_str().unwrap();
        assert_eq!(
            health(&["--socket", socket, "--timeout-ms=100"], &[]),
            (1, format!("not ready: no answer within 100 ms from the agent at the socket `{socket}`: it is starting, overloaded or hung"))
        );
    }

    #[test]
    fn that_do_not_run_are_not_ready() {
        assert_eq!(
            health(&["--socket", "/nowhere/wasm.sock"], &[]),
            (
                1,
                "not ready: cannot connect to the socket `/nowhere/wasm.sock`: No such file or directory (os error 2): \
                 start the agent, or name its socket with `--socket`"
                    .into()
            )
        );
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let (status, line) = health(&["--admin-address", &address.to_string()], &[]);
        assert_eq!(status, 1);
        assert!(line.starts_with(&format!("not ready: cannot connect to http://{address}: Connection refused")), "{line}");
    }

    /// A proxy that connects does not lose its place, and no configuration is applied.
    #[test]
    fn are_not_disturbed() {
        let agent = start(&module::tagging("good"), &[]);
        let mut proxy = agent.connect();
        for number in 0..50 {
            assert_eq!(health(&["--socket", agent.socket.to_str().unwrap(), "--timeout-ms=60000"], &[]).0, 0);
            assert_eq!(testkit::decision(&proxy.get(&format!("id-{number}"), "/")), "allow");
        }
        // Its own connections have ended, and nothing was logged about them.
        agent.admin().wait_for_metric("wasm_agent_connections", 1.0);
        let entries = agent.log.entries();
        assert!(entries.iter().all(|entry| entry["level"] == "INFO"), "{entries:?}");
    }
}

mod usage {
    use super::*;

    #[test]
    fn errors_exit_with_2() {
        for (options, expected) in [
            (&["--timeout-ms", "x"][..], "error: invalid value 'x' for '--timeout-ms <MS>': expected a whole number from 1 to 60000"),
            (&["--sockt=x"], "error: unexpected argument '--sockt' found; a similar argument exists: '--socket'"),
            (&["now"], "error: unexpected argument 'now' found"),
        ] {
            assert_eq!(health(options, &[]), (2, expected.into()));
        }
        let variable = health(&[], &[("WASM_ADMIN_ADDRESS", "x")]);
        assert_eq!(
            variable,
            (2, "error: invalid value 'x' for 'WASM_ADMIN_ADDRESS': expected an IP address and a port, such as 127.0.0.1:9090".into())
        );
    }
}

/// Servers that are no agent, or a hung one. Each of them keeps its connections open until the test
/// ends, so only `health` itself can end.
mod hostile {
    use super::*;

    const SHORT: &str = "--timeout-ms=300";

    /// The answer about a server of a socket, whose connections `serve` gets.
    #[track_caller]
    fn of_socket(timeout: &str, serve: impl Fn(UnixStream) + Send + 'static) -> String {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        thread::spawn(move || listener.incoming().map_while(Result::ok).for_each(serve));
        let (status, line) = health(&["--socket", path.to_str().unwrap(), timeout], &[]);
        assert_eq!(status, 1, "{line}");
        line.replace(path.to_str().unwrap(), "PATH")
    }

    /// The answer about a server of an admin address. `serve` gets its connections once they have
    /// sent a request.
    #[track_caller]
    fn of_admin(timeout: &str, serve: impl Fn(TcpStream) + Send + 'static) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        thread::spawn(move || {
            for mut stream in listener.incoming().map_while(Result::ok) {
                let _ = stream.read(&mut [0; 4096]);
                serve(stream);
            }
        });
        let (status, line) = health(&["--admin-address", &address, timeout], &[]);
        assert_eq!(status, 1, "{line}");
        line.replace(&address, "ADDRESS")
    }

    /// Writes until the client goes away.
    fn write_forever(mut stream: impl std::io::Write, first: &[u8], again: &[u8]) {
        let _ = stream.write_all(first);
        while stream.write_all(again).is_ok() {}
    }

    /// Keeps a connection until the client goes away.
    fn keep(mut stream: impl std::io::Read) {
        let _ = stream.read_to_end(&mut Vec::new());
    }

    const HUNG: &str = "not ready: no answer within 300 ms from the agent at the socket `PATH`: it is starting, overloaded or hung";
    const HUNG_ADMIN: &str = "not ready: no answer within 300 ms from the agent at http://ADDRESS: it is starting, overloaded or hung";

    #[test]
    fn servers_that_never_answer() {
        assert_eq!(of_socket(SHORT, keep), HUNG);
        assert_eq!(of_admin(SHORT, keep), HUNG_ADMIN);
    }

    #[test]
    fn servers_that_never_accept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        // Its queue of clients is full.
        let listener = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        listener.bind(&SockAddr::unix(&path).unwrap()).unwrap();
        listener.listen(0).unwrap();
        let _waiting = UnixStream::connect(&path).unwrap();
        let (status, line) = health(&["--socket", path.to_str().unwrap(), SHORT], &[]);
        assert_eq!((status, line.replace(path.to_str().unwrap(), "PATH")), (1, HUNG.into()));
    }

    #[test]
    fn servers_that_trickle() {
        let trickle = |mut stream: UnixStream| {
            // A frame of 1 MB, of which a byte arrives now and then.
            let _ = stream.write_all(&[0, 16, 0, 0, kind::HEALTH_STATUS]);
            while stream.write_all(b" ").is_ok() {
                thread::sleep(Duration::from_millis(10));
            }
        };
        assert_eq!(of_socket(SHORT, trickle), HUNG);
        let trickle = |mut stream: TcpStream| {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n");
            while stream.write_all(b"r").is_ok() {
                thread::sleep(Duration::from_millis(10));
            }
        };
        assert_eq!(of_admin(SHORT, trickle), HUNG_ADMIN);
    }

    #[test]
    fn servers_that_answer_without_end() {
        let patient = "--timeout-ms=60000";
        let metrics = frame(kind::METRICS_REPORT, &[b' '; 10_000]);
        let line = of_socket(patient, move |stream| write_forever(stream, b"", &metrics));
        assert_eq!(line, "not ready: the socket `PATH` has sent no health report within 1048576 bytes");
        let line = of_socket(patient, |stream| write_forever(stream, &[0, 0xff, 0xff, 0xff, kind::HEALTH_STATUS], &[b' '; 10_000]));
        assert_eq!(line, "not ready: the socket `PATH` has sent no health report within 1048576 bytes");
        let line = of_admin(patient, |stream| write_forever(stream, b"HTTP/1.1 200 OK\r\n\r\n", &[b'r'; 10_000]));
        assert_eq!(line, "not ready: http://ADDRESS/readyz gives no valid answer: length limit exceeded");
        let line = of_admin(patient, |stream| write_forever(stream, b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"));
        assert!(line.starts_with("not ready: http://ADDRESS/readyz gives no valid answer: "), "{line}");
    }

    #[test]
    fn servers_that_close() {
        let patient = "--timeout-ms=60000";
        let line = of_socket(patient, |mut stream| drop(stream.read(&mut [0; 4096])));
        assert_eq!(line, "not ready: the socket `PATH` closed the connection without a health report");
        let line = of_admin(patient, drop);
        assert!(line.starts_with("not ready: http://ADDRESS/readyz gives no valid answer: "), "{line}");
    }

    #[test]
    fn servers_that_are_something_else() {
        let patient = "--timeout-ms=60000";
        for (bytes, expected) in [
            (&b"SSH-2.0-OpenSSH\r\n"[..], "not ready: the socket `PATH` is not an agent's: invalid frame: "),
            (&[0, 0, 0, 0, 0], "not ready: the socket `PATH` is not an agent's: invalid frame: length 0"),
            (&[0, 0, 0, 2, kind::HEALTH_STATUS, b'x'], "not ready: the socket `PATH` sent invalid JSON: "),
            // No agent's either, but JSON.
            (&[0, 0, 0, 3, kind::HEALTH_STATUS, b'[', b']'], "not ready"),
        ] {
            let line = of_socket(patient, move |mut stream| {
                let _ = stream.write_all(bytes);
                keep(stream);
            });
            assert!(line.starts_with(expected), "{line}");
        }
        let rejection = json!({"success": false, "error": "no\nroom\u{1b}[2J"}).to_string();
        let line = of_socket(patient, move |mut stream| {
            let _ = stream.write_all(&frame(kind::HANDSHAKE_RESPONSE, rejection.as_bytes()));
            keep(stream);
        });
        assert_eq!(line, "not ready: the socket `PATH` rejects the handshake: no room [2J");

        for (bytes, expected) in [
            (
                &b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"[..],
                "not ready: http://ADDRESS/readyz answers 404: is this the agent's `--admin-address`?",
            ),
            (b"SSH-2.0-OpenSSH\r\n", "not ready: http://ADDRESS/readyz gives no valid answer: "),
            // A reason on more than one line.
            (b"HTTP/1.1 503 No\r\nContent-Length: 7\r\n\r\none\ntwo", "not ready: one two"),
        ] {
            let line = of_admin(patient, move |mut stream| {
                let _ = stream.write_all(bytes);
                keep(stream);
            });
            assert!(line.starts_with(expected), "{line}");
        }
    }

    /// The path of a file that is no socket.
    #[test]
    fn files_that_are_no_socket() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for path in [file.path(), Path::new("/")] {
            let (status, line) = health(&["--socket", path.to_str().unwrap()], &[]);
            assert_eq!(status, 1);
            assert!(line.starts_with("not ready: cannot connect to the socket `"), "{line}");
        }
    }
}
