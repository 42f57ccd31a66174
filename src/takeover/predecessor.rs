//! The process that served before, and what is taken over from it.

use std::fs::File;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tracing::{info, warn};
use zentinel_wasm_contract::Handler as _;
use zentinel_wasm_engine::{Agent, SettingLimits};

use super::control::{ControlSocket, Hello, MESSAGE_TIMEOUT, check_peer, path_for};
use super::handover::{Handover, Listeners, Manifest, STATE_VERSION, manifest_of};
use super::store::{self, Inherited};
use super::wire::{self, Kind, Message};
use crate::listen::admin::AdminServer;
use crate::listen::grpc::GrpcServer;
use crate::listen::tls::ReloadableTls;
use crate::listen::unix::{PausedConnection, SocketCommand, SocketServer};

/// Time for the old process to pause its connections and hand over everything: longer than it waits
/// for busy connections.
const HANDOVER_TIMEOUT: Duration = Duration::from_secs(10);

/// Time for the connections that were busy: the longest grace period of the old process, in which
/// it waits for them, and a while for the last one.
const LATE_TIMEOUT: Duration = Duration::from_millis(SettingLimits::GRACE_MS + 10_000);

/// The process that served before, if there was one and something can be taken over from it.
pub struct Predecessor {
    found: Found,
    /// What it serves.
    manifest: Manifest,
}

enum Found {
    Nobody,
    /// A running process, with this control socket.
    Process(PathBuf),
    /// A process that has ended. What it handed over is in this socket.
    Store(StdUnixStream),
}

/// What the new process wants to serve.
pub struct Wanted<'a> {
    /// The Unix socket.
    pub socket: &'a Path,
    /// Its permissions.
    pub socket_mode: Option<u32>,
    /// The gRPC address.
    pub grpc: Option<SocketAddr>,
    /// The TLS configuration of the gRPC address.
    pub tls: Option<ReloadableTls>,
    /// The admin address.
    pub admin: Option<SocketAddr>,
    /// Whether other processes may take over from this one.
    pub takeover: bool,
}

impl Predecessor {
    /// Finds the predecessor: in the descriptor store, or, with `wanted.takeover`, a process that
    /// serves the socket.
    ///
    /// # Errors
    ///
    /// A process serves the socket, and nothing can be taken over from it.
    pub async fn find(inherited: Inherited, wanted: &Wanted<'_>) -> anyhow::Result<Self> {
        if let Some(queue) = inherited.into_newest() {
            match stored_manifest(&queue) {
                Ok(manifest) => return Ok(Self { found: Found::Store(queue), manifest }),
                Err(error) => {
                    warn!("nothing to take over from the descriptor store: {error:#}");
                    store::remove();
                }
            }
        }
        if wanted.takeover {
            let path = path_for(wanted.socket);
            if let Some((_, manifest)) = greet(&path).await? {
                return Ok(Self { found: Found::Process(path), manifest });
            }
        }
        Ok(Self { found: Found::Nobody, manifest: Manifest::default() })
    }

    /// Whether the Unix socket at `path` is taken over.
    pub fn has_socket(&self, path: &Path) -> bool {
        self.manifest.socket.as_ref().is_some_and(|identity| identity.path() == path)
    }

    /// Whether the gRPC address is taken over.
    pub fn has_grpc(&self, address: SocketAddr) -> bool {
        is_same(address, self.manifest.grpc)
    }

    /// Whether the admin address is taken over.
    pub fn has_admin(&self, address: SocketAddr) -> bool {
        is_same(address, self.manifest.admin)
    }

    /// Takes over everything. The old process goes on if this fails.
    ///
    /// # Errors
    ///
    /// Nothing is taken over.
    pub async fn take(self, agent: &Arc<Agent>, wanted: &Wanted<'_>) -> anyhow::Result<Inheritance> {
        match self.found {
            Found::Nobody => Ok(Inheritance::default()),
            Found::Process(path) => {
                let context = || format!("cannot take over from the agent that serves `{}`, which goes on", wanted.socket.display());
                configure(agent, &self.manifest).await.with_context(context)?;
                take_from_process(&path, agent, wanted).await.with_context(context)
            }
            Found::Store(queue) => {
                let configured = configure(agent, &self.manifest).await;
                let taken = take_from_store(queue, agent, wanted).await;
                store::remove();
                let mut taken = taken.unwrap_or_else(|error| {
                    warn!("cannot take over connections from the descriptor store, so they are closed: {error:#}");
                    Inheritance::default()
                });
                if let Err(error) = configured {
                    // The proxies connect again and send their configuration, which is rejected
                    // then, or corrected.
                    warn!("closing the connections that were taken over: {error:#}");
                    taken.connections.clear();
                }
                Ok(taken)
            }
        }
    }
}

/// What was taken over.
#[derive(Default)]
pub struct Inheritance {
    /// The Unix socket.
    pub socket: Option<SocketServer>,
    /// The gRPC address.
    pub grpc: Option<GrpcServer>,
    /// The admin address.
    pub admin: Option<AdminServer>,
    /// The control socket.
    pub control: Option<ControlSocket>,
    /// Connections of the Unix socket.
    pub(crate) connections: Vec<PausedConnection>,
    /// On which the others arrive.
    pub(crate) late: Option<UnixStream>,
}

fn is_same(wanted: SocketAddr, served: Option<SocketAddr>) -> bool {
    served.is_some_and(|served| wanted.ip() == served.ip() && (wanted.port() == 0 || wanted.port() == served.port()))
}

/// Applies the configuration of the predecessor's proxy, so the first event is decided with it.
async fn configure(agent: &Arc<Agent>, manifest: &Manifest) -> anyhow::Result<()> {
    if manifest.config == agent.proxy_config() {
        return Ok(());
    }
    let applied = agent.configure(manifest.config.clone()).await;
    applied.map_err(|reason| anyhow!("the proxy's configuration cannot be applied: {reason}"))
}

/// The manifest of a handover in the descriptor store, which stays there.
fn stored_manifest(queue: &StdUnixStream) -> anyhow::Result<Manifest> {
    let mut memory = wire::peek_descriptors(queue.as_fd())?;
    let memory = memory.pop().context("it is empty")?;
    Ok(manifest_of(&File::from(memory))?.0)
}

async fn take_from_store(queue: StdUnixStream, agent: &Arc<Agent>, wanted: &Wanted<'_>) -> anyhow::Result<Inheritance> {
    queue.set_nonblocking(true)?;
    let queue = UnixStream::from_std(queue)?;
    let handover = timeout(MESSAGE_TIMEOUT, receive(&queue)).await??;
    let taken = adopt(handover, agent, wanted)?;
    info!("took over {} connections from the descriptor store", taken.connections.len());
    Ok(taken)
}

async fn take_from_process(path: &Path, agent: &Arc<Agent>, wanted: &Wanted<'_>) -> anyhow::Result<Inheritance> {
    let Some((stream, manifest)) = greet(path).await? else {
        info!("the agent to take over from has ended, so there is nothing to take over");
        return Ok(Inheritance::default());
    };
    // It may have changed since.
    configure(agent, &manifest).await?;
    timeout(MESSAGE_TIMEOUT, wire::send(&stream, Kind::Take, b"", &[])).await??;
    let handover = timeout(HANDOVER_TIMEOUT, receive(&stream)).await.context("no answer in time")??;
    let configured = configure(agent, &handover.manifest).await;
    let taken = match configured.and_then(|()| adopt(handover, agent, wanted)) {
        Ok(taken) => taken,
        Err(error) => {
            let _ = timeout(MESSAGE_TIMEOUT, wire::send(&stream, Kind::Refused, format!("{error:#}").as_bytes(), &[])).await;
            return Err(error);
        }
    };
    match timeout(MESSAGE_TIMEOUT, confirm(&stream)).await.map_err(anyhow::Error::from).flatten() {
        Ok(()) => {
            info!("took over {} connections", taken.connections.len());
            Ok(Inheritance { late: Some(stream), ..taken })
        }
        Err(error) => {
            // The files belong to the old process.
            taken.socket.into_iter().for_each(SocketServer::release);
            taken.control.into_iter().for_each(ControlSocket::release);
            Err(error)
        }
    }
}

/// Confirms that everything is here, and waits for the permission to serve.
async fn confirm(stream: &UnixStream) -> anyhow::Result<()> {
    wire::send(stream, Kind::Confirmed, b"", &[]).await?;
    match wire::receive(stream).await? {
        Message { kind: Kind::Go, .. } => Ok(()),
        _ => bail!("an unexpected message"),
    }
}

/// Connects to a running process and asks what it serves. Returns None if there is none.
async fn greet(path: &Path) -> anyhow::Result<Option<(UnixStream, Manifest)>> {
    let stream = match UnixStream::connect(path).await {
        Ok(stream) => stream,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("cannot connect to `{}`", path.display())),
    };
    let context = || format!("cannot take over from the process that serves `{}`", path.display());
    check_peer(&stream).with_context(context)?;
    let hello = Hello { version: env!("CARGO_PKG_VERSION").into(), state_version: STATE_VERSION };
    let greeted = async {
        wire::send(&stream, Kind::Hello, &serde_json::to_vec(&hello)?, &[]).await?;
        match wire::receive(&stream).await? {
            Message { kind: Kind::Welcome, payload, .. } => Ok(serde_json::from_slice::<Manifest>(&payload)?),
            Message { kind: Kind::Refused, payload, .. } => bail!("{}", String::from_utf8_lossy(&payload)),
            _ => bail!("an unexpected message"),
        }
    };
    let manifest = timeout(MESSAGE_TIMEOUT, greeted).await.map_err(anyhow::Error::from).flatten().with_context(context)?;
    if manifest.state_version != STATE_VERSION {
        warn!("the running agent, version {}, hands over its listeners only: its connections have another format", manifest.version);
    }
    Ok(Some((stream, manifest)))
}

async fn receive(stream: &UnixStream) -> anyhow::Result<Handover> {
    match wire::receive(stream).await? {
        Message { kind: Kind::Handover, descriptors, .. } => Handover::receive(stream, descriptors).await,
        Message { kind: Kind::Refused, payload, .. } => bail!("{}", String::from_utf8_lossy(&payload)),
        _ => bail!("an unexpected message"),
    }
}

/// Makes servers and connections of a handover. If that fails, the files of its sockets stay.
fn adopt(mut handover: Handover, agent: &Arc<Agent>, wanted: &Wanted<'_>) -> anyhow::Result<Inheritance> {
    let connections = handover.adopt_connections(agent)?;
    let Listeners { socket, control, grpc, admin } = handover.listeners;
    let grpc = grpc.filter(|(_, address)| wanted.grpc.is_some_and(|wanted| is_same(wanted, Some(*address))));
    let grpc = grpc.map(|(listener, _)| GrpcServer::adopt(listener, wanted.tls.clone())).transpose()?;
    let admin = admin.filter(|(_, address)| wanted.admin.is_some_and(|wanted| is_same(wanted, Some(*address))));
    let admin = admin.map(|(listener, _)| AdminServer::adopt(listener)).transpose()?;
    let socket = match socket {
        Some((listener, identity)) => {
            let is_wanted = identity.path() == wanted.socket;
            // A socket that is not wanted any more is removed.
            Some(SocketServer::adopt(identity, listener, wanted.socket_mode.filter(|_| is_wanted))?).filter(|_| is_wanted)
        }
        None => None,
    };
    let control =
        match control.map(|(listener, identity)| (identity.path() == path_for(wanted.socket), ControlSocket::adopt(identity, listener))) {
            Some((is_wanted, Ok(control))) => Some(control).filter(|_| is_wanted && wanted.takeover),
            Some((_, Err(error))) => {
                socket.into_iter().for_each(SocketServer::release);
                return Err(error);
            }
            None => None,
        };
    Ok(Inheritance { socket, grpc, admin, control, connections, late: None })
}

/// Receives the connections that were busy when the others were handed over, until there are no
/// more.
pub(crate) async fn receive_late(stream: UnixStream, agent: Arc<Agent>, server: mpsc::Sender<SocketCommand>) {
    loop {
        match timeout(LATE_TIMEOUT, receive_one(&stream, &agent)).await {
            Ok(Ok(connections)) if !connections.is_empty() => {
                for connection in connections {
                    let _ = server.send(SocketCommand::Serve(connection)).await;
                }
            }
            Ok(Ok(_)) => return,
            Ok(Err(error)) => return warn!("the old process has not handed over its last connections: {error:#}"),
            Err(_) => return,
        }
    }
}

async fn receive_one(stream: &UnixStream, agent: &Arc<Agent>) -> anyhow::Result<Vec<PausedConnection>> {
    match wire::receive(stream).await? {
        Message { kind: Kind::Done, .. } => Ok(Vec::new()),
        Message { kind: Kind::Handover, descriptors, .. } => Handover::receive(stream, descriptors).await?.adopt_connections(agent),
        _ => bail!("an unexpected message"),
    }
}
