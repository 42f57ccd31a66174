//! A log that cannot be written delays nothing and fails nothing.

use std::fs::File;

use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit};
use serde_json::Value;
use std::io::{BufRead, BufReader, PipeReader, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use tempfile::TempDir;
use testkit::{Admin, Connection, PATIENCE, Program, decision, module, module_error, wait_for};

const AGENT: Program = Program(env!("CARGO_BIN_EXE_zentinel-wasm-agent"));

const LOST: &str = "wasm_agent_log_lines_lost_total";

const RELOADED: &str = r#"wasm_agent_reloads_total{result="success"}"#;

/// Events of a load. Each logs a line of 8 KiB. A pipe has room for a few, and the queue for some
/// hundred.
const EVENTS: usize = 700;

/// An agent with a given standard error. It is killed when dropped.
struct Agent {
    home: TempDir,
    admin: Admin,
    child: Child,
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Agent {
    fn start(stderr: impl Into<Stdio>, wat: &str) -> Self {
        let home = tempfile::tempdir().unwrap();
        let module = module::write(home.path(), "m.wasm", wat);
        // The test cannot read from the log which port the agent got.
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut command = AGENT.command(home.path());
        command.arg("--socket").arg(home.path().join("wasm.sock")).arg("--module").arg(&module);
        command.args(["--timeout-ms", "20000", "--admin-address", &address.to_string()]).env("RUST_LOG", "info,=nonsense=");
        let child = command.stderr(stderr).spawn().unwrap();
        let agent = Self { home, admin: Admin(address), child };
        wait_for("the admin address", || std::net::TcpStream::connect(address).ok());
        wait_for("the start", || (agent.admin.get("/readyz").0 == 200).then_some(()));
        agent
    }

    fn connect(&self) -> Connection {
        Connection::open(&self.home.path().join("wasm.sock"))
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Checks that events are answered although each logs, and so are those of another connection,
    /// the admin address, and a reload.
    fn load(&self) {
        let mut connection = self.connect();
        for at in 0..EVENTS {
            assert_eq!(decision(&connection.get(&at.to_string(), "/")), "allow");
        }
        assert_eq!(decision(&self.connect().get("another", "/")), "allow");
        assert_eq!(self.admin.get("/healthz"), (200, "healthy\n".to_owned()));
        module::write(self.home.path(), "m.wasm", &module::choosing());
        self.signal(Signal::HUP);
        self.admin.wait_for_metric(RELOADED, 1.0);
        for at in 0..30 {
            assert_eq!(module_error(&connection.get(&at.to_string(), "/t")), Some("WASM_TRAP"));
        }
    }

    fn end(&mut self) {
        self.signal(Signal::TERM);
        assert_eq!(wait_for("the end", || self.child.try_wait().unwrap()).code(), Some(0));
    }
}

/// A module that logs 8 KiB on every request.
fn verbose() -> String {
    module::logging(&"x".repeat(8 << 10))
}

mod unwritable {
    use super::*;

    #[test]
    fn closed_pipe_loses_only_lines() {
        let (reader, gone) = std::io::pipe().unwrap();
        drop(reader);
        let mut agent = Agent::start(gone, &verbose());
        agent.load();
        assert!(agent.admin.metric(LOST) > 500.0, "{}", agent.admin.metric(LOST));
        agent.end();
    }

    #[test]
    fn full_disk_loses_only_lines() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let mut agent = Agent::start(full, &verbose());
        agent.load();
        assert!(agent.admin.metric(LOST) > 500.0, "{}", agent.admin.metric(LOST));
        agent.end();
    }

    /// The system sends SIGXFSZ, which ends a process that does not handle it.
    #[test]
    fn file_at_its_size_limit_loses_only_lines() {
        let directory = tempfile::tempdir().unwrap();
        let mut agent = Agent::start(File::create(directory.path().join("log")).unwrap(), &verbose());
        let limit = Rlimit { current: Some(4096), maximum: Some(4096) };
        prlimit(Some(Pid::from_child(&agent.child)), Resource::Fsize, limit).unwrap();
        agent.load();
        assert!(agent.admin.metric(LOST) > 500.0, "{}", agent.admin.metric(LOST));
        agent.end();
    }

    /// The exit code of an agent that ends by itself, with this standard error.
    fn status(stderr: impl Into<Stdio>, arguments: &[&str]) -> Option<i32> {
        let home = tempfile::tempdir().unwrap();
        let mut child = AGENT.command(home.path()).args(arguments).stderr(stderr).spawn().unwrap();
        wait_for("the end", || child.try_wait().unwrap()).code()
    }

    /// Fills a pipe.
    fn fill(pipe: &std::io::PipeWriter) {
        use std::io::Write as _;
        let mut filler = File::options().write(true).custom_flags(rustix::fs::OFlags::NONBLOCK.bits() as i32).open(own(pipe)).unwrap();
        while filler.write(&[b'\n'; 4096]).is_ok() {}
    }

    /// The path by which this process can open a pipe again, with other flags.
    fn own(pipe: &std::io::PipeWriter) -> impl AsRef<Path> + use<> {
        use std::os::fd::AsRawFd as _;
        format!("/proc/self/fd/{}", pipe.as_raw_fd())
    }

    #[test]
    fn stderr_does_not_change_the_exit_code() {
        let full = || File::options().write(true).open("/dev/full").unwrap();
        let closed = || std::io::pipe().unwrap().1;
        for (arguments, expected) in [
            (&["--nonsense"][..], 2),
            (&["--module", "m", "--pool-size", "0"], 2),
            (&["--module", "/nowhere/m.wasm", "--socket", "/nowhere/s"], 1),
            (&["--help"], 0),
        ] {
            assert_eq!(status(full(), arguments), Some(expected), "{arguments:?}");
            assert_eq!(status(closed(), arguments), Some(expected), "{arguments:?}");
            let (_reader, stalled) = std::io::pipe().unwrap();
            fill(&stalled);
            assert_eq!(status(stalled, arguments), Some(expected), "{arguments:?}");
        }
    }
}

mod stalled_reader {
    use super::*;

    /// The entries read from `reader` until its end. Fails if there is no other one for
    /// [`PATIENCE`].
    fn entries(reader: PipeReader) -> impl Iterator<Item = Value> {
        let (sender, receiver) = mpsc::channel();
        // A thread of its own, because reading a pipe has no time limit.
        thread::spawn(move || BufReader::new(reader).lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        std::iter::from_fn(move || match receiver.recv_timeout(PATIENCE) {
            Ok(line) => Some(serde_json::from_str(&line).expect("a partial line")),
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => panic!("no other entry within {PATIENCE:?}"),
        })
    }

    #[test]
    fn delays_nothing_and_learns_what_it_missed() {
        let (reader, stalled) = std::io::pipe().unwrap();
        let mut agent = Agent::start(stalled, &verbose());
        agent.load();
        // Some of the first 500 lines, which the module may log at once, fit neither pipe nor
        // queue.
        let lost = agent.admin.metric(LOST);
        assert!(lost > 0.0);
        let mut lines = entries(reader);
        let reported: f64 = lines.by_ref().find_map(|entry| entry["lost"].as_f64()).expect("no line with the number of lost ones");
        assert_eq!(reported, lost);
        // Later lines arrive.
        agent.signal(Signal::HUP);
        lines
            .by_ref()
            .find(|entry| entry["message"].as_str().is_some_and(|message| message.contains("serving the module")))
            .expect("no later line");
        assert_eq!(agent.admin.metric(LOST), lost);
        agent.end();
        assert_eq!(lines.last().expect("no last line")["message"], "shutdown complete");
    }

    #[test]
    fn does_not_delay_the_shutdown() {
        let (_reader, stalled) = std::io::pipe().unwrap();
        let mut agent = Agent::start(stalled, &verbose());
        agent.load();
        agent.end();
    }

    #[test]
    fn gets_later_lines_once_it_returns() {
        let home = tempfile::tempdir().unwrap();
        let fifo = home.path().join("log");
        assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        // Nonblocking, so opening it does not wait for a writer.
        let reader = || File::options().read(true).custom_flags(rustix::fs::OFlags::NONBLOCK.bits() as i32).open(&fifo).unwrap();
        let first = reader();
        let writer: OwnedFd = File::options().write(true).open(&fifo).unwrap().into();
        let mut agent = Agent::start(writer, &module::choosing());
        drop(first);
        let mut connection = agent.connect();
        for at in 0..30 {
            connection.get(&at.to_string(), "/t");
        }
        wait_for("lost lines", || (agent.admin.metric(LOST) > 0.0).then_some(()));
        let lost = agent.admin.metric(LOST);
        let mut second = reader();
        let mut read = String::new();
        wait_for("a line with the number of lost ones", || {
            agent.signal(Signal::HUP);
            let _ = second.read_to_string(&mut read);
            read.lines()
                .any(|line| serde_json::from_str::<Value>(line).is_ok_and(|entry| entry["lost"].as_f64() >= Some(lost)))
                .then_some(())
        });
        agent.end();
    }
}

mod filter {
    use super::*;

    #[test]
    fn invalid_is_named_in_the_log() {
        let home = tempfile::tempdir().unwrap();
        let file = module::write(home.path(), "m.wasm", &module::choosing());
        let agent = AGENT.start_with(&file, |command| {
            command.env("RUST_LOG", "info,=nonsense=");
        });
        agent.log.wait_for_entry("the warning", |entry| {
            entry["level"] == "WARN" && entry["message"].as_str().is_some_and(|message| message.contains("`RUST_LOG`: =nonsense="))
        });
        assert!(agent.log.lines().iter().all(|line| serde_json::from_str::<Value>(line).is_ok()), "{:?}", agent.log.lines());
    }
}
