//! What one process hands over to another.

use std::fs::File;
use std::io::{self, ErrorKind, Write as _};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::net::UnixStream;
use tracing::warn;
use zentinel_wasm_bounds::run_blocking_if_large;
use zentinel_wasm_engine::{Agent, LiveRequests};
use zentinel_wasm_protocol::socket::{ConnectionState, Paused};

use super::wire::{self, Kind, MAX_DESCRIPTORS};
use crate::listen::socket_file::SocketIdentity;
use crate::listen::unix::PausedConnection;

/// Version of [`State`] and of everything in it. Processes with different versions hand over
/// listeners only.
pub(crate) const STATE_VERSION: u32 = 1;

/// Received bytes of all connections that are handed over, in bytes. An idle connection has none,
/// and a busy one a few kilobytes; further connections are closed.
const MAX_RECEIVED: usize = 256 << 20;

/// Largest state, in bytes: [`MAX_RECEIVED`], all bodies in collection, all contexts, and room for
/// their encoding.
const MAX_STATE: u64 = 768 << 20;

/// Largest manifest, in bytes: a configuration of a proxy, and room for the rest.
const MAX_MANIFEST: usize = 8 << 20;

/// Most connections of one handover: more than a socket has.
const MAX_CONNECTIONS: usize = 4096;

/// What is handed over, in a form that other versions of the agent understand: they ignore unknown
/// fields.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Manifest {
    /// Version of the agent.
    pub(crate) version: String,
    /// See [`STATE_VERSION`]. 0 if there is no state.
    pub(crate) state_version: u32,
    /// The Unix socket.
    pub(crate) socket: Option<SocketIdentity>,
    /// The socket on which the agent is asked for a handover.
    pub(crate) control: Option<SocketIdentity>,
    /// The gRPC address.
    pub(crate) grpc: Option<SocketAddr>,
    /// The admin address.
    pub(crate) admin: Option<SocketAddr>,
    /// Number of connections of the Unix socket.
    pub(crate) connections: usize,
    /// The proxy's last configuration.
    pub(crate) config: Value,
}

/// The state of the connections, in their order.
#[derive(Serialize, Deserialize)]
struct State {
    connections: Vec<ConnectionState>,
    requests: LiveRequests,
}

/// The listeners of a handover.
#[derive(Debug, Default)]
pub(crate) struct Listeners {
    pub(crate) socket: Option<(OwnedFd, SocketIdentity)>,
    pub(crate) control: Option<(OwnedFd, SocketIdentity)>,
    pub(crate) grpc: Option<(OwnedFd, SocketAddr)>,
    pub(crate) admin: Option<(OwnedFd, SocketAddr)>,
}

impl Manifest {
    /// An empty one of this version of the agent.
    pub(crate) fn of_this_version() -> Self {
        Self { version: env!("CARGO_PKG_VERSION").into(), state_version: STATE_VERSION, ..Self::default() }
    }
}

impl Listeners {
    /// What they are.
    fn manifest(&self) -> Manifest {
        Manifest {
            socket: self.socket.as_ref().map(|(_, identity)| identity.clone()),
            control: self.control.as_ref().map(|(_, identity)| identity.clone()),
            grpc: self.grpc.as_ref().map(|(_, address)| *address),
            admin: self.admin.as_ref().map(|(_, address)| *address),
            ..Manifest::of_this_version()
        }
    }

    fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let sockets = [self.socket.as_ref(), self.control.as_ref()].into_iter().flatten().map(|(listener, _)| listener.as_fd());
        let addresses = [self.grpc.as_ref(), self.admin.as_ref()].into_iter().flatten().map(|(listener, _)| listener.as_fd());
        sockets.chain(addresses)
    }
}

/// Sends listeners and connections of `agent`, which must not change meanwhile. Without `state`,
/// no connections are sent. The first handover between two processes is `with_contexts`.
pub(crate) async fn send(
    stream: &UnixStream,
    agent: &Agent,
    listeners: &Listeners,
    connections: &[PausedConnection],
    with_contexts: bool,
) -> anyhow::Result<()> {
    let mut received = 0;
    let fits = |connection: &&PausedConnection| {
        received += connection.state().size();
        received <= MAX_RECEIVED
    };
    let sent: Vec<&PausedConnection> = connections.iter().take_while(fits).collect();
    if sent.len() < connections.len() {
        warn!("{} connections have received too much to be handed over", connections.len() - sent.len());
    }
    let numbers: Vec<u64> = sent.iter().map(|connection| connection.number()).collect();
    let state = State {
        connections: sent.iter().map(|connection| connection.state().clone()).collect(),
        requests: agent.carry(&numbers, with_contexts),
    };
    let manifest = Manifest { connections: sent.len(), config: agent.proxy_config(), ..listeners.manifest() };
    // Large states are written off the other tasks.
    let memory = run_blocking_if_large(received, || memory_of(&manifest, &postcard::to_allocvec(&state)?))?;
    let descriptors: Vec<BorrowedFd<'_>> = listeners.descriptors().chain(sent.iter().map(|connection| connection.as_fd())).collect();
    wire::send(stream, Kind::Handover, b"", &[memory.as_fd()]).await?;
    for descriptors in descriptors.chunks(MAX_DESCRIPTORS) {
        wire::send(stream, Kind::Descriptors, b"", descriptors).await?;
    }
    Ok(())
}

/// Sealed memory with the length of the manifest, the manifest, and the state.
fn memory_of(manifest: &Manifest, state: &[u8]) -> anyhow::Result<OwnedFd> {
    let manifest = serde_json::to_vec(manifest)?;
    let mut memory = File::from(new_memory().context("cannot create memory for the state")?);
    memory.write_all(&(manifest.len() as u32).to_be_bytes())?;
    memory.write_all(&manifest)?;
    memory.write_all(state)?;
    seal(&memory)?;
    Ok(memory.into())
}

#[cfg(target_os = "linux")]
fn new_memory() -> io::Result<OwnedFd> {
    use rustix::fs::{MemfdFlags, memfd_create};

    Ok(memfd_create("zentinel-wasm-handover", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?)
}

#[cfg(not(target_os = "linux"))]
fn new_memory() -> io::Result<OwnedFd> {
    Err(ErrorKind::Unsupported.into())
}

#[cfg(target_os = "linux")]
fn seal(memory: &File) -> io::Result<()> {
    use rustix::fs::{SealFlags, fcntl_add_seals};

    Ok(fcntl_add_seals(memory, SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE)?)
}

#[cfg(not(target_os = "linux"))]
fn seal(_: &File) -> io::Result<()> {
    Err(ErrorKind::Unsupported.into())
}

/// Reads the manifest from the memory of a handover.
pub(crate) fn manifest_of(memory: &File) -> anyhow::Result<(Manifest, u64)> {
    let mut len = [0; 4];
    memory.read_exact_at(&mut len, 0)?;
    let len = u32::from_be_bytes(len) as usize;
    if len > MAX_MANIFEST {
        bail!("the description of the handover has {len} bytes, the limit is {MAX_MANIFEST}");
    }
    let mut manifest = vec![0; len];
    memory.read_exact_at(&mut manifest, 4)?;
    let manifest: Manifest = serde_json::from_slice(&manifest).context("cannot read the description of the handover")?;
    if manifest.connections > MAX_CONNECTIONS {
        bail!("{} connections are handed over, the limit is {MAX_CONNECTIONS}", manifest.connections);
    }
    Ok((manifest, 4 + len as u64))
}

/// A received handover.
pub(crate) struct Handover {
    pub(crate) manifest: Manifest,
    pub(crate) listeners: Listeners,
    connections: Vec<OwnedFd>,
    state: Vec<u8>,
}

impl Handover {
    /// Receives a handover whose first message has the descriptors `memory`.
    ///
    /// # Errors
    ///
    /// It is incomplete or not valid.
    pub(super) async fn receive(stream: &UnixStream, memory: Vec<OwnedFd>) -> anyhow::Result<Self> {
        let [memory] = <[OwnedFd; 1]>::try_from(memory).map_err(|_| io::Error::from(ErrorKind::InvalidData))?;
        let memory = File::from(memory);
        let (manifest, at) = manifest_of(&memory)?;
        let size = memory.metadata()?.len();
        if size > MAX_STATE {
            bail!("the state that is handed over has {size} bytes, the limit is {MAX_STATE}");
        }
        let mut state = vec![0; size.saturating_sub(at) as usize];
        run_blocking_if_large(state.len(), || memory.read_exact_at(&mut state, at))?;
        let count = [manifest.socket.is_some(), manifest.control.is_some(), manifest.grpc.is_some(), manifest.admin.is_some()];
        let count = count.into_iter().map(usize::from).sum::<usize>() + manifest.connections;
        let mut descriptors = Vec::with_capacity(count);
        while descriptors.len() < count {
            let message = wire::receive(stream).await?;
            if message.kind != Kind::Descriptors || message.descriptors.is_empty() {
                bail!("descriptors are missing in the handover");
            }
            descriptors.extend(message.descriptors);
        }
        let mut descriptors = descriptors.into_iter();
        let listeners = Listeners {
            socket: manifest.socket.clone().and_then(|identity| Some((descriptors.next()?, identity))),
            control: manifest.control.clone().and_then(|identity| Some((descriptors.next()?, identity))),
            grpc: manifest.grpc.and_then(|address| Some((descriptors.next()?, address))),
            admin: manifest.admin.and_then(|address| Some((descriptors.next()?, address))),
        };
        Ok(Self { manifest, listeners, connections: descriptors.collect(), state })
    }

    /// Makes connections of `agent` of those that were handed over, and gives it the state of their
    /// requests. To be called before the agent gets events, if the handover has contexts.
    ///
    /// # Errors
    ///
    /// The state cannot be used.
    pub(crate) fn adopt_connections(&mut self, agent: &Arc<Agent>) -> anyhow::Result<Vec<PausedConnection>> {
        if self.manifest.state_version != STATE_VERSION {
            return Ok(Vec::new());
        }
        let state = std::mem::take(&mut self.state);
        let state: State =
            run_blocking_if_large(state.len(), || postcard::from_bytes(&state)).context("cannot read the state of the connections")?;
        let State { connections: states, requests } = state;
        let mut connections = Vec::with_capacity(states.len());
        for (descriptor, state) in std::mem::take(&mut self.connections).into_iter().zip(states) {
            let stream = StdUnixStream::from(descriptor);
            stream.set_nonblocking(true)?;
            connections.push(Paused::new(UnixStream::from_std(stream)?, state, Arc::clone(agent)));
        }
        let numbers: Vec<u64> = connections.iter().map(Paused::number).collect();
        agent.adopt(requests, &numbers)?;
        Ok(connections)
    }
}
