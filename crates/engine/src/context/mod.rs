//! What is remembered of requests for their later hooks.
//!
//! The proxy sends no end-of-request event, and the client chooses the correlation id, so that two live requests may share one. A context that is
//! missing is harmless; one that belongs to another request is a security bug. Hence:
//!
//! * an id that is seen again while it is remembered becomes *ambiguous*: neither request gets a context;
//! * an id is removed only when its request has surely ended, or after [`REMEMBERED`] without an event;
//! * where memory for contexts runs out, the least recently used are dropped, but their ids stay remembered;
//! * where memory for ids runs out, the least recently used id is evicted into a [`IdFilter`], which may take another id for it, but never
//!   misses it within [`REMEMBERED`].
//!
//! There are two filters, because an evicted id means one of two things:
//!
//! * **The request may still be live**: its response has not been seen. A new request of the id is ambiguous from the start.
//! * **The response has ended, the request's body has not**, as with an upstream that answers early, or a proxy that sends no
//!   `request_body` events. Nothing but body events can still come for the old request. So a new request of the id has its context in the
//!   response hooks, but not in `on_request_body`; and the end of a body does not end it, because that may be the old one's body.
//!
//! Whether this proxy sends body events at all is deliberately not learned from what has arrived: a client that makes an upstream
//! answer early could teach the agent that no bodies come, hold a body back, and have it arrive in the context of its next request. With the
//! second filter nothing has to be learned. Where bodies never come, nobody misses their contexts, and the response hooks keep theirs
//! at any rate of requests.
//!
//! Everything is one slab with a list per state, least recently used first, and a hash table that chains through the slab. Every operation
//! is O(1), the memory is reserved once and used as it fills, and nothing is ever sorted, searched or rehashed under the lock.

mod filter;
mod remembered;
mod table;
#[cfg(test)]
mod tests;

use std::hash::BuildHasher;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use hashbrown::DefaultHashBuilder;
use tracing::warn;
use zentinel_wasm_runtime::ResponseContext;

pub(crate) use remembered::Remembered;
use table::{Begun, Evicted, IdTable, MAX_IDS};

/// The store.
pub(crate) struct Contexts {
    hasher: DefaultHashBuilder,
    started: Instant,
    /// Held for a few list operations at most: every request waits for it.
    inner: Mutex<IdTable>,
}

impl Contexts {
    pub(crate) fn new() -> Self {
        Self { hasher: DefaultHashBuilder::default(), started: Instant::now(), inner: Mutex::new(IdTable::new()) }
    }

    /// The id's key. Two ids of one key are taken for one, and are ambiguous then; the hash is keyed, so that a client cannot look for them.
    fn key(&self, id: &str) -> u64 {
        self.hasher.hash_one(id)
    }

    fn seconds(&self, now: Instant) -> u32 {
        now.saturating_duration_since(self.started).as_secs() as u32
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, IdTable> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request has begun, with a body to come or not.
    pub(crate) fn begin(&self, remembered: Remembered, body_open: bool, now: Instant) -> Begun {
        let key = self.key(&remembered.id);
        // Made before the lock is taken, and dropped after it.
        let remembered = Arc::new(remembered);
        let (begun, evicted) = self.lock().begin(key, remembered, body_open, self.seconds(now));
        warn_of(evicted);
        begun
    }

    /// An event of the id was not answered. Its request may be live nevertheless, also where it was taken for refused and its id is not
    /// remembered any more.
    pub(crate) fn unanswered(&self, id: &str, now: Instant) {
        let key = self.key(id);
        let evicted = self.lock().unanswered(key, self.seconds(now));
        warn_of(evicted);
    }

    /// A request of the id has begun of which nothing is known, because its event could not be read.
    pub(crate) fn begin_unknown(&self, id: &str, now: Instant) {
        let key = self.key(id);
        let evicted = self.lock().withhold(key, self.seconds(now));
        warn_of(evicted);
    }

    /// What is known of the request of a response event.
    pub(crate) fn get(&self, id: &str, now: Instant) -> Option<Arc<Remembered>> {
        let key = self.key(id);
        self.lock().get(key, self.seconds(now)).filter(|known| *known.id == *id)
    }

    /// What is known of the request of a body event, after which other chunks follow or do not.
    pub(crate) fn get_for_body(&self, id: &str, is_last: bool, now: Instant) -> Option<Arc<Remembered>> {
        let key = self.key(id);
        self.lock().get_for_body(key, is_last, self.seconds(now)).filter(|known| *known.id == *id)
    }

    /// The request's response is known.
    pub(crate) fn respond(&self, id: &str, response: ResponseContext) {
        let key = self.key(id);
        self.lock().respond(key, response);
    }

    /// No more events of the request will come, unless its body is still under way.
    pub(crate) fn end(&self, id: &str, now: Instant) {
        let key = self.key(id);
        self.lock().end(key, self.seconds(now));
    }

    /// The request was refused: nothing more of it will come.
    pub(crate) fn refused(&self, id: &str, number: u64) {
        let key = self.key(id);
        self.lock().refused(key, number);
    }
}

/// Says, once an hour at most, what an operator can do about an id that was evicted.
fn warn_of(evicted: Option<Evicted>) {
    match evicted {
        Some(Evicted::Live) => warn!(
            "later hooks get no context for some requests: more than {MAX_IDS} requests never ended, because no response \
             event arrived for them; add `response_headers`, and `response_body` where the module exports `on_response_body`, to the \
             agent's `events`, or stop the clients that leave requests open"
        ),
        Some(Evicted::BodyOpen) => warn!(
            "`on_request_body` gets no context for some requests: more than {MAX_IDS} requests ended before their bodies; \
             if the proxy sends no body events, add `request_body` to the agent's `events`, or remove the export"
        ),
        None => {}
    }
}
