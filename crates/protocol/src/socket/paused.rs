//! Connections that are paused, so another process can serve them.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;
use zentinel_wasm_contract::Handler;

use super::encoding::Encoding;
use crate::proxy::Proxy;

/// What a connection has agreed on and received. No event is in flight, and every answer is
/// written. Default: a new connection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionState {
    /// The outcome of the handshake, if it has taken place.
    pub(super) agreed: Option<(Encoding, Proxy)>,
    /// Bytes that are received and not decoded: at most a frame of the largest size, and what one
    /// read takes.
    pub(super) received: Vec<u8>,
    /// Ids whose next event supersedes another one. It is among the received bytes.
    pub(super) superseding: Vec<String>,
}

impl ConnectionState {
    /// Its memory, in bytes.
    pub fn size(&self) -> usize {
        size_of::<Self>() + self.received.len() + self.superseding.iter().map(|id| size_of::<String>() + id.len()).sum::<usize>()
    }
}

/// How a connection ended for this process.
pub enum Ended<H: Handler> {
    /// It is closed.
    Closed,
    /// It is paused. Dropping it closes it.
    Paused(Paused<H>),
}

/// A connection that is not being served.
pub struct Paused<H: Handler> {
    pub(super) stream: UnixStream,
    pub(super) state: ConnectionState,
    pub(super) registration: Registration<H>,
}

impl<H: Handler> Paused<H> {
    /// A connection that `handler` has not served yet.
    pub fn new(stream: UnixStream, state: ConnectionState, handler: Arc<H>) -> Self {
        Self { stream, state, registration: Registration::new(handler) }
    }

    /// The connection's number, by which the handler knows it.
    pub fn number(&self) -> u64 {
        self.registration.number
    }

    /// Its state.
    pub fn state(&self) -> &ConnectionState {
        &self.state
    }
}

impl<H: Handler> fmt::Debug for Ended<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("Closed"),
            Self::Paused(paused) => f.debug_tuple("Paused").field(&paused.number()).finish(),
        }
    }
}

impl<H: Handler> AsFd for Paused<H> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// Number of the next connection.
static CONNECTIONS: AtomicU64 = AtomicU64::new(0);

/// The number of a connection. Notifies the handler when the connection ends, even by a panic.
pub(super) struct Registration<H: Handler> {
    pub(super) handler: Arc<H>,
    pub(super) number: u64,
}

impl<H: Handler> Registration<H> {
    fn new(handler: Arc<H>) -> Self {
        Self { handler, number: CONNECTIONS.fetch_add(1, Relaxed) }
    }
}

impl<H: Handler> Drop for Registration<H> {
    fn drop(&mut self) {
        self.handler.disconnected(self.number);
    }
}
