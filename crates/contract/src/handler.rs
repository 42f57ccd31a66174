//! Where a transport meets whoever decides: [`Handler`] takes events, [`Encode`] takes the answers.

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
    /// Largest body handed to the module, in bytes.
    pub max_body: usize,
}

/// Turns an answer into what goes over one transport.
///
/// An answer borrows from the memory of the instance that gave it, so that it is written while it exists: by the handler, not by the transport.
pub trait Encode: Clone + Send + Sync + 'static {
    /// What the transport sends.
    type Encoded: Send + 'static;

    /// The id of the event that is answered.
    fn correlation_id(&self) -> &Arc<str>;

    /// The connection that the event came on, where its answers can change a body. No two connections have the same number.
    fn connection(&self) -> Option<u64> {
        None
    }

    /// Writes `answer`.
    ///
    /// # Errors
    ///
    /// The answer holds something that this transport cannot carry.
    fn encode(&self, answer: &Answer<'_>) -> Result<Self::Encoded, Failure>;

    /// Whether this transport leaves out the answer's routing metadata, which no proxy decides by.
    fn loses_routing_metadata(&self, _answer: &Answer<'_>) -> bool {
        false
    }
}

/// Whether an event has met another of its correlation id on its connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Arrival {
    /// It has not.
    #[default]
    Alone,
    /// One had not been answered, and will not be.
    Superseding,
}

/// Who decides about events.
pub trait Handler: Send + Sync + 'static {
    /// What the agent tells of itself in the handshake.
    fn capabilities(&self) -> Capabilities;

    /// Decides about an event. What it needs of the event it takes before it returns; the future is polled on the connection's task.
    fn handle<E: Encode>(
        self: &Arc<Self>,
        event: &Event<'_>,
        arrival: Arrival,
        encode: E,
    ) -> impl Future<Output = E::Encoded> + Send + 'static;

    /// Answers an event for `hook` that could not be decoded: the module-error answer of its kind,
    /// never a silent allow.
    fn reject<E: Encode>(self: &Arc<Self>, hook: Hook, failure: Failure, encode: E) -> E::Encoded;

    /// Applies the proxy's configuration: a JSON object. The error is the reason for which it is rejected. It bounds its own time: the limits
    /// for clients do not count it.
    fn configure(self: &Arc<Self>, config: serde_json::Value) -> impl Future<Output = Result<(), String>> + Send + 'static;

    /// The proxy wants no more answers to the events of this id on this connection.
    fn cancelled(&self, _connection: u64, _correlation_id: &str) {}

    /// A connection has ended, whose number [`Encode::connection`] has told.
    fn disconnected(&self, _connection: u64) {}

    /// Whether more events of a request on this connection are awaited, so that it is not to be closed while the agent drains.
    fn awaits_more(&self, _connection: u64) -> bool {
        false
    }

    /// What the agent reports without being asked, whenever it changes.
    fn reports(&self) -> watch::Receiver<Arc<Reports>>;
}
