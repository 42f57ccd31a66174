//! Serves from the first connection to the last: reports, the watchdog, reloads, and shutdown.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use sd_notify::NotifyState;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};
use tracing::{info, warn};
use zentinel_wasm_contract::report::REPORT_INTERVAL;
use zentinel_wasm_engine::Agent;
use zentinel_wasm_protocol::{Stage, Timeouts};

use crate::listen::grpc::GrpcServer;
use crate::listen::unix::SocketServer;
use crate::reload::reload_when_due;
use crate::signals::{Signals, TerminationSignals};
use crate::source::Source;
use crate::systemd::notify;
use crate::tasks::log_if_panicked;
use crate::watch::FileWatcher;

/// Time after the grace period in which the last answers are written.
const FLUSH_GRACE: Duration = Duration::from_secs(1);

/// How connections are served and ended.
#[derive(Clone, Copy, Debug)]
pub struct LifecycleConfig {
    /// Time to finish in-flight events at shutdown.
    pub grace: Duration,
    /// How long clients of all addresses are waited for.
    pub timeouts: Timeouts,
}

/// The agent's servers, and what ends them.
pub struct Lifecycle {
    agent: Arc<Agent>,
    config: LifecycleConfig,
    stage: watch::Sender<Stage>,
    /// Tasks that end after draining.
    servers: JoinSet<()>,
    /// The task that ends with the process.
    reloading: JoinSet<()>,
    termination: TerminationSignals,
}

impl Lifecycle {
    /// A lifecycle without servers. From now on, SIGHUP and changes of the files of `watcher`
    /// reload `source`.
    pub fn new(agent: Arc<Agent>, source: Source, config: LifecycleConfig, signals: Signals, watcher: Option<FileWatcher>) -> Self {
        let Signals { termination, hangup } = signals;
        let mut reloading = JoinSet::new();
        reloading.spawn(reload_when_due(Arc::clone(&agent), source, hangup, watcher));
        Self { agent, config, stage: watch::Sender::new(Stage::Serving), servers: JoinSet::new(), reloading, termination }
    }

    /// Serves the Unix socket.
    ///
    /// # Errors
    ///
    /// The system cannot start the thread that checks the socket's path.
    pub fn serve_socket(&mut self, server: SocketServer) -> anyhow::Result<()> {
        let served = server.serve(Arc::clone(&self.agent), self.stage.subscribe(), self.config.timeouts);
        self.servers.spawn(served.context("cannot start the thread that checks the socket's path")?);
        Ok(())
    }

    /// Serves the gRPC address.
    pub fn serve_grpc(&mut self, server: GrpcServer) {
        self.servers.spawn(server.serve(Arc::clone(&self.agent), self.stage.subscribe(), self.config.timeouts));
    }

    /// Serves until SIGTERM or SIGINT, and shuts down.
    pub async fn run(mut self) {
        notify(&[NotifyState::Ready]);
        let mut report = tokio::time::interval(REPORT_INTERVAL);
        report.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut watchdog_usec = 0;
        let mut watchdog = tokio::time::interval(match sd_notify::watchdog_enabled(false, &mut watchdog_usec) {
            true => Duration::from_micros(watchdog_usec / 2).max(Duration::from_millis(1)),
            // Ignored by systemd.
            false => REPORT_INTERVAL,
        });
        loop {
            tokio::select! {
                () = self.termination.recv() => break,
                _ = report.tick() => self.agent.publish(),
                _ = watchdog.tick() => notify(&[NotifyState::Watchdog]),
                Some(ended) = self.reloading.join_next() => log_if_panicked("reloading", ended),
            }
        }
        notify(&[NotifyState::Stopping]);
        self.shut_down().await;
    }

    async fn shut_down(mut self) {
        info!("shutting down: finishing in-flight events for at most {:?}", self.config.grace);
        self.agent.drain();
        self.stage.send_replace(Stage::Draining);
        let deadline = Instant::now() + self.config.grace;
        if tokio::time::timeout_at(deadline, join_all(&mut self.servers)).await.is_err() {
            warn!("grace period expired; rejecting new events");
            self.stage.send_replace(Stage::Closing);
            if tokio::time::timeout(FLUSH_GRACE, join_all(&mut self.servers)).await.is_err() {
                warn!("closing connections that are still open");
                // Awaited, because the socket's file is removed when its server is dropped.
                self.servers.shutdown().await;
            }
        }
        info!("shutdown complete");
    }
}

async fn join_all(servers: &mut JoinSet<()>) {
    while let Some(ended) = servers.join_next().await {
        log_if_panicked("a server", ended);
    }
}
