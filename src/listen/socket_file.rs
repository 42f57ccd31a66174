//! The file of the Unix socket: who may have its path, and the thread that keeps it there.

use std::convert::Infallible;
use std::ffi::OsString;
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
use serde::{Deserialize, Serialize};
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::net::UnixListener;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tracing::info;
use zentinel_wasm_bounds::log_limited;
use zentinel_wasm_engine::Agent;

use crate::files::{folder, folder_hint};

/// Clients that may wait to be accepted: as many as may be connected.
const BACKLOG: i32 = 1024;

/// How often to check that the path still leads to the socket. A check costs one system call. A
/// proxy retries to connect for minutes, so it finds the socket soon after it was removed and bound
/// again.
const PATH_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Checks between two attempts to find out whether another process still serves the path. Each
/// attempt is a connection that the other process has to accept.
const CHECKS_WHILE_SERVED: u32 = 10;

/// Device and inode of a file.
pub(crate) type FileId = (u64, u64);

/// A bound socket's file, for another process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SocketIdentity {
    path: OsString,
    id: FileId,
}

impl SocketIdentity {
    pub(crate) fn path(&self) -> &Path {
        Path::new(&self.path)
    }
}

/// The file of a bound socket. It is removed on drop, unless another file has taken its place.
pub(crate) struct SocketFile {
    path: PathBuf,
    mode: Option<u32>,
    id: Option<FileId>,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.is_in_place() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl SocketFile {
    /// Binds `path`, with the permissions `mode` if given. Replaces a stale socket and nothing
    /// else.
    pub(crate) fn bind_or_replace_stale(path: &Path, mode: Option<u32>) -> anyhow::Result<(Self, UnixListener)> {
        let mut file = Self { path: path.to_owned(), mode, id: None };
        if socket_at(path)?.is_some() {
            remove_stale(path)?;
        }
        let listener = UnixListener::from_std(file.bind()?)?;
        Ok((file, listener))
    }

    /// The file of a socket that another process has bound, and that socket.
    ///
    /// # Errors
    ///
    /// The permissions cannot be changed to `mode`, or the system does not accept the socket.
    pub(crate) fn adopt(identity: SocketIdentity, listener: OwnedFd, mode: Option<u32>) -> anyhow::Result<(Self, UnixListener)> {
        let SocketIdentity { path, id } = identity;
        // Without an id until nothing can fail, because the other process goes on with the file.
        let mut file = Self { path: PathBuf::from(path), mode, id: None };
        if let Some(mode) = mode
            && file_id(&file.path) == Some(id)
        {
            let changed = fs::set_permissions(&file.path, fs::Permissions::from_mode(mode));
            changed.map_err(|error| cannot_serve(&file.path, &error))?;
        }
        let listener = StdUnixListener::from(listener);
        listener.set_nonblocking(true)?;
        let listener = UnixListener::from_std(listener)?;
        file.id = Some(id);
        Ok((file, listener))
    }

    /// Its identity, for another process.
    pub(crate) fn identity(&self) -> Option<SocketIdentity> {
        Some(SocketIdentity { path: self.path.clone().into(), id: self.id? })
    }

    /// Leaves the file to another process.
    pub(crate) fn release(mut self) {
        self.id = None;
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    fn is_in_place(&self) -> bool {
        self.id.is_some() && file_id(&self.path) == self.id
    }

    /// Binds the path, where no file may exist.
    fn bind(&mut self) -> anyhow::Result<StdUnixListener> {
        let listener = bind(&self.path, self.mode).map_err(|error| cannot_serve(&self.path, &error))?;
        self.id = file_id(&self.path);
        Ok(listener)
    }
}

fn file_id(path: &Path) -> Option<FileId> {
    fs::symlink_metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

/// The thread that owns the socket's file and keeps it in its place.
pub(super) struct KeeperHandle {
    /// Sockets that were bound because the previous one was lost.
    pub(super) bound: mpsc::Receiver<(UnixListener, SocketIdentity)>,
    /// Makes the thread leave the file to another process. Ends the thread when dropped.
    end: std::sync::mpsc::Sender<Release>,
    /// Closed when the thread has removed the file.
    ended: oneshot::Receiver<Infallible>,
}

/// The file belongs to another process from now on.
struct Release;

impl KeeperHandle {
    /// Leaves the file to another process, and waits until the thread no longer touches it.
    pub(super) async fn release(self) {
        let _ = self.end.send(Release);
        self.end().await;
    }

    /// Removes the file and waits until that is done.
    pub(super) async fn end(self) {
        drop((self.bound, self.end));
        let _ = self.ended.await;
    }
}

/// Starts the thread that checks whether `file` is in its place. It is a thread of its own because
/// system calls on files may block.
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
                Ok(Release) => return keeper.file.release(),
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
    listeners: mpsc::Sender<(UnixListener, SocketIdentity)>,
    runtime: Handle,
    foreign: Option<ForeignSocket>,
    /// Why the socket is unreachable, as last logged.
    problem: Option<String>,
}

/// Another process's socket at our path.
enum ForeignSocket {
    /// It is served. To be checked again after `CHECKS_WHILE_SERVED` checks of the path.
    Served { id: FileId, checks: u32 },
    /// It has refused one connection. That does not prove that it is stale, because its owner may
    /// be between `bind` and `listen`.
    Refused(FileId),
}

impl Keeper {
    fn check(&mut self) {
        if self.file.is_in_place() {
            self.clear_problem();
            return;
        }
        match self.bind_again() {
            Ok(Some(listener)) => {
                self.foreign = None;
                // Fails only if the server is shutting down.
                if self.listeners.blocking_send(listener).is_ok() {
                    self.clear_problem();
                    log_limited!(warn, "the socket `{}` was removed or replaced; bound it again", self.file.path.display());
                }
            }
            Ok(None) => {}
            Err(error) => {
                let problem = format!("{error:#}");
                if self.problem.as_ref() != Some(&problem) {
                    log_limited!(
                        warn,
                        "the socket is unreachable because it was removed or replaced; retrying to bind it every {PATH_CHECK_INTERVAL:?}: \
                         {problem}"
                    );
                    self.agent.set_unreachable(Some(problem.clone()));
                    self.problem = Some(problem);
                }
            }
        }
    }

    fn clear_problem(&mut self) {
        if self.problem.take().is_some() {
            info!("the socket `{}` is reachable again", self.file.path.display());
            self.agent.set_unreachable(None);
        }
    }

    /// Binds the path if no other process serves it. Returns None if another process served it at
    /// the last attempt to connect, which is not repeated yet.
    fn bind_again(&mut self) -> anyhow::Result<Option<(UnixListener, SocketIdentity)>> {
        let path = &self.file.path;
        if let Some(found) = socket_at(path)? {
            match &mut self.foreign {
                Some(ForeignSocket::Served { id, checks }) if *id == found && *checks < CHECKS_WHILE_SERVED => {
                    *checks += 1;
                    return Ok(None);
                }
                Some(ForeignSocket::Refused(id)) if *id == found => remove_stale(path)?,
                foreign => {
                    // Set first, so that a failing check is not repeated at once either.
                    *foreign = Some(ForeignSocket::Served { id: found, checks: 0 });
                    if is_served(path)? {
                        return Err(served_by_another(path));
                    }
                    *foreign = Some(ForeignSocket::Refused(found));
                    bail!("cannot serve the socket `{}`: another socket is at that path and refuses connections", path.display());
                }
            }
        }
        let listener = self.file.bind()?;
        let _context = self.runtime.enter();
        let listener = UnixListener::from_std(listener)?;
        Ok(self.file.identity().map(|identity| (listener, identity)))
    }
}

/// The id of the socket at `path`, if there is one.
///
/// # Errors
///
/// The file at `path` is not a socket, or cannot be inspected.
fn socket_at(path: &Path) -> anyhow::Result<Option<FileId>> {
    let shown = path.display();
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(cannot_serve(path, &error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            bail!("cannot serve the socket `{shown}`: the path exists and is not a socket; remove it or choose another `--socket`")
        }
        Ok(metadata) => Ok(Some((metadata.dev(), metadata.ino()))),
    }
}

/// The error of a system call on `path`, with what to do about it if its folder is the reason.
fn cannot_serve(path: &Path, error: &io::Error) -> anyhow::Error {
    let hint = match error.kind() {
        ErrorKind::NotADirectory => {
            // The longest part of the path that exists.
            let folder = folder(path);
            let file = folder.ancestors().find(|part| part.exists()).unwrap_or(folder);
            format!("; `{}` is not a folder: choose another `--socket`", file.display())
        }
        kind => folder_hint(path, kind).unwrap_or_default(),
    };
    anyhow!("cannot serve the socket `{}`: {error}{hint}", path.display())
}

/// Removes the socket at `path`, unless a process serves it.
fn remove_stale(path: &Path) -> anyhow::Result<()> {
    if is_served(path)? {
        return Err(served_by_another(path));
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot replace the stale socket `{}`", path.display()))
        }
        _ => Ok(()),
    }
}

fn served_by_another(path: &Path) -> anyhow::Error {
    anyhow!("cannot serve the socket `{}`: it is already served by another process", path.display())
}

/// Whether a process serves the socket at `path`.
fn is_served(path: &Path) -> anyhow::Result<bool> {
    // Non-blocking, because the process may not accept connections.
    let connected = Socket::new(Domain::UNIX, Type::STREAM, None).and_then(|socket| {
        socket.set_nonblocking(true)?;
        socket.connect(&SockAddr::unix(path)?)
    });
    match connected {
        Ok(()) => Ok(true),
        // The queue of clients that wait to be accepted is full.
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(true),
        Err(error) if matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::NotFound) => Ok(false),
        Err(error) => {
            bail!("cannot serve the socket `{}`: cannot check whether another process serves it: {error}", path.display())
        }
    }
}

/// Binds `path`. Clients cannot connect before the permissions are set.
fn bind(path: &Path, mode: Option<u32>) -> io::Result<StdUnixListener> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    let too_long = |_| io::Error::new(ErrorKind::InvalidInput, "the path is too long for the system; choose a shorter `--socket`");
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

#[cfg(test)]
mod tests {
    use super::*;

    fn hint(path: &Path, kind: ErrorKind) -> String {
        let error = cannot_serve(path, &kind.into()).to_string();
        error.strip_prefix(&format!("cannot serve the socket `{}`: {kind}", path.display())).unwrap().to_owned()
    }

    #[test]
    fn says_what_to_do_about_the_folder() {
        let root = tempfile::tempdir().unwrap();
        let shown = root.path().display();
        fs::write(root.path().join("file"), "").unwrap();
        let hint = |path: &str, kind| hint(&root.path().join(path), kind);
        assert_eq!(hint("a/s", ErrorKind::NotFound), format!("; create the folder `{shown}/a`"));
        assert_eq!(hint("a/b/s", ErrorKind::NotFound), format!("; create the folder `{shown}/a/b`"));
        assert_eq!(hint("s", ErrorKind::NotFound), "");
        for path in ["file/s", "file/a/s"] {
            let expected = format!("; `{shown}/file` is not a folder: choose another `--socket`");
            assert_eq!(hint(path, ErrorKind::NotADirectory), expected);
        }
        let expected = format!("; the agent's user must be able to write to the folder `{shown}`");
        assert_eq!(hint("s", ErrorKind::PermissionDenied), expected);
        assert_eq!(hint("s", ErrorKind::ReadOnlyFilesystem), "");
    }

    #[test]
    fn a_path_without_a_folder_is_in_the_working_directory() {
        assert_eq!(hint(Path::new("s"), ErrorKind::PermissionDenied), "; the agent's user must be able to write to the folder `.`");
        assert_eq!(hint(Path::new("s"), ErrorKind::NotFound), "");
    }
}
