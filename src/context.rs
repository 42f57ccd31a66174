//! What is remembered of requests for their later hooks.
//!
//! The proxy sends no end-of-request event, and the client chooses the correlation id, so that two live requests may share one. A context that is
//! missing is harmless; one that belongs to another request is a security bug. Hence:
//!
//! * an id that is seen again while it is remembered becomes *ambiguous*: neither request gets a context;
//! * an id is forgotten only when its request has surely ended, or after [`REMEMBERED`] without an event;
//! * where memory for contexts runs out, the oldest are dropped, but their ids stay remembered;
//! * where memory for ids runs out, new requests get no context until every request that could not be remembered must have ended.

use std::collections::VecDeque;
use std::hash::BuildHasher;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hashbrown::{DefaultHashBuilder, HashMap};
use tracing::warn;
use zentinel_wasm_contract::input::Context;

use crate::bodies::Length;

/// How long an id is remembered after its last event. No request that a proxy still cares for is silent for so long.
const REMEMBERED: Duration = Duration::from_secs(3600);

/// How long a context is kept after its request's last event. Upstreams that take longer are rare, and get no context.
const KEPT: Duration = Duration::from_secs(300);

/// Memory of all contexts, in bytes: some twenty thousand requests under way.
const MAX_BYTES: usize = 64 << 20;

/// Ids that are remembered, at some 50 bytes each. A thousand requests a second fill it only if they never end.
const MAX_IDS: usize = 1 << 20;

/// What of a request its later hooks are told, and the logs of them.
#[derive(Debug)]
pub(crate) struct Remembered {
    pub(crate) context: Context,
    pub(crate) traceparent: Option<Arc<str>>,
    /// Whether the upstream knows how long the request's body is.
    pub(crate) length: Length,
    /// Tells it from other requests of its id.
    number: u64,
}

impl Remembered {
    pub(crate) fn new(context: Context, traceparent: Option<Arc<str>>, length: Length) -> Self {
        Self { context, traceparent, length, number: 0 }
    }

    pub(crate) fn number(&self) -> u64 {
        self.number
    }
}

enum State {
    Known {
        id: Box<str>,
        remembered: Arc<Remembered>,
        /// A body may follow, or goes on.
        body_open: bool,
    },
    /// The id belongs to several requests, or to one whose context was dropped.
    Withheld,
}

struct Entry {
    state: State,
    touched: Instant,
}

/// The store.
pub(crate) struct Contexts(Mutex<Inner>);

struct Inner {
    hasher: DefaultHashBuilder,
    entries: HashMap<u64, Entry>,
    /// Keys in the order in which they got their places, with the time of that; an entry may have been touched since.
    order: VecDeque<(u64, Instant)>,
    bytes: usize,
    /// How many requests have begun.
    begun: u64,
    /// Until then, requests are under way that could not be remembered.
    overflow_until: Option<Instant>,
}

impl Contexts {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(Inner {
            hasher: DefaultHashBuilder::default(),
            entries: HashMap::new(),
            order: VecDeque::new(),
            bytes: 0,
            begun: 0,
            overflow_until: None,
        }))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request has begun, whose number this is.
    pub(crate) fn begin(&self, id: &str, remembered: Remembered, body_open: bool) -> u64 {
        self.lock().begin(id, remembered, body_open, Instant::now())
    }

    /// What is known of the request of a later event.
    pub(crate) fn get(&self, id: &str) -> Option<Arc<Remembered>> {
        self.lock().get(id, Instant::now())
    }

    /// The request's response is known.
    pub(crate) fn respond(&self, id: &str, response: Box<[u8]>) {
        self.lock().respond(id, response);
    }

    /// A chunk of the request's body has been seen, after which others follow or do not.
    pub(crate) fn body_open(&self, id: &str, open: bool) {
        self.lock().body_open(id, open);
    }

    /// No more events of the request will come, unless its body is still under way.
    pub(crate) fn end(&self, id: &str) {
        self.lock().end(id);
    }

    /// The request was refused: nothing more of it will come.
    pub(crate) fn refused(&self, id: &str, number: u64) {
        self.lock().refused(id, number);
    }
}

fn size(remembered: &Remembered) -> usize {
    remembered.context.size() + size_of::<Remembered>()
}

impl Inner {
    fn key(&self, id: &str) -> u64 {
        // Two ids of one hash are taken for one, and are ambiguous then.
        self.hasher.hash_one(id)
    }

    fn begin(&mut self, id: &str, mut remembered: Remembered, body_open: bool, now: Instant) -> u64 {
        self.age(now);
        self.begun += 1;
        let number = self.begun;
        remembered.number = number;
        let key = self.key(id);
        if let Some(entry) = self.entries.get_mut(&key) {
            self.bytes -= release(&mut entry.state);
            entry.touched = now;
            return number;
        }
        if self.entries.len() >= MAX_IDS {
            if self.overflow_until.is_none() {
                warn!(
                    "{MAX_IDS} requests are under way or never ended: later hooks are told nothing of their requests for {REMEMBERED:?}; \
                     does the module export a response hook whose events the proxy does not send?"
                );
            }
            self.overflow_until = Some(now + REMEMBERED);
            return number;
        }
        let withheld = self.overflow_until.is_some_and(|until| now < until);
        let state = if withheld {
            State::Withheld
        } else {
            self.overflow_until = None;
            self.bytes += size(&remembered);
            State::Known { id: id.into(), remembered: Arc::new(remembered), body_open }
        };
        self.entries.insert(key, Entry { state, touched: now });
        self.order.push_back((key, now));
        self.compact();
        self.shrink(key);
        number
    }

    /// Rids the order of the keys of ended requests before they outnumber the others.
    fn compact(&mut self) {
        const SLACK: usize = 1024;
        if self.order.len() <= 2 * self.entries.len() + SLACK {
            return;
        }
        let mut keys: Vec<_> = self.entries.iter().map(|(key, entry)| (entry.touched, *key)).collect();
        keys.sort_unstable();
        self.order = keys.into_iter().map(|(touched, key)| (key, touched)).collect();
    }

    fn get(&mut self, id: &str, now: Instant) -> Option<Arc<Remembered>> {
        let key = self.key(id);
        let entry = self.entries.get_mut(&key)?;
        if now.duration_since(entry.touched) > KEPT {
            self.bytes -= release(&mut entry.state);
        }
        entry.touched = now;
        match &entry.state {
            State::Known { id: known, remembered, .. } if **known == *id => Some(Arc::clone(remembered)),
            _ => None,
        }
    }

    fn respond(&mut self, id: &str, response: Box<[u8]>) {
        let key = self.key(id);
        let Some(Entry { state: State::Known { id: known, remembered, .. }, .. }) = self.entries.get_mut(&key) else { return };
        // A call that still holds the old state has no use for the new one.
        if **known == *id
            && let Some(remembered) = Arc::get_mut(remembered)
        {
            self.bytes -= size(remembered);
            remembered.context.response = response;
            self.bytes += size(remembered);
            self.shrink(key);
        }
    }

    fn body_open(&mut self, id: &str, open: bool) {
        let key = self.key(id);
        if let Some(Entry { state: State::Known { id: known, body_open, .. }, .. }) = self.entries.get_mut(&key)
            && **known == *id
        {
            *body_open = open;
        }
    }

    fn end(&mut self, id: &str) {
        let key = self.key(id);
        let Some(entry) = self.entries.get_mut(&key) else { return };
        let State::Known { id: known, body_open, .. } = &entry.state else { return };
        if **known != *id {
            return;
        }
        let open = *body_open;
        self.bytes -= release(&mut entry.state);
        // The key's place in the order is found stale later.
        if !open {
            self.entries.remove(&key);
        }
    }

    fn refused(&mut self, id: &str, number: u64) {
        let key = self.key(id);
        let Some(entry) = self.entries.get_mut(&key) else { return };
        if matches!(&entry.state, State::Known { remembered, .. } if remembered.number == number) {
            self.bytes -= release(&mut entry.state);
            self.entries.remove(&key);
        }
    }

    /// Looks at the oldest few: forgets ids that are silent for too long, and gives their memory back before that.
    fn age(&mut self, now: Instant) {
        const LOOKS: usize = 4;
        for _ in 0..LOOKS {
            let Some(&(key, placed)) = self.order.front() else { return };
            let Some(entry) = self.entries.get_mut(&key) else {
                self.order.pop_front();
                continue;
            };
            if now.duration_since(placed) <= KEPT {
                // Those behind got their places later.
                return;
            }
            self.order.pop_front();
            let silent = now.duration_since(entry.touched);
            if silent > KEPT {
                self.bytes -= release(&mut entry.state);
            }
            if silent > REMEMBERED {
                self.entries.remove(&key);
            } else {
                self.order.push_back((key, now));
            }
        }
    }

    /// Drops contexts, the oldest first, until the rest is within bounds. Where a few looks do not find enough, the one that has just grown goes too,
    /// for every other request waits meanwhile.
    fn shrink(&mut self, grown: u64) {
        const LOOKS: usize = 64;
        for _ in 0..LOOKS {
            if self.bytes <= MAX_BYTES {
                return;
            }
            let Some((key, placed)) = self.order.pop_front() else { break };
            if let Some(entry) = self.entries.get_mut(&key) {
                self.bytes -= release(&mut entry.state);
                let last = self.order.back().map_or(placed, |(_, placed)| *placed);
                self.order.push_back((key, last));
            }
        }
        if self.bytes > MAX_BYTES
            && let Some(entry) = self.entries.get_mut(&grown)
        {
            self.bytes -= release(&mut entry.state);
        }
    }
}

/// Makes an entry say nothing any more, and tells how many bytes that frees.
fn release(state: &mut State) -> usize {
    match std::mem::replace(state, State::Withheld) {
        State::Known { remembered, .. } => size(&remembered),
        State::Withheld => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn about(uri: &str) -> Remembered {
        Remembered::new(Context { request: uri.as_bytes().into(), ..Context::default() }, None, Length::Open)
    }

    fn uri(store: &mut Inner, id: &str, now: Instant) -> Option<String> {
        store.get(id, now).map(|known| String::from_utf8(known.context.request.to_vec()).unwrap())
    }

    fn store() -> Inner {
        Contexts::new().0.into_inner().unwrap()
    }

    #[test]
    fn a_request_is_known_until_it_ends() {
        let (mut store, now) = (store(), Instant::now());
        store.begin("a", about("/1"), false, now);
        assert_eq!(uri(&mut store, "a", now).as_deref(), Some("/1"));
        assert_eq!(uri(&mut store, "b", now), None);
        store.end("a");
        assert_eq!(uri(&mut store, "a", now), None);
        store.begin("a", about("/2"), false, now);
        assert_eq!(uri(&mut store, "a", now).as_deref(), Some("/2"));
    }

    #[test]
    fn two_live_requests_of_one_id_get_nothing_of_each_other() {
        let (mut store, now) = (store(), Instant::now());
        store.begin("a", about("/1"), false, now);
        store.begin("a", about("/2"), false, now);
        assert_eq!(uri(&mut store, "a", now), None);
        // One of them ends, the other is still there: nobody knows which.
        store.end("a");
        store.begin("a", about("/3"), false, now);
        assert_eq!(uri(&mut store, "a", now), None);
        assert_eq!(store.bytes, 0);
    }

    #[test]
    fn a_request_whose_body_is_under_way_does_not_lend_its_id() {
        let (mut store, now) = (store(), Instant::now());
        store.begin("a", about("/1"), true, now);
        store.end("a");
        store.begin("a", about("/2"), false, now);
        assert_eq!(uri(&mut store, "a", now), None);
    }

    #[test]
    fn the_end_of_a_body_counts_while_its_call_is_under_way() {
        let (mut store, now) = (store(), Instant::now());
        store.begin("a", about("/1"), true, now);
        let call = store.get("a", now);
        store.body_open("a", false);
        drop(call);
        store.end("a");
        store.begin("a", about("/2"), false, now);
        assert_eq!(uri(&mut store, "a", now).as_deref(), Some("/2"));
    }

    #[test]
    fn a_refusal_ends_its_own_request_and_no_newer_one() {
        let (mut store, now) = (store(), Instant::now());
        let first = store.begin("a", about("/1"), false, now);
        store.end("a");
        let second = store.begin("a", about("/2"), true, now);
        store.refused("a", first);
        assert_eq!(uri(&mut store, "a", now).as_deref(), Some("/2"));
        store.refused("a", second);
        assert_eq!((store.entries.len(), store.bytes), (0, 0));
        // Of two that share an id, none is forgotten.
        store.begin("a", about("/3"), false, now);
        let fourth = store.begin("a", about("/4"), false, now);
        store.refused("a", fourth);
        store.begin("a", about("/5"), false, now);
        assert_eq!(uri(&mut store, "a", now), None);
    }

    #[test]
    fn silence_takes_the_context_first_and_the_id_much_later() {
        let (mut store, now) = (store(), Instant::now());
        store.begin("a", about("/1"), false, now);
        let later = now + KEPT + Duration::from_secs(1);
        store.begin("b", about("/b"), false, later);
        assert_eq!(uri(&mut store, "a", later), None);
        store.begin("a", about("/2"), false, later);
        assert_eq!(uri(&mut store, "a", later), None);
        let much_later = later + REMEMBERED + Duration::from_secs(1);
        store.begin("c", about("/c"), false, much_later);
        store.begin("a", about("/3"), false, much_later);
        assert_eq!(uri(&mut store, "a", much_later).as_deref(), Some("/3"));
    }

    #[test]
    fn an_id_that_is_never_silent_keeps_no_other_remembered() {
        let (mut store, mut now) = (store(), Instant::now());
        for id in 0..100 {
            store.begin(&id.to_string(), about("/"), false, now);
        }
        // The first is in use all the time.
        let end = now + 2 * REMEMBERED;
        while now < end {
            now += KEPT / 2;
            for _ in 0..50 {
                store.begin("0", about("/"), false, now);
            }
        }
        assert_eq!(store.entries.len(), 1);
    }

    #[test]
    fn memory_is_bounded_and_dropped_contexts_do_not_lend_their_ids() {
        let (mut store, now) = (store(), Instant::now());
        let large = "x".repeat(1 << 20);
        for at in 0..100 {
            store.begin(&at.to_string(), about(&large), false, now);
            assert!(store.bytes <= MAX_BYTES);
        }
        assert_eq!(uri(&mut store, "0", now), None);
        store.begin("0", about("/new"), false, now);
        assert_eq!(uri(&mut store, "0", now), None);
        assert!(uri(&mut store, "99", now).is_some());
    }

    #[test]
    fn many_ids_without_a_context_neither_stretch_the_memory_nor_the_search() {
        let (mut store, now) = (store(), Instant::now());
        for key in 0..200 {
            store.entries.insert(key, Entry { state: State::Withheld, touched: now });
            store.order.push_back((key, now));
        }
        let large = "x".repeat(MAX_BYTES / 2);
        let mut known = Vec::new();
        for id in ["a", "b", "c", "d", "e", "f"] {
            let front = *store.order.front().unwrap();
            store.begin(id, about(&large), false, now);
            assert!(store.bytes <= MAX_BYTES);
            let moved = store.order.len() - store.order.iter().position(|key| *key == front).unwrap();
            assert!(moved <= 64 || store.order[0] == front, "{moved} were looked at");
            known.push(uri(&mut store, id, now).is_some());
        }
        // "a" is found at last, and makes room for "e".
        assert_eq!(known, [true, false, false, false, true, false]);
    }

    #[test]
    fn the_memory_of_responses_is_bounded_too() {
        let (mut store, now) = (store(), Instant::now());
        for at in 0..100 {
            store.begin(&at.to_string(), about("/"), false, now);
        }
        for at in 0..100 {
            store.respond(&at.to_string(), vec![0; 1 << 20].into());
            assert!(store.bytes <= MAX_BYTES);
        }
    }

    #[test]
    fn ended_requests_leave_nothing_behind() {
        let (mut store, now) = (store(), Instant::now());
        store.begin("long", about("/"), false, now);
        for at in 0..10_000 {
            let id = at.to_string();
            store.begin(&id, about("/"), false, now);
            store.end(&id);
        }
        assert_eq!(store.entries.len(), 1);
        assert!(store.order.len() < 2000, "{}", store.order.len());
    }

    #[test]
    fn a_full_store_withholds_contexts_until_everybody_has_ended() {
        let (mut store, now) = (store(), Instant::now());
        for at in 0..MAX_IDS {
            store.entries.insert(at as u64, Entry { state: State::Withheld, touched: now });
        }
        store.begin("unremembered", about("/1"), false, now);
        store.entries.clear();
        store.begin("unremembered", about("/2"), false, now);
        assert_eq!(uri(&mut store, "unremembered", now), None);
        let later = now + REMEMBERED;
        store.begin("other", about("/3"), false, later);
        assert_eq!(uri(&mut store, "other", later).as_deref(), Some("/3"));
    }
}
