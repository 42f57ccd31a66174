//! A chunk of a request's body, and what becomes of it.

use zentinel_wasm_contract::{Failure, FailureKind};

use crate::bodies::Length;

/// A chunk of a request's body.
pub(crate) struct RequestChunk<'a> {
    /// The connection it came on.
    pub(crate) connection: u64,
    pub(crate) id: &'a str,
    /// The request's, where the agent knows it for certain.
    pub(crate) number: Option<u64>,
    pub(crate) length: Length,
    pub(crate) bytes: Vec<u8>,
    pub(crate) index: u32,
    pub(crate) is_last: bool,
    /// Bytes of the body with this chunk, as the proxy counts them.
    pub(crate) received: Option<u64>,
    /// The proxy has buffered it, and would ignore that it is held.
    pub(crate) buffered: bool,
    /// Largest body that may be collected, in bytes.
    pub(crate) limit: usize,
    /// Whether an error is to give back what was held.
    pub(crate) fail_open: bool,
}

/// What becomes of a chunk.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Collected {
    /// It is the whole body already: as without collecting.
    Alone,
    /// It is held.
    Held,
    /// It passes as it is, for an error has been allowed.
    Pass,
    /// The same, but with this in its place.
    Forward(Vec<u8>),
    /// It was the last; this is the body.
    Whole(Vec<u8>),
}

/// What an error can still do for the body, where errors are allowed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Rescue {
    /// Let the event pass as it is: nothing is held.
    #[default]
    Pass,
    /// Let it pass with this in the place of the chunk.
    Replace(std::sync::Arc<Vec<u8>>),
    /// Nothing: bytes are missing, so the request is refused whatever the failure mode.
    Refuse,
}

/// A chunk that cannot be collected.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Lost {
    pub(crate) failure: Failure,
    pub(crate) rescue: Rescue,
}

impl Lost {
    pub(super) fn new(kind: FailureKind, detail: impl Into<String>, rescue: Rescue) -> Self {
        Self { failure: Failure::new(kind, detail), rescue }
    }

    /// Bytes are missing, or it is not certain whose they are.
    pub(super) fn bytes(detail: impl Into<String>) -> Self {
        Self::new(FailureKind::BodyNotCollected, detail, Rescue::Refuse)
    }
}
