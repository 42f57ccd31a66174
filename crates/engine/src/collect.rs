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

use std::hash::BuildHasher;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hashbrown::{DefaultHashBuilder, HashMap};
use zentinel_wasm_contract::{Failure, FailureKind};

use crate::bodies::Length;

/// Memory of all bodies that are being collected, in bytes: a hundred of the default `--max-body-bytes`, which is as many
/// requests as a proxy has under way on a connection.
const MAX_BYTES: usize = 128 << 20;

/// Bodies that are known at once, at some 150 bytes each beside what they hold.
const MAX_BODIES: usize = 1 << 16;

/// How long the bytes of a body are kept after its last chunk. The proxy itself gives up a client that is silent for a minute.
const KEPT: Duration = Duration::from_secs(60);

/// How long the bytes of a body are kept at most: `--max-body-bytes` at 15 kbit/s. A client must not hold memory by
/// sending a byte a minute.
const LONGEST: Duration = Duration::from_secs(600);

/// How long a body whose bytes are gone is remembered, so that a late chunk of it is not taken for one of a newer body: as long
/// as a request's id.
const REMEMBERED: Duration = Duration::from_secs(3600);

/// Silence after which a body gives way to others where memory has run out. Clients that are sending do not pause for so long,
/// and those that hold bodies back to fill the memory must keep sending.
const IDLE: Duration = Duration::from_secs(5);

/// Pause between two searches for bodies that may give way: each looks at all of them.
const SEARCH_PAUSE: Duration = Duration::from_secs(1);

/// The proxy's buffer for sending a body again when an upstream connection fails, in bytes.
const REPLAYED: usize = 64 << 10;

/// Chunks are joined into pieces of up to this size, in bytes, so that small ones cost no memory of their own.
const PIECE: usize = 64 << 10;

/// A chunk of a request's body.
pub(crate) struct Chunk<'a> {
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
    fn new(kind: FailureKind, detail: impl Into<String>, rescue: Rescue) -> Self {
        Self { failure: Failure::new(kind, detail), rescue }
    }

    /// Bytes are missing, or it is not certain whose they are.
    fn bytes(detail: impl Into<String>) -> Self {
        Self::new(FailureKind::BodyNotCollected, detail, Rescue::Refuse)
    }
}

/// The bodies that are being collected.
pub(crate) struct Bodies {
    inner: Mutex<Inner>,
    /// As many as there are. Requests without the option look here and go on.
    known: AtomicUsize,
}

struct Inner {
    hasher: DefaultHashBuilder,
    bodies: HashMap<Key, Body>,
    /// Memory that they hold, in bytes.
    bytes: usize,
    searched: Option<Instant>,
}

/// A connection, and the hash of an id. Two ids of one hash are taken for one, and refused.
type Key = (u64, u64);

struct Body {
    number: Option<u64>,
    /// Index of the next chunk.
    next: u32,
    /// Bytes so far, as the proxy counts them.
    received: u64,
    state: Progress,
    began: Instant,
    touched: Instant,
}

enum Progress {
    /// Its chunks are held.
    Held(Pieces, Tail),
    /// An error has been allowed: the rest passes, after these first bytes of a code point.
    Passing(Tail),
    /// Nothing of it is taken any more.
    Broken,
    /// It has ended and had so many bytes. The proxy may send it again, as one chunk, to another upstream connection.
    Ended(usize),
}

impl Bodies {
    pub(crate) fn new() -> Self {
        let inner = Inner { hasher: DefaultHashBuilder::default(), bodies: HashMap::new(), bytes: 0, searched: None };
        Self { inner: Mutex::new(inner), known: AtomicUsize::new(0) }
    }

    /// Whether there are none.
    pub(crate) fn is_empty(&self) -> bool {
        self.known.load(Relaxed) == 0
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the bodies, and counts them.
    fn change<T>(&self, change: impl FnOnce(&mut Inner) -> T) -> T {
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
    pub(crate) fn take(&self, chunk: Chunk<'_>) -> Result<Collected, Lost> {
        self.take_at(chunk, Instant::now())
    }

    fn take_at(&self, chunk: Chunk<'_>, now: Instant) -> Result<Collected, Lost> {
        // What is large is put together when others can go on.
        match self.change(|inner| inner.take(chunk, now))? {
            Outcome::Chunk(collected) => Ok(collected),
            Outcome::Whole(pieces) => Ok(Collected::Whole(pieces.join())),
            Outcome::GiveBack(failure, pieces) => Err(Lost { failure, rescue: Rescue::Replace(std::sync::Arc::new(pieces.join())) }),
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
                inner.bytes -= body.spoil();
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
                    *bytes -= body.spoil();
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

/// What a chunk comes to, before anything large is put together.
enum Outcome {
    Chunk(Collected),
    Whole(Pieces),
    /// An error that may give back what was held.
    GiveBack(Failure, Pieces),
}

impl Inner {
    fn key(&self, connection: u64, id: &str) -> Key {
        (connection, self.hasher.hash_one(id))
    }

    fn take(&mut self, chunk: Chunk<'_>, now: Instant) -> Result<Outcome, Lost> {
        let key = self.key(chunk.connection, chunk.id);
        let is_new = match self.bodies.get(&key) {
            None => true,
            // The request that it belonged to has surely ended.
            Some(body) => chunk.index == 0 && body.is_over(chunk.number),
        };
        if is_new { self.begin(key, chunk, now) } else { self.go_on(key, chunk, now) }
    }

    fn begin(&mut self, key: Key, chunk: Chunk<'_>, now: Instant) -> Result<Outcome, Lost> {
        if let Some(mut old) = self.bodies.remove(&key) {
            self.bytes -= old.spoil();
        }
        if chunk.index > 0 {
            return Err(Lost::bytes(format!(
                "received chunk {} of a body without the chunks before it: it changed its connection, or was idle for too long",
                chunk.index
            )));
        }
        if chunk.buffered {
            if chunk.is_last {
                return Ok(Outcome::Chunk(Collected::Alone));
            }
            let detail = "the proxy has buffered a part of the body and withholds the rest: `--collect-request-body` needs \
                          `request-body-mode \"stream\"` on every agent of the route";
            return Err(Lost::new(FailureKind::BodyNotCollected, detail, Rescue::Pass));
        }
        if self.bodies.len() >= MAX_BODIES && !self.search(now) {
            return Err(Lost::new(
                FailureKind::Overloaded,
                format!("already collecting {MAX_BODIES} request bodies, the limit"),
                Rescue::Refuse,
            ));
        }
        let size = chunk.bytes.len();
        let received = chunk.received.unwrap_or(size as u64);
        let mut body =
            Body { number: chunk.number, next: 1, received, state: Progress::Passing(Tail::default()), began: now, touched: now };
        let result = if received != size as u64 {
            let detail = "the proxy sent the body without its beginning: `--collect-request-body` needs `request-body-mode \"stream\"`";
            Err(Lost::new(FailureKind::BodyNotCollected, detail, Rescue::Pass))
        } else if chunk.is_last {
            body.state = Progress::Ended(size);
            Ok(Outcome::Chunk(Collected::Alone))
        } else {
            match self.room(&chunk, 0, now) {
                Err(failure) => Err(Lost { failure, rescue: Rescue::Pass }),
                Ok(()) => match Tail::default().after(&chunk.bytes) {
                    Ok(tail) => {
                        let mut pieces = Pieces::default();
                        self.bytes += pieces.push(chunk.bytes);
                        body.state = Progress::Held(pieces, tail);
                        Ok(Outcome::Chunk(Collected::Held))
                    }
                    Err(NotText) => Err(Lost::new(FailureKind::BodyNotCollected, NOT_TEXT, Rescue::Pass)),
                },
            }
        };
        if result.is_err() && chunk.is_last {
            body.state = Progress::Ended(size);
        } else if result.is_err() && !chunk.fail_open {
            body.state = Progress::Broken;
        }
        self.bodies.insert(key, body);
        result
    }

    fn go_on(&mut self, key: Key, chunk: Chunk<'_>, now: Instant) -> Result<Outcome, Lost> {
        let Some(body) = self.bodies.get_mut(&key) else { unreachable!("it was found before") };
        // It must not give way to itself.
        body.touched = now;
        let mut problem = body.rejects(&chunk);
        let (held, tail) = match &body.state {
            Progress::Held(pieces, tail) => (pieces.len, *tail),
            Progress::Passing(tail) => (0, *tail),
            Progress::Broken | Progress::Ended(_) => (0, Tail::default()),
        };
        let room = match (&problem, &body.state) {
            (None, Progress::Held(..)) => self.room(&chunk, held, now),
            _ => Ok(()),
        };
        let Some(body) = self.bodies.get_mut(&key) else { unreachable!("no body is removed that was just touched") };
        if problem.is_none() && matches!(body.state, Progress::Broken) {
            problem = Some(format!("the body took longer than {LONGEST:?}"));
        }
        if let Some(problem) = problem {
            self.bytes -= body.spoil();
            return Err(Lost::bytes(problem));
        }
        body.next = body.next.saturating_add(1);
        body.received += chunk.bytes.len() as u64;
        let after = match &body.state {
            // As it came at first, or a second time: the whole.
            Progress::Ended(_) => return Ok(Outcome::Chunk(Collected::Alone)),
            // No text is needed.
            Progress::Passing(tail) if tail.is_empty() => {
                if chunk.is_last {
                    body.state = Progress::Ended(body.received as usize);
                }
                return Ok(Outcome::Chunk(Collected::Pass));
            }
            Progress::Passing(_) | Progress::Held(..) | Progress::Broken => tail.after(&chunk.bytes),
        };
        let after = match after {
            Ok(after) if after.is_empty() || !chunk.is_last => after,
            // Also with `--fail-open`: what is held cannot be put before bytes that are not text.
            _ => {
                self.bytes -= body.spoil();
                return Err(Lost::bytes(NOT_TEXT));
            }
        };
        let ended = |body: &Body| Progress::Ended(body.received as usize);
        match std::mem::replace(&mut body.state, Progress::Broken) {
            Progress::Passing(tail) => {
                let mut text = tail.bytes().to_vec();
                text.extend_from_slice(&chunk.bytes);
                text.truncate(text.len() - after.bytes().len());
                body.state = if chunk.is_last { ended(body) } else { Progress::Passing(after) };
                Ok(Outcome::Chunk(Collected::Forward(text)))
            }
            Progress::Held(mut pieces, _) => {
                self.bytes -= pieces.capacity;
                if let Err(failure) = room {
                    if !chunk.fail_open {
                        return Err(Lost { failure, rescue: Rescue::Refuse });
                    }
                    pieces.push(chunk.bytes);
                    pieces.cut(after.bytes().len());
                    body.state = if chunk.is_last { ended(body) } else { Progress::Passing(after) };
                    return Ok(Outcome::GiveBack(failure, pieces));
                }
                pieces.push(chunk.bytes);
                if chunk.is_last {
                    body.state = ended(body);
                    return Ok(Outcome::Whole(pieces));
                }
                self.bytes += pieces.capacity;
                body.state = Progress::Held(pieces, after);
                Ok(Outcome::Chunk(Collected::Held))
            }
            Progress::Broken | Progress::Ended(_) => unreachable!("these were answered above"),
        }
    }

    /// Whether the chunk may be added to a body of `held` bytes.
    fn room(&mut self, chunk: &Chunk<'_>, held: usize, now: Instant) -> Result<(), Failure> {
        let size = held + chunk.bytes.len();
        let announced = match chunk.length {
            Length::Announced(Some(length)) => usize::try_from(length).unwrap_or(usize::MAX),
            Length::Announced(None) | Length::Open | Length::Unknown => 0,
        };
        let (size, limit) = (size.max(announced), chunk.limit);
        if size > limit {
            let detail = format!("the body has {size} bytes or more, the limit is {limit}: raise `--max-body-bytes`");
            return Err(Failure::new(FailureKind::BodyLimit, detail));
        }
        // A piece may grow to twice what is in it.
        let needed = 2 * chunk.bytes.len();
        let fits = |bodies: &Self| bodies.bytes + needed <= MAX_BYTES;
        if !fits(self) {
            self.search(now);
        }
        if !fits(self) {
            let detail = format!("request bodies in collection take {} MiB, the limit", MAX_BYTES >> 20);
            return Err(Failure::new(FailureKind::Overloaded, detail));
        }
        Ok(())
    }

    /// Looks for bodies that may give way. False when there has just been a search, or it has found nothing.
    fn search(&mut self, now: Instant) -> bool {
        if self.searched.is_some_and(|searched| now.duration_since(searched) < SEARCH_PAUSE) {
            return false;
        }
        self.searched = Some(now);
        let before = (self.bytes, self.bodies.len());
        self.sweep(IDLE, now);
        if self.bodies.len() >= MAX_BODIES {
            self.bodies.retain(|_, body| body.is_open() || now.duration_since(body.touched) <= KEPT);
        }
        before != (self.bytes, self.bodies.len())
    }

    /// Drops the bytes of bodies that have been silent for longer than `kept` or take too long, and what is known of bodies whose requests must have ended.
    fn sweep(&mut self, kept: Duration, now: Instant) {
        let bytes = &mut self.bytes;
        self.bodies.retain(|_, body| {
            let silent = now.duration_since(body.touched);
            if matches!(body.state, Progress::Ended(_)) {
                return silent <= kept;
            }
            if silent > kept || now.duration_since(body.began) > LONGEST {
                *bytes -= body.spoil();
            }
            silent <= REMEMBERED
        });
    }
}

/// Why a body is refused whose bytes cannot be sent.
const NOT_TEXT: &str =
    "the body is not UTF-8: the proxy accepts only text as a replacement, so `--collect-request-body` cannot put it back";

impl Body {
    /// Whether its request has ended, by what is known of the one of a new chunk.
    fn is_over(&self, number: Option<u64>) -> bool {
        matches!(self.state, Progress::Ended(_)) || self.number.zip(number).is_some_and(|(own, other)| own != other)
    }

    /// Whether more of it is awaited.
    fn is_open(&self) -> bool {
        matches!(self.state, Progress::Held(..) | Progress::Passing(_))
    }

    /// Why a chunk does not go on where this body stands.
    fn rejects(&self, chunk: &Chunk<'_>) -> Option<String> {
        let size = chunk.bytes.len() as u64;
        let in_turn = chunk.index == self.next
            && chunk.received.is_none_or(|received| received == self.received + size)
            && !chunk.buffered
            && self.number.zip(chunk.number).is_none_or(|(own, other)| own == other);
        if !in_turn || matches!(self.state, Progress::Broken) {
            return Some(format!(
                "received chunk {} of the body, expected chunk {}: another live request has the same correlation id, or the body was rejected",
                chunk.index, self.next
            ));
        }
        match (&self.state, chunk.length) {
            (Progress::Ended(whole), _) if !(chunk.is_last && chunk.bytes.len() == *whole) => {
                Some("received more of the body after its end".to_owned())
            }
            (Progress::Held(pieces, _), Length::Announced(Some(length))) => {
                let sum = pieces.len as u64 + size;
                let fits = if chunk.is_last { sum == length } else { sum <= length };
                (!fits).then(|| format!("the chunks of the body have {sum} bytes, but the request announced {length}"))
            }
            // The chunks of a body whose length is known must add up; only here could a second time go unnoticed.
            (Progress::Held(pieces, _), _) if pieces.equal(&chunk.bytes) => Some(
                "a chunk repeats the whole body before it: the proxy may be resending the body to another upstream connection".to_owned(),
            ),
            _ => None,
        }
    }

    /// Gives it up, and returns how much memory that frees.
    fn spoil(&mut self) -> usize {
        match std::mem::replace(&mut self.state, Progress::Broken) {
            Progress::Held(pieces, _) => pieces.capacity,
            Progress::Passing(_) | Progress::Broken | Progress::Ended(_) => 0,
        }
    }
}

/// The bytes of a body in order.
#[derive(Default)]
struct Pieces {
    list: Vec<Vec<u8>>,
    /// Bytes in all.
    len: usize,
    /// Memory in all.
    capacity: usize,
}

impl Pieces {
    /// Appends bytes and returns by how much memory that is more.
    fn push(&mut self, bytes: Vec<u8>) -> usize {
        let before = self.capacity;
        self.len += bytes.len();
        match self.list.last_mut() {
            Some(last) if last.len() + bytes.len() <= PIECE => {
                self.capacity -= last.capacity();
                last.extend_from_slice(&bytes);
                self.capacity += last.capacity();
            }
            _ => {
                self.capacity += bytes.capacity();
                self.list.push(bytes);
            }
        }
        self.capacity - before
    }

    /// Leaves out the last bytes, which are in the last piece.
    fn cut(&mut self, count: usize) {
        let mut count = count;
        while count > 0
            && let Some(last) = self.list.last_mut()
        {
            let cut = count.min(last.len());
            last.truncate(last.len() - cut);
            count -= cut;
            if last.is_empty() {
                self.list.pop();
            }
        }
    }

    /// Whether the proxy may have sent these bytes a second time.
    fn equal(&self, bytes: &[u8]) -> bool {
        let mut rest = bytes;
        !bytes.is_empty()
            && bytes.len() == self.len
            && self.len <= REPLAYED
            && self.list.iter().all(|piece| match rest.split_at_checked(piece.len()) {
                Some((first, others)) => {
                    rest = others;
                    first == piece
                }
                None => false,
            })
    }

    fn join(mut self) -> Vec<u8> {
        if self.list.len() == 1 { self.list.remove(0) } else { self.list.concat() }
    }
}

/// The first bytes of a code point that its chunk did not hold to the end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Tail {
    bytes: [u8; 3],
    len: u8,
}

#[derive(Debug, PartialEq, Eq)]
struct NotText;

impl Tail {
    fn new(bytes: &[u8]) -> Self {
        let mut tail = Self { bytes: [0; 3], len: bytes.len() as u8 };
        tail.bytes[..bytes.len()].copy_from_slice(bytes);
        tail
    }

    fn bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }

    fn is_empty(self) -> bool {
        self.len == 0
    }

    /// What is left over when `chunk` follows.
    fn after(self, chunk: &[u8]) -> Result<Self, NotText> {
        /// A code point has up to four bytes.
        const LONGEST: usize = 4;

        let mut rest = chunk;
        if !self.is_empty() {
            let mut shared = self.bytes().to_vec();
            loop {
                let Some((first, others)) = rest.split_first() else { return Ok(Self::new(&shared)) };
                shared.push(*first);
                rest = others;
                match std::str::from_utf8(&shared) {
                    Ok(_) => break,
                    Err(error) if error.error_len().is_none() && shared.len() < LONGEST => {}
                    Err(_) => return Err(NotText),
                }
            }
        }
        match std::str::from_utf8(rest) {
            Ok(_) => Ok(Self::default()),
            Err(error) if error.error_len().is_none() => Ok(Self::new(&rest[error.valid_up_to()..])),
            Err(_) => Err(NotText),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: usize = 1 << 20;

    fn store() -> Bodies {
        Bodies::new()
    }

    /// A chunk of a body whose length nobody announced, after `before` bytes.
    fn chunk<'a>(id: &'a str, index: u32, before: u64, bytes: &[u8], is_last: bool) -> Chunk<'a> {
        Chunk {
            connection: 1,
            id,
            number: None,
            length: Length::Open,
            bytes: bytes.to_vec(),
            index,
            is_last,
            received: Some(before + bytes.len() as u64),
            buffered: false,
            limit: LIMIT,
            fail_open: false,
        }
    }

    #[track_caller]
    fn take(bodies: &Bodies, chunk: Chunk<'_>) -> Result<Collected, (FailureKind, Rescue)> {
        bodies.take(chunk).map_err(|lost| (lost.failure.kind, lost.rescue))
    }

    fn bytes(bodies: &Bodies) -> usize {
        bodies.lock().bytes
    }

    const LOST: Result<Collected, (FailureKind, Rescue)> = Err((FailureKind::BodyNotCollected, Rescue::Refuse));

    #[test]
    fn chunks_become_the_whole() {
        let bodies = store();
        assert_eq!(take(&bodies, chunk("a", 0, 0, b"one ", false)), Ok(Collected::Held));
        assert_eq!(take(&bodies, chunk("a", 1, 4, b"two ", false)), Ok(Collected::Held));
        assert!(bodies.holds(1) && !bodies.holds(2) && bytes(&bodies) > 0);
        assert_eq!(take(&bodies, chunk("a", 2, 8, b"", true)), Ok(Collected::Whole(b"one two ".to_vec())));
        assert!(!bodies.holds(1) && bytes(&bodies) == 0);
    }

    #[test]
    fn a_body_of_one_chunk_is_left_alone() {
        let bodies = store();
        assert_eq!(take(&bodies, chunk("a", 0, 0, b"\xff", true)), Ok(Collected::Alone));
        // And the same a second time, or the next of the same id.
        assert_eq!(take(&bodies, chunk("a", 1, 1, b"\xff", true)), Ok(Collected::Alone));
        assert_eq!(take(&bodies, chunk("a", 0, 0, b"x", true)), Ok(Collected::Alone));
        assert_eq!(take(&bodies, Chunk { buffered: true, ..chunk("b", 0, 0, b"x", true) }), Ok(Collected::Alone));
    }

    #[test]
    fn large_and_small_chunks_keep_their_order() {
        let bodies = store();
        let sent: Vec<u8> = (0..400_000_u32).map(|at| b'a' + (at % 23) as u8).collect();
        let (mut before, mut index) = (0, 0);
        for size in [1, PIECE, 3, PIECE - 1, 2, PIECE + 1].into_iter().cycle() {
            let is_last = before + size >= sent.len();
            let part = &sent[before..(before + size).min(sent.len())];
            let step = take(&bodies, chunk("a", index, before as u64, part, is_last)).unwrap();
            (before, index) = (before + part.len(), index + 1);
            if is_last {
                assert_eq!(step, Collected::Whole(sent));
                break;
            }
            assert_eq!(step, Collected::Held);
            assert!(bytes(&bodies) >= before, "{} of {before}", bytes(&bodies));
        }
        assert_eq!(bytes(&bodies), 0);
    }

    #[test]
    fn code_points_may_be_cut_anywhere() {
        let text = "aé€😀z";
        for at in 0..=text.len() {
            for then in at..=text.len() {
                let bodies = store();
                let parts = [&text.as_bytes()[..at], &text.as_bytes()[at..then], &text.as_bytes()[then..]];
                assert_eq!(take(&bodies, chunk("a", 0, 0, parts[0], false)), Ok(Collected::Held), "{at}");
                assert_eq!(take(&bodies, chunk("a", 1, at as u64, parts[1], false)), Ok(Collected::Held), "{at} {then}");
                assert_eq!(take(&bodies, chunk("a", 2, then as u64, parts[2], true)), Ok(Collected::Whole(text.into())));
            }
        }
    }

    #[test]
    fn bytes_that_are_not_text_are_refused_once_something_is_held() {
        for (first, second, is_last) in
            [(&b"a"[..], &b"\xff"[..], false), (b"a\xe2", b"a", false), (b"a\xe2\x82", b"", true), (b"a", b"\xc3", true)]
        {
            for fail_open in [false, true] {
                let bodies = store();
                assert_eq!(take(&bodies, Chunk { fail_open, ..chunk("a", 0, 0, first, false) }), Ok(Collected::Held));
                let second = Chunk { fail_open, ..chunk("a", 1, first.len() as u64, second, is_last) };
                assert_eq!(take(&bodies, second), LOST);
                assert_eq!(bytes(&bodies), 0);
            }
        }
        let bodies = store();
        let first = take(&bodies, Chunk { fail_open: true, ..chunk("a", 0, 0, b"\xff", false) });
        assert_eq!(first, Err((FailureKind::BodyNotCollected, Rescue::Pass)));
        // Nothing of it is held, so the rest passes.
        assert_eq!(take(&bodies, chunk("a", 1, 1, b"\xff", false)), Ok(Collected::Pass));
        assert_eq!(take(&bodies, chunk("a", 2, 2, b"\xff", true)), Ok(Collected::Pass));
    }

    #[test]
    fn two_live_bodies_of_one_id_are_both_refused() {
        let bodies = store();
        assert_eq!(take(&bodies, chunk("a", 0, 0, b"one", false)), Ok(Collected::Held));
        assert_eq!(take(&bodies, chunk("a", 0, 0, b"two", false)), LOST);
        assert_eq!(bytes(&bodies), 0);
        // Whichever of them goes on, and a third one too: its next chunk could be one of the first.
        assert_eq!(take(&bodies, chunk("a", 1, 3, b"...", false)), LOST);
        assert_eq!(take(&bodies, chunk("a", 0, 0, b"six", false)), LOST);
        assert_eq!(take(&bodies, chunk("a", 0, 0, b"six", true)), LOST);
        // Others have nothing to do with it.
        assert_eq!(take(&bodies, chunk("b", 0, 0, b"one", false)), Ok(Collected::Held));
        assert_eq!(take(&bodies, Chunk { connection: 2, ..chunk("a", 0, 0, b"one", false) }), Ok(Collected::Held));
    }

    #[test]
    fn a_request_that_surely_came_later_begins_anew() {
        let bodies = store();
        let of = |number, chunk| Chunk { number: Some(number), ..chunk };
        assert_eq!(take(&bodies, of(1, chunk("a", 0, 0, b"one", false))), Ok(Collected::Held));
        assert_eq!(take(&bodies, of(2, chunk("a", 1, 3, b"two", false))), LOST);
        assert_eq!(take(&bodies, of(2, chunk("a", 0, 0, b"two", false))), Ok(Collected::Held));
        assert_eq!(take(&bodies, of(1, chunk("a", 1, 3, b"one", true))), LOST);
    }

    #[test]
    fn a_chunk_out_of_turn_is_refused() {
        for (index, before) in [(2, 3), (1, 2), (1, 4), (0, 3)] {
            let bodies = store();
            assert_eq!(take(&bodies, chunk("a", 0, 0, b"one", false)), Ok(Collected::Held));
            assert_eq!(take(&bodies, chunk("a", index, before, b"two", true)), LOST, "{index} {before}");
        }
        assert_eq!(take(&store(), chunk("a", 1, 3, b"two", true)), LOST);
    }

    #[test]
    fn a_length_that_was_announced_must_come() {
        for (announced, is_last) in [(5, false), (7, true), (5, true)] {
            let bodies = store();
            let of = |chunk| Chunk { length: Length::Announced(Some(announced)), ..chunk };
            assert_eq!(take(&bodies, of(chunk("a", 0, 0, b"one", false))), Ok(Collected::Held));
            assert_eq!(take(&bodies, of(chunk("a", 1, 3, b"two", is_last))), LOST, "{announced}");
        }
    }

    #[test]
    fn a_body_that_comes_a_second_time_is_not_doubled() {
        let bodies = store();
        assert_eq!(take(&bodies, chunk("a", 0, 0, b"one", false)), Ok(Collected::Held));
        assert_eq!(take(&bodies, chunk("a", 1, 3, b"one", false)), LOST);
        // After its end it is the whole in one chunk.
        assert_eq!(take(&bodies, chunk("b", 0, 0, b"one", false)), Ok(Collected::Held));
        assert_eq!(take(&bodies, chunk("b", 1, 3, b"two", true)), Ok(Collected::Whole(b"onetwo".to_vec())));
        assert_eq!(take(&bodies, chunk("b", 2, 6, b"onetwo", true)), Ok(Collected::Alone));
        assert_eq!(take(&bodies, chunk("b", 3, 12, b"two", true)), LOST);
    }

    #[test]
    fn a_body_over_the_limit_is_given_back_where_errors_are_allowed() {
        let rest = vec![b'x'; LIMIT];
        let of = |fail_open, chunk| Chunk { fail_open, ..chunk };
        let bodies = store();
        assert_eq!(take(&bodies, of(false, chunk("a", 0, 0, b"one", false))), Ok(Collected::Held));
        let refused = take(&bodies, of(false, chunk("a", 1, 3, &rest, false)));
        assert_eq!(refused, Err((FailureKind::BodyLimit, Rescue::Refuse)));
        assert_eq!(take(&bodies, of(false, chunk("a", 2, 3 + LIMIT as u64, b"x", true))), LOST);

        // A code point is cut at the end of the chunk that is one too much, and of the one after it.
        let large = [&rest[..], b"\xf0"].concat();
        let after = 3 + large.len() as u64;
        assert_eq!(take(&bodies, of(true, chunk("b", 0, 0, b"one", false))), Ok(Collected::Held));
        let given = Rescue::Replace([b"one", &rest[..]].concat().into());
        assert_eq!(take(&bodies, of(true, chunk("b", 1, 3, &large, false))), Err((FailureKind::BodyLimit, given)));
        assert_eq!(bytes(&bodies), 0);
        assert_eq!(take(&bodies, of(true, chunk("b", 2, after, b"\x9f", false))), Ok(Collected::Forward(Vec::new())));
        let smile = take(&bodies, of(true, chunk("b", 3, after + 1, b"\x98\x80!\xc3", false)));
        assert_eq!(smile, Ok(Collected::Forward("😀!".into())));
        assert_eq!(take(&bodies, of(true, chunk("b", 4, after + 5, b"\xa9", false))), Ok(Collected::Forward("é".into())));
        assert_eq!(take(&bodies, of(true, chunk("b", 5, after + 6, b"\xff", false))), Ok(Collected::Pass));
        assert_eq!(take(&bodies, of(true, chunk("b", 6, after + 7, b"", true))), Ok(Collected::Pass));

        let announced = Chunk { length: Length::Announced(Some(LIMIT as u64 + 1)), ..chunk("c", 0, 0, b"one", false) };
        assert_eq!(take(&bodies, announced), Err((FailureKind::BodyLimit, Rescue::Pass)));
    }

    #[test]
    fn a_body_that_the_proxy_keeps_from_the_agent_is_not_collected() {
        let bodies = store();
        let part = Chunk { buffered: true, ..chunk("a", 0, 0, b"one", false) };
        assert_eq!(take(&bodies, part), Err((FailureKind::BodyNotCollected, Rescue::Pass)));
        let middle = chunk("b", 0, 4096, b"two", false);
        assert_eq!(take(&bodies, middle), Err((FailureKind::BodyNotCollected, Rescue::Pass)));
    }

    #[test]
    fn ends_and_cancels_free_memory() {
        let bodies = store();
        for (connection, id) in [(1, "a"), (1, "b"), (2, "a")] {
            assert_eq!(take(&bodies, Chunk { connection, ..chunk(id, 0, 0, b"one", false) }), Ok(Collected::Held));
        }
        let all = bytes(&bodies);
        bodies.cancelled(1, "a");
        assert_eq!(bytes(&bodies), all / 3 * 2);
        assert_eq!(take(&bodies, chunk("a", 1, 3, b"two", true)), LOST);
        bodies.disconnected(1);
        assert!(!bodies.knows(1, "b") && bodies.knows(2, "a"));
        assert_eq!(bytes(&bodies), all / 3);
        bodies.disconnected(2);
        assert!(bodies.is_empty() && bytes(&bodies) == 0);
    }

    #[test]
    fn silence_and_slowness_take_the_bytes_first_and_the_body_much_later() {
        let bodies = store();
        let now = Instant::now();
        let sweep = |now| bodies.change(|inner| inner.sweep(KEPT, now));
        bodies.take_at(chunk("silent", 0, 0, b"one", false), now).unwrap();
        bodies.take_at(chunk("slow", 0, 0, b"one", false), now).unwrap();
        let (mut at, mut index) = (now, 1);
        while at.duration_since(now) <= LONGEST {
            at += KEPT / 2;
            let goes_on = bodies.take_at(chunk("slow", index, 3 + u64::from(index) - 1, b"x", false), at);
            assert_eq!(goes_on.is_ok(), at.duration_since(now) <= LONGEST + KEPT, "{index}");
            sweep(at);
            index += 1;
        }
        assert_eq!(bytes(&bodies), 0);
        assert!(bodies.take_at(chunk("silent", 1, 3, b"two", true), at).is_err());
        assert!(bodies.take_at(chunk("slow", index, 3 + u64::from(index) - 1, b"x", true), at).is_err());
        sweep(at + REMEMBERED);
        assert!(bodies.knows(1, "slow"));
        sweep(at + REMEMBERED + Duration::from_secs(1));
        assert!(bodies.is_empty());
    }

    #[test]
    fn memory_is_bounded_and_the_idle_give_way() {
        let bodies = store();
        let now = Instant::now();
        let large = vec![b'x'; LIMIT];
        let mut taken = 0;
        let full = loop {
            let id = format!("{taken}");
            match bodies.take_at(Chunk { fail_open: true, ..chunk(&id, 0, 0, &large, false) }, now) {
                Ok(_) => taken += 1,
                Err(lost) => break lost,
            }
        };
        assert_eq!((full.failure.kind, full.rescue), (FailureKind::Overloaded, Rescue::Pass));
        assert!(taken > 100 && bytes(&bodies) <= MAX_BYTES, "{taken}");
        // Those that are sending keep their place.
        let later = now + IDLE + Duration::from_secs(1);
        bodies.take_at(chunk("0", 1, LIMIT as u64, b"", false), later).unwrap();
        bodies.take_at(chunk("new", 0, 0, &large, false), later).unwrap();
        assert_eq!(bytes(&bodies), 2 * LIMIT);
        assert!(bodies.take_at(chunk("1", 1, LIMIT as u64, b"", true), later).is_err());
        let whole = bodies.take_at(chunk("0", 2, LIMIT as u64, b"", true), later);
        assert_eq!(whole, Ok(Collected::Whole(large)));
    }

    #[test]
    fn bodies_are_bounded_in_number() {
        let bodies = store();
        let now = Instant::now();
        for at in 0..MAX_BODIES {
            bodies.take_at(chunk(&at.to_string(), 0, 0, b"x", false), now).unwrap();
        }
        let lost = bodies.take_at(chunk("more", 0, 0, b"x", false), now).unwrap_err();
        assert_eq!((lost.failure.kind, lost.rescue), (FailureKind::Overloaded, Rescue::Refuse));
        let later = now + KEPT + Duration::from_secs(1);
        bodies.take_at(chunk("more", 0, 0, b"x", false), later).unwrap();
        assert!(bodies.lock().bodies.len() < MAX_BODIES);
    }
}
