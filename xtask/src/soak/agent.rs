//! An agent under soak: its process, its use of resources, its reloads.

use super::subject::Subject;
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use testkit::{Connection, Program, Signal, module};

/// Time between two samples of the agents' usage.
pub(super) const SAMPLE_INTERVAL: Duration = Duration::from_millis(250);

/// Limit for the end of reloads and of idle threads. The agent keeps idle threads for 10 s.
const TIMEOUT: Duration = Duration::from_secs(30);

pub(super) struct SoakedAgent {
    pub(super) subject: &'static Subject,
    pub(super) process: testkit::Agent,
    module: PathBuf,
    /// Usage before the first request.
    idle: Usage,
    /// The module, and the same module with another digest.
    versions: [Vec<u8>; 2],
}

impl SoakedAgent {
    pub(super) fn start(program: &Path, subject: &'static Subject) -> Result<Self> {
        let home = TempDir::new()?;
        let bytes = module::encode(&module::hostile(subject.fixture));
        // A custom section changes only the digest.
        let other = [bytes.as_slice(), b"\0\x05\x04soak"].concat();
        let module = home.path().join("module.wasm");
        fs::write(&module, &bytes)?;
        let cache = home.path().join("cache");
        let process = Program(program).launch_in(home, "agent.sock", &module, |command| {
            command.arg("--cache-dir").arg(cache).args(["--admin-address", "127.0.0.1:0"]);
        });
        process.log.wait_for_line("serving the socket", |line| line.contains("serving the socket"));
        let mut agent = Self { subject, process, module, idle: Usage::default(), versions: [bytes, other] };
        // After the handshake, everything that the agent keeps is allocated.
        drop(Connection::try_open(&agent.process.socket)?);
        thread::sleep(SAMPLE_INTERVAL);
        agent.idle = agent.sample()?;
        Ok(agent)
    }

    pub(super) fn reload(&self, number: usize) -> Result<()> {
        let next = self.module.with_extension("next");
        fs::write(&next, &self.versions[number % 2])?;
        fs::rename(next, &self.module)?;
        self.process.signal(Signal::HUP);
        Ok(())
    }

    /// The number of reloads with this result, from the agent's metrics.
    pub(super) fn reloads(&self, result: &str) -> u64 {
        self.process.admin().metric(&format!(r#"wasm_agent_reloads_total{{result="{result}"}}"#)) as u64
    }

    /// Waits until every requested reload has succeeded, and until the agent has no more files and
    /// threads than before the load. The only slack is one or two threads that read and compiled
    /// the module at the start: they count as usage before the load, and end some seconds later.
    pub(super) fn settle(&self, requested: usize) -> Result<()> {
        ensure!(requested > 0, "no reload was requested");
        let deadline = Instant::now() + TIMEOUT;
        loop {
            // Taken before the metrics, because reading those opens a file.
            let now = self.sample()?;
            let (succeeded, failed) = (self.reloads("success"), self.reloads("failure"));
            let problem = if failed > 0 || succeeded != requested as u64 {
                format!("{requested} reloads were requested, {succeeded} succeeded and {failed} failed")
            } else if now.files > self.idle.files {
                format!("{} file descriptors before the load and {} after it", self.idle.files, now.files)
            } else if now.threads > self.idle.threads {
                format!("{} threads before the load and {} after it", self.idle.threads, now.threads)
            } else {
                return Ok(());
            };
            ensure!(Instant::now() < deadline, "{problem}");
            thread::sleep(SAMPLE_INTERVAL);
        }
    }

    pub(super) fn sample(&self) -> Result<Usage> {
        let count = |what| -> Result<u64> {
            let folder = format!("/proc/{}/{what}", self.process.pid().as_raw_nonzero());
            Ok(fs::read_dir(folder).context("the agent has exited")?.count() as u64)
        };
        Ok(Usage { resident: self.process.resident(), files: count("fd")?, threads: count("task")? })
    }

    pub(super) fn end(mut self) -> Result<()> {
        self.process.signal(Signal::TERM);
        let status = self.process.wait();
        ensure!(status.success(), "the agent exited with {status}");
        ensure!(!self.process.log.whole().contains("panicked"), "the agent panicked");
        Ok(())
    }
}

#[derive(Clone, Copy, Default)]
pub(super) struct Usage {
    pub(super) resident: u64,
    pub(super) files: u64,
    pub(super) threads: u64,
}
