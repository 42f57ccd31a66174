//! From the first connection to the last: signals, reloads, the watchdog, and an orderly end.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use sd_notify::NotifyState;
use tokio::signal::unix::Signal;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};
use tracing::{info, warn};
use zentinel_wasm_contract::report::REPORT_INTERVAL;
use zentinel_wasm_engine::agent::Agent;
use zentinel_wasm_protocol::Stage;

use crate::listen::grpc;
use crate::listen::unix::Listener;
use crate::reload::reload_when_due;
use crate::signals::Signals;
use crate::source::Source;
use crate::systemd::notify;
use crate::tasks::note_end;
use crate::watch::Watched;

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
