//! The samples of `deploy/`, moved to the ports and folders of a test.

use crate::http::Message;
use crate::stack::{Agent, Proxy, free_port};
use crate::upstream::Upstream;
use crate::{HttpRequest, wait};
use std::io;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// The path of a file or folder in `deploy/`.
pub fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy").join(name)
}

/// The text of a file in `deploy/`.
///
/// # Panics
///
/// If it cannot be read.
pub fn read(name: &str) -> String {
    let path = path(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Replaces each first string by the second one wherever it occurs.
///
/// # Panics
///
/// If a string does not occur, because the sample has changed then.
#[track_caller]
pub fn adapt(text: &str, replacements: &[(&str, String)]) -> String {
    replacements.iter().fold(text.to_owned(), |text, (from, to)| {
        assert!(text.contains(from), "the sample does not contain {from:?}:\n{text}");
        text.replace(from, to)
    })
}

/// The configuration without the proxy's own metrics listener, which would bind every interface, on
/// a port that all proxies share.
pub fn without_metrics(text: &str) -> String {
    format!("{text}\nobservability {{ metrics {{ enabled #false; }} }}\n")
}

/// The configuration with longer timeouts of an agent and of its `config` block, because other
/// tests on the machine must not cause timeouts.
pub fn patient(text: &str) -> String {
    let longer = |line: &str| if line.trim_start().starts_with("timeout-ms ") { "timeout-ms 5000".into() } else { line.to_owned() };
    text.lines().map(longer).collect::<Vec<_>>().join("\n")
}

/// The binaries and the module of a [`SampleStack`].
#[derive(Debug, Clone)]
pub struct Files {
    /// The agent's binary.
    pub agent: PathBuf,
    /// The proxy's binary.
    pub proxy: PathBuf,
    /// The module.
    pub module: PathBuf,
}

/// The proxy with a sample as its configuration, the agent and an upstream, stopped in this order.
#[derive(Debug)]
pub struct SampleStack {
    proxy: Proxy,
    agent: Option<Agent>,
    _upstream: Upstream,
    grpc_port: Option<u16>,
    files: Files,
    dir: TempDir,
}

impl SampleStack {
    /// Starts everything and waits until a request succeeds.
    ///
    /// # Errors
    ///
    /// If a process exits or no request succeeds in time.
    pub fn start(files: &Files, text: &str) -> io::Result<Self> {
        let dir = TempDir::new()?;
        let upstream = Upstream::start()?;
        let grpc_port = text.contains("grpc address").then(free_port);
        let agent = start_agent(files, dir.path(), grpc_port)?;
        let port = free_port();
        let mut replacements =
            vec![("127.0.0.1:8080", format!("127.0.0.1:{port}")), ("127.0.0.1:8081", format!("127.0.0.1:{}", upstream.port()))];
        match grpc_port {
            Some(port) => replacements.push(("127.0.0.1:50051", format!("127.0.0.1:{port}"))),
            None => replacements.push(("/run/zentinel-agents/wasm.sock", agent.socket().display().to_string())),
        }
        let text = patient(&without_metrics(&adapt(text, &replacements)));
        let proxy = Proxy::start_with(&files.proxy, port, &text, dir.path())?;
        let stack = Self { proxy, agent: Some(agent), _upstream: upstream, grpc_port, files: files.clone(), dir };
        stack.wait_until_ready()?;
        Ok(stack)
    }

    /// Sends a request through the proxy.
    ///
    /// # Errors
    ///
    /// If there is no response.
    pub fn get(&self, path: &str) -> io::Result<Message> {
        HttpRequest::get(path).header("User-Agent", "Mozilla/5.0").send(self.proxy.port())
    }

    /// Waits until a request succeeds.
    ///
    /// # Errors
    ///
    /// If none does in time.
    pub fn wait_until_ready(&self) -> io::Result<()> {
        wait::until_ok("a request succeeds", || Ok(self.get("/").ok().filter(|response| response.status() == 200)))?;
        Ok(())
    }

    /// The warnings and errors in the logs of the agent and the proxy.
    ///
    /// # Panics
    ///
    /// Between [`Self::kill_agent`] and [`Self::start_agent`].
    pub fn warnings(&self) -> Vec<String> {
        let logs = self.agent.as_ref().expect("the agent is stopped").log() + &self.proxy.log();
        let is_warning = |line: &str| line.contains("WARN") || line.contains("ERROR");
        // `Agent::start` connects to see whether gRPC is served.
        let is_ours = |line: &str| line.contains("connection closed before reading preface");
        logs.lines().filter(|line| is_warning(line) && !is_ours(line)).map(str::to_owned).collect()
    }

    /// Ends the agent with SIGKILL, as a crash does.
    pub fn kill_agent(&mut self) {
        self.agent = None;
    }

    /// Starts the agent again, and waits until it accepts connections.
    ///
    /// # Errors
    ///
    /// If it exits.
    pub fn start_agent(&mut self) -> io::Result<()> {
        self.agent = Some(start_agent(&self.files, self.dir.path(), self.grpc_port)?);
        Ok(())
    }
}

fn start_agent(files: &Files, dir: &Path, grpc_port: Option<u16>) -> io::Result<Agent> {
    Agent::start(&files.agent, &files.module, dir, grpc_port, &["--timeout-ms", "3000"])
}
