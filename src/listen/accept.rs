//! The accept loop of the Unix socket and the gRPC address.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, watch};
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

    /// Waits for the next connection. Dropping the future loses none.
    async fn accept(&mut self) -> io::Result<Self::Stream>;

    /// Serves a connection until it ends.
    fn serve(&self, stream: Self::Stream, context: ConnectionContext) -> impl Future<Output = ()> + Send + 'static;

    /// Stops accepting connections.
    async fn close(self);
}

/// Serves the connections of `endpoint` until the agent drains, closes the endpoint, and waits
/// until its connections have ended.
pub(super) async fn serve_endpoint<E: Endpoint>(mut endpoint: E, mut context: ConnectionContext) {
    let errors = AcceptErrors::new(E::CONNECTION);
    // A limit for each endpoint, so that a flood on one does not silence the other.
    let rejections = RateLimit::per_log_line();
    let permits = Arc::new(Semaphore::new(E::MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let stream = tokio::select! {
            accepted = endpoint.accept() => match accepted {
                Ok(stream) => stream,
                Err(error) => {
                    errors.log_and_pause(&error).await;
                    continue;
                }
            },
            Some(ended) = connections.join_next() => {
                log_if_panicked(E::CONNECTION, ended);
                continue;
            }
            () = draining(&mut context.stage) => break,
        };
        let Ok(permit) = Arc::clone(&permits).try_acquire_owned() else {
            if let Some(suppressed) = rejections.admit() {
                warn!(suppressed, "rejected {}: limit of {} reached", E::CONNECTION, E::MAX_CONNECTIONS);
            }
            continue;
        };
        let agent = Arc::clone(&context.agent);
        let served = endpoint.serve(stream, context.clone());
        connections.spawn(async move {
            let _permit = permit;
            let _connected = agent.connected();
            served.await;
        });
    }
    endpoint.close().await;
    while let Some(ended) = connections.join_next().await {
        log_if_panicked(E::CONNECTION, ended);
    }
}

/// Waits until the agent drains.
async fn draining(stage: &mut watch::Receiver<Stage>) {
    // The sender is dropped only when the agent has ended.
    let _ = stage.wait_for(|stage| *stage > Stage::Serving).await;
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
