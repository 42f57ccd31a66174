//! Every id that is remembered exactly, with its request's context.

use std::sync::Arc;

use zentinel_wasm_runtime::ResponseContext;

use super::filter::IdFilter;
use super::remembered::{KEPT_SECONDS, REMEMBERED_SECONDS, Remembered};

/// Memory of all contexts, in bytes: some ten thousand requests under way.
pub(super) const MAX_BYTES: usize = 16 << 20;

/// Ids that are remembered exactly, at some 50 bytes each. Well above what [`MAX_BYTES`] has contexts for, so that filters are for ids whose
/// requests have long been silent.
pub(super) const MAX_IDS: usize = 1 << 17;

/// What [`Contexts::begin`] has made of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Begun {
    /// Tells the request from others of its id.
    pub(crate) number: u64,
    /// Another request of its id is, or may be, live.
    pub(crate) collides: bool,
}

/// A place in the slab. The first ones are the ends of the lists; zero therefore stands for none.
pub(super) type Index = u32;

/// The state of an id, which is the list that it is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum IdState {
    /// It belongs to one live request, whose context is kept.
    Known = 0,
    /// It belongs to several requests, or to one whose context was dropped.
    Withheld = 1,
    /// Its request has ended, but not the request's body.
    Ended = 2,
}

impl IdState {
    pub(super) const ALL: [Self; 3] = [Self::Known, Self::Withheld, Self::Ended];
}

pub(super) struct Entry {
    pub(super) key: u64,
    pub(super) remembered: Option<Arc<Remembered>>,
    /// When it was last used, in seconds since the start.
    pub(super) touched: u32,
    pub(super) before: Index,
    pub(super) behind: Index,
    /// The next entry whose key has the same place in the table, or the next free one.
    pub(super) chained: Index,
    pub(super) state: IdState,
    /// A body may follow, or goes on.
    pub(super) body_open: bool,
}

/// What was evicted into a filter that had been empty before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Evicted {
    Live,
    BodyOpen,
}

pub(super) struct IdTable {
    pub(super) entries: Vec<Entry>,
    /// For each value of a key's lowest bits, the first entry.
    pub(super) table: Box<[Index]>,
    pub(super) free: Index,
    pub(super) len: usize,
    pub(super) bytes: usize,
    /// How many requests have begun.
    pub(super) begun: u64,
    /// Ids of requests that may be live.
    pub(super) live: IdFilter,
    /// Ids of requests that have ended, but not their bodies.
    pub(super) bodies: IdFilter,
}

impl IdTable {
    pub(super) fn new() -> Self {
        // Address space; memory is taken as entries are used.
        let mut entries = Vec::with_capacity(MAX_IDS + IdState::ALL.len());
        for state in IdState::ALL {
            let end = state as Index;
            entries.push(Entry { key: 0, remembered: None, touched: 0, before: end, behind: end, chained: 0, state, body_open: false });
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

    pub(super) fn at(&mut self, index: Index) -> &mut Entry {
        &mut self.entries[index as usize]
    }

    pub(super) fn place(key: u64) -> usize {
        key as usize % MAX_IDS
    }

    pub(super) fn find(&self, key: u64) -> Option<Index> {
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
    pub(super) fn oldest(&self, state: IdState) -> Option<Index> {
        let first = self.entries[state as usize].behind;
        (first != state as Index).then_some(first)
    }

    pub(super) fn unlink(&mut self, at: Index) {
        let Entry { before, behind, .. } = *self.at(at);
        self.at(before).behind = behind;
        self.at(behind).before = before;
    }

    pub(super) fn append(&mut self, at: Index, state: IdState, now: u32) {
        let end = state as Index;
        let last = std::mem::replace(&mut self.at(end).before, at);
        self.at(last).behind = at;
        let entry = self.at(at);
        (entry.before, entry.behind, entry.state, entry.touched) = (last, end, state, now);
    }

    pub(super) fn touch(&mut self, at: Index, state: IdState, now: u32) {
        self.unlink(at);
        self.append(at, state, now);
    }

    /// Drops the context of an entry.
    pub(super) fn release(&mut self, at: Index, state: IdState, now: u32) {
        if let Some(remembered) = self.at(at).remembered.take() {
            self.bytes -= remembered.size();
        }
        self.touch(at, state, now);
    }

    pub(super) fn insert(&mut self, key: u64, remembered: Option<Arc<Remembered>>, body_open: bool, now: u32) -> Index {
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

    pub(super) fn remove(&mut self, at: Index) {
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
    pub(super) fn age(&mut self, now: u32) {
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
    pub(super) fn evict(&mut self, now: u32) -> Option<Evicted> {
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

    pub(super) fn begin(&mut self, key: u64, mut remembered: Arc<Remembered>, body_open: bool, now: u32) -> (Begun, Option<Evicted>) {
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
        let is_remembered = self.find(key).is_some_and(|at| now.saturating_sub(self.at(at).touched) <= REMEMBERED_SECONDS);
        if is_remembered { None } else { self.withhold(key, now) }
    }

    pub(super) fn get(&mut self, key: u64, now: u32) -> Option<Arc<Remembered>> {
        let at = self.find(key)?;
        let Entry { state, touched, .. } = *self.at(at);
        if state == IdState::Known && now.saturating_sub(touched) > KEPT_SECONDS {
            self.release(at, IdState::Withheld, now);
            return None;
        }
        self.touch(at, state, now);
        self.at(at).remembered.clone()
    }

    pub(super) fn get_for_body(&mut self, key: u64, is_last: bool, now: u32) -> Option<Arc<Remembered>> {
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

    pub(super) fn respond(&mut self, key: u64, response: ResponseContext) {
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

    /// Drops contexts, the least recently used first, until the rest is within bounds. Where a few do not free enough, the one that has just
    /// grown goes too, because every other request waits meanwhile.
    pub(super) fn shrink(&mut self, grown: Index, now: u32) {
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
