//! Starts and stops the processes.

use crate::http::Message;
use crate::kdl::{ALL_EVENTS, ProxyConfig, Transport, render, render_hop};
use crate::upstream::Upstream;
use crate::{HttpRequest, wait};
use std::fs::File;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use tempfile::TempDir;

/// Log lines shown when a test fails.
const LOG_TAIL: usize = 25;

/// The proxy's audit log, in the stack's folder.
const AUDIT_LOG: &str = "audit.log";

/// The files that `cargo xtask e2e` has built.
#[derive(Debug, Clone)]
pub struct Paths {
    /// The agent's binary.
    pub agent: PathBuf,
    /// The proxy's binary.
    pub proxy: PathBuf,
    /// The mirror module.
    pub mirror: PathBuf,
    /// The product page's security module.
    pub security: PathBuf,
    /// The product page's bot protection module.
    pub bot_protection: PathBuf,
}

impl Paths {
    /// Reads `E2E_AGENT`, `E2E_PROXY`, `E2E_MIRROR`, `E2E_SECURITY`, `E2E_BOT_PROTECTION`.
    ///
    /// # Panics
    ///
    /// If one is missing.
    pub fn from_env() -> Self {
        let path = |name: &str| match std::env::var_os(name) {
            Some(path) => PathBuf::from(path),
            None => panic!("`{name}` is not set: run these tests with `cargo xtask e2e`"),
        };
        Self {
            agent: path("E2E_AGENT"),
            proxy: path("E2E_PROXY"),
            mirror: path("E2E_MIRROR"),
            security: path("E2E_SECURITY"),
            bot_protection: path("E2E_BOT_PROTECTION"),
        }
    }
}

/// A child process. Dropping it kills the process and, if the test failed, prints its log.
#[derive(Debug)]
struct Process {
    name: &'static str,
    child: Child,
    log: PathBuf,
}

impl Process {
    fn start(name: &'static str, command: &mut Command, log: &Path) -> io::Result<Self> {
        let out = File::options().create(true).append(true).open(log)?;
        let child = command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out).spawn()?;
        Ok(Self { name, child, log: log.to_owned() })
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// An error with its log if the process has exited.
    fn check_running(&mut self) -> io::Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => {
                let log = self.log();
                Err(io::Error::other(format!("the {} exited: {status}\n{}", self.name, log.trim_end())))
            }
        }
    }

    fn signal(&self, signal: &str) {
        let sent = Command::new("kill").args([signal, &self.child.id().to_string()]).status();
        assert!(sent.is_ok_and(|status| status.success()), "cannot send {signal} to the {}", self.name);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            let tail = &lines[lines.len().saturating_sub(LOG_TAIL)..];
            eprintln!("--- log of the {}:\n{}", self.name, tail.join("\n"));
        }
        // Both fail only if the process has exited already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// A running agent.
#[derive(Debug)]
pub struct Agent {
    process: Process,
    socket: PathBuf,
    grpc_port: Option<u16>,
}

impl Agent {
    /// Starts `binary` with its socket and log in `dir`, and waits until it accepts connections.
    pub fn start(binary: &Path, module: &Path, dir: &Path, grpc_port: Option<u16>, more: &[&str]) -> io::Result<Self> {
        let socket = dir.join("wasm.sock");
        let mut command = Command::new(binary);
        command.arg("--socket").arg(&socket);
        command.arg("--module").arg(module);
        if let Some(port) = grpc_port {
            command.args(["--grpc-address", &format!("127.0.0.1:{port}")]);
        }
        command.args(more);
        Self::start_command(&mut command, socket, grpc_port, dir)
    }

    /// Starts a command that serves `socket` and `grpc_port`, with its log in `dir`, and waits
    /// until it accepts connections there.
    pub fn start_command(command: &mut Command, socket: PathBuf, grpc_port: Option<u16>, dir: &Path) -> io::Result<Self> {
        let process = Process::start("agent", command, &dir.join("agent.log"))?;
        let mut agent = Self { process, socket, grpc_port };
        wait::until_ok("the agent accepts connections", || {
            agent.process.check_running()?;
            let on_socket = UnixStream::connect(&agent.socket).is_ok();
            let on_grpc = agent.grpc_port.is_none_or(|port| TcpStream::connect(("127.0.0.1", port)).is_ok());
            Ok((on_socket && on_grpc).then_some(()))
        })?;
        Ok(agent)
    }

    /// The path of its socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.child.id()
    }

    /// Its log.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// An error with its log if it has exited.
    pub fn check_running(&mut self) -> io::Result<()> {
        self.process.check_running()
    }

    /// Stops it with SIGTERM, as an init system does, and waits until it has exited.
    pub fn stop(mut self) {
        self.process.signal("-TERM");
        wait::until("the agent stops", || self.process.child.try_wait().ok().flatten());
    }
}

/// A running proxy.
#[derive(Debug)]
pub struct Proxy {
    process: Process,
    config: PathBuf,
    port: u16,
}

impl Proxy {
    /// Starts `binary` with its configuration and log in `dir`, and waits until it accepts
    /// connections.
    pub fn start(binary: &Path, settings: &ProxyConfig, dir: &Path) -> io::Result<Self> {
        Self::start_with(binary, settings.port, &render(settings), dir)
    }

    /// Like [`Self::start`], with a configuration as text that listens on `port`.
    pub fn start_with(binary: &Path, port: u16, text: &str, dir: &Path) -> io::Result<Self> {
        let config = dir.join("zentinel.kdl");
        std::fs::write(&config, text)?;
        let mut command = Command::new(binary);
        command.arg("-c").arg(&config).current_dir(dir);
        let process = Process::start("proxy", &mut command, &dir.join("proxy.log"))?;
        let mut proxy = Self { process, config, port };
        wait::until_ok("the proxy accepts connections", || {
            proxy.process.check_running()?;
            Ok(TcpStream::connect(("127.0.0.1", proxy.port)).ok())
        })?;
        Ok(proxy)
    }

    /// Its port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Its log.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// An error with its log if it has exited.
    pub fn check_running(&mut self) -> io::Result<()> {
        self.process.check_running()
    }

    /// Writes a new configuration and makes the proxy load it.
    pub fn reload(&self, settings: &ProxyConfig) -> io::Result<()> {
        std::fs::write(&self.config, render(settings))?;
        self.process.signal("-HUP");
        Ok(())
    }
}

/// What to start. The default is the mirror module with every event.
#[derive(Debug)]
pub struct Builder {
    paths: Paths,
    transport: Transport,
    module: PathBuf,
    events: Vec<&'static str>,
    agent_lines: String,
    route_lines: String,
    agent_args: Vec<String>,
}

impl Builder {
    /// Serves another module instead of the mirror module.
    pub fn module(mut self, pick: impl Fn(&Paths) -> &PathBuf) -> Self {
        self.module = pick(&self.paths).clone();
        self
    }

    /// Sends only these events.
    pub fn events(mut self, events: &[&'static str]) -> Self {
        self.events = events.to_vec();
        self
    }

    /// Adds lines to the agent's block of the proxy's configuration.
    pub fn agent_lines(mut self, lines: &str) -> Self {
        self.agent_lines = lines.into();
        self
    }

    /// Adds lines to the route's block of the proxy's configuration.
    pub fn route_lines(mut self, lines: &str) -> Self {
        self.route_lines = lines.into();
        self
    }

    /// Adds options to the agent's command line.
    pub fn agent_args(mut self, args: &[&str]) -> Self {
        self.agent_args.extend(args.iter().map(|arg| (*arg).to_owned()));
        self
    }

    /// Starts everything and waits until a request succeeds.
    pub fn start(self) -> Stack {
        let stack = self.start_unready();
        stack.wait_until_ready();
        stack
    }

    /// Starts everything without waiting until a request succeeds.
    pub fn start_unready(self) -> Stack {
        let dir = TempDir::new().expect("cannot create a directory");
        let upstream = Upstream::start().expect("cannot start the upstream");
        let grpc_port = (self.transport == Transport::Grpc).then(free_port);
        let args: Vec<&str> = self.agent_args.iter().map(String::as_str).collect();
        let agent = Agent::start(&self.paths.agent, &self.module, dir.path(), grpc_port, &args).expect("cannot start the agent");
        let settings = ProxyConfig {
            port: free_port(),
            upstream_port: upstream.port(),
            socket: agent.socket.clone(),
            audit_log: Some(dir.path().join(AUDIT_LOG)),
            grpc_port,
            events: self.events,
            agent_lines: self.agent_lines,
            route_lines: self.route_lines,
        };
        let proxy = Proxy::start(&self.paths.proxy, &settings, dir.path()).expect("cannot start the proxy");
        Stack { proxy, agent: Some(agent), upstream, settings, paths: self.paths, module: self.module, agent_args: self.agent_args, dir }
    }
}

/// The proxy, the agent and an upstream, stopped in this order.
#[derive(Debug)]
pub struct Stack {
    proxy: Proxy,
    agent: Option<Agent>,
    upstream: Upstream,
    settings: ProxyConfig,
    paths: Paths,
    module: PathBuf,
    agent_args: Vec<String>,
    dir: TempDir,
}

impl Stack {
    /// A builder for a stack whose proxy and agent are connected by `transport`.
    pub fn over(transport: Transport) -> Builder {
        let paths = Paths::from_env();
        Builder {
            module: paths.mirror.clone(),
            transport,
            events: ALL_EVENTS.to_vec(),
            agent_lines: String::new(),
            route_lines: String::new(),
            // The tests check behaviour and not speed, so other tests on the machine must not cause
            // timeouts.
            agent_args: vec!["--timeout-ms".into(), "3000".into()],
            paths,
        }
    }

    /// Sends a request through the proxy.
    #[track_caller]
    pub fn send(&self, request: &HttpRequest) -> Message {
        request.send(self.proxy.port).unwrap_or_else(|error| panic!("{request:?}: {error}"))
    }

    /// Waits until the proxy allows an ordinary request.
    #[track_caller]
    pub fn wait_until_ready(&self) {
        let request = HttpRequest::get("/ready").header("User-Agent", "Mozilla/5.0");
        wait::until("a request succeeds", || {
            let response = request.send(self.proxy.port).ok()?;
            (response.status() == 200).then_some(())
        });
    }

    /// Starts a second proxy in front of the first, without an agent and with these lines in its
    /// route's block.
    pub fn start_hop(&self, route_lines: &str) -> Proxy {
        let dir = self.dir.path().join("hop");
        std::fs::create_dir(&dir).expect("cannot create a directory");
        let port = free_port();
        let text = render_hop(port, self.proxy.port, route_lines);
        Proxy::start_with(&self.paths.proxy, port, &text, &dir).expect("cannot start the second proxy")
    }

    /// The entries of the proxy's audit log.
    pub fn audit_log(&self) -> Vec<serde_json::Value> {
        // The file is created with the first entry.
        let log = std::fs::read_to_string(self.dir.path().join(AUDIT_LOG)).unwrap_or_default();
        log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// The proxy's port on 127.0.0.1.
    pub fn proxy_port(&self) -> u16 {
        self.proxy.port
    }

    /// How many requests the upstream has received.
    pub fn upstream_requests(&self) -> usize {
        self.upstream.requests()
    }

    /// The proxy.
    pub fn proxy(&mut self) -> &mut Proxy {
        &mut self.proxy
    }

    /// The agent.
    ///
    /// # Panics
    ///
    /// Between [`Stack::stop_agent`] and [`Stack::start_agent`].
    pub fn agent(&mut self) -> &mut Agent {
        self.agent.as_mut().expect("the agent is stopped")
    }

    /// Stops the agent and keeps the proxy running.
    pub fn stop_agent(&mut self) {
        self.agent.take().expect("the agent is stopped already").stop();
    }

    /// Starts the agent again with the same settings.
    pub fn start_agent(&mut self) {
        let args: Vec<&str> = self.agent_args.iter().map(String::as_str).collect();
        let agent = Agent::start(&self.paths.agent, &self.module, self.dir.path(), self.settings.grpc_port, &args);
        self.agent = Some(agent.expect("cannot restart the agent"));
    }

    /// Reloads the proxy with other lines in the agent's block.
    pub fn reload_proxy(&mut self, agent_lines: &str) {
        self.settings.agent_lines = agent_lines.into();
        self.proxy.reload(&self.settings).expect("cannot reload the proxy");
    }
}

/// A free port of the loopback interface that stays free: this process returns each port once, and
/// all of them are below 32768, where the kernel begins to assign ports to connections and to
/// listeners on any port, such as the upstreams of other tests.
pub fn free_port() -> u16 {
    const FIRST: u32 = 10_000;
    const COUNT: u32 = 20_000;
    static GIVEN: AtomicU32 = AtomicU32::new(0);

    // Concurrent processes begin at different ports.
    let begin = std::process::id().wrapping_mul(7919) % COUNT;
    (0..COUNT)
        .map(|_| (FIRST + (begin + GIVEN.fetch_add(1, Relaxed)) % COUNT) as u16)
        .find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .expect("no free port")
}
