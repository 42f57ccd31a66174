//! The agent as a process, and its HTTP address.

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::process::{Pid, Signal};
use tempfile::TempDir;

use crate::{Connection, Log, PATIENCE, wait_for};

/// The path of the agent's binary. Only integration tests of its package get it from Cargo, so they
/// pass it in: `Program(env!("CARGO_BIN_EXE_zentinel-wasm-agent"))`.
#[derive(Clone, Copy)]
pub struct Program<P = &'static str>(pub P);

impl<P: AsRef<OsStr>> Program<P> {
    /// A command that runs the agent with `home` as its home directory and an empty environment.
    pub fn command(&self, home: &Path) -> Command {
        let mut command = Command::new(&self.0);
        let kept = ["PATH", "LLVM_PROFILE_FILE"].map(|name| (name, std::env::var_os(name)));
        command.env_clear().env("HOME", home).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        for (name, value) in kept {
            if let Some(value) = value {
                command.env(name, value);
            }
        }
        command
    }

    /// Starts the agent with a module and further options, and waits until it serves the socket.
    #[track_caller]
    pub fn start(&self, module: &Path, options: &[&str]) -> Agent {
        self.start_with(module, |command| {
            command.args(options);
        })
    }

    /// Like [`start`](Self::start), after `prepare` has changed the command.
    #[track_caller]
    pub fn start_with(&self, module: &Path, prepare: impl FnOnce(&mut Command)) -> Agent {
        let agent = self.launch(module, prepare);
        agent.log.wait_for_line("serving the socket", |line| line.contains("serving the socket"));
        agent
    }

    /// Starts the agent without waiting.
    pub fn launch(&self, module: &Path, prepare: impl FnOnce(&mut Command)) -> Agent {
        self.launch_in(tempfile::tempdir().unwrap(), "wasm.sock", module, prepare)
    }

    /// Starts the agent in an existing home without waiting. `socket` is relative to the home, or
    /// absolute.
    pub fn launch_in(&self, home: TempDir, socket: impl AsRef<Path>, module: &Path, prepare: impl FnOnce(&mut Command)) -> Agent {
        let socket = home.path().join(socket);
        let mut command = self.command(home.path());
        command.arg("--socket").arg(&socket).arg("--module").arg(module);
        prepare(&mut command);
        Agent::spawn(home, socket, command)
    }
}

/// A running agent. It is killed when dropped.
pub struct Agent {
    /// Its home directory, with the socket in it.
    pub home: TempDir,
    pub socket: PathBuf,
    pub log: Log,
    child: Child,
}

impl Agent {
    /// Runs `command`, which must serve `socket` and pipe its standard error, without waiting.
    pub fn spawn(home: TempDir, socket: PathBuf, mut command: Command) -> Self {
        let mut child = command.spawn().unwrap();
        let log = Log::follow(child.stderr.take().unwrap());
        Self { home, socket, log, child }
    }

    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub fn signal(&self, signal: Signal) {
        rustix::process::kill_process(self.pid(), signal).unwrap();
    }

    /// Waits until the process has exited.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        wait_for("the agent to exit", || self.child.try_wait().unwrap())
    }

    /// Sends SIGTERM and checks that the exit code is 0.
    #[track_caller]
    pub fn end(mut self) {
        self.signal(Signal::TERM);
        assert_eq!(self.wait().code(), Some(0), "{}", self.log.whole());
    }

    /// Like [`end`](Self::end), and checks that nothing in it panicked.
    #[track_caller]
    pub fn end_unharmed(self) {
        let log = self.log.clone();
        self.end();
        let log = log.whole();
        assert!(!log.contains("panicked"), "{log}");
    }

    /// Resident memory, in bytes.
    pub fn resident(&self) -> u64 {
        let statm = std::fs::read_to_string(format!("/proc/{}/statm", self.pid().as_raw_nonzero())).unwrap();
        statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
    }

    /// The highest resident memory so far, in bytes.
    pub fn peak(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid().as_raw_nonzero())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    }

    #[track_caller]
    pub fn connect(&self) -> Connection {
        Connection::open(&self.socket)
    }

    /// The address that `--admin-address 127.0.0.1:0` was bound to.
    #[track_caller]
    pub fn admin(&self) -> Admin {
        let line = self.log.wait_for_line("the admin address", |line| line.contains("serving /metrics"));
        let (_, rest) = line.split_once("http://").unwrap();
        let address: String = rest.chars().take_while(|c| c.is_ascii_digit() || ".:".contains(*c)).collect();
        Admin(address.parse().unwrap())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The agent's admin address.
#[derive(Clone, Copy)]
pub struct Admin(pub SocketAddr);

impl Admin {
    /// Status and body of a GET.
    #[track_caller]
    pub fn get(self, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(self.0).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n").unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).unwrap();
        let (head, body) = response.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, body.to_owned())
    }

    /// The value of one series, such as `wasm_agent_errors_total{kind="trap"}`; 0 if there is none.
    #[track_caller]
    pub fn metric(self, series: &str) -> f64 {
        let (status, text) = self.get("/metrics");
        assert_eq!(status, 200);
        let value = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        value.map_or(0.0, |value| value.parse().unwrap())
    }

    /// Waits until a series has the value `wanted`.
    #[track_caller]
    pub fn wait_for_metric(self, series: &str, wanted: f64) {
        wait_for(&format!("{series} to be {wanted}"), || (self.metric(series) == wanted).then_some(()));
    }
}
