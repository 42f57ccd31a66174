//! The agent is restarted and upgraded behind the real proxy, under load.

use crate::http::read_message;
use crate::sample::{Files, adapt, patient, read, without_metrics};
use crate::stack::{Proxy, free_port};
use crate::upstream::Upstream;
use crate::{HttpRequest, wait};
use std::io::{self, BufReader, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use testkit::{Agent, Program, ServiceManager, Signal};

/// Connections of the clients: enough that requests are sent in time although some of them wait.
const CLIENTS: usize = 64;

/// After this time without a response, a request has failed.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// Time between two changes, in which nothing happens.
const CALM: Duration = Duration::from_millis(500);

/// A change still has an effect for so long after the new process serves.
const AFTERMATH: Duration = Duration::from_millis(100);

/// What happened to the agent while a request was sent or answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The service was restarted, with the descriptor store of a service manager.
    Restart,
    /// Another binary took over from the running process.
    Upgrade,
}

/// A request that was answered, or failed.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// When it should have been sent.
    due: Instant,
    /// From then to its response.
    pub latency: Duration,
    /// Its status; None if there was no response.
    pub status: Option<u16>,
}

/// All requests, and what happened meanwhile.
#[derive(Debug, Default)]
pub struct Report {
    samples: Vec<Sample>,
    changes: Vec<(Change, Instant, Instant)>,
}

impl Report {
    /// The requests during changes of this kind, or without any change.
    pub fn samples(&self, change: Option<Change>) -> Vec<Sample> {
        let during = |sample: &Sample| {
            let overlapping = self.changes.iter().find(|(_, from, to)| sample.due <= *to && sample.due + sample.latency >= *from);
            overlapping.map(|(change, ..)| *change)
        };
        self.samples.iter().copied().filter(|sample| during(sample) == change).collect()
    }

    /// The requests that were not answered with 200.
    pub fn failed(&self) -> usize {
        self.samples.iter().filter(|sample| sample.status != Some(200)).count()
    }

    /// All requests.
    pub fn requests(&self) -> usize {
        self.samples.len()
    }
}

/// The proxy, an upstream, and the agent as a service.
pub struct Restarts {
    proxy: Proxy,
    agent: Option<Agent>,
    manager: ServiceManager,
    files: Files,
    /// Another binary of the agent.
    other: PathBuf,
    _upstream: Upstream,
    dir: TempDir,
}

impl Restarts {
    /// Starts everything, with the samples for the proxy, and waits until a request succeeds.
    ///
    /// # Errors
    ///
    /// If a process exits or no request succeeds in time.
    pub fn start(files: &Files) -> io::Result<Self> {
        let dir = TempDir::new()?;
        // The same program with other bytes at another path.
        let other = dir.path().join("upgraded-agent");
        std::fs::copy(&files.agent, &other)?;
        std::fs::File::options().append(true).open(&other)?.write_all(b"upgraded")?;
        let upstream = Upstream::start()?;
        let manager = ServiceManager::start();
        let agent = launch(&files.agent, files, dir.path(), &manager);
        wait_until_serving(&agent);
        let port = free_port();
        let text = adapt(
            &read("kdl/wasm-agent.kdl"),
            &[
                ("/run/zentinel-agents/wasm.sock", socket(dir.path()).display().to_string()),
                ("127.0.0.1:8080", format!("127.0.0.1:{port}")),
                ("127.0.0.1:8081", format!("127.0.0.1:{}", upstream.port())),
            ],
        );
        let proxy = Proxy::start_with(&files.proxy, port, &patient(&without_metrics(&text)), dir.path())?;
        wait::until_ok("a request succeeds", || {
            let response = HttpRequest::get("/").header("User-Agent", "Mozilla/5.0").send(port);
            Ok(response.ok().filter(|response| response.status() == 200))
        })?;
        Ok(Self { proxy, agent: Some(agent), manager, files: files.clone(), other, _upstream: upstream, dir })
    }

    /// Sends `rate` requests per second while the agent changes, and then reports.
    ///
    /// # Panics
    ///
    /// If a process of the agent fails.
    pub fn run(&mut self, rate: u32, changes: &[Change]) -> Report {
        let port = self.proxy.port();
        let (next, stop, samples) = (AtomicU32::new(0), AtomicBool::new(false), Mutex::new(Vec::new()));
        let began = Instant::now();
        let changes = std::thread::scope(|scope| {
            for _ in 0..CLIENTS {
                scope.spawn(|| {
                    let mut client = Client { port, connection: None };
                    while !stop.load(Relaxed) {
                        let due = began + next.fetch_add(1, Relaxed) * Duration::from_secs(1) / rate;
                        std::thread::sleep(due.saturating_duration_since(Instant::now()));
                        let status = client.get();
                        let sample = Sample { due, latency: due.elapsed(), status };
                        samples.lock().expect("a client panicked").push(sample);
                    }
                });
            }
            let _stop = testkit::Stop(&stop);
            let mut done = Vec::new();
            for change in changes {
                std::thread::sleep(CALM);
                let from = Instant::now();
                match change {
                    Change::Restart => self.restart(),
                    Change::Upgrade => self.upgrade(),
                }
                done.push((*change, from, Instant::now() + AFTERMATH));
            }
            std::thread::sleep(CALM);
            done
        });
        Report { samples: samples.into_inner().expect("a client panicked"), changes }
    }

    fn restart(&mut self) {
        let mut agent = self.agent.take().expect("the agent runs");
        agent.signal(Signal::TERM);
        assert!(agent.wait().success(), "the agent failed:\n{}", agent.log.whole());
        let next = launch(&self.files.agent, &self.files, self.dir.path(), &self.manager);
        wait_until_serving(&next);
        self.agent = Some(next);
    }

    fn upgrade(&mut self) {
        let next = launch(&self.other, &self.files, self.dir.path(), &self.manager);
        wait_until_serving(&next);
        let mut agent = self.agent.replace(next).expect("the agent runs");
        assert!(agent.wait().success(), "the agent failed:\n{}", agent.log.whole());
    }
}

fn socket(dir: &Path) -> PathBuf {
    dir.join("wasm.sock")
}

fn launch(binary: &Path, files: &Files, dir: &Path, manager: &ServiceManager) -> Agent {
    let mut command = Program(binary).command(dir);
    command.arg("--socket").arg(socket(dir)).arg("--module").arg(&files.module);
    command.args(["--takeover", "--timeout-ms", "3000", "--cache-dir"]).arg(dir.join("cache"));
    let home = TempDir::new().expect("cannot create a directory");
    Agent::spawn(home, socket(dir), manager.service(&command))
}

fn wait_until_serving(agent: &Agent) {
    agent.log.wait_until_serving();
}

/// A client with a connection of its own.
struct Client {
    port: u16,
    connection: Option<BufReader<TcpStream>>,
}

impl Client {
    /// Returns the status of the response, if there is one.
    fn get(&mut self) -> Option<u16> {
        let response = self.try_get();
        if response.is_err() {
            self.connection = None;
        }
        response.ok()
    }

    fn try_get(&mut self) -> io::Result<u16> {
        let connection = match &mut self.connection {
            Some(connection) => connection,
            None => {
                let stream = TcpStream::connect(("127.0.0.1", self.port))?;
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(REQUEST_TIMEOUT))?;
                self.connection.insert(BufReader::new(stream))
            }
        };
        connection.get_mut().write_all(b"GET / HTTP/1.1\r\nHost: shop.example\r\nUser-Agent: Mozilla/5.0\r\n\r\n")?;
        let response = read_message(connection, |_| true)?.ok_or(io::ErrorKind::UnexpectedEof)?;
        Ok(response.status())
    }
}
