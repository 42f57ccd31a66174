//! Whole request bodies for modules, where the proxy streams them: `--collect-request-body`.
//!
//! Every chunk but the last is *held*: answered by a drop and `needs_more`, so that the proxy goes on and
//! sends nothing upstream. The module sees the whole at the end, and the answer to the last chunk puts the whole,
//! as it is or replaced, into its place. From the first chunk that is held, an allow without these bytes
//! would send a body with a hole. Hence:
//!
//! * a body is known by its connection and correlation id, and a chunk is taken only if it goes on exactly where the body
//!   stands. A client chooses the id; but every body begins with chunk 0, so a second one of a live id shows at once,
//!   and *both* are refused from then on. Other connections cannot interfere.
//! * what the agent does not know to be complete is refused, also with `--fail-open`;
//! * an error that loses nothing, such as a body over the limit, gives back under `--fail-open` what was held, and
//!   lets the rest pass.
//!
//! The wire carries a changed chunk as text only. A code point that two chunks share is put together before it is judged.

mod body;
mod chunk;
mod pieces;
mod store;
mod tail;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

pub(crate) use chunk::{Collected, Lost, RequestChunk, Rescue};
use store::{KEPT, PartialBodies, Taken};

/// The bodies that are being collected.
pub(crate) struct BodyCollector {
    inner: Mutex<PartialBodies>,
    /// As many as there are. Requests without the option look here and go on.
    known: AtomicUsize,
}

impl BodyCollector {
    pub(crate) fn new() -> Self {
        Self { inner: Mutex::default(), known: AtomicUsize::new(0) }
    }

    /// Whether there are none.
    pub(crate) fn is_empty(&self) -> bool {
        self.known.load(Relaxed) == 0
    }

    fn lock(&self) -> MutexGuard<'_, PartialBodies> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the bodies, and counts them.
    fn change<T>(&self, change: impl FnOnce(&mut PartialBodies) -> T) -> T {
        let mut inner = self.lock();
        let result = change(&mut inner);
        self.known.store(inner.bodies.len(), Relaxed);
        result
    }

    /// Whether a body of this id is known, so that its chunks must be [taken](Self::take) whatever the settings are by now.
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
        // What is large is put together when others can go on.
        match self.change(|inner| inner.take(chunk, now))? {
            Taken::Chunk(collected) => Ok(collected),
            Taken::Whole(pieces) => Ok(Collected::Whole(pieces.join())),
            Taken::GiveBack(failure, pieces) => Err(Lost { failure, rescue: Rescue::Replace(std::sync::Arc::new(pieces.join())) }),
        }
    }

    /// The proxy wants no more answers for this request, or did not get one.
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

    /// A connection has ended, and all of its requests.
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

    /// Whether bytes are held of a request on this connection.
    pub(crate) fn holds(&self, connection: u64) -> bool {
        !self.is_empty() && self.lock().bodies.iter().any(|((of, _), body)| *of == connection && body.is_open())
    }

    /// Drops what has become too old.
    pub(crate) fn sweep(&self) {
        if !self.is_empty() {
            self.change(|inner| inner.sweep(KEPT, Instant::now()));
        }
    }
}
