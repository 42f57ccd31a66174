//! What the agent remembers of requests for their later hooks.
//!
//! The proxy sends no end-of-request event, and the client may choose the correlation id, so two
//! live requests can share one. A missing context is harmless; the context of another request is a
//! security bug. Hence:
//!
//! * an id that arrives again while it is remembered becomes *ambiguous*: neither request gets a
//!   context;
//! * an id is removed only when its request has certainly ended, or after
//!   [`REMEMBERED`](remembered::REMEMBERED) without an event;
//! * when the memory for contexts is used up, the least recently used are dropped, but their ids
//!   stay remembered;
//! * when the memory for ids is used up, the least recently used id is evicted into an
//!   [`IdFilter`](filter::IdFilter), which may have false positives, but no false negatives within
//!   [`REMEMBERED`](remembered::REMEMBERED).
//!
//! There are two filters, because an evicted id can have two meanings:
//!
//! * **The request may still be live**: its response has not arrived. A new request with the id is
//!   ambiguous from the start.
//! * **The response has ended, but the request's body has not**, as with an upstream that responds
//!   early, or a proxy that sends no `request_body` events. Only body events can still arrive for
//!   the old request. So a new request with the id gets its context in the response hooks, but not
//!   in `on_request_body`; and the end of a body does not end it, because that may be the body of
//!   the old request.
//!
//! The agent deliberately does not learn from events whether this proxy sends body events at all: a
//! client that makes an upstream respond early could make the agent conclude that no bodies come,
//! hold a body back, and have it arrive in the context of its next request. With the second filter
//! the agent need not know. If bodies never come, their contexts are not missed, and the response
//! hooks keep theirs at any rate of requests.
//!
//! All ids are in one slab, with a list per state, least recently used first, and a hash table that
//! chains through the slab. Every operation is O(1). Memory is reserved once and used as the slab
//! fills, and nothing is ever sorted, searched or rehashed under the lock.

mod carried;
mod filter;
mod remembered;
mod table;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tracing::warn;
use zentinel_wasm_runtime::ResponseContext;

pub(crate) use carried::CarriedContexts;
pub(crate) use remembered::Remembered;
use table::{Begun, Evicted, IdTable, MAX_IDS};

use crate::ids::IdHasher;

/// The contexts and ids of all requests.
pub(crate) struct Contexts {
    hasher: IdHasher,
    started: Instant,
    /// The time that this process began with, in seconds: 0, or that of its predecessor.
    offset: AtomicU32,
    /// Held for a few list operations at most, because every request waits for it.
    inner: Mutex<IdTable>,
}

impl Contexts {
    pub(crate) fn new() -> Self {
        Self { hasher: IdHasher::default(), started: Instant::now(), offset: AtomicU32::new(0), inner: Mutex::new(IdTable::new()) }
    }

    /// The key of `id`. Two ids with the same key count as the same id, and are ambiguous; the hash
    /// is keyed, so a client cannot search for such ids.
    fn key(&self, id: &str) -> u64 {
        self.hasher.key(id)
    }

    fn seconds(&self, now: Instant) -> u32 {
        self.offset.load(Relaxed).saturating_add(now.saturating_duration_since(self.started).as_secs() as u32)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, IdTable> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What another process needs to go on.
    pub(crate) fn carry(&self, now: Instant) -> CarriedContexts {
        let now = self.seconds(now);
        CarriedContexts::of(&self.lock(), self.hasher.secret(), now)
    }

    /// Goes on where another process was. Returns whether that is possible: only before the first
    /// event.
    pub(crate) fn adopt(&self, carried: CarriedContexts) -> bool {
        if !self.hasher.adopt(carried.secret) {
            return false;
        }
        self.offset.store(carried.now, Relaxed);
        carried.fill(&mut self.lock());
        true
    }

    /// Records that a request has begun. `body_open`: a body may follow.
    pub(crate) fn begin(&self, remembered: Remembered, body_open: bool, now: Instant) -> Begun {
        let key = self.key(&remembered.id);
        // Allocated before taking the lock, and dropped after releasing it.
        let remembered = Arc::new(remembered);
        let (begun, evicted) = self.lock().begin(key, remembered, body_open, self.seconds(now));
        warn_of(evicted);
        begun
    }

    /// Records that an event with this id got no answer. Its request may be live nevertheless, even
    /// if it was recorded as refused and its id is no longer remembered.
    pub(crate) fn unanswered(&self, id: &str, now: Instant) {
        let key = self.key(id);
        let evicted = self.lock().unanswered(key, self.seconds(now));
        warn_of(evicted);
    }

    /// Records that a request with this id has begun whose event could not be decoded.
    pub(crate) fn begin_unknown(&self, id: &str, now: Instant) {
        let key = self.key(id);
        let evicted = self.lock().withhold(key, self.seconds(now));
        warn_of(evicted);
    }

    /// Looks up the request of a response event.
    pub(crate) fn get(&self, id: &str, now: Instant) -> Option<Arc<Remembered>> {
        let key = self.key(id);
        self.lock().get(key, self.seconds(now)).filter(|known| *known.id == *id)
    }

    /// Looks up the request of a body event. `is_last`: no other chunk follows.
    pub(crate) fn get_for_body(&self, id: &str, is_last: bool, now: Instant) -> Option<Arc<Remembered>> {
        let key = self.key(id);
        self.lock().get_for_body(key, is_last, self.seconds(now)).filter(|known| *known.id == *id)
    }

    /// Adds the request's response to its context.
    pub(crate) fn respond(&self, id: &str, response: ResponseContext) {
        let key = self.key(id);
        self.lock().respond(key, response);
    }

    /// Records that the request has ended, except perhaps for its body.
    pub(crate) fn end(&self, id: &str, now: Instant) {
        let key = self.key(id);
        self.lock().end(key, self.seconds(now));
    }

    /// Records that the request was refused, so it has no more events.
    pub(crate) fn refused(&self, id: &str, number: u64) {
        let key = self.key(id);
        self.lock().refused(key, number);
    }
}

/// Logs what an operator can do about evicted ids. A filter reports an eviction at most once an
/// hour.
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
