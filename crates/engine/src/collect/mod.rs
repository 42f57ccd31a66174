//! Whole request bodies for modules although the proxy streams them: `--collect-request-body`.
//!
//! Every chunk except the last is *held*: the answer drops it and has `needs_more`, so the proxy
//! continues but sends nothing upstream. At the end the module gets the whole body, and the answer
//! to the last chunk puts all of it, original or replaced, in the place of that chunk. From the
//! first held chunk on, a plain allow would forward a body with a gap. Hence:
//!
//! * a body is identified by its connection and correlation id, and a chunk is accepted only if it
//!   continues the body exactly where it ends. A client may choose the id; but every body begins
//!   with chunk 0, so a second body with a live id is detected immediately, and *both* are rejected
//!   from then on. Other connections cannot interfere;
//! * a body that is not known to be complete is rejected, also with `--fail-open`;
//! * after an error that loses nothing, such as a body over the limit, `--fail-open` returns what
//!   was held and lets the rest pass.
//!
//! The socket's protocol carries a replaced chunk as text only. A code point that spans two chunks
//! is joined before it is checked.

mod body;
mod carried;
mod chunk;
mod pieces;
mod store;
mod tail;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

pub(crate) use carried::CarriedBodies;
pub(crate) use chunk::{Collected, Lost, RequestChunk, Rescue};
use store::{KEPT, PartialBodies, Taken};

/// The bodies that are being collected.
pub(crate) struct BodyCollector {
    inner: Mutex<PartialBodies>,
    /// The number of bodies, so requests without the option need no lock.
    known: AtomicUsize,
}

impl BodyCollector {
    pub(crate) fn new() -> Self {
        Self { inner: Mutex::default(), known: AtomicUsize::new(0) }
    }

    /// Whether no body is known.
    pub(crate) fn is_empty(&self) -> bool {
        self.known.load(Relaxed) == 0
    }

    fn lock(&self) -> MutexGuard<'_, PartialBodies> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the bodies, and updates their number.
    fn change<T>(&self, change: impl FnOnce(&mut PartialBodies) -> T) -> T {
        let mut inner = self.lock();
        let result = change(&mut inner);
        self.known.store(inner.bodies.len(), Relaxed);
        result
    }

    /// Whether a body with this id is known. If so, its chunks must be [taken](Self::take) even if
    /// the option is off by now.
    pub(crate) fn knows(&self, connection: u64, id: &str) -> bool {
        !self.is_empty() && {
            let inner = self.lock();
            inner.bodies.contains_key(&inner.key(connection, id))
        }
    }

    /// Takes a chunk.
    ///
    /// # Errors
    ///
    /// It cannot be collected.
    pub(crate) fn take(&self, chunk: RequestChunk<'_>) -> Result<Collected, Lost> {
        self.take_at(chunk, Instant::now())
    }

    fn take_at(&self, chunk: RequestChunk<'_>, now: Instant) -> Result<Collected, Lost> {
        // Large bodies are joined without the lock.
        match self.change(|inner| inner.take(chunk, now))? {
            Taken::Chunk(collected) => Ok(collected),
            Taken::Whole(pieces) => Ok(Collected::Whole(pieces.join())),
            Taken::GiveBack(failure, pieces) => Err(Lost { failure, rescue: Rescue::Replace(std::sync::Arc::new(pieces.join())) }),
        }
    }

    /// Records that the proxy has cancelled this request, or got no answer to one of its events.
    pub(crate) fn cancelled(&self, connection: u64, id: &str) {
        if self.is_empty() {
            return;
        }
        self.change(|inner| {
            let key = inner.key(connection, id);
            if let Some(body) = inner.bodies.get_mut(&key).filter(|body| body.is_open()) {
                inner.bytes -= body.mark_broken();
            }
        });
    }

    /// Records that a connection has ended, with all of its requests.
    pub(crate) fn disconnected(&self, connection: u64) {
        if self.is_empty() {
            return;
        }
        self.change(|inner| {
            let bytes = &mut inner.bytes;
            inner.bodies.retain(|(of, _), body| {
                let stays = *of != connection;
                if !stays {
                    *bytes -= body.mark_broken();
                }
                stays
            });
        });
    }

    /// What another process needs to go on with the bodies on these connections.
    pub(crate) fn carry(&self, connections: &[u64]) -> CarriedBodies {
        CarriedBodies::of(&self.lock(), connections, Instant::now())
    }

    /// Goes on with the bodies of another process on these connections, which correspond to those
    /// that were [carried](Self::carry). Returns whether that is possible: only before other
    /// bodies.
    pub(crate) fn adopt(&self, carried: CarriedBodies, connections: &[u64]) -> bool {
        self.change(|inner| carried.fill(inner, connections, Instant::now()))
    }

    /// Whether a body on this connection is incomplete.
    pub(crate) fn holds(&self, connection: u64) -> bool {
        !self.is_empty() && self.lock().bodies.iter().any(|((of, _), body)| *of == connection && body.is_open())
    }

    /// Drops bodies that have been idle for too long or take too long.
    pub(crate) fn sweep(&self) {
        if !self.is_empty() {
            self.change(|inner| inner.sweep(KEPT, Instant::now()));
        }
    }
}
