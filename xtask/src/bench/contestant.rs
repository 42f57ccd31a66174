//! The programs that cases compare, as child processes.

use super::modules::{Module, Modules};
use crate::peers::Programs;
use crate::tools::show;
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::fs::File;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use testkit::Collector;
use zentinel_wasm_e2e::free_port;

/// A placeholder in a case's arguments for the gRPC address, which is known when the contestant
/// runs.
pub(crate) const OVER_GRPC: &str = "over-grpc";
/// A placeholder in an agent's arguments for the URL of a collector that takes everything.
pub(crate) const COLLECTOR: &str = "collector";
/// Far beyond the time of a start with an empty compile cache.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// Everything that the cases need.
pub(crate) struct Builds {
    pub(crate) programs: Programs,
    pub(crate) agent: PathBuf,
    pub(crate) modules: Modules,
    /// Takes spans and metrics and forgets them.
    pub(crate) collector: Collector,
    /// The folder of logs and the report.
    pub(crate) dir: PathBuf,
}

pub(crate) struct Contestant {
    pub(crate) label: &'static str,
    pub(crate) program: Program,
    /// The cores that it may run on, in the syntax of `taskset -c`.
    pub(crate) cores: Option<&'static str>,
}

pub(crate) enum Program {
    Echo,
    Noop,
    Agent { module: Module, arguments: Vec<String> },
}

impl Contestant {
    fn command(&self, builds: &Builds, socket: &Path, grpc: Option<&str>) -> Command {
        let program = match self.program {
            Program::Echo => &builds.programs.echo,
            Program::Noop => &builds.programs.noop_agent,
            Program::Agent { .. } => &builds.agent,
        };
        let mut command = match self.cores {
            None => Command::new(program),
            Some(cores) => {
                // It executes the program in the same process.
                let mut taskset = Command::new("taskset");
                taskset.args(["-c", cores]).arg(program);
                taskset
            }
        };
        command.arg("--socket").arg(socket);
        if let Program::Agent { module, arguments } = &self.program {
            command.arg("--module").arg(builds.modules.path(*module));
            for argument in arguments {
                command.arg(if argument == COLLECTOR { builds.collector.url() } else { argument.clone() });
            }
        }
        if let Some(address) = grpc {
            command.args(["--grpc-address", address]);
        }
        command.stdin(Stdio::null());
        command
    }

    /// Measures the time from start to first answer `runs` times.
    pub(crate) fn time_start(&self, builds: &Builds, runs: usize) -> Result<Value> {
        let dir = TempDir::new()?;
        let socket = dir.path().join("agent.sock");
        let agent = self.command(builds, &socket, None);
        let mut start = Command::new(&builds.programs.loadgen);
        start.arg("start").arg("--socket").arg(&socket).args(["--runs", &runs.to_string(), "--"]);
        start.arg(agent.get_program()).args(agent.get_args());
        let printed = crate::tools::output(&mut start)?;
        serde_json::from_str(&printed).with_context(|| format!("reading what {} printed", show(&start)))
    }
}

/// A running contestant, killed when dropped.
pub(crate) struct Running {
    child: Child,
    dir: TempDir,
    grpc: String,
}

impl Running {
    pub(crate) fn start(contestant: &Contestant, builds: &Builds, with_grpc: bool) -> Result<Self> {
        let dir = TempDir::new()?;
        let socket = dir.path().join("agent.sock");
        let grpc = format!("127.0.0.1:{}", free_port());
        let mut command = contestant.command(builds, &socket, with_grpc.then_some(&grpc));
        let log_path = builds.dir.join(format!("{}.log", contestant.label.replace(' ', "-")));
        let log = File::create(&log_path).with_context(|| format!("making {}", log_path.display()))?;
        let child = command.stdout(log.try_clone()?).stderr(log).spawn().with_context(|| format!("cannot start {}", show(&command)))?;
        let mut running = Self { child, dir, grpc };
        let started = Instant::now();
        while UnixStream::connect(&socket).is_err() || (with_grpc && TcpStream::connect(&running.grpc).is_err()) {
            if running.child.try_wait()?.is_some() || started.elapsed() > START_TIMEOUT {
                bail!("{} does not serve: see its log {}", show(&command), log_path.display());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(running)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The generator's arguments for this contestant's address.
    pub(crate) fn address(&self, over_grpc: bool) -> [String; 2] {
        if over_grpc {
            ["--grpc-address".to_owned(), self.grpc.clone()]
        } else {
            ["--socket".to_owned(), self.dir.path().join("agent.sock").display().to_string()]
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only if it has exited already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
