//! Where transports meet the engine: a [`Handler`] takes events, an [`Encode`] takes answers.

use std::sync::Arc;

use tokio::sync::watch;

use crate::answer::Answer;
use crate::event::Event;
use crate::failure::Failure;
use crate::hook::{Hook, Hooks};
use crate::report::Reports;

/// What the agent announces in the handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Hooks that the module exports.
    pub hooks: Hooks,
    /// Largest body that the module is given, in bytes.
    pub max_body: usize,
}

/// Encodes the answer to one event for a transport.
///
/// An answer borrows from the memory of the instance that gave it. So the handler encodes it,
/// before it lets the instance go.
pub trait Encode: Clone + Send + Sync + 'static {
    /// What the transport sends.
    type Encoded: Send + 'static;

    /// The id of the event.
    fn correlation_id(&self) -> &Arc<str>;

    /// The number of the event's connection, unique in the process. None if answers on this
    /// transport cannot change a body.
    fn connection(&self) -> Option<u64> {
        None
    }

    /// Encodes `answer`.
    ///
    /// # Errors
    ///
    /// The answer contains something that this transport cannot carry.
    fn encode(&self, answer: &Answer<'_>) -> Result<Self::Encoded, Failure>;

    /// Whether this transport drops the answer's routing metadata, which no proxy bases a decision
    /// on.
    fn loses_routing_metadata(&self, _answer: &Answer<'_>) -> bool {
        false
    }
}

/// Whether another event with the same correlation id was pending on the connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Arrival {
    /// None was.
    #[default]
    Alone,
    /// One was, and its answer will not be sent.
    Superseding,
}

/// Decides about events.
pub trait Handler: Send + Sync + 'static {
    /// What the agent announces in the handshake.
    fn capabilities(&self) -> Capabilities;

    /// Decides about an event. The handler copies what it needs of the event before it returns. The
    /// future is polled on the connection's task.
    fn handle<E: Encode>(
        self: &Arc<Self>,
        event: &Event<'_>,
        arrival: Arrival,
        encode: E,
    ) -> impl Future<Output = E::Encoded> + Send + 'static;

    /// Answers an event for `hook` that cannot be decoded, like any module error: never a silent
    /// allow.
    fn reject<E: Encode>(self: &Arc<Self>, hook: Hook, failure: Failure, encode: E) -> E::Encoded;

    /// Applies the proxy's configuration, a JSON object. The error is the reason why it is
    /// rejected. The future bounds its own time, because the limits for clients do not count it.
    fn configure(self: &Arc<Self>, config: serde_json::Value) -> impl Future<Output = Result<(), String>> + Send + 'static;

    /// The proxy cancelled the events of this id on this connection.
    fn cancelled(&self, _connection: u64, _correlation_id: &str) {}

    /// A connection closed. Its number is that of [`Encode::connection`].
    fn disconnected(&self, _connection: u64) {}

    /// Whether a request on this connection has more events to come, so that the connection must
    /// stay open while the agent drains.
    fn awaits_more(&self, _connection: u64) -> bool {
        false
    }

    /// Health and metrics, which change whenever the agent publishes new ones.
    fn reports(&self) -> watch::Receiver<Arc<Reports>>;
}
