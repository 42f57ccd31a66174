//! The file of the Unix socket: who may have its path, and what keeps it there.

use std::convert::Infallible;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;
use std::{fs, thread};

use anyhow::{Context as _, anyhow, bail};
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::net::UnixListener;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tracing::info;
use zentinel_wasm_bounds::log_limited;
use zentinel_wasm_engine::agent::Agent;

/// Clients that may wait to be accepted: as many as may be connected.
const BACKLOG: i32 = 1024;

/// How often to check that the socket's path still leads to it. A proxy tries to connect again for
/// minutes, so that it finds the socket soon after something has removed it; a look costs one
/// system call.
const PATH_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Checks between two questions whether another process still serves the path: each is a connection
/// that it has to accept.
const CHECKS_WHILE_SERVED: u32 = 10;

/// The file of a socket, by which it is known again.
pub(super) struct SocketFile {
    pub(super) path: PathBuf,
    mode: Option<u32>,
    identity: Option<Identity>,
}

/// Device and inode of what is at a path.
type Identity = (u64, u64);

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Somebody else may have put another one there.
        if self.is_in_place() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl SocketFile {
    /// Binds `path`, with the permissions `mode` if given.
    ///
    /// # Errors
    ///
    /// Another process serves the path, it is not a socket, or the system refuses it. A stale socket is replaced, anything else left alone.
    pub(super) fn open(path: &Path, mode: Option<u32>) -> anyhow::Result<(Self, UnixListener)> {
        let mut file = Self { path: path.to_owned(), mode, identity: None };
        if socket_at(path)?.is_some() {
            remove_stale(path)?;
        }
        let listener = UnixListener::from_std(file.bind()?)?;
        Ok((file, listener))
    }

    fn is_in_place(&self) -> bool {
        self.identity.is_some() && identity(&self.path) == self.identity
    }

    /// Binds the path, at which nothing must be.
    fn bind(&mut self) -> anyhow::Result<StdUnixListener> {
        let listener = bind(&self.path, self.mode).with_context(|| format!("cannot serve the socket `{}`", self.path.display()))?;
        self.identity = identity(&self.path);
        Ok(listener)
    }
}

fn identity(path: &Path) -> Option<Identity> {
    fs::symlink_metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

/// The socket's file, in the hands of a thread that keeps it in its place.
pub(super) struct KeeperHandle {
    /// The sockets that were bound because the one before was lost.
    pub(super) bound: mpsc::Receiver<UnixListener>,
    /// Ends the thread when dropped.
    end: std::sync::mpsc::Sender<Infallible>,
    /// Closed when the thread has removed the file.
    ended: oneshot::Receiver<Infallible>,
}

impl KeeperHandle {
    /// Removes the file, and waits until that is done.
    pub(super) async fn end(self) {
        drop((self.bound, self.end));
        let _ = self.ended.await;
    }
}

/// Starts the thread that checks whether `file` is in its place. A thread of its own, because
/// looking at a file may block.
pub(super) fn keep(file: SocketFile, agent: Arc<Agent>) -> io::Result<KeeperHandle> {
    let (listeners, bound) = mpsc::channel(1);
    let (end, ends) = std::sync::mpsc::channel();
    let (done, ended) = oneshot::channel();
    let mut keeper = Keeper { file, agent, listeners, runtime: Handle::current(), foreign: None, problem: None };
    thread::Builder::new().name("socket".into()).spawn(move || {
        loop {
            keeper.check();
            match ends.recv_timeout(PATH_CHECK_INTERVAL) {
                Err(RecvTimeoutError::Timeout) => {}
                Ok(never) => match never {},
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        drop(keeper);
        drop::<oneshot::Sender<Infallible>>(done);
    })?;
    Ok(KeeperHandle { bound, end, ended })
}

struct Keeper {
    file: SocketFile,
    agent: Arc<Agent>,
    listeners: mpsc::Sender<UnixListener>,
    runtime: Handle,
    foreign: Option<ForeignSocket>,
    /// Why the socket cannot be reached, as it was logged last.
    problem: Option<String>,
}

/// A socket at our path that is not ours.
enum ForeignSocket {
    /// It is served. Asked again after some checks.
    Served { identity: Identity, checks: u32 },
    /// It has refused a connection. Its owner may be just about to listen, so that one refusal
    /// proves nothing.
    Refused(Identity),
}

impl Keeper {
    fn check(&mut self) {
        if self.file.is_in_place() {
            self.found();
            return;
        }
        match self.bind_again() {
            Ok(Some(listener)) => {
                self.foreign = None;
                // The end has begun when nobody takes it.
                if self.listeners.blocking_send(listener).is_ok() {
                    self.found();
                    log_limited!(warn, "the socket `{}` was gone from its path and is bound again", self.file.path.display());
                }
            }
            Ok(None) => {}
            Err(error) => {
                let problem = format!("{error:#}");
                if self.problem.as_ref() != Some(&problem) {
                    log_limited!(
                        warn,
                        "the socket is gone from its path and nobody can connect; trying to bind it again every {PATH_CHECK_INTERVAL:?}: {problem}"
                    );
                    self.agent.socket_lost(Some(problem.clone()));
                    self.problem = Some(problem);
                }
            }
        }
    }

    fn found(&mut self) {
        if self.problem.take().is_some() {
            info!("the socket `{}` can be reached again", self.file.path.display());
            self.agent.socket_lost(None);
        }
    }

    /// Binds the path if that takes it from nobody. None: it is served as before, as far as anybody
    /// has looked.
    fn bind_again(&mut self) -> anyhow::Result<Option<UnixListener>> {
        let path = &self.file.path;
        if let Some(found) = socket_at(path)? {
            match &mut self.foreign {
                Some(ForeignSocket::Served { identity, checks }) if *identity == found && *checks < CHECKS_WHILE_SERVED => {
                    *checks += 1;
                    return Ok(None);
                }
                Some(ForeignSocket::Refused(identity)) if *identity == found => remove_stale(path)?,
                foreign => {
                    // Whether it is served or cannot be asked, it is left alone for a while.
                    *foreign = Some(ForeignSocket::Served { identity: found, checks: 0 });
                    if is_served(path)? {
                        return Err(served(path));
                    }
                    *foreign = Some(ForeignSocket::Refused(found));
                    bail!("cannot serve the socket `{}`: another socket is at that path and refuses connections", path.display());
                }
            }
        }
        let listener = self.file.bind()?;
        let _context = self.runtime.enter();
        Ok(Some(UnixListener::from_std(listener)?))
    }
}

/// Which socket is at `path`, if there is one.
///
/// # Errors
///
/// Something else is there, or nobody can tell.
fn socket_at(path: &Path) -> anyhow::Result<Option<Identity>> {
    let shown = path.display();
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => bail!("cannot serve the socket `{shown}`: {error}"),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            bail!("cannot serve the socket `{shown}`: something that is not a socket stands there; remove it or choose another `--socket`")
        }
        Ok(metadata) => Ok(Some((metadata.dev(), metadata.ino()))),
    }
}

/// Removes the socket at `path`, which nobody must serve.
fn remove_stale(path: &Path) -> anyhow::Result<()> {
    if is_served(path)? {
        return Err(served(path));
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot replace the stale socket `{}`", path.display()))
        }
        _ => Ok(()),
    }
}

fn served(path: &Path) -> anyhow::Error {
    anyhow!("cannot serve the socket `{}`: it is already served by another process", path.display())
}

/// Whether a process serves the socket at `path`.
fn is_served(path: &Path) -> anyhow::Result<bool> {
    // It must not wait for a process that accepts nobody.
    let connected = Socket::new(Domain::UNIX, Type::STREAM, None).and_then(|socket| {
        socket.set_nonblocking(true)?;
        socket.connect(&SockAddr::unix(path)?)
    });
    match connected {
        Ok(()) => Ok(true),
        // More clients wait to be accepted than it takes.
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(true),
        Err(error) if matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::NotFound) => Ok(false),
        Err(error) => {
            bail!("cannot serve the socket `{}`: it is there and cannot be asked who serves it: {error}", path.display())
        }
    }
}

/// Binds `path`. Nobody gets in before the permissions are right.
fn bind(path: &Path, mode: Option<u32>) -> io::Result<StdUnixListener> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    let too_long = |_| io::Error::new(ErrorKind::InvalidInput, "the system takes no path of that length; choose a shorter `--socket`");
    socket.bind(&SockAddr::unix(path).map_err(too_long)?)?;
    let listen = || {
        if let Some(mode) = mode {
            fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
        }
        socket.set_nonblocking(true)?;
        socket.listen(BACKLOG)
    };
    if let Err(error) = listen() {
        let _ = fs::remove_file(path);
        return Err(error);
    }
    Ok(StdUnixListener::from(OwnedFd::from(socket)))
}
