//! The Unix socket: what becomes of connections.

use std::io::{self, ErrorKind};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UnixListener;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tracing::{debug, info};
use zentinel_wasm_bounds::log_limited;
use zentinel_wasm_engine::agent::Agent;
use zentinel_wasm_protocol::socket::{self, SocketError};
use zentinel_wasm_protocol::{Stage, Timeouts};

use super::drains;
use super::socket_file::{KeeperHandle, SocketFile, keep};
use crate::tasks::note_end;

/// Connections at once. A proxy opens four per agent; what is more is turned away.
const MAX_CONNECTIONS: usize = 1024;

/// Pause after the system has refused a connection, for example because it has no file descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A bound socket, whose file is removed when it is dropped.
pub struct Listener {
    // Dropped first: as long as the socket is bound, no other file gets the number of its inode.
    file: SocketFile,
    listener: UnixListener,
}

impl Listener {
    /// Binds `path`, with the permissions `mode` if given.
    ///
    /// # Errors
    ///
    /// Another process serves the path, it is not a socket, or the system refuses it. A stale socket is replaced, anything else left alone.
    pub fn bind(path: &Path, mode: Option<u32>) -> anyhow::Result<Self> {
        let (file, listener) = SocketFile::open(path, mode)?;
        Ok(Self { file, listener })
    }

    /// Serves connections until the agent drains, and then until they have ended. A thread checks
    /// meanwhile that the socket can be reached.
    ///
    /// # Errors
    ///
    /// The system gives no thread.
    pub fn serve(self, agent: Arc<Agent>, stage: watch::Receiver<Stage>) -> io::Result<impl Future<Output = ()> + Send + 'static> {
        let Self { listener, file } = self;
        let shown = file.path.display().to_string();
        let keeper = keep(file, Arc::clone(&agent))?;
        Ok(async move {
            info!("serving the socket `{shown}`");
            serve(listener, keeper, agent, stage).await;
        })
    }
}

async fn serve(mut listener: UnixListener, mut keeper: KeeperHandle, agent: Arc<Agent>, mut stage: watch::Receiver<Stage>) {
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
            // Clients that wait in the old socket's queue have to connect again.
            Some(bound) = keeper.bound.recv() => {
                listener = bound;
                continue;
            }
            Some(ended) = connections.join_next() => {
                note_end("a connection", ended);
                continue;
            }
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
            match socket::serve(stream, agent, stage, &Timeouts::default()).await {
                Ok(()) => debug!("a connection has ended"),
                // Clients come and go, and some go while something is being sent to them.
                Err(SocketError::Io(error)) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => {
                    debug!("a client has closed its connection: {error}");
                }
                Err(error) => log_limited!(warn, "closed a connection: {error}"),
            }
        });
    }
    // Nobody comes any more; those who are here may finish.
    keeper.end().await;
    drop(listener);
    while let Some(ended) = connections.join_next().await {
        note_end("a connection", ended);
    }
}
