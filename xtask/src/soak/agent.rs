//! An agent under soak: its process, its resources, its reloads.

use super::subject::Subject;
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use testkit::{Connection, Program, Signal, module};

/// Time between two looks at the agents.
pub(super) const LOOK: Duration = Duration::from_millis(250);

/// What takes longer than this will not come: an answer, the end of a reload. Ten seconds of it are how long the agent keeps threads without work.
const PATIENCE: Duration = Duration::from_secs(30);

pub(super) struct Agent {
    pub(super) subject: &'static Subject,
    pub(super) process: testkit::Agent,
    module: PathBuf,
    /// The agent before it was asked anything.
    idle: Sample,
    /// The module, and the same module with another digest.
    versions: [Vec<u8>; 2],
}

impl Agent {
    pub(super) fn start(program: &Path, subject: &'static Subject) -> Result<Self> {
        let home = TempDir::new()?;
        let bytes = module::encode(&module::hostile(subject.fixture));
        // A custom section changes nothing but the digest.
        let other = [bytes.as_slice(), b"\0\x05\x04soak"].concat();
        let module = home.path().join("module.wasm");
        fs::write(&module, &bytes)?;
        let cache = home.path().join("cache");
        let process = Program(program).launch_in(home, "agent.sock", &module, |command| {
            command.arg("--cache-dir").arg(cache).args(["--admin-address", "127.0.0.1:0"]);
        });
        process.log.wait_for_line("serving the socket", |line| line.contains("serving the socket"));
        let mut agent = Self { subject, process, module, idle: Sample::default(), versions: [bytes, other] };
        // Once its socket answers, everything that it keeps is there.
        drop(Connection::try_open(&agent.process.socket)?);
        thread::sleep(LOOK);
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

    /// Reloads with this result, as the agent counts them.
    pub(super) fn reloads(&self, result: &str) -> u64 {
        self.process.admin().metric(&format!(r#"wasm_agent_reloads_total{{result="{result}"}}"#)) as u64
    }

    /// Waits until every reload asked for has succeeded, and until the agent has no more files and threads than before the load. The only slack are one
    /// or two threads that have read and compiled the module at the start: they count before the load, and end some seconds later.
    pub(super) fn settle(&self, asked: usize) -> Result<()> {
        ensure!(asked > 0, "no reload was asked for");
        let deadline = Instant::now() + PATIENCE;
        loop {
            // Before the metrics are asked for: that takes a file.
            let now = self.sample()?;
            let (succeeded, failed) = (self.reloads("success"), self.reloads("failure"));
            let problem = if failed > 0 || succeeded != asked as u64 {
                format!("{asked} reloads were asked for, {succeeded} succeeded and {failed} failed")
            } else if now.files > self.idle.files {
                format!("{} file descriptors before the load and {} after it", self.idle.files, now.files)
            } else if now.threads > self.idle.threads {
                format!("{} threads before the load and {} after it", self.idle.threads, now.threads)
            } else {
                return Ok(());
            };
            ensure!(Instant::now() < deadline, "{problem}");
            thread::sleep(LOOK);
        }
    }

    pub(super) fn sample(&self) -> Result<Sample> {
        let count = |what| -> Result<u64> {
            let folder = format!("/proc/{}/{what}", self.process.pid().as_raw_nonzero());
            Ok(fs::read_dir(folder).context("the agent is gone")?.count() as u64)
        };
        Ok(Sample { resident: self.process.resident(), files: count("fd")?, threads: count("task")? })
    }

    pub(super) fn end(mut self) -> Result<()> {
        self.process.signal(Signal::TERM);
        let status = self.process.wait();
        ensure!(status.success(), "the agent ended with {status}");
        ensure!(!self.process.log.whole().contains("panicked"), "the agent has panicked");
        Ok(())
    }
}

#[derive(Clone, Copy, Default)]
pub(super) struct Sample {
    pub(super) resident: u64,
    pub(super) files: u64,
    pub(super) threads: u64,
}
