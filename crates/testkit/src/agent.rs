//! The agent as a process, and its HTTP address.

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::process::{Pid, Signal};
use tempfile::TempDir;

use crate::{Connection, Log, PATIENCE, wait_for};

/// The agent's binary. Only integration tests of its package know where Cargo has put it.
#[derive(Clone, Copy)]
pub struct Program<P = &'static str>(pub P);

impl<P: AsRef<OsStr>> Program<P> {
    /// The program with a clean environment, whose home is `home`.
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

    /// Starts the agent with a module and further options, and waits until it serves.
    #[track_caller]
    pub fn start(&self, module: &Path, options: &[&str]) -> Agent {
        self.start_with(module, |command| {
            command.args(options);
        })
    }

    /// The same, with whatever `prepare` does to the command.
    #[track_caller]
    pub fn start_with(&self, module: &Path, prepare: impl FnOnce(&mut Command)) -> Agent {
        let agent = self.launch(module, prepare);
        agent.log.wait_for_line("that it serves", |line| line.contains("serving the socket"));
        agent
    }

    /// The same without waiting.
    pub fn launch(&self, module: &Path, prepare: impl FnOnce(&mut Command)) -> Agent {
        self.launch_in(tempfile::tempdir().unwrap(), "wasm.sock", module, prepare)
    }

    /// The same in a home that is there already; `socket` may be absolute.
    pub fn launch_in(&self, home: TempDir, socket: impl AsRef<Path>, module: &Path, prepare: impl FnOnce(&mut Command)) -> Agent {
        let socket = home.path().join(socket);
        let mut command = self.command(home.path());
        command.arg("--socket").arg(&socket).arg("--module").arg(module);
        prepare(&mut command);
        let mut child = command.spawn().unwrap();
        let log = Log::follow(child.stderr.take().unwrap());
        Agent { home, socket, log, child }
    }
}

/// A running agent. Dropping it kills it.
pub struct Agent {
    /// Its home, in which its socket lies too.
    pub home: TempDir,
    pub socket: PathBuf,
    pub log: Log,
    child: Child,
}

impl Agent {
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub fn signal(&self, signal: Signal) {
        rustix::process::kill_process(self.pid(), signal).unwrap();
    }

    /// Waits until it has ended.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        wait_for("the agent to end", || self.child.try_wait().unwrap())
    }

    /// Ends it in order and checks that it says so.
    #[track_caller]
    pub fn end(mut self) {
        self.signal(Signal::TERM);
        assert_eq!(self.wait().code(), Some(0), "{}", self.log.whole());
    }

    /// The same for an agent that was treated badly: nothing in it has panicked.
    #[track_caller]
    pub fn end_unharmed(self) {
        let log = self.log.clone();
        self.end();
        let log = log.whole();
        assert!(!log.contains("panicked"), "{log}");
    }

    /// Memory that it has in use, in bytes.
    pub fn resident(&self) -> u64 {
        let statm = std::fs::read_to_string(format!("/proc/{}/statm", self.pid().as_raw_nonzero())).unwrap();
        statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
    }

    /// The most memory that it ever had in use, in bytes.
    pub fn peak(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid().as_raw_nonzero())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    }

    #[track_caller]
    pub fn connect(&self) -> Connection {
        Connection::open(&self.socket)
    }

    /// Where `--admin-address 127.0.0.1:0` has ended up.
    #[track_caller]
    pub fn admin(&self) -> Admin {
        let line = self.log.wait_for_line("where the admin address is", |line| line.contains("serving /metrics"));
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

/// The agent's HTTP address.
#[derive(Clone, Copy)]
pub struct Admin(pub SocketAddr);

impl Admin {
    /// Status and body.
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

    /// The value of one series, such as `wasm_agent_errors_total{kind="trap"}`.
    #[track_caller]
    pub fn metric(self, series: &str) -> f64 {
        let (status, text) = self.get("/metrics");
        assert_eq!(status, 200);
        let value = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        value.map_or(0.0, |value| value.parse().unwrap())
    }

    /// Waits until a series has the value.
    #[track_caller]
    pub fn wait_for_metric(self, series: &str, wanted: f64) {
        wait_for(&format!("{series} to be {wanted}"), || (self.metric(series) == wanted).then_some(()));
    }
}
