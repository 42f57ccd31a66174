//! A chunk of a request's body, and the outcome of collecting it.

use zentinel_wasm_contract::{Failure, FailureKind};

use crate::bodies::Length;

/// A chunk of a request's body.
pub(crate) struct RequestChunk<'a> {
    /// The connection on which it arrived.
    pub(crate) connection: u64,
    pub(crate) id: &'a str,
    /// The number of its request, if known for certain.
    pub(crate) number: Option<u64>,
    pub(crate) length: Length,
    pub(crate) bytes: Vec<u8>,
    pub(crate) index: u32,
    pub(crate) is_last: bool,
    /// Bytes of the body up to and including this chunk, as counted by the proxy.
    pub(crate) received: Option<u64>,
    /// The proxy has buffered it, and would ignore its drop.
    pub(crate) buffered: bool,
    /// Largest body that can be collected, in bytes.
    pub(crate) limit: usize,
    /// Whether an error should return what was held.
    pub(crate) fail_open: bool,
}

/// The outcome of collecting a chunk.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Collected {
    /// It is the whole body, so it is handled as if it were not collected.
    Alone,
    /// It is held.
    Held,
    /// It passes unchanged, because an error was allowed.
    Pass,
    /// The same, with this in its place.
    Forward(Vec<u8>),
    /// It was the last. This is the whole body.
    Whole(Vec<u8>),
}

/// What to do with a body after an error, with `--fail-open`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Rescue {
    /// Let the event pass unchanged, because nothing is held.
    #[default]
    Pass,
    /// Let it pass, with this in the place of the chunk.
    Replace(std::sync::Arc<Vec<u8>>),
    /// Reject the request whatever the failure mode, because bytes are missing.
    Refuse,
}

/// A chunk that cannot be collected.
#[derive(Debug)]
pub(crate) struct Lost {
    pub(crate) failure: Failure,
    pub(crate) rescue: Rescue,
}

impl Lost {
    pub(super) fn new(kind: FailureKind, detail: impl Into<String>, rescue: Rescue) -> Self {
        Self { failure: Failure::new(kind, detail), rescue }
    }

    /// Bytes are missing, or may belong to another request.
    pub(super) fn bytes(detail: impl Into<String>) -> Self {
        Self::new(FailureKind::BodyNotCollected, detail, Rescue::Refuse)
    }
}
