//! The ids that are remembered exactly, with their requests' contexts.

use std::sync::Arc;

use zentinel_wasm_runtime::ResponseContext;

use super::filter::IdFilter;
use super::remembered::{KEPT_SECONDS, REMEMBERED_SECONDS, Remembered};

/// Memory of all contexts, in bytes: enough for about ten thousand requests in flight.
pub(super) const MAX_BYTES: usize = 16 << 20;

/// Ids that are remembered exactly, at about 50 bytes each. Far more than [`MAX_BYTES`] has
/// contexts for, so only ids of requests that have long been idle get into the filters.
pub(super) const MAX_IDS: usize = 1 << 17;

/// The result of recording a new request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Begun {
    /// Distinguishes the request from others with its id.
    pub(crate) number: u64,
    /// Another request with its id is, or may be, live.
    pub(crate) collides: bool,
}

/// A position in the slab. The first entries are the ends of the lists, so zero can mean "none".
pub(super) type Index = u32;

/// The state of an id. There is a list for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum IdState {
    /// It belongs to one live request, whose context is stored.
    Known = 0,
    /// It belongs to several requests, or to one whose context was dropped.
    Withheld = 1,
    /// Its request has ended, but not the request's body.
    Ended = 2,
}

impl IdState {
    pub(super) const ALL: [Self; 3] = [Self::Known, Self::Withheld, Self::Ended];
}

/// An id.
pub(super) struct Entry {
    pub(super) key: u64,
    pub(super) remembered: Option<Arc<Remembered>>,
    /// When it was last used, in seconds since the agent's start.
    pub(super) last_used: u32,
    pub(super) prev: Index,
    pub(super) next: Index,
    /// The next entry whose key has the same bucket, or the next free entry.
    pub(super) next_in_bucket: Index,
    pub(super) state: IdState,
    /// A body may follow, or has begun and not ended.
    pub(super) body_open: bool,
}

/// An eviction into a filter that was empty before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Evicted {
    Live,
    BodyOpen,
}

/// The slab, its lists and its hash table.
pub(super) struct IdTable {
    pub(super) entries: Vec<Entry>,
    /// For each value of a key's lowest bits, the first entry with it.
    table: Box<[Index]>,
    free: Index,
    pub(super) len: usize,
    pub(super) bytes: usize,
    /// Number of requests that have begun.
    pub(super) begun: u64,
    /// Evicted ids of requests that may be live.
    pub(super) live: IdFilter,
    /// Evicted ids of requests that have ended, except for their bodies.
    pub(super) bodies: IdFilter,
}

impl IdTable {
    pub(super) fn new() -> Self {
        // This reserves address space; memory is allocated as entries are used.
        let mut entries = Vec::with_capacity(MAX_IDS + IdState::ALL.len());
        for state in IdState::ALL {
            let end = state as Index;
            entries.push(Entry {
                key: 0,
                remembered: None,
                last_used: 0,
                prev: end,
                next: end,
                next_in_bucket: 0,
                state,
                body_open: false,
            });
        }
        Self {
            entries,
            table: vec![0; MAX_IDS].into(),
            free: 0,
            len: 0,
            bytes: 0,
            begun: 0,
            live: IdFilter::new(),
            bodies: IdFilter::new(),
        }
    }

    fn at(&mut self, index: Index) -> &mut Entry {
        &mut self.entries[index as usize]
    }

    fn bucket(key: u64) -> usize {
        key as usize % MAX_IDS
    }

    pub(super) fn find(&self, key: u64) -> Option<Index> {
        let mut at = self.table[Self::bucket(key)];
        while at != 0 {
            let entry = &self.entries[at as usize];
            if entry.key == key {
                return Some(at);
            }
            at = entry.next_in_bucket;
        }
        None
    }

    /// The least recently used entry of `state`.
    fn oldest(&self, state: IdState) -> Option<Index> {
        let first = self.entries[state as usize].next;
        (first != state as Index).then_some(first)
    }

    fn unlink(&mut self, at: Index) {
        let Entry { prev, next, .. } = *self.at(at);
        self.at(prev).next = next;
        self.at(next).prev = prev;
    }

    fn append(&mut self, at: Index, state: IdState, now: u32) {
        let end = state as Index;
        let last = std::mem::replace(&mut self.at(end).prev, at);
        self.at(last).next = at;
        let entry = self.at(at);
        (entry.prev, entry.next, entry.state, entry.last_used) = (last, end, state, now);
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
        self.insert_as(state, key, remembered, body_open, now)
    }

    /// Inserts an id that is not in the table.
    pub(super) fn insert_as(&mut self, state: IdState, key: u64, remembered: Option<Arc<Remembered>>, body_open: bool, now: u32) -> Index {
        self.bytes += remembered.as_ref().map_or(0, |remembered| remembered.size());
        self.len += 1;
        let next_in_bucket = self.table[Self::bucket(key)];
        let entry = Entry { key, remembered, last_used: now, prev: 0, next: 0, next_in_bucket, state, body_open };
        let at = if self.free == 0 {
            self.entries.push(entry);
            (self.entries.len() - 1) as Index
        } else {
            let at = self.free;
            self.free = std::mem::replace(self.at(at), entry).next_in_bucket;
            at
        };
        self.table[Self::bucket(key)] = at;
        self.append(at, state, now);
        at
    }

    fn remove(&mut self, at: Index) {
        self.unlink(at);
        let (free, entry) = (self.free, self.at(at));
        let (key, next_in_bucket) = (entry.key, std::mem::replace(&mut entry.next_in_bucket, free));
        if let Some(remembered) = entry.remembered.take() {
            self.bytes -= remembered.size();
        }
        self.free = at;
        self.len -= 1;
        let bucket = Self::bucket(key);
        if self.table[bucket] == at {
            self.table[bucket] = next_in_bucket;
            return;
        }
        let mut before = self.table[bucket];
        while self.at(before).next_in_bucket != at {
            before = self.at(before).next_in_bucket;
        }
        self.at(before).next_in_bucket = next_in_bucket;
    }

    /// Expires contexts and ids that have been idle for too long. Each new request expires a few,
    /// which is enough.
    fn age(&mut self, now: u32) {
        if let Some(at) = self.oldest(IdState::Known)
            && now.saturating_sub(self.at(at).last_used) > KEPT_SECONDS
        {
            self.release(at, IdState::Withheld, now);
        }
        for state in [IdState::Withheld, IdState::Ended] {
            for _ in 0..2 {
                let Some(at) =
                    self.oldest(state).filter(|at| now.saturating_sub(self.entries[*at as usize].last_used) > REMEMBERED_SECONDS)
                else {
                    break;
                };
                self.remove(at);
            }
        }
    }

    /// Makes room for another id.
    fn evict(&mut self, now: u32) -> Option<Evicted> {
        if self.len < MAX_IDS {
            return None;
        }
        let silent = [IdState::Withheld, IdState::Ended].into_iter().filter_map(|state| self.oldest(state));
        let at = silent.min_by_key(|at| self.entries[*at as usize].last_used).or_else(|| self.oldest(IdState::Known))?;
        let Entry { key, state, .. } = *self.at(at);
        self.remove(at);
        let (filter, evicted) =
            if state == IdState::Ended { (&mut self.bodies, Evicted::BodyOpen) } else { (&mut self.live, Evicted::Live) };
        filter.insert(key, now).then_some(evicted)
    }

    pub(super) fn begin(&mut self, key: u64, mut remembered: Arc<Remembered>, body_open: bool, now: u32) -> (Begun, Option<Evicted>) {
        self.age(now);
        self.begun += 1;
        let number = self.begun;
        if let Some(at) = self.find(key) {
            if now.saturating_sub(self.at(at).last_used) <= REMEMBERED_SECONDS {
                self.release(at, IdState::Withheld, now);
                return (Begun { number, collides: true }, None);
            }
            self.remove(at);
        }
        let evicted = self.evict(now);
        let known = if self.live.contains(key, now) {
            None
        } else {
            // It is not shared yet.
            if let Some(remembered) = Arc::get_mut(&mut remembered) {
                remembered.number = number;
            }
            Some(remembered)
        };
        let at = self.insert(key, known, body_open, now);
        self.shrink(at, now);
        (Begun { number, collides: false }, evicted)
    }

    /// Withholds the context of the id from now on.
    pub(super) fn withhold(&mut self, key: u64, now: u32) -> Option<Evicted> {
        self.age(now);
        if let Some(at) = self.find(key) {
            self.release(at, IdState::Withheld, now);
            return None;
        }
        let evicted = self.evict(now);
        self.insert(key, None, false, now);
        evicted
    }

    pub(super) fn unanswered(&mut self, key: u64, now: u32) -> Option<Evicted> {
        let is_remembered = self.find(key).is_some_and(|at| now.saturating_sub(self.at(at).last_used) <= REMEMBERED_SECONDS);
        if is_remembered { None } else { self.withhold(key, now) }
    }

    pub(super) fn get(&mut self, key: u64, now: u32) -> Option<Arc<Remembered>> {
        let at = self.find(key)?;
        let Entry { state, last_used, .. } = *self.at(at);
        if state == IdState::Known && now.saturating_sub(last_used) > KEPT_SECONDS {
            self.release(at, IdState::Withheld, now);
            return None;
        }
        self.touch(at, state, now);
        self.at(at).remembered.clone()
    }

    pub(super) fn get_for_body(&mut self, key: u64, is_last: bool, now: u32) -> Option<Arc<Remembered>> {
        let known = self.get(key, now);
        // This may be the body of an earlier request with the id: it must neither get the context
        // of this one nor end it.
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

    pub(super) fn respond(&mut self, key: u64, response: ResponseContext) {
        let Some(at) = self.find(key) else { return };
        let Some(remembered) = &mut self.at(at).remembered else { return };
        let before = remembered.size();
        // A call that still holds the old context does not need the response.
        let Some(changed) = Arc::get_mut(remembered) else { return };
        changed.context.set_response(response);
        let after = changed.size();
        self.bytes = self.bytes - before + after;
        let now = self.at(at).last_used;
        self.shrink(at, now);
    }

    pub(super) fn end(&mut self, key: u64, now: u32) {
        let Some(at) = self.find(key) else { return };
        let Entry { state, body_open, .. } = *self.at(at);
        match state {
            IdState::Known if body_open => self.release(at, IdState::Ended, now),
            IdState::Known => self.remove(at),
            IdState::Withheld | IdState::Ended => {}
        }
    }

    pub(super) fn refused(&mut self, key: u64, number: u64) {
        if let Some(at) = self.find(key)
            && self.at(at).remembered.as_ref().is_some_and(|remembered| remembered.number == number)
        {
            self.remove(at);
        }
    }

    /// Drops contexts, the least recently used first, until the rest fits. If dropping a few does
    /// not free enough, the one that has just grown is dropped too, because all other requests wait
    /// meanwhile.
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
