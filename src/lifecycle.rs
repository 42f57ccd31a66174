//! From the first connection to the last: signals, reloads, the watchdog, and an orderly end.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};
use tracing::{info, warn};
use zentinel_wasm_contract::report::REPORT_INTERVAL;
use zentinel_wasm_protocol::Stage;
use zentinel_wasm_runtime::Cache;

use crate::listen::grpc;
use crate::listen::unix::Listener;
use crate::source::Source;
use crate::tasks::note_end;
use crate::watch::Cause;
pub use crate::watch::Watched;
use zentinel_wasm_engine::agent::Agent;

/// Time beyond the grace in which the last answers are written.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// The agent's servers, and what ends them.
pub struct Lifecycle {
    agent: Arc<Agent>,
    grace: Duration,
    stage: watch::Sender<Stage>,
    /// Servers that drain.
    servers: JoinSet<()>,
    /// Helpers that end with the process.
    helpers: JoinSet<()>,
    terminate: Signal,
    interrupt: Signal,
}

/// The signals that end or reload the agent. They are listened to before anything is made, so that
/// none of them ends it halfway.
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    /// Listens from now on.
    ///
    /// # Errors
    ///
    /// Signals cannot be received.
    pub fn listen() -> anyhow::Result<Self> {
        let listen = |kind| signal(kind).context("cannot receive signals");
        // Sent when the log, or the cache, has reached the limit on the size of files. Once listened
        // to it ends nobody, and the write fails instead.
        drop(listen(SignalKind::from_raw(rustix::process::Signal::XFSZ.as_raw()))?);
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
            hangup: listen(SignalKind::hangup())?,
        })
    }

    /// Waits for SIGTERM or SIGINT.
    pub async fn end(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

impl Lifecycle {
    /// A lifecycle in which nothing is served yet. SIGHUP reloads from now on, and so do changes of
    /// the `watched` files.
    pub fn new(agent: Arc<Agent>, source: Source, grace: Duration, signals: Signals, watched: Option<Watched>) -> Self {
        let Signals { terminate, interrupt, hangup } = signals;
        let stage = watch::Sender::new(Stage::Serving);
        let mut helpers = JoinSet::new();
        helpers.spawn(reload_when_due(Arc::clone(&agent), source, hangup, watched));
        Self { agent, grace, stage, servers: JoinSet::new(), helpers, terminate, interrupt }
    }

    /// Serves the Unix socket.
    ///
    /// # Errors
    ///
    /// The system gives no thread.
    pub fn serve_socket(&mut self, listener: Listener) -> anyhow::Result<()> {
        let served = listener.serve(Arc::clone(&self.agent), self.stage.subscribe());
        self.servers.spawn(served.context("cannot start the thread that looks after the socket")?);
        Ok(())
    }

    /// Serves the gRPC address.
    pub fn serve_grpc(&mut self, listener: grpc::Listener) {
        self.servers.spawn(listener.serve(Arc::clone(&self.agent), self.stage.subscribe()));
    }

    /// Serves until SIGTERM or SIGINT, and ends in order.
    pub async fn run(mut self) {
        notify(&[NotifyState::Ready]);
        let mut report = tokio::time::interval(REPORT_INTERVAL);
        report.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut watchdog_usec = 0;
        let mut watchdog = tokio::time::interval(match sd_notify::watchdog_enabled(false, &mut watchdog_usec) {
            true => Duration::from_micros(watchdog_usec / 2).max(Duration::from_millis(1)),
            false => REPORT_INTERVAL,
        });
        loop {
            tokio::select! {
                _ = self.terminate.recv() => break,
                _ = self.interrupt.recv() => break,
                _ = report.tick() => self.agent.publish(),
                _ = watchdog.tick() => notify(&[NotifyState::Watchdog]),
                Some(ended) = self.helpers.join_next() => note_end("a helper", ended),
            }
        }
        notify(&[NotifyState::Stopping]);
        self.end().await;
    }

    async fn end(mut self) {
        info!("ending: finishing what is in flight, at most {:?}", self.grace);
        self.agent.drain();
        self.stage.send_replace(Stage::Draining);
        let deadline = Instant::now() + self.grace;
        if tokio::time::timeout_at(deadline, join_all(&mut self.servers)).await.is_err() {
            warn!("the grace is over: no more events are taken");
            self.stage.send_replace(Stage::Closing);
            if tokio::time::timeout(LAST_WORDS, join_all(&mut self.servers)).await.is_err() {
                warn!("connections that do not end are closed");
                // Waited for, so that the socket's file goes with its server.
                self.servers.shutdown().await;
            }
        }
        info!("ended");
    }
}

async fn join_all(tasks: &mut JoinSet<()>) {
    while let Some(ended) = tasks.join_next().await {
        note_end("a server", ended);
    }
}

/// Reloads one at a time, so that signals that arrive during a reload become one more.
async fn reload_when_due(agent: Arc<Agent>, source: Source, mut hangup: Signal, mut watched: Option<Watched>) {
    loop {
        tokio::select! {
            _ = hangup.recv() => info!("reloading because of SIGHUP"),
            cause = due(watched.as_mut()) => match cause {
                Cause::Change => info!("reloading because a watched file has changed"),
                Cause::Retry => info!("trying the failed reload again"),
            },
        }
        if let Some(watched) = &mut watched {
            watched.reloading().await;
        }
        let succeeded = reload(&agent, &source).await;
        if let Some(watched) = &mut watched {
            watched.reloaded(succeeded);
        }
    }
}

async fn due(watched: Option<&mut Watched>) -> Cause {
    match watched {
        Some(watched) => watched.due().await,
        None => std::future::pending().await,
    }
}

/// Whether it has succeeded.
async fn reload(agent: &Agent, source: &Source) -> bool {
    notify(&[NotifyState::Reloading, NotifyState::monotonic_usec_now().unwrap_or(NotifyState::MonotonicUsec(0))]);
    let result = source.reload(agent).await;
    if let Err(error) = &result {
        warn!("reload failed, keeping the current module, configuration and certificates: {error:#}");
    }
    notify(&[NotifyState::Ready]);
    result.is_ok()
}

/// Tells systemd, where it is there.
fn notify(states: &[NotifyState<'_>]) {
    let _ = sd_notify::notify(false, states);
}

/// The directory for compiled modules: the given one, or where systemd and the desktop conventions put caches. One that cannot be used is a warning.
pub fn open_cache(given: Option<&Path>) -> Option<Cache> {
    let from = |variable: &str| std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
    let name = "zentinel-wasm-agent";
    let directory = given
        .map(Path::to_owned)
        // systemd may name several, separated by colons.
        .or_else(|| from("CACHE_DIRECTORY").map(|list| PathBuf::from(list.to_string_lossy().split(':').next().unwrap_or_default())))
        .or_else(|| from("XDG_CACHE_HOME").map(|cache| cache.join(name)))
        .or_else(|| from("HOME").map(|home| home.join(".cache").join(name)))?;
    match Cache::open(&directory) {
        Ok(cache) => Some(cache),
        Err(error) => {
            warn!("compiled modules are not kept: the cache `{}` cannot be used: {error}", directory.display());
            None
        }
    }
}
