//! The accept loop of the Unix socket and the gRPC address.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tracing::warn;
use zentinel_wasm_bounds::RateLimit;
use zentinel_wasm_engine::Agent;
use zentinel_wasm_protocol::{Stage, Timeouts};

use crate::tasks::log_if_panicked;

/// Pause after the system has refused a connection, for example because the process has no file
/// descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What every connection is served with.
#[derive(Clone)]
pub(super) struct ConnectionContext {
    pub(super) agent: Arc<Agent>,
    pub(super) stage: watch::Receiver<Stage>,
    pub(super) timeouts: Timeouts,
}

/// Where connections come from.
pub(super) trait Endpoint {
    /// A connection in log messages, such as `a connection`.
    const CONNECTION: &str;

    /// Connections at once. Further ones are closed as soon as they are accepted.
    const MAX_CONNECTIONS: usize;

    type Stream: Send + 'static;

    /// A connection that has ended for this process and not for its client.
    type Paused: Send + 'static;

    /// Waits for the next connection. Dropping the future loses none.
    async fn accept(&mut self) -> io::Result<Self::Stream>;

    /// Serves a connection until it ends or is paused.
    fn serve(&self, stream: Self::Stream, context: ConnectionContext) -> impl Future<Output = Option<Self::Paused>> + Send + 'static;

    /// Serves a paused connection until it ends or is paused again.
    fn resume(&self, paused: Self::Paused, context: ConnectionContext) -> impl Future<Output = Option<Self::Paused>> + Send + 'static;

    /// Stops accepting connections.
    async fn close(self);
}

/// Serves the connections of `endpoint` until the agent drains, closes the endpoint, and waits
/// until its connections have ended.
pub(super) async fn serve_endpoint<E: Endpoint>(endpoint: E, context: ConnectionContext) {
    let mut acceptor = Acceptor::new(endpoint, context);
    acceptor.run().await;
    let (endpoint, mut connections) = acceptor.into_parts();
    endpoint.close().await;
    while connections.next().await.is_some() {}
}

/// The connections of an endpoint.
pub(super) struct Connections<P>(JoinSet<Option<P>>);

impl<P: 'static> Connections<P> {
    /// Waits until a connection ends or is paused. Returns None if there is none. Dropping the
    /// future loses nothing.
    pub(super) async fn next(&mut self) -> Option<Option<P>> {
        let ended = self.0.join_next().await?;
        Some(ended.unwrap_or_else(|error| {
            log_if_panicked("a connection", Err(error));
            None
        }))
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

/// Accepts connections and serves them.
pub(super) struct Acceptor<E: Endpoint> {
    pub(super) endpoint: E,
    context: ConnectionContext,
    errors: AcceptErrors,
    /// A limit for each endpoint, so that a flood on one does not silence the other.
    rejections: RateLimit,
    permits: Arc<Semaphore>,
    pub(super) connections: Connections<E::Paused>,
    /// Paused connections that nobody has taken yet.
    pub(super) paused: Vec<E::Paused>,
}

impl<E: Endpoint> Acceptor<E> {
    pub(super) fn new(endpoint: E, context: ConnectionContext) -> Self {
        Self {
            endpoint,
            context,
            errors: AcceptErrors::new(E::CONNECTION),
            rejections: RateLimit::per_log_line(),
            permits: Arc::new(Semaphore::new(E::MAX_CONNECTIONS)),
            connections: Connections(JoinSet::new()),
            paused: Vec::new(),
        }
    }

    /// Accepts connections until the agent drains. Dropping the future loses none.
    pub(super) async fn run(&mut self) {
        let mut stage = self.context.stage.clone();
        loop {
            // While paused, clients wait in the system's queue for whoever serves next.
            let now = *stage.borrow_and_update();
            if now > Stage::Pausing {
                return;
            }
            let accepts = now == Stage::Serving;
            if accepts {
                for paused in std::mem::take(&mut self.paused) {
                    self.resume(paused);
                }
            }
            tokio::select! {
                accepted = self.endpoint.accept(), if accepts => match accepted {
                    Ok(stream) => self.serve(stream),
                    Err(error) => self.errors.log_and_pause(&error).await,
                },
                Some(ended) = self.connections.next() => self.paused.extend(ended),
                changed = stage.changed() => {
                    // The sender is dropped only when the agent has ended.
                    if changed.is_err() {
                        return;
                    }
                }
            }
        }
    }

    fn serve(&mut self, stream: E::Stream) {
        let Ok(permit) = Arc::clone(&self.permits).try_acquire_owned() else {
            if let Some(suppressed) = self.rejections.admit() {
                warn!(suppressed, "rejected {}: limit of {} reached", E::CONNECTION, E::MAX_CONNECTIONS);
            }
            return;
        };
        let served = self.endpoint.serve(stream, self.context.clone());
        self.spawn(permit, served);
    }

    /// Serves a paused connection, which was counted when it was accepted.
    pub(super) fn resume(&mut self, paused: E::Paused) {
        let Ok(permit) = Arc::clone(&self.permits).try_acquire_owned() else { return };
        let served = self.endpoint.resume(paused, self.context.clone());
        self.spawn(permit, served);
    }

    fn spawn(&mut self, permit: OwnedSemaphorePermit, served: impl Future<Output = Option<E::Paused>> + Send + 'static) {
        let agent = Arc::clone(&self.context.agent);
        self.connections.0.spawn(async move {
            let _permit = permit;
            let _connected = agent.connected();
            served.await
        });
    }

    pub(super) fn into_parts(self) -> (E, Connections<E::Paused>) {
        (self.endpoint, self.connections)
    }
}

/// The listener of another process.
pub(super) fn tcp_listener(listener: OwnedFd) -> io::Result<TcpListener> {
    let listener = std::net::TcpListener::from(listener);
    listener.set_nonblocking(true)?;
    TcpListener::from_std(listener)
}

/// Handles the errors of `accept` on one endpoint.
pub(super) struct AcceptErrors {
    /// A connection in log messages.
    connection: &'static str,
    limit: RateLimit,
}

impl AcceptErrors {
    pub(super) fn new(connection: &'static str) -> Self {
        Self { connection, limit: RateLimit::per_log_line() }
    }

    /// Logs `error` and waits before the next attempt, which would fail immediately otherwise.
    pub(super) async fn log_and_pause(&self, error: &io::Error) {
        if let Some(suppressed) = self.limit.admit() {
            warn!(suppressed, "cannot accept {}: {error}", self.connection);
        }
        tokio::time::sleep(ACCEPT_PAUSE).await;
    }
}
