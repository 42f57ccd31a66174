//! The agent as a child process.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Far beyond the time of a start, so only an agent that never serves fails a test.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// How a test connects to the agent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Transport {
    /// The Unix socket, which the agent always serves.
    Socket,
    /// gRPC, which it serves beside the socket on request.
    Grpc,
}

/// A running agent, killed when dropped.
pub struct Agent {
    child: Child,
    dir: TempDir,
    grpc: Option<SocketAddr>,
}

impl Agent {
    /// Starts the agent with the module at `module`, and waits until it serves.
    pub fn start(transport: Transport, module: &Path, arguments: &[&str]) -> Self {
        Self::start_in(TempDir::new().expect("cannot create a directory"), transport, module, arguments)
    }

    fn start_in(dir: TempDir, transport: Transport, module: &Path, arguments: &[&str]) -> Self {
        let log = File::create(dir.path().join("log")).expect("cannot create the log");
        let mut command = Command::new(path_from("ZENTINEL_WASM_AGENT"));
        command.arg("--socket").arg(dir.path().join("wasm.sock")).arg("--module").arg(module).args(arguments);
        // The tests check behaviour and not speed, so a busy machine must not cause timeouts.
        if !arguments.contains(&"--timeout-ms") {
            command.args(["--timeout-ms", "3000"]);
        }
        let grpc = (transport == Transport::Grpc).then(free_address);
        if let Some(address) = grpc {
            command.arg("--grpc-address").arg(address.to_string());
        }
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("cannot share the log")).stderr(log);
        let child = command.spawn().expect("cannot run `ZENTINEL_WASM_AGENT`");
        let mut agent = Self { child, dir, grpc };
        agent.wait_until_served();
        agent
    }

    /// Starts the agent with a module given as bytes.
    pub fn with_module(transport: Transport, module: &[u8], arguments: &[&str]) -> Self {
        let dir = TempDir::new().expect("cannot create a directory");
        let path = dir.path().join("module.wasm");
        fs::write(&path, module).expect("cannot write the module");
        Self::start_in(dir, transport, &path, arguments)
    }

    /// The path of the Unix socket.
    pub fn socket(&self) -> String {
        self.dir.path().join("wasm.sock").display().to_string()
    }

    /// The URL of the gRPC server.
    pub fn grpc_endpoint(&self) -> String {
        format!("http://{}", self.grpc.expect("the agent was started without gRPC"))
    }

    fn wait_until_served(&mut self) {
        let started = Instant::now();
        while UnixStream::connect(self.socket()).is_err() || self.grpc.is_some_and(|address| TcpStream::connect(address).is_err()) {
            let ended = self.child.try_wait().expect("cannot query the agent's process");
            assert!(
                ended.is_none() && started.elapsed() < START_TIMEOUT,
                "the agent does not serve (exit status {ended:?}); its log:\n{}",
                fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
            );
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("the agent's log:\n{}", fs::read_to_string(self.dir.path().join("log")).unwrap_or_default());
        }
        // Both fail only if it has exited already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The product page's security module.
pub fn security_module() -> PathBuf {
    path_from("ZENTINEL_WASM_SECURITY")
}

/// The product page's bot protection module.
pub fn bot_module() -> PathBuf {
    path_from("ZENTINEL_WASM_BOT")
}

fn path_from(variable: &str) -> PathBuf {
    std::env::var_os(variable)
        .map(PathBuf::from)
        .unwrap_or_else(|| panic!("`{variable}` is not set: run these tests with `cargo xtask test`"))
}

/// The system reuses a port that was just released last, so the port stays free for the agent.
fn free_address() -> SocketAddr {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|listener| listener.local_addr()).expect("no free port")
}
