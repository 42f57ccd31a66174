//! The agent with one module, ready for requests.

use anyhow::{Context, Result};
use std::path::Path;
use tempfile::TempDir;
use testkit::Connection;
use zentinel_wasm_e2e::http::exchange;
use zentinel_wasm_e2e::{Agent, free_port, wait};

pub(super) struct Serving {
    pub(super) connection: Connection,
    admin_port: u16,
    agent: Agent,
    _dir: TempDir,
}

impl Serving {
    /// Starts `agent` and waits until the module is compiled, because a large one takes longer than
    /// the connection would wait.
    ///
    /// The tests check decisions and the measurements take means, so a busy machine must not cause
    /// timeouts.
    pub(super) fn start(agent: &Path, module: &Path, options: &[&str]) -> Result<Self> {
        Self::start_with(agent, module, &[&["--timeout-ms", "10000"], options].concat())
    }

    /// Starts `agent` with these options only, and waits as [`start`](Self::start) does.
    pub(super) fn start_with(agent: &Path, module: &Path, options: &[&str]) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let admin_port = free_port();
        let address = format!("127.0.0.1:{admin_port}");
        let fixed = ["--admin-address", &address];
        let mut agent = Agent::start(agent, module, dir.path(), None, &[&fixed, options].concat())?;
        wait::until_ok("the module is compiled", || {
            agent.check_running()?;
            Ok(exchange(admin_port, "GET", "/readyz", &[], None).ok().filter(|answer| answer.status() == 200).map(|_| ()))
        })?;
        let connection = Connection::try_open(agent.socket())?;
        Ok(Self { connection, admin_port, agent, _dir: dir })
    }

    /// The agent's metrics in the text format of Prometheus.
    pub(super) fn metrics(&self) -> Result<String> {
        Ok(exchange(self.admin_port, "GET", "/metrics", &[], None).context("cannot read the agent's metrics")?.text())
    }

    /// The resident memory of the agent, in bytes.
    pub(super) fn memory(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.agent.pid())).context("cannot read the agent's memory")?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("the kernel does not report the agent's memory")?;
        let kibibytes: u64 = line.trim().trim_end_matches(" kB").parse().context("cannot read the agent's memory")?;
        Ok(kibibytes * 1024)
    }

    /// The agent's log so far.
    pub(super) fn log(&self) -> String {
        self.agent.log()
    }

    pub(super) fn stop(self) {
        drop(self.connection);
        self.agent.stop();
    }
}
