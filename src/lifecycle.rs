//! Serves from the first connection to the last: reports, the watchdog, reloads, handovers to
//! another process, and shutdown.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use sd_notify::NotifyState;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};
use tracing::{info, warn};
use zentinel_wasm_contract::report::REPORT_INTERVAL;
use zentinel_wasm_engine::Agent;
use zentinel_wasm_protocol::{Stage, Timeouts};

use crate::listen::admin::AdminTask;
use crate::listen::grpc::GrpcServer;
use crate::listen::socket_file::SocketIdentity;
use crate::listen::unix::{HandOver, HandOverOutcome, PausedConnection, PausedServer, SocketCommand, SocketServer};
use crate::reload::reload_when_due;
use crate::signals::{Signals, TerminationSignals};
use crate::source::Source;
use crate::systemd::notify;
use crate::takeover::control::{ControlServer, ControlSocket, Request};
use crate::takeover::handover::{Listeners, Manifest};
use crate::takeover::predecessor::{self, Inheritance};
use crate::takeover::store;
use crate::tasks::log_if_panicked;
use crate::watch::FileWatcher;

/// How long a handover waits for the events in flight on all connections. Busy connections follow
/// later, one by one, so they delay no others.
const PAUSE_TIME: Duration = Duration::from_millis(20);

/// The same if there is no later, because this process has to end before the next one starts.
const LAST_PAUSE_TIME: Duration = Duration::from_secs(2);

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
    /// Of the Unix socket.
    stage: watch::Sender<Stage>,
    /// Of the gRPC address.
    grpc_stage: watch::Sender<Stage>,
    /// The server of the Unix socket.
    socket: Option<mpsc::Sender<SocketCommand>>,
    /// The identity of its file.
    identity: Option<SocketIdentity>,
    control: Option<ControlServer>,
    /// A duplicate of the listener, for another process.
    grpc: Option<(OwnedFd, SocketAddr)>,
    admin: Option<AdminTask>,
    /// Tasks that end after draining.
    servers: JoinSet<()>,
    grpc_servers: JoinSet<()>,
    /// Receives the last connections of the process before this one.
    late: JoinSet<()>,
    /// Tasks that end with the process.
    background: JoinSet<()>,
    termination: TerminationSignals,
}

impl Lifecycle {
    /// A lifecycle without servers. From now on, SIGHUP and changes of the files of `watcher`
    /// reload `source`.
    pub fn new(agent: Arc<Agent>, source: Source, config: LifecycleConfig, signals: Signals, watcher: Option<FileWatcher>) -> Self {
        let Signals { termination, hangup } = signals;
        let mut background = JoinSet::new();
        background.spawn(reload_when_due(Arc::clone(&agent), source, hangup, watcher));
        Self {
            agent,
            config,
            stage: watch::Sender::new(Stage::Serving),
            grpc_stage: watch::Sender::new(Stage::Serving),
            socket: None,
            identity: None,
            control: None,
            grpc: None,
            admin: None,
            servers: JoinSet::new(),
            grpc_servers: JoinSet::new(),
            late: JoinSet::new(),
            background,
            termination,
        }
    }

    /// Serves the Unix socket.
    ///
    /// # Errors
    ///
    /// The system cannot start the thread that checks the socket's path.
    pub fn serve_socket(&mut self, server: SocketServer) -> anyhow::Result<()> {
        self.identity = server.identity();
        let served = server.serve_pausable(Arc::clone(&self.agent), self.stage.subscribe(), self.config.timeouts);
        let (served, commands) = served.context("cannot start the thread that checks the socket's path")?;
        self.servers.spawn(served);
        self.socket = Some(commands);
        Ok(())
    }

    /// Serves the connections that another process has handed over, with the server of the Unix
    /// socket.
    pub async fn serve_inherited(&mut self, inheritance: Inheritance) {
        let Some(commands) = &self.socket else { return };
        for connection in inheritance.connections {
            let _ = commands.send(SocketCommand::Serve(connection)).await;
        }
        if let Some(late) = inheritance.late {
            self.late.spawn(predecessor::receive_late(late, Arc::clone(&self.agent), commands.clone()));
        }
    }

    /// Serves the gRPC address.
    pub fn serve_grpc(&mut self, server: GrpcServer) {
        self.grpc = server.listener().ok().zip(server.local_addr().ok());
        self.grpc_servers.spawn(server.serve(Arc::clone(&self.agent), self.grpc_stage.subscribe(), self.config.timeouts));
    }

    /// Ends the server of the admin address with the process.
    pub fn keep_admin(&mut self, admin: AdminTask) {
        self.admin = Some(admin);
    }

    /// Lets another process take over.
    ///
    /// # Errors
    ///
    /// The system has no descriptor left.
    pub fn allow_takeover(&mut self, control: ControlSocket) -> anyhow::Result<()> {
        let serves = Manifest {
            socket: self.identity.clone(),
            grpc: self.grpc.as_ref().map(|(_, address)| *address),
            admin: self.admin.as_ref().and_then(AdminTask::address),
            ..Manifest::of_this_version()
        };
        self.control = Some(control.serve(Arc::clone(&self.agent), serves).context("cannot serve the control socket")?);
        Ok(())
    }

    /// Serves until SIGTERM or SIGINT, and shuts down, or until another process has taken over.
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
                // One takeover after the other.
                request = requested(&mut self.control), if self.late.is_empty() => {
                    if let Some(late) = self.hand_over(&request).await {
                        return self.end_after_hand_over(request, late).await;
                    }
                }
                _ = report.tick() => self.agent.publish(),
                _ = watchdog.tick() => notify(&[NotifyState::Watchdog]),
                Some(ended) = self.late.join_next() => log_if_panicked("taking over", ended),
                Some(ended) = self.background.join_next() => log_if_panicked("reloading", ended),
            }
        }
        notify(&[NotifyState::Stopping]);
        // A process that wants to take over would wait in vain.
        if let Some(control) = self.control.take() {
            control.end().await;
        }
        let deadline = Instant::now() + self.config.grace;
        if store::is_offered() && self.socket.is_some() {
            self.keep_in_store(deadline).await;
        }
        self.shut_down(deadline).await;
    }

    /// Pauses the connections of the socket, if `stage` is `Pausing`, and takes them from their
    /// server. The other result gets the outcome.
    async fn pause(&mut self, stage: Stage, time: Duration) -> Option<(PausedServer, oneshot::Sender<HandOverOutcome>)> {
        let commands = self.socket.as_ref()?;
        self.stage.send_replace(stage);
        let (paused, server) = oneshot::channel();
        let (sender, outcome) = oneshot::channel();
        let request = HandOver { deadline: Instant::now() + time, paused, outcome };
        let sent = commands.send(SocketCommand::HandOver(request)).await.is_ok();
        let server = if sent { server.await.ok() } else { None };
        if server.is_none() {
            // Its task has panicked.
            self.stage.send_replace(Stage::Serving);
        }
        Some((server?, sender))
    }

    /// Everything but the Unix socket that another process can serve.
    fn listeners(&self) -> Listeners {
        let duplicate = |listener: &Option<(OwnedFd, SocketAddr)>| {
            let (listener, address) = listener.as_ref()?;
            Some((listener.try_clone().ok()?, *address))
        };
        Listeners {
            socket: None,
            control: self.control.as_ref().and_then(ControlServer::listener),
            grpc: duplicate(&self.grpc),
            admin: self.admin.as_ref().and_then(AdminTask::listener),
        }
    }

    /// Hands over to the process that asks for it. Returns where the connections arrive that were
    /// busy. Returns None if that failed, and this process goes on.
    async fn hand_over(&mut self, request: &Request) -> Option<mpsc::Receiver<PausedConnection>> {
        let process = request.process.unwrap_or_default();
        info!("handing over to process {process}, version {}", request.version);
        if !request.same_state {
            warn!("handing over listeners only: version {} has another format for connections", request.version);
        }
        let stage = if request.same_state { Stage::Pausing } else { Stage::Serving };
        let time = if request.same_state { PAUSE_TIME } else { Duration::ZERO };
        let began = Instant::now();
        let (mut server, outcome) = self.pause(stage, time).await?;
        let listeners = Listeners { socket: server.socket.take(), ..self.listeners() };
        let count = server.connections.len();
        let handed_over = async {
            request.offer(&self.agent, &listeners, &server.connections).await?;
            // The new process announces that it is ready as soon as it may serve.
            notify(&[NotifyState::MainPid(process as u32)]);
            request.go().await
        };
        match handed_over.await {
            Ok(()) => {
                info!(busy = server.busy, "handed over {count} connections within {:?}", began.elapsed());
                let (sender, late) = mpsc::channel(1);
                let _ = outcome.send(HandOverOutcome::Done(sender));
                Some(late)
            }
            Err(error) => {
                notify(&[NotifyState::MainPid(std::process::id())]);
                let _ = outcome.send(HandOverOutcome::Failed(server.connections));
                self.stage.send_replace(Stage::Serving);
                warn!("process {process} has not taken over, so this one goes on: {error:#}");
                None
            }
        }
    }

    /// Ends when everything is served by the other process, and the grace period at the latest.
    async fn end_after_hand_over(mut self, request: Request, mut late: mpsc::Receiver<PausedConnection>) {
        self.background.shutdown().await;
        if let Some(control) = self.control.take() {
            control.release();
        }
        let admin = self.admin.take();
        let admin = tokio::spawn(async move {
            if let Some(admin) = admin {
                admin.stop().await;
            }
        });
        let deadline = Instant::now() + self.config.grace;
        self.agent.drain();
        self.grpc = None;
        self.grpc_stage.send_replace(Stage::Draining);
        if !request.same_state {
            self.stage.send_replace(Stage::Draining);
        }
        let forward = async {
            while let Some(connection) = late.recv().await {
                if let Err(error) = request.late(&self.agent, connection).await {
                    warn!("cannot hand over a connection: {error:#}");
                    return;
                }
            }
        };
        let _ = tokio::time::timeout_at(deadline, forward).await;
        request.done().await;
        drop(late);
        self.end_servers(deadline).await;
        let _ = tokio::time::timeout(FLUSH_GRACE, admin).await;
        info!("shutdown complete");
    }

    /// Leaves the connections of the socket in systemd's descriptor store, for the next process.
    async fn keep_in_store(&mut self, deadline: Instant) {
        // The next process starts when this one has ended, so gRPC comes first: connections of the
        // socket are served meanwhile.
        self.grpc_stage.send_replace(Stage::Draining);
        let drained = join_all(&mut self.grpc_servers);
        let _ = tokio::time::timeout_at(deadline, drained).await;
        let Some((mut server, outcome)) = self.pause(Stage::Pausing, LAST_PAUSE_TIME).await else { return };
        let listeners = Listeners { socket: server.socket.take(), ..self.listeners() };
        match store::put(&self.agent, &listeners, &server.connections).await {
            Ok(()) => {
                info!("left {} connections to the next process, in the descriptor store", server.connections.len());
                if server.busy > 0 {
                    warn!("closing {} connections whose events were not answered within {LAST_PAUSE_TIME:?}", server.busy);
                }
                // Nobody takes those that are still busy.
                let (nobody, _) = mpsc::channel(1);
                let _ = outcome.send(HandOverOutcome::Done(nobody));
                self.socket = None;
                join_all(&mut self.servers).await;
            }
            Err(error) => {
                warn!("cannot leave connections in the descriptor store, so they are closed: {error:#}");
                let _ = outcome.send(HandOverOutcome::Failed(server.connections));
                self.stage.send_replace(Stage::Serving);
            }
        }
    }

    async fn shut_down(mut self, deadline: Instant) {
        info!("shutting down: finishing in-flight events for at most {:?}", self.config.grace);
        self.agent.drain();
        // Clients are refused from now on, and not left waiting in the queue.
        self.grpc = None;
        self.stage.send_replace(Stage::Draining);
        self.grpc_stage.send_replace(Stage::Draining);
        self.end_servers(deadline).await;
        info!("shutdown complete");
    }

    async fn servers_ended(&mut self) {
        join_all(&mut self.servers).await;
        join_all(&mut self.grpc_servers).await;
    }

    /// Waits until all servers have ended, until the deadline at most.
    async fn end_servers(&mut self, deadline: Instant) {
        if tokio::time::timeout_at(deadline, self.servers_ended()).await.is_ok() {
            return;
        }
        warn!("grace period expired; rejecting new events");
        self.stage.send_replace(Stage::Closing);
        self.grpc_stage.send_replace(Stage::Closing);
        if tokio::time::timeout(FLUSH_GRACE, self.servers_ended()).await.is_err() {
            warn!("closing connections that are still open");
            // Awaited, because the socket's file is removed when its server is dropped.
            self.servers.shutdown().await;
            self.grpc_servers.shutdown().await;
        }
    }
}

/// Waits for a process that wants to take over.
async fn requested(control: &mut Option<ControlServer>) -> Request {
    match control {
        Some(control) => control.request().await,
        None => std::future::pending().await,
    }
}

async fn join_all(servers: &mut JoinSet<()>) {
    while let Some(ended) = servers.join_next().await {
        log_if_panicked("a server", ended);
    }
}
