//! The Unix socket: who may have its path, and what becomes of connections.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::net::UnixListener;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tracing::{debug, info};
use zentinel_wasm_protocol::connection::{self, ConnectionError, Stage};
use zentinel_wasm_protocol::log_limited;

use crate::agent::Agent;

/// Connections at once. A proxy opens four per agent; what is more is turned away.
const MAX_CONNECTIONS: usize = 1024;

/// Pause after the system has refused a connection, for example because it has no file descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A bound socket, whose file is removed when it is dropped.
pub struct Listener {
    listener: UnixListener,
    file: SocketFile,
}

/// The file of a socket, by which it is known again.
struct SocketFile {
    path: PathBuf,
    identity: Option<(u64, u64)>,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Somebody else may have put another one there.
        if self.identity.is_some() && identity(&self.path) == self.identity {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

impl Listener {
    /// Binds `path`, with the permissions `mode` if given.
    ///
    /// # Errors
    ///
    /// Another process serves the path, it is not a socket, or the system refuses it. A stale socket is replaced, anything else left alone.
    pub fn bind(path: &Path, mode: Option<u32>) -> anyhow::Result<Self> {
        make_way(path)?;
        let listener = bind(path, mode).with_context(|| format!("cannot serve the socket `{}`", path.display()))?;
        let file = SocketFile { path: path.to_owned(), identity: identity(path) };
        Ok(Self { listener, file })
    }

    /// Serves connections until the agent drains, and then until they have ended.
    pub async fn serve(self, agent: Arc<Agent>, mut stage: watch::Receiver<Stage>) {
        let Self { listener, file } = self;
        info!("serving the socket `{}`", file.path.display());
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut connections = JoinSet::new();
        loop {
            let stream = tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => stream,
                    Err(error) => {
                        log_limited!(warn, "cannot accept a connection: {error}");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                        continue;
                    }
                },
                Some(_) = connections.join_next() => continue,
                () = drains(&mut stage) => break,
            };
            let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else {
                log_limited!(warn, "turned a connection away: there are {MAX_CONNECTIONS} already");
                continue;
            };
            let (agent, stage) = (Arc::clone(&agent), stage.clone());
            connections.spawn(async move {
                let _slot = slot;
                let _connected = agent.metrics().connected();
                match connection::serve(stream, agent, stage).await {
                    Ok(()) => debug!("a connection has ended"),
                    // Clients come and go, and some go while something is being sent to them.
                    Err(ConnectionError::Io(error)) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => {
                        debug!("a client has closed its connection: {error}");
                    }
                    Err(error) => log_limited!(warn, "closed a connection: {error}"),
                }
            });
        }
        // Nobody comes any more; those who are here may finish.
        drop(listener);
        while connections.join_next().await.is_some() {}
        drop(file);
    }
}

/// Waits until the agent drains.
pub(crate) async fn drains(stage: &mut watch::Receiver<Stage>) {
    // Without a sender the agent is at its end too.
    let _ = stage.wait_for(|stage| *stage > Stage::Serving).await;
}

/// Removes a stale socket at `path`.
fn make_way(path: &Path) -> anyhow::Result<()> {
    let shown = path.display();
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => bail!("cannot serve the socket `{shown}`: {error}"),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            bail!("cannot serve the socket `{shown}`: something that is not a socket stands there; remove it or choose another `--socket`")
        }
        Ok(_) => {}
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => bail!("cannot serve the socket `{shown}`: it is already served by another process"),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            fs::remove_file(path).with_context(|| format!("cannot replace the stale socket `{shown}`"))
        }
        Err(error) => bail!("cannot serve the socket `{shown}`: it is there and cannot be asked who serves it: {error}"),
    }
}

fn bind(path: &Path, mode: Option<u32>) -> io::Result<UnixListener> {
    let Some(mode) = mode else { return UnixListener::bind(path) };
    // Nobody may get in before the permissions are right.
    let umask = rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
    let bound = UnixListener::bind(path);
    rustix::process::umask(umask);
    let listener = bound?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    Ok(listener)
}
