//! systemd's descriptor store, which keeps a handover from the end of one process to the start of
//! the next.
//!
//! It gets one descriptor: a socket whose queue has the messages of a handover, with everything in
//! them. Reading them empties the queue, so no process gets connections from which another one has
//! read: if it crashes, they are closed with it. Until then, the next process finds them, however
//! many starts fail in between. When the unit stops for good, systemd closes the descriptor, and
//! the kernel all that is in its queue.

use std::io::{self, ErrorKind, Read as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream as StdUnixStream};
use std::time::Duration;

use anyhow::Context as _;
use listenfd::ListenFd;
use tokio::net::UnixStream;
use tokio::time::timeout;
use zentinel_wasm_engine::Agent;

use super::handover::{self, Listeners};
use super::wire;
use crate::listen::unix::PausedConnection;

/// Name of our descriptors in the store.
const NAME: &str = "zentinel-wasm-handover";

/// Time for systemd to take the descriptor: a busy system's.
const STORE_TIMEOUT: Duration = Duration::from_secs(5);

/// Time for the kernel to take the messages, which fit into the queue.
const QUEUE_TIMEOUT: Duration = Duration::from_secs(5);

/// The handovers that were in the store when the process was started.
#[derive(Default)]
pub struct Inherited(Vec<StdUnixStream>);

impl Inherited {
    /// Takes the descriptors that the service manager has passed, and removes the variables that
    /// describe them. To be called before other threads are started.
    pub fn take() -> Self {
        let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
        let mut descriptors = ListenFd::from_env();
        let ours = names.split(':').enumerate().filter(|(_, name)| *name == NAME);
        // Checked to be a Unix socket. That it is one of a pair, and no listener, makes no
        // difference here.
        let taken = ours.filter_map(|(at, _)| descriptors.take_unix_listener(at).ok().flatten());
        Self(taken.map(|socket| StdUnixStream::from(OwnedFd::from(socket))).collect())
    }

    /// The last handover. The others are closed.
    pub(super) fn into_newest(mut self) -> Option<StdUnixStream> {
        self.0.pop()
    }
}

/// Whether there is a store. systemd 254 and later set the variable to its size.
pub(crate) fn is_offered() -> bool {
    let size = std::env::var("FDSTORE").ok().and_then(|size| size.parse::<u32>().ok());
    size.is_some_and(|size| size > 0) && std::env::var_os("NOTIFY_SOCKET").is_some()
}

/// Puts everything into the store. When this returns, systemd has it.
///
/// # Errors
///
/// systemd does not take it.
pub(crate) async fn put(agent: &Agent, listeners: &Listeners, connections: &[PausedConnection]) -> anyhow::Result<()> {
    let (queue, kept) = UnixStream::pair()?;
    timeout(QUEUE_TIMEOUT, handover::send(&queue, agent, listeners, connections, true)).await.context("the queue is full")??;
    drop(queue);
    let kept = kept.into_std()?;
    let stored = store(&kept).await;
    if stored.is_err() {
        discard(&kept);
    }
    stored
}

/// Passes a queue to systemd. When this returns, systemd has it.
async fn store(queue: &StdUnixStream) -> anyhow::Result<()> {
    // systemd must not watch it: its other end is closed.
    notify_with(&format!("FDSTORE=1\nFDNAME={NAME}\nFDPOLL=0"), queue.as_fd())?;
    // systemd closes this one when it has read the messages before.
    let (barrier, closed) = StdUnixStream::pair()?;
    notify_with("BARRIER=1", closed.as_fd())?;
    drop(closed);
    barrier.set_nonblocking(true)?;
    let barrier = UnixStream::from_std(barrier)?;
    timeout(STORE_TIMEOUT, barrier.readable()).await.context("systemd does not answer")??;
    match barrier.into_std()?.read(&mut [0]) {
        Ok(0) => Ok(()),
        Ok(_) => Err(io::Error::from(ErrorKind::InvalidData).into()),
        Err(error) => Err(error.into()),
    }
}

/// Empties a queue that systemd may have or get nevertheless, because this process goes on with its
/// connections.
fn discard(mut queue: &StdUnixStream) {
    // A read without room for descriptors closes them.
    while queue.read(&mut [0; 64]).is_ok_and(|read| read > 0) {}
    remove();
}

/// Removes everything from the store.
pub(super) fn remove() {
    let _ = send_notification(&format!("FDSTOREREMOVE=1\nFDNAME={NAME}"), &[]);
}

fn notify_with(message: &str, descriptor: BorrowedFd<'_>) -> anyhow::Result<()> {
    send_notification(message, &[descriptor]).context("cannot notify systemd")
}

/// Sends a message to the service manager, if there is one.
fn send_notification(message: &str, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return Ok(()) };
    let socket = UnixDatagram::unbound()?;
    connect(&socket, &path)?;
    wire::send_with(socket.as_fd(), message.as_bytes(), descriptors).map(drop)
}

#[cfg(target_os = "linux")]
fn connect(socket: &UnixDatagram, path: &std::ffi::OsStr) -> io::Result<()> {
    use std::os::linux::net::SocketAddrExt as _;
    use std::os::unix::ffi::OsStrExt as _;
    use std::os::unix::net::SocketAddr;

    match path.as_bytes() {
        [b'@', name @ ..] => socket.connect_addr(&SocketAddr::from_abstract_name(name)?),
        _ => socket.connect(path),
    }
}

#[cfg(not(target_os = "linux"))]
fn connect(socket: &UnixDatagram, path: &std::ffi::OsStr) -> io::Result<()> {
    socket.connect(path)
}
