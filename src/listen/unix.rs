//! The Unix socket and its connections.

use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tracing::{debug, info};
use zentinel_wasm_bounds::log_limited;
use zentinel_wasm_engine::Agent;
use zentinel_wasm_protocol::socket::{self, Ended, Paused, SocketError};
use zentinel_wasm_protocol::{Stage, Timeouts};

use super::accept::{Acceptor, ConnectionContext, Endpoint};
use super::socket_file::{KeeperHandle, SocketFile, SocketIdentity, keep};

/// A connection that no process serves right now.
pub(crate) type PausedConnection = Paused<Agent>;

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

    /// The socket that another process has bound.
    ///
    /// # Errors
    ///
    /// The permissions cannot be changed to `mode`, or the system does not accept the socket.
    pub(crate) fn adopt(identity: SocketIdentity, listener: OwnedFd, mode: Option<u32>) -> anyhow::Result<Self> {
        let (file, listener) = SocketFile::adopt(identity, listener, mode)?;
        Ok(Self { file, listener })
    }

    /// The identity of its file.
    pub(crate) fn identity(&self) -> Option<SocketIdentity> {
        self.file.identity()
    }

    /// Leaves the socket to the process that serves it.
    pub(crate) fn release(self) {
        self.file.release();
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
        Ok(self.serve_pausable(agent, stage, timeouts)?.0)
    }

    /// Like [`serve`](Self::serve), and returns what pauses the server.
    pub(crate) fn serve_pausable(
        self,
        agent: Arc<Agent>,
        stage: watch::Receiver<Stage>,
        timeouts: Timeouts,
    ) -> io::Result<(impl Future<Output = ()> + Send + 'static, mpsc::Sender<SocketCommand>)> {
        let Self { file, listener } = self;
        let path = file.path().display().to_string();
        let identity = file.identity();
        let keeper = keep(file, Arc::clone(&agent))?;
        let (sender, commands) = mpsc::channel(1);
        let endpoint = SocketEndpoint { listener, identity, keeper };
        let served = async move {
            info!("serving the socket `{path}`");
            serve(Acceptor::new(endpoint, ConnectionContext { agent, stage, timeouts }), commands).await;
        };
        Ok((served, sender))
    }
}

/// What the server of the socket is asked to do.
pub(crate) enum SocketCommand {
    /// Serve this connection.
    Serve(PausedConnection),
    /// Hand over everything. The stage has been changed before, to `Pausing` if connections should
    /// be handed over.
    HandOver(HandOver),
}

/// Hands the socket and its connections over to another process.
pub(crate) struct HandOver {
    /// Until when connections are awaited that are not paused yet.
    pub(crate) deadline: Instant,
    /// Gets what is handed over.
    pub(crate) paused: oneshot::Sender<PausedServer>,
    /// Gets the outcome. Without one, the server resumes.
    pub(crate) outcome: oneshot::Receiver<HandOverOutcome>,
}

/// A server that accepts no connections, and its connections.
pub(crate) struct PausedServer {
    /// A duplicate of the socket, and the identity of its file.
    pub(crate) socket: Option<(OwnedFd, SocketIdentity)>,
    pub(crate) connections: Vec<PausedConnection>,
    /// Number of connections that are not paused.
    pub(crate) busy: usize,
}

/// What became of a [`HandOver`].
pub(crate) enum HandOverOutcome {
    /// It failed. These connections are to be served again.
    Failed(Vec<PausedConnection>),
    /// The socket belongs to another process. Gets the connections that were not paused in time,
    /// until none is left.
    Done(mpsc::Sender<PausedConnection>),
}

async fn serve(mut acceptor: Acceptor<SocketEndpoint>, mut commands: mpsc::Receiver<SocketCommand>) {
    loop {
        tokio::select! {
            () = acceptor.run() => break,
            Some(command) = commands.recv() => match command {
                SocketCommand::Serve(paused) => acceptor.resume(paused),
                SocketCommand::HandOver(request) => if let Some(late) = hand_over(&mut acceptor, request).await {
                    return end_after_hand_over(acceptor, late).await;
                },
            },
        }
    }
    let (endpoint, mut connections) = acceptor.into_parts();
    endpoint.close().await;
    while connections.next().await.is_some() {}
}

/// Returns who gets the connections that are left if the socket was handed over.
async fn hand_over(acceptor: &mut Acceptor<SocketEndpoint>, request: HandOver) -> Option<mpsc::Sender<PausedConnection>> {
    let HandOver { deadline, paused, outcome } = request;
    let all = async {
        while let Some(ended) = acceptor.connections.next().await {
            acceptor.paused.extend(ended);
        }
    };
    // Dropping the future loses none.
    let _ = tokio::time::timeout_at(deadline, all).await;
    let SocketEndpoint { listener, identity, .. } = &acceptor.endpoint;
    let socket = rustix::io::fcntl_dupfd_cloexec(listener, 0).ok().zip(identity.clone());
    let connections = std::mem::take(&mut acceptor.paused);
    let server = PausedServer { socket, connections, busy: acceptor.connections.len() };
    if let Err(server) = paused.send(server) {
        acceptor.paused.extend(server.connections);
        return None;
    }
    match outcome.await {
        Ok(HandOverOutcome::Done(late)) => Some(late),
        Ok(HandOverOutcome::Failed(connections)) => {
            acceptor.paused.extend(connections);
            None
        }
        Err(_) => None,
    }
}

async fn end_after_hand_over(acceptor: Acceptor<SocketEndpoint>, late: mpsc::Sender<PausedConnection>) {
    let (endpoint, mut connections) = acceptor.into_parts();
    let SocketEndpoint { listener, keeper, .. } = endpoint;
    keeper.release().await;
    drop(listener);
    loop {
        let ended = tokio::select! {
            ended = connections.next() => ended,
            // Nobody takes the others.
            () = late.closed() => return,
        };
        match ended {
            Some(Some(paused)) => drop(late.send(paused).await),
            Some(None) => {}
            None => return,
        }
    }
}

struct SocketEndpoint {
    listener: UnixListener,
    identity: Option<SocketIdentity>,
    keeper: KeeperHandle,
}

impl Endpoint for SocketEndpoint {
    const CONNECTION: &str = "a connection";

    /// A proxy opens four per agent.
    const MAX_CONNECTIONS: usize = 1024;

    type Stream = UnixStream;

    type Paused = PausedConnection;

    async fn accept(&mut self) -> io::Result<UnixStream> {
        loop {
            tokio::select! {
                accepted = self.listener.accept() => return accepted.map(|(stream, _)| stream),
                // Clients in the old socket's queue have to connect again.
                Some((listener, identity)) = self.keeper.bound.recv() => {
                    self.listener = listener;
                    self.identity = Some(identity);
                }
            }
        }
    }

    fn serve(&self, stream: UnixStream, context: ConnectionContext) -> impl Future<Output = Option<PausedConnection>> + Send + 'static {
        let ConnectionContext { agent, stage, timeouts } = context;
        let served = socket::serve(stream, agent, stage, &timeouts);
        async move { log_end(served.await) }
    }

    fn resume(
        &self,
        paused: PausedConnection,
        context: ConnectionContext,
    ) -> impl Future<Output = Option<PausedConnection>> + Send + 'static {
        let served = socket::resume(paused, context.stage, &context.timeouts);
        async move { log_end(served.await) }
    }

    async fn close(self) {
        // The file goes before the socket, because its inode number identifies it.
        self.keeper.end().await;
        drop(self.listener);
    }
}

fn log_end(ended: Result<Ended<Agent>, SocketError>) -> Option<PausedConnection> {
    match ended {
        Ok(Ended::Paused(paused)) => return Some(paused),
        Ok(Ended::Closed) => debug!("a connection has ended"),
        // Not a warning, because clients may disconnect while an answer is sent to them.
        Err(SocketError::Io(error)) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => {
            debug!("connection closed by peer: {error}");
        }
        Err(error) => log_limited!(warn, "closed a connection: {error}"),
    }
    None
}
