//! What is remembered of requests for their later hooks.
//!
//! The proxy sends no end-of-request event, and the client chooses the correlation id, so that two live requests may share one. A context that is
//! missing is harmless; one that belongs to another request is a security bug. Hence:
//!
//! * an id that is seen again while it is remembered becomes *ambiguous*: neither request gets a context;
//! * an id is removed only when its request has surely ended, or after [`REMEMBERED`] without an event;
//! * where memory for contexts runs out, the least recently used are dropped, but their ids stay remembered;
//! * where memory for ids runs out, the least recently used id is evicted into a [`Filter`], which may take another id for it, but never
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

use std::hash::BuildHasher;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hashbrown::DefaultHashBuilder;
use tracing::warn;
use zentinel_wasm_runtime::{Context, ResponseContext};

use crate::bodies::Length;

/// How long an id is remembered after its last event. No request that a proxy still cares for is silent for so long.
const REMEMBERED: Duration = Duration::from_secs(3600);

/// How long a context is kept after its request's last event. Upstreams that take longer are rare, and get no context.
const KEPT: Duration = Duration::from_secs(300);

/// Memory of all contexts, in bytes: some ten thousand requests under way.
const MAX_BYTES: usize = 16 << 20;

/// What a context takes beside its bytes: the structures, and what the allocator adds to each of its six pieces.
const OVERHEAD: usize = size_of::<Remembered>() + 6 * 24;

/// Ids that are remembered exactly, at some 50 bytes each. Well above what [`MAX_BYTES`] has contexts for, so that filters are for ids whose
/// requests have long been silent.
const MAX_IDS: usize = 1 << 17;

/// Blocks of a filter, each made when it is first needed. 8 MiB per filter when all are in use.
const BLOCKS: usize = 1 << 10;

/// Bits of a block for ids of an hour. At a million ids an hour, one other id in 300 is taken for one of them; at ten million, one in five.
const BLOCK_BITS: usize = 1 << 15;

/// What of a request its later hooks are told, and the logs of them.
#[derive(Debug)]
pub(crate) struct Remembered {
    pub(crate) context: Context,
    pub(crate) traceparent: Option<Arc<str>>,
    /// Whether the upstream knows how long the request's body is.
    pub(crate) length: Length,
    id: Arc<str>,
    /// Tells it from other requests of its id.
    number: u64,
}

impl Remembered {
    pub(crate) fn new(id: Arc<str>, context: Context, traceparent: Option<Arc<str>>, length: Length) -> Self {
        Self { context, traceparent, length, id, number: 0 }
    }

    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// Memory that it holds, in bytes.
    fn size(&self) -> usize {
        self.context.size() + self.id.len() + self.traceparent.as_ref().map_or(0, |text| text.len()) + OVERHEAD
    }
}

/// What [`Contexts::begin`] has made of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Begun {
    /// Tells the request from others of its id.
    pub(crate) number: u64,
    /// Another request of its id is, or may be, live.
    pub(crate) collides: bool,
}

/// The store.
pub(crate) struct Contexts {
    hasher: DefaultHashBuilder,
    started: Instant,
    /// Held for a few list operations at most: every request waits for it.
    inner: Mutex<Inner>,
}

impl Contexts {
    pub(crate) fn new() -> Self {
        Self { hasher: DefaultHashBuilder::default(), started: Instant::now(), inner: Mutex::new(Inner::new()) }
    }

    /// The id's key. Two ids of one key are taken for one, and are ambiguous then; the hash is keyed, so that a client cannot look for them.
    fn key(&self, id: &str) -> u64 {
        self.hasher.hash_one(id)
    }

    fn seconds(&self, now: Instant) -> u32 {
        now.saturating_duration_since(self.started).as_secs() as u32
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
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

/// A place in the slab. The first ones are the ends of the lists; zero therefore stands for none.
type Index = u32;

/// The state of an id, which is the list that it is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum IdState {
    /// It belongs to one live request, whose context is kept.
    Known = 0,
    /// It belongs to several requests, or to one whose context was dropped.
    Withheld = 1,
    /// Its request has ended, but not the request's body.
    Ended = 2,
}

impl IdState {
    const ALL: [Self; 3] = [Self::Known, Self::Withheld, Self::Ended];
}

struct Entry {
    key: u64,
    remembered: Option<Arc<Remembered>>,
    /// When it was last used, in seconds since the start.
    touched: u32,
    before: Index,
    behind: Index,
    /// The next entry whose key has the same place in the table, or the next free one.
    chained: Index,
    state: IdState,
    /// A body may follow, or goes on.
    body_open: bool,
}

/// What was evicted into a filter that had been empty before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Evicted {
    Live,
    BodyOpen,
}

struct Inner {
    entries: Vec<Entry>,
    /// For each value of a key's lowest bits, the first entry.
    table: Box<[Index]>,
    free: Index,
    len: usize,
    bytes: usize,
    /// How many requests have begun.
    begun: u64,
    /// Ids of requests that may be live.
    live: Filter,
    /// Ids of requests that have ended, but not their bodies.
    bodies: Filter,
}

const KEPT_SECONDS: u32 = KEPT.as_secs() as u32;
const REMEMBERED_SECONDS: u32 = REMEMBERED.as_secs() as u32;

impl Inner {
    fn new() -> Self {
        // Address space; memory is taken as entries are used.
        let mut entries = Vec::with_capacity(MAX_IDS + IdState::ALL.len());
        for state in IdState::ALL {
            let end = state as Index;
            entries.push(Entry { key: 0, remembered: None, touched: 0, before: end, behind: end, chained: 0, state, body_open: false });
        }
        Self { entries, table: vec![0; MAX_IDS].into(), free: 0, len: 0, bytes: 0, begun: 0, live: Filter::new(), bodies: Filter::new() }
    }

    fn at(&mut self, index: Index) -> &mut Entry {
        &mut self.entries[index as usize]
    }

    fn place(key: u64) -> usize {
        key as usize % MAX_IDS
    }

    fn find(&self, key: u64) -> Option<Index> {
        let mut at = self.table[Self::place(key)];
        while at != 0 {
            let entry = &self.entries[at as usize];
            if entry.key == key {
                return Some(at);
            }
            at = entry.chained;
        }
        None
    }

    /// The entry of `state` that has not been used for the longest time.
    fn oldest(&self, state: IdState) -> Option<Index> {
        let first = self.entries[state as usize].behind;
        (first != state as Index).then_some(first)
    }

    fn unlink(&mut self, at: Index) {
        let Entry { before, behind, .. } = *self.at(at);
        self.at(before).behind = behind;
        self.at(behind).before = before;
    }

    fn append(&mut self, at: Index, state: IdState, now: u32) {
        let end = state as Index;
        let last = std::mem::replace(&mut self.at(end).before, at);
        self.at(last).behind = at;
        let entry = self.at(at);
        (entry.before, entry.behind, entry.state, entry.touched) = (last, end, state, now);
    }

    fn touch(&mut self, at: Index, state: IdState, now: u32) {
        self.unlink(at);
        self.append(at, state, now);
    }

    /// Drops the context of an entry.
    fn release(&mut self, at: Index, state: IdState, now: u32) {
        if let Some(remembered) = self.at(at).remembered.take() {
            self.bytes -= remembered.size();
        }
        self.touch(at, state, now);
    }

    fn insert(&mut self, key: u64, remembered: Option<Arc<Remembered>>, body_open: bool, now: u32) -> Index {
        let state = if remembered.is_some() { IdState::Known } else { IdState::Withheld };
        self.bytes += remembered.as_ref().map_or(0, |remembered| remembered.size());
        self.len += 1;
        let chained = self.table[Self::place(key)];
        let entry = Entry { key, remembered, touched: now, before: 0, behind: 0, chained, state, body_open };
        let at = if self.free == 0 {
            self.entries.push(entry);
            (self.entries.len() - 1) as Index
        } else {
            let at = self.free;
            self.free = std::mem::replace(self.at(at), entry).chained;
            at
        };
        self.table[Self::place(key)] = at;
        self.append(at, state, now);
        at
    }

    fn remove(&mut self, at: Index) {
        self.unlink(at);
        let (free, entry) = (self.free, self.at(at));
        let (key, chained) = (entry.key, std::mem::replace(&mut entry.chained, free));
        if let Some(remembered) = entry.remembered.take() {
            self.bytes -= remembered.size();
        }
        self.free = at;
        self.len -= 1;
        let place = Self::place(key);
        if self.table[place] == at {
            self.table[place] = chained;
            return;
        }
        let mut before = self.table[place];
        while self.at(before).chained != at {
            before = self.at(before).chained;
        }
        self.at(before).chained = chained;
    }

    /// Expires contexts and ids that are silent for too long. A few of them for each that comes are enough.
    fn age(&mut self, now: u32) {
        if let Some(at) = self.oldest(IdState::Known)
            && now.saturating_sub(self.at(at).touched) > KEPT_SECONDS
        {
            self.release(at, IdState::Withheld, now);
        }
        for state in [IdState::Withheld, IdState::Ended] {
            for _ in 0..2 {
                let Some(at) = self.oldest(state).filter(|at| now.saturating_sub(self.entries[*at as usize].touched) > REMEMBERED_SECONDS)
                else {
                    break;
                };
                self.remove(at);
            }
        }
    }

    /// Makes room for an id.
    fn evict(&mut self, now: u32) -> Option<Evicted> {
        if self.len < MAX_IDS {
            return None;
        }
        let silent = [IdState::Withheld, IdState::Ended].into_iter().filter_map(|state| self.oldest(state));
        let at = silent.min_by_key(|at| self.entries[*at as usize].touched).or_else(|| self.oldest(IdState::Known))?;
        let Entry { key, state, .. } = *self.at(at);
        self.remove(at);
        let (filter, evicted) =
            if state == IdState::Ended { (&mut self.bodies, Evicted::BodyOpen) } else { (&mut self.live, Evicted::Live) };
        filter.insert(key, now).then_some(evicted)
    }

    fn begin(&mut self, key: u64, mut remembered: Arc<Remembered>, body_open: bool, now: u32) -> (Begun, Option<Evicted>) {
        self.age(now);
        self.begun += 1;
        let number = self.begun;
        if let Some(at) = self.find(key) {
            if now.saturating_sub(self.at(at).touched) <= REMEMBERED_SECONDS {
                self.release(at, IdState::Withheld, now);
                return (Begun { number, collides: true }, None);
            }
            self.remove(at);
        }
        let evicted = self.evict(now);
        let known = if self.live.contains(key, now) {
            None
        } else {
            // Nobody else has it yet.
            if let Some(remembered) = Arc::get_mut(&mut remembered) {
                remembered.number = number;
            }
            Some(remembered)
        };
        let at = self.insert(key, known, body_open, now);
        self.shrink(at, now);
        (Begun { number, collides: false }, evicted)
    }

    /// Gives the id no context from now on.
    fn withhold(&mut self, key: u64, now: u32) -> Option<Evicted> {
        self.age(now);
        if let Some(at) = self.find(key) {
            self.release(at, IdState::Withheld, now);
            return None;
        }
        let evicted = self.evict(now);
        self.insert(key, None, false, now);
        evicted
    }

    fn unanswered(&mut self, key: u64, now: u32) -> Option<Evicted> {
        let is_remembered = self.find(key).is_some_and(|at| now.saturating_sub(self.at(at).touched) <= REMEMBERED_SECONDS);
        if is_remembered { None } else { self.withhold(key, now) }
    }

    fn get(&mut self, key: u64, now: u32) -> Option<Arc<Remembered>> {
        let at = self.find(key)?;
        let Entry { state, touched, .. } = *self.at(at);
        if state == IdState::Known && now.saturating_sub(touched) > KEPT_SECONDS {
            self.release(at, IdState::Withheld, now);
            return None;
        }
        self.touch(at, state, now);
        self.at(at).remembered.clone()
    }

    fn get_for_body(&mut self, key: u64, is_last: bool, now: u32) -> Option<Arc<Remembered>> {
        let known = self.get(key, now);
        // It may be the body of a request that ended before, and neither tells of this one's nor ends it.
        if self.bodies.contains(key, now) {
            return None;
        }
        if let Some(at) = self.find(key) {
            match self.at(at).state {
                IdState::Known => self.at(at).body_open = !is_last,
                IdState::Ended if is_last => self.remove(at),
                IdState::Ended | IdState::Withheld => {}
            }
        }
        known
    }

    fn respond(&mut self, key: u64, response: ResponseContext) {
        let Some(at) = self.find(key) else { return };
        let Some(remembered) = &mut self.at(at).remembered else { return };
        let before = remembered.size();
        // A call that still holds the old state has no use for the new one.
        let Some(changed) = Arc::get_mut(remembered) else { return };
        changed.context.set_response(response);
        let after = changed.size();
        self.bytes = self.bytes - before + after;
        let now = self.at(at).touched;
        self.shrink(at, now);
    }

    fn end(&mut self, key: u64, now: u32) {
        let Some(at) = self.find(key) else { return };
        let Entry { state, body_open, .. } = *self.at(at);
        match state {
            IdState::Known if body_open => self.release(at, IdState::Ended, now),
            IdState::Known => self.remove(at),
            IdState::Withheld | IdState::Ended => {}
        }
    }

    fn refused(&mut self, key: u64, number: u64) {
        if let Some(at) = self.find(key)
            && self.at(at).remembered.as_ref().is_some_and(|remembered| remembered.number == number)
        {
            self.remove(at);
        }
    }

    /// Drops contexts, the least recently used first, until the rest is within bounds. Where a few do not free enough, the one that has just
    /// grown goes too, because every other request waits meanwhile.
    fn shrink(&mut self, grown: Index, now: u32) {
        const DROPPED_AT_ONCE: usize = 64;
        for _ in 0..DROPPED_AT_ONCE {
            if self.bytes <= MAX_BYTES {
                return;
            }
            let Some(at) = self.oldest(IdState::Known) else { return };
            self.release(at, IdState::Withheld, now);
        }
        if self.bytes > MAX_BYTES && self.at(grown).state == IdState::Known {
            self.release(grown, IdState::Withheld, now);
        }
    }
}

/// A set of keys that takes none for absent for [`REMEMBERED`] after it was inserted, and forgets it after twice that time. Others may be taken
/// for present: a Bloom filter with two bits per key, in blocks.
struct Filter {
    blocks: Box<[Option<Box<Block>>]>,
    /// When a key was last inserted.
    inserted: Option<u32>,
}

struct Block {
    /// When `recent` was begun.
    since: u32,
    recent: [u64; BLOCK_BITS / 64],
    /// The keys of the time before.
    former: [u64; BLOCK_BITS / 64],
}

impl Block {
    const EMPTY: [u64; BLOCK_BITS / 64] = [0; BLOCK_BITS / 64];

    fn turn(&mut self, now: u32) {
        let age = now.saturating_sub(self.since);
        if age > REMEMBERED_SECONDS {
            self.former = if age > 2 * REMEMBERED_SECONDS { Self::EMPTY } else { self.recent };
            self.recent = Self::EMPTY;
            self.since = now;
        }
    }
}

impl Filter {
    fn new() -> Self {
        Self { blocks: std::iter::repeat_with(|| None).take(BLOCKS).collect(), inserted: None }
    }

    /// The place of a key: its block, and two bits of it. Bits that the table's places do not depend on.
    fn place(key: u64) -> (usize, [(usize, u64); 2]) {
        let bit = |shift: u32| {
            let bit = (key >> shift) as usize % BLOCK_BITS;
            (bit / 64, 1 << (bit % 64))
        };
        ((key >> 54) as usize % BLOCKS, [bit(24), bit(39)])
    }

    /// True when there had been no key for so long that it was empty.
    fn insert(&mut self, key: u64, now: u32) -> bool {
        let (block, bits) = Self::place(key);
        let block = self.blocks[block].get_or_insert_with(|| Box::new(Block { since: now, recent: Block::EMPTY, former: Block::EMPTY }));
        block.turn(now);
        for (word, bit) in bits {
            block.recent[word] |= bit;
        }
        let before = self.inserted.replace(now);
        before.is_none_or(|before| now.saturating_sub(before) > REMEMBERED_SECONDS)
    }

    fn contains(&mut self, key: u64, now: u32) -> bool {
        if self.inserted.is_none() {
            return false;
        }
        let (block, bits) = Self::place(key);
        let Some(block) = &mut self.blocks[block] else { return false };
        block.turn(now);
        bits.iter().all(|(word, bit)| block.recent[*word] & bit != 0) || bits.iter().all(|(word, bit)| block.former[*word] & bit != 0)
    }
}

#[cfg(test)]
mod tests {
    use zentinel_wasm_guest_json::input;

    use super::*;

    fn about(id: &str, uri: &str) -> Remembered {
        Remembered::new(
            id.into(),
            Context::Json(input::Context { request: uri.as_bytes().into(), ..input::Context::default() }),
            None,
            Length::Open,
        )
    }

    fn text(known: Option<Arc<Remembered>>) -> Option<String> {
        known.map(|known| {
            let Context::Json(context) = &known.context;
            String::from_utf8(context.request.to_vec()).unwrap()
        })
    }

    /// What a response hook is told.
    fn uri(store: &Contexts, id: &str, now: Instant) -> Option<String> {
        text(store.get(id, now))
    }

    fn store() -> (Contexts, Instant) {
        let store = Contexts::new();
        let started = store.started;
        (store, started)
    }

    /// Checks what holds between any two operations.
    fn check(inner: &Inner) {
        let mut seen = 0;
        let mut bytes = 0;
        for state in IdState::ALL {
            let mut at = inner.entries[state as usize].behind;
            let mut before = state as Index;
            while at != state as Index {
                let entry = &inner.entries[at as usize];
                assert_eq!((entry.state, entry.before), (state, before));
                assert_eq!(entry.remembered.is_some(), state == IdState::Known);
                assert_eq!(inner.find(entry.key), Some(at));
                bytes += entry.remembered.as_ref().map_or(0, |remembered| remembered.size());
                seen += 1;
                (before, at) = (at, entry.behind);
            }
            assert_eq!(inner.entries[state as usize].before, before);
        }
        assert_eq!((inner.len, inner.bytes), (seen, bytes));
        assert!(inner.len <= MAX_IDS && inner.bytes <= MAX_BYTES);
        assert!(inner.entries.len() <= MAX_IDS + IdState::ALL.len(), "the slab has grown beyond what was reserved");
    }

    #[test]
    fn a_request_is_known_until_it_ends() {
        let (store, now) = store();
        store.begin(about("a", "/1"), false, now);
        assert_eq!(uri(&store, "a", now).as_deref(), Some("/1"));
        assert_eq!(uri(&store, "b", now), None);
        store.end("a", now);
        assert_eq!(uri(&store, "a", now), None);
        store.begin(about("a", "/2"), false, now);
        assert_eq!(uri(&store, "a", now).as_deref(), Some("/2"));
    }

    #[test]
    fn two_live_requests_of_one_id_get_nothing_of_each_other() {
        let (store, now) = store();
        assert!(!store.begin(about("a", "/1"), false, now).collides);
        assert!(store.begin(about("a", "/2"), false, now).collides);
        assert_eq!(uri(&store, "a", now), None);
        // One of them ends, the other is still there: nobody knows which.
        store.end("a", now);
        assert!(store.begin(about("a", "/3"), false, now).collides);
        assert_eq!(uri(&store, "a", now), None);
        assert_eq!(store.lock().bytes, 0);
    }

    #[test]
    fn a_request_whose_body_is_under_way_does_not_lend_its_id() {
        let (store, now) = store();
        store.begin(about("a", "/1"), true, now);
        store.end("a", now);
        assert!(store.begin(about("a", "/2"), false, now).collides);
        assert_eq!(uri(&store, "a", now), None);
    }

    #[test]
    fn a_body_that_ends_after_the_response_frees_the_id() {
        let (store, now) = store();
        store.begin(about("a", "/1"), true, now);
        store.end("a", now);
        assert!(store.get_for_body("a", false, now).is_none());
        assert_eq!(store.lock().len, 1);
        assert!(store.get_for_body("a", true, now).is_none());
        assert_eq!(store.lock().len, 0);
        store.begin(about("a", "/2"), true, now);
        assert_eq!(text(store.get_for_body("a", true, now)).as_deref(), Some("/2"));
    }

    #[test]
    fn the_end_of_a_body_counts_while_its_call_is_under_way() {
        let (store, now) = store();
        store.begin(about("a", "/1"), true, now);
        let call = store.get("a", now);
        store.get_for_body("a", true, now);
        drop(call);
        store.end("a", now);
        store.begin(about("a", "/2"), false, now);
        assert_eq!(uri(&store, "a", now).as_deref(), Some("/2"));
    }

    #[test]
    fn a_refusal_ends_its_own_request_and_no_newer_one() {
        let (store, now) = store();
        let first = store.begin(about("a", "/1"), false, now).number;
        store.end("a", now);
        let second = store.begin(about("a", "/2"), true, now).number;
        store.refused("a", first);
        assert_eq!(uri(&store, "a", now).as_deref(), Some("/2"));
        store.refused("a", second);
        assert_eq!(store.lock().len, 0);
        check(&store.lock());
        // Of two that share an id, none is forgotten.
        store.begin(about("a", "/3"), false, now);
        let fourth = store.begin(about("a", "/4"), false, now).number;
        store.refused("a", fourth);
        store.begin(about("a", "/5"), false, now);
        assert_eq!(uri(&store, "a", now), None);
    }

    #[test]
    fn a_refusal_that_was_not_sent_reserves_the_id_again() {
        let (store, now) = store();
        let first = store.begin(about("a", "/1"), false, now).number;
        store.refused("a", first);
        store.unanswered("a", now);
        assert!(store.begin(about("a", "/2"), false, now).collides);
        assert_eq!(uri(&store, "a", now), None);
        // One that is remembered keeps its context: the event that was not answered may be its own.
        store.begin(about("b", "/1"), false, now);
        store.unanswered("b", now);
        assert_eq!(uri(&store, "b", now).as_deref(), Some("/1"));
        // Silent for so long, it would be forgotten by the next that begins.
        let later = now + REMEMBERED + Duration::from_secs(1);
        store.unanswered("a", later);
        assert!(store.begin(about("a", "/3"), false, later).collides);
        check(&store.lock());
    }

    #[test]
    fn a_request_of_which_nothing_is_known_shares_its_id_with_no_other() {
        let (store, now) = store();
        store.begin_unknown("a", now);
        assert!(store.begin(about("a", "/1"), false, now).collides);
        store.begin(about("b", "/1"), false, now);
        store.begin_unknown("b", now);
        assert_eq!((uri(&store, "a", now), uri(&store, "b", now)), (None, None));
        check(&store.lock());
    }

    #[test]
    fn silence_takes_the_context_first_and_the_id_much_later() {
        let (store, now) = store();
        store.begin(about("a", "/1"), false, now);
        let later = now + KEPT + Duration::from_secs(1);
        store.begin(about("b", "/b"), false, later);
        assert_eq!(uri(&store, "a", later), None);
        store.begin(about("a", "/2"), false, later);
        assert_eq!(uri(&store, "a", later), None);
        let much_later = later + REMEMBERED + Duration::from_secs(1);
        store.begin(about("a", "/3"), false, much_later);
        assert_eq!(uri(&store, "a", much_later).as_deref(), Some("/3"));
    }

    #[test]
    fn an_id_that_is_never_silent_keeps_no_other_remembered() {
        let (store, mut now) = store();
        for id in 0..100 {
            store.begin(about(&id.to_string(), "/"), id % 2 == 0, now);
            if id % 4 == 0 {
                store.end(&id.to_string(), now);
            }
        }
        // The first is in use all the time.
        let end = now + 2 * REMEMBERED;
        while now < end {
            now += KEPT / 2;
            for _ in 0..50 {
                store.begin(about("0", "/"), false, now);
            }
        }
        assert_eq!(store.lock().len, 1);
    }

    #[test]
    fn memory_is_bounded_and_dropped_contexts_do_not_lend_their_ids() {
        let (store, now) = store();
        let large = "x".repeat(1 << 20);
        for at in 0..100 {
            store.begin(about(&at.to_string(), &large), false, now);
            assert!(store.lock().bytes <= MAX_BYTES);
        }
        assert_eq!(uri(&store, "0", now), None);
        store.begin(about("0", "/new"), false, now);
        assert_eq!(uri(&store, "0", now), None);
        assert!(uri(&store, "99", now).is_some());
        // One that leaves no room for others gets none itself.
        store.begin(about("huge", &"x".repeat(MAX_BYTES)), false, now);
        assert_eq!(uri(&store, "huge", now), None);
        check(&store.lock());
    }

    #[test]
    fn ids_without_a_context_are_not_in_the_way_of_those_that_are_dropped() {
        let (store, now) = store();
        for at in 0..10_000 {
            store.begin(about(&at.to_string(), "/"), false, now);
            store.begin(about(&at.to_string(), "/"), false, now);
        }
        let large = "x".repeat(MAX_BYTES / 2 - 1000);
        for id in ["a", "b", "c", "d", "e", "f"] {
            store.begin(about(id, &large), false, now);
            assert!(uri(&store, id, now).is_some(), "{id}");
        }
        check(&store.lock());
    }

    /// A client may fill the store with small contexts and then send one that takes the place of all.
    #[test]
    fn no_request_waits_until_many_contexts_are_dropped() {
        let (store, now) = store();
        for at in 0..10_000 {
            store.begin(about(&at.to_string(), &"x".repeat(1000)), false, now);
        }
        store.begin(about("large", &"x".repeat(MAX_BYTES / 2)), false, now);
        assert_eq!(uri(&store, "large", now), None);
        let known = (0..10_000).filter(|at| uri(&store, &at.to_string(), now).is_some()).count();
        assert!(known >= 9900, "{known}");
        check(&store.lock());
    }

    #[test]
    fn the_memory_of_responses_is_bounded_too() {
        let (store, now) = store();
        for at in 0..100 {
            store.begin(about(&at.to_string(), "/"), false, now);
        }
        for at in 0..100 {
            store.respond(&at.to_string(), ResponseContext::Json(vec![0; 1 << 20].into()));
            check(&store.lock());
        }
    }

    #[test]
    fn ended_requests_leave_nothing_behind() {
        let (store, now) = store();
        store.begin(about("long", "/"), false, now);
        for at in 0..10_000 {
            let id = at.to_string();
            store.begin(about(&id, "/"), false, now);
            store.end(&id, now);
        }
        let inner = store.lock();
        assert_eq!((inner.len, inner.entries.len()), (1, IdState::ALL.len() + 2));
        check(&inner);
    }

    /// A request whose response never comes is remembered, although there is no place for it.
    #[test]
    fn a_full_store_takes_no_context_from_others_and_lends_no_id() {
        let (store, now) = store();
        let id = |at: usize| at.to_string();
        for at in 0..2 * MAX_IDS {
            store.begin(about(&id(at), "/"), false, now);
        }
        check(&store.lock());
        // All of the earlier half, whether they lie in the slab or in the filter.
        for at in (0..MAX_IDS).step_by(100) {
            store.begin(about(&id(at), "/other"), false, now);
            assert_eq!(uri(&store, &id(at), now), None, "{at}");
        }
        let known = (0..1000).map(|at| format!("new-{at}")).filter(|id| {
            store.begin(about(id, "/new"), false, now);
            uri(&store, id, now).as_deref() == Some("/new")
        });
        assert!(known.count() > 990);
        // They are remembered for an hour at least, and for two at most.
        let hour = now + REMEMBERED - Duration::from_secs(1);
        store.begin(about(&id(1), "/other"), false, hour);
        assert_eq!(uri(&store, &id(1), hour), None);
        let later = now + 2 * REMEMBERED + Duration::from_secs(2);
        store.begin(about(&id(2), "/later"), false, later);
        assert_eq!(uri(&store, &id(2), later).as_deref(), Some("/later"));
    }

    /// As behind a proxy that sends no body events: response hooks miss nothing.
    #[test]
    fn bodies_that_never_come_take_no_context_from_response_hooks() {
        let (store, now) = store();
        let ids: Vec<_> = (0..4 * MAX_IDS).map(|at| at.to_string()).collect();
        for id in &ids {
            assert!(!store.begin(about(id, "/"), true, now).collides);
            assert!(uri(&store, id, now).is_some());
            store.end(id, now);
        }
        check(&store.lock());
    }

    /// The body of an ended request comes late, when its id has been evicted and is in use again.
    #[test]
    fn a_late_body_gets_no_context_of_a_newer_request_and_ends_none() {
        let (store, now) = store();
        store.begin(about("late", "/1"), true, now);
        store.end("late", now);
        for at in 0..2 * MAX_IDS {
            let id = at.to_string();
            store.begin(about(&id, "/"), true, now);
            store.end(&id, now);
        }
        assert!(!store.begin(about("late", "/2"), true, now).collides, "it was evicted");
        assert_eq!(uri(&store, "late", now).as_deref(), Some("/2"));
        assert!(store.get_for_body("late", true, now).is_none(), "that may be the body of /1");
        store.end("late", now);
        // That of /2 is still to come.
        store.begin(about("late", "/3"), true, now);
        assert_eq!(uri(&store, "late", now), None);
        assert!(store.get_for_body("late", true, now).is_none());
        // Bodies of other requests are known.
        let known = (0..1000).map(|at| format!("new-{at}")).filter(|id| {
            store.begin(about(id, "/new"), true, now);
            store.get_for_body(id, true, now).is_some()
        });
        assert!(known.count() > 980);
    }

    #[test]
    fn a_filter_misses_no_key_for_an_hour_and_forgets_it_after_two() {
        let hasher = DefaultHashBuilder::default();
        let mut filter = Filter::new();
        let mut inserted = std::collections::VecDeque::new();
        // Keys come all the time, in steps that divide no hour.
        for step in 0..20_000_u32 {
            let now = step * 7;
            let key = hasher.hash_one(step);
            filter.insert(key, now);
            inserted.push_back((key, now));
            if let Some(&(key, since)) = inserted.front()
                && now - since >= REMEMBERED_SECONDS - 7
            {
                inserted.pop_front();
                assert!(filter.contains(key, now), "{step}");
            }
        }
        let (mut filter, now) = (Filter::new(), 1000);
        assert!(filter.insert(1, now));
        assert!(!filter.insert(2, now + REMEMBERED_SECONDS));
        assert!(filter.contains(1, now + REMEMBERED_SECONDS));
        assert!(!filter.contains(1, now + 2 * REMEMBERED_SECONDS + 2));
        assert!(filter.insert(3, now + 3 * REMEMBERED_SECONDS));
    }

    #[test]
    fn a_filter_takes_few_others_for_its_keys() {
        let hasher = DefaultHashBuilder::default();
        let mut filter = Filter::new();
        for at in 0..1_000_000_u32 {
            filter.insert(hasher.hash_one(at), 0);
        }
        let wrong = (1_000_000..1_100_000_u32).filter(|at| filter.contains(hasher.hash_one(at), 0)).count();
        assert!(wrong < 1000, "{wrong} of 100000");
    }

    /// Every operation in any order, on few ids, so that states meet.
    #[test]
    fn lists_and_sums_agree_whatever_is_done() {
        let (store, mut now) = store();
        let mut seed = 1_u64;
        let mut random = |bound: u64| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed % bound
        };
        let large = "x".repeat(MAX_BYTES / 10);
        for _ in 0..30_000 {
            let id = random(50).to_string();
            match random(11) {
                0..3 => {
                    let uri = if random(20) == 0 { &*large } else { "/" };
                    store.begin(about(&id, uri), random(2) == 0, now);
                }
                3 => drop(store.get(&id, now)),
                4 => drop(store.get_for_body(&id, random(2) == 0, now)),
                5 => store.respond(&id, ResponseContext::Json(vec![0; random(1000) as usize].into())),
                6 => store.end(&id, now),
                7 => store.refused(&id, random(30_000)),
                8 => store.begin_unknown(&id, now),
                9 => store.unanswered(&id, now),
                _ => now += Duration::from_secs(random(2) * random(400)),
            }
            check(&store.lock());
        }
    }
}
