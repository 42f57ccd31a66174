//! The Unix socket and its connections.

use std::io::{self, ErrorKind};
use std::path::Path;
use std::sync::Arc;

use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tracing::{debug, info};
use zentinel_wasm_bounds::log_limited;
use zentinel_wasm_engine::Agent;
use zentinel_wasm_protocol::socket::{self, SocketError};
use zentinel_wasm_protocol::{Stage, Timeouts};

use super::accept::{ConnectionContext, Endpoint, serve_endpoint};
use super::socket_file::{KeeperHandle, SocketFile, keep};

/// A bound socket. Its file is removed when it is dropped.
pub struct SocketServer {
    // Dropped first: as long as the socket is bound, no other file gets its inode number.
    file: SocketFile,
    listener: UnixListener,
}

impl SocketServer {
    /// Binds `path`, with the permissions `mode` if given; otherwise the umask decides. Replaces a
    /// stale socket.
    ///
    /// # Errors
    ///
    /// Another process serves the path, the path is not a socket, or the system refuses to bind it.
    pub fn bind(path: &Path, mode: Option<u32>) -> anyhow::Result<Self> {
        let (file, listener) = SocketFile::bind_or_replace_stale(path, mode)?;
        Ok(Self { file, listener })
    }

    /// Serves connections until the agent drains, and then until they have ended. Meanwhile a
    /// thread checks that the path still leads to the socket.
    ///
    /// # Errors
    ///
    /// The system cannot start the thread.
    pub fn serve(
        self,
        agent: Arc<Agent>,
        stage: watch::Receiver<Stage>,
        timeouts: Timeouts,
    ) -> io::Result<impl Future<Output = ()> + Send + 'static> {
        let Self { file, listener } = self;
        let path = file.path().display().to_string();
        let keeper = keep(file, Arc::clone(&agent))?;
        Ok(async move {
            info!("serving the socket `{path}`");
            serve_endpoint(SocketEndpoint { listener, keeper }, ConnectionContext { agent, stage, timeouts }).await;
        })
    }
}

struct SocketEndpoint {
    listener: UnixListener,
    keeper: KeeperHandle,
}

impl Endpoint for SocketEndpoint {
    const CONNECTION: &str = "a connection";

    /// A proxy opens four per agent.
    const MAX_CONNECTIONS: usize = 1024;

    type Stream = UnixStream;

    async fn accept(&mut self) -> io::Result<UnixStream> {
        loop {
            tokio::select! {
                accepted = self.listener.accept() => return accepted.map(|(stream, _)| stream),
                // Clients in the old socket's queue have to connect again.
                Some(bound) = self.keeper.bound.recv() => self.listener = bound,
            }
        }
    }

    fn serve(&self, stream: UnixStream, context: ConnectionContext) -> impl Future<Output = ()> + Send + 'static {
        let ConnectionContext { agent, stage, timeouts } = context;
        async move {
            match socket::serve(stream, agent, stage, &timeouts).await {
                Ok(()) => debug!("a connection has ended"),
                // Not a warning, because clients may disconnect while an answer is sent to them.
                Err(SocketError::Io(error)) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => {
                    debug!("connection closed by peer: {error}");
                }
                Err(error) => log_limited!(warn, "closed a connection: {error}"),
            }
        }
    }

    async fn close(self) {
        // The file goes before the socket, because its inode number identifies it.
        self.keeper.end().await;
        drop(self.listener);
    }
}
