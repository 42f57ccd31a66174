//! The control socket: a running agent hands over to another process that asks for it.

use std::convert::Infallible;
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::bail;
use serde::{Deserialize, Serialize};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use zentinel_wasm_bounds::log_limited;
use zentinel_wasm_engine::Agent;

use super::handover::{self, Listeners, Manifest, STATE_VERSION};
use super::wire::{self, Kind, Message};
use crate::listen::socket_file::{SocketFile, SocketIdentity};
use crate::listen::unix::PausedConnection;

/// Only the agent's user may connect. The other side's user is checked as well.
const MODE: u32 = 0o600;

/// Time for each message that needs no work.
pub(super) const MESSAGE_TIMEOUT: Duration = Duration::from_secs(5);

/// Time for the new process between its introduction and its request: it may have to apply the
/// proxy's configuration, which takes a few seconds. Nothing waits for it meanwhile.
const TAKE_TIMEOUT: Duration = Duration::from_secs(30);

/// Time for the new process to receive everything and confirm it. Clients are waiting.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(5);

/// Pause after the system has refused a connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The path of the control socket of an agent that serves `socket`.
pub(super) fn path_for(socket: &Path) -> PathBuf {
    let mut path = OsString::from(socket);
    path.push(".takeover");
    path.into()
}

/// What the new process says about itself.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Hello {
    /// Version of the agent.
    pub(super) version: String,
    /// See [`STATE_VERSION`].
    pub(super) state_version: u32,
}

/// A bound control socket. Its file is removed on drop.
pub struct ControlSocket {
    file: SocketFile,
    listener: UnixListener,
}

impl ControlSocket {
    /// Binds the control socket of an agent that serves `socket`.
    ///
    /// # Errors
    ///
    /// Another process serves the path, or the system refuses to bind it.
    pub fn bind(socket: &Path) -> anyhow::Result<Self> {
        let (file, listener) = SocketFile::bind_or_replace_stale(&path_for(socket), Some(MODE))?;
        Ok(Self { file, listener })
    }

    /// The control socket that another process has bound.
    pub(super) fn adopt(identity: SocketIdentity, listener: OwnedFd) -> anyhow::Result<Self> {
        let (file, listener) = SocketFile::adopt(identity, listener, Some(MODE))?;
        Ok(Self { file, listener })
    }

    /// Leaves the control socket to the process that serves it.
    pub(super) fn release(self) {
        self.file.release();
    }

    /// Answers other processes, and passes on who wants to take over.
    pub(crate) fn serve(self, agent: Arc<Agent>, serves: Manifest) -> std::io::Result<ControlServer> {
        let Self { file, listener } = self;
        let duplicate = rustix::io::fcntl_dupfd_cloexec(&listener, 0)?;
        let (sender, requests) = mpsc::channel(1);
        let task = tokio::spawn(answer_all(listener, agent, serves, sender));
        Ok(ControlServer { file, listener: duplicate, requests, task })
    }
}

/// A served control socket.
pub(crate) struct ControlServer {
    file: SocketFile,
    listener: OwnedFd,
    requests: mpsc::Receiver<Request>,
    task: JoinHandle<()>,
}

impl ControlServer {
    /// Waits for a process that wants to take over.
    pub(crate) async fn request(&mut self) -> Request {
        match self.requests.recv().await {
            Some(request) => request,
            // The task has panicked.
            None => std::future::pending().await,
        }
    }

    /// The socket and the identity of its file, for another process.
    pub(crate) fn listener(&self) -> Option<(OwnedFd, SocketIdentity)> {
        self.listener.try_clone().ok().zip(self.file.identity())
    }

    /// Closes the control socket. Processes that have asked are refused.
    pub(crate) async fn end(self) {
        let Self { file, listener, requests, task } = self;
        task.abort();
        // The file goes before the socket, because its inode number identifies it.
        drop(file);
        drop((listener, requests));
        let _ = task.await;
    }

    /// Leaves the control socket to another process.
    pub(crate) fn release(self) {
        self.task.abort();
        self.file.release();
    }
}

/// Answers one process at a time: nothing that it asks for takes long.
async fn answer_all(listener: UnixListener, agent: Arc<Agent>, serves: Manifest, requests: mpsc::Sender<Request>) {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                log_limited!(warn, "cannot accept a connection on the control socket: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        match answer(stream, &agent, &serves).await {
            Ok(Some((request, ended))) => {
                let _ = requests.send(request).await;
                // Meanwhile, others wait in the queue for whoever serves it next.
                let _ = ended.await;
            }
            Ok(None) => {}
            Err(error) => log_limited!(warn, "a process asked for a takeover in vain: {error:#}"),
        }
    }
}

/// Returns the process's request and what ends with it, or None if it only asked what is served.
async fn answer(stream: UnixStream, agent: &Agent, serves: &Manifest) -> anyhow::Result<Option<(Request, oneshot::Receiver<Infallible>)>> {
    let process = check_peer(&stream)?;
    let Message { kind: Kind::Hello, payload, .. } = timeout(MESSAGE_TIMEOUT, wire::receive(&stream)).await?? else {
        bail!("its first message is no introduction");
    };
    let hello: Hello = serde_json::from_slice(&payload)?;
    let manifest = Manifest { config: agent.proxy_config(), ..serves.clone() };
    let welcome = serde_json::to_vec(&manifest)?;
    timeout(MESSAGE_TIMEOUT, wire::send(&stream, Kind::Welcome, &welcome, &[])).await??;
    match timeout(TAKE_TIMEOUT, wire::receive(&stream)).await? {
        Ok(Message { kind: Kind::Take, .. }) => {
            let same_state = hello.state_version == STATE_VERSION;
            let (pending, ended) = oneshot::channel();
            Ok(Some((Request { stream, process, version: hello.version, same_state, _pending: pending }, ended)))
        }
        Ok(_) => bail!("an unexpected message"),
        // It only wanted to know what is served.
        Err(_) => Ok(None),
    }
}

/// Checks that the other process belongs to the same user. Returns its id.
pub(super) fn check_peer(stream: &UnixStream) -> anyhow::Result<Option<i32>> {
    let peer = stream.peer_cred()?;
    let own = rustix::process::geteuid().as_raw();
    if peer.uid() != own {
        bail!("the other process belongs to the user {}, this one to {own}", peer.uid());
    }
    Ok(peer.pid())
}

/// A process that wants to take over.
pub(crate) struct Request {
    stream: UnixStream,
    /// Its id.
    pub(crate) process: Option<i32>,
    /// Its version.
    pub(crate) version: String,
    /// Whether it can take over connections. Otherwise it gets the listeners only.
    pub(crate) same_state: bool,
    /// The control socket accepts no other process as long as this exists.
    _pending: oneshot::Sender<Infallible>,
}

impl Request {
    /// Hands everything over. When this returns, the other process has it all, and may serve as
    /// soon as it is [told to](Self::go).
    ///
    /// # Errors
    ///
    /// The other process does not confirm it in time. It will not serve then.
    pub(crate) async fn offer(&self, agent: &Agent, listeners: &Listeners, connections: &[PausedConnection]) -> anyhow::Result<()> {
        let offered = async {
            handover::send(&self.stream, agent, listeners, connections, self.same_state).await?;
            match wire::receive(&self.stream).await? {
                Message { kind: Kind::Confirmed, .. } => Ok(()),
                Message { kind: Kind::Refused, payload, .. } => bail!("{}", String::from_utf8_lossy(&payload)),
                _ => bail!("an unexpected message"),
            }
        };
        match timeout(CONFIRM_TIMEOUT, offered).await {
            Ok(result) => result,
            Err(_) => bail!("not confirmed within {CONFIRM_TIMEOUT:?}"),
        }
    }

    /// Allows the other process to serve. From now on, this process must not.
    ///
    /// # Errors
    ///
    /// The other process is gone, and has not served.
    pub(crate) async fn go(&self) -> anyhow::Result<()> {
        Ok(timeout(MESSAGE_TIMEOUT, wire::send(&self.stream, Kind::Go, b"", &[])).await??)
    }

    /// Hands over a connection that was not paused in time.
    ///
    /// # Errors
    ///
    /// The other process is gone.
    pub(crate) async fn late(&self, agent: &Agent, connection: PausedConnection) -> anyhow::Result<()> {
        let none = Listeners::default();
        let sent = handover::send(&self.stream, agent, &none, std::slice::from_ref(&connection), false);
        timeout(MESSAGE_TIMEOUT, sent).await?
    }

    /// Tells the other process that nothing is left.
    pub(crate) async fn done(self) {
        let _ = timeout(MESSAGE_TIMEOUT, wire::send(&self.stream, Kind::Done, b"", &[])).await;
    }
}
