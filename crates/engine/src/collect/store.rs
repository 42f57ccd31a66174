//! All bodies in collection, and their bounds.

use std::time::{Duration, Instant};

use hashbrown::HashMap;
use zentinel_wasm_contract::{Failure, FailureKind};

use super::body::{PartialBody, Progress};
use super::chunk::{Collected, Lost, RequestChunk, Rescue};
use super::pieces::Pieces;
use super::tail::{NotText, Tail};
use crate::bodies::Length;
use crate::ids::IdHasher;

/// Memory of all bodies in collection, in bytes: 100 times the default `--max-body-bytes`, because
/// a proxy has up to 100 requests in flight on a connection.
pub(super) const MAX_BYTES: usize = 128 << 20;

/// Known bodies, at about 150 bytes each in addition to what they hold.
pub(super) const MAX_BODIES: usize = 1 << 16;

/// How long the bytes of a body are kept after its last chunk. The proxy gives up on a client that
/// is idle for a minute.
pub(super) const KEPT: Duration = Duration::from_secs(60);

/// How long the bytes of a body are kept at most: `--max-body-bytes` at 15 kbit/s. Otherwise a
/// client could hold memory by sending a byte per minute.
pub(super) const LONGEST: Duration = Duration::from_secs(600);

/// How long a body is remembered after its bytes were dropped, so a late chunk of it is not
/// mistaken for one of a newer body: as long as a request's id.
pub(super) const REMEMBERED: Duration = Duration::from_secs(3600);

/// Idle time after which a body is evicted if memory is used up. Clients that send do not pause for
/// so long, and clients that hold bodies back to fill the memory must keep sending.
pub(super) const IDLE: Duration = Duration::from_secs(5);

/// Pause between two searches for bodies to evict, because each search visits all bodies.
const SEARCH_PAUSE: Duration = Duration::from_secs(1);

/// Why a body with binary bytes is rejected.
const NOT_TEXT: &str =
    "the body is not UTF-8: the proxy accepts only text as a replacement, so `--collect-request-body` cannot put it back";

#[derive(Default)]
pub(super) struct PartialBodies {
    pub(super) hasher: IdHasher,
    pub(super) bodies: HashMap<Key, PartialBody>,
    /// Memory of the held bytes.
    pub(super) bytes: usize,
    searched: Option<Instant>,
}

/// A connection, and the hash of an id. Two ids with the same hash count as the same id, so both
/// bodies are rejected.
type Key = (u64, u64);

/// The outcome of a chunk, before the pieces are joined.
pub(super) enum Taken {
    Chunk(Collected),
    Whole(Pieces),
    /// An error, and the bytes to return.
    GiveBack(Failure, Pieces),
}

impl PartialBodies {
    pub(super) fn key(&self, connection: u64, id: &str) -> Key {
        (connection, self.hasher.key(id))
    }

    pub(super) fn take(&mut self, chunk: RequestChunk<'_>, now: Instant) -> Result<Taken, Lost> {
        let key = self.key(chunk.connection, chunk.id);
        let is_new = match self.bodies.get(&key) {
            None => true,
            // The request to which it belonged has certainly ended.
            Some(body) => chunk.index == 0 && body.is_over(chunk.number),
        };
        if is_new { self.begin(key, chunk, now) } else { self.append(key, chunk, now) }
    }

    fn begin(&mut self, key: Key, chunk: RequestChunk<'_>, now: Instant) -> Result<Taken, Lost> {
        if let Some(mut old) = self.bodies.remove(&key) {
            self.bytes -= old.mark_broken();
        }
        if chunk.index > 0 {
            return Err(Lost::bytes(format!(
                "received chunk {} of a body without the chunks before it: it changed its connection, or was idle for too long",
                chunk.index
            )));
        }
        if chunk.buffered {
            if chunk.is_last {
                return Ok(Taken::Chunk(Collected::Alone));
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
            PartialBody { number: chunk.number, next: 1, received, state: Progress::Passing(Tail::default()), began: now, touched: now };
        let result = if received != size as u64 {
            let detail = "the proxy sent the body without its beginning: `--collect-request-body` needs `request-body-mode \"stream\"`";
            Err(Lost::new(FailureKind::BodyNotCollected, detail, Rescue::Pass))
        } else if chunk.is_last {
            body.state = Progress::Ended(size);
            Ok(Taken::Chunk(Collected::Alone))
        } else {
            match self.room(&chunk, 0, now) {
                Err(failure) => Err(Lost { failure, rescue: Rescue::Pass }),
                Ok(()) => match Tail::default().after(&chunk.bytes) {
                    Ok(tail) => {
                        let mut pieces = Pieces::default();
                        self.bytes += pieces.push(chunk.bytes);
                        body.state = Progress::Held(pieces, tail);
                        Ok(Taken::Chunk(Collected::Held))
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

    fn append(&mut self, key: Key, chunk: RequestChunk<'_>, now: Instant) -> Result<Taken, Lost> {
        let Some(body) = self.bodies.get_mut(&key) else { unreachable!("it was found before") };
        // A body must not be evicted for its own chunk.
        body.touched = now;
        let mut problem = body.problem_with(&chunk);
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
            self.bytes -= body.mark_broken();
            return Err(Lost::bytes(problem));
        }
        body.next = body.next.saturating_add(1);
        body.received += chunk.bytes.len() as u64;
        let after = match &body.state {
            // This is the whole body, resent.
            Progress::Ended(_) => return Ok(Taken::Chunk(Collected::Alone)),
            // It passes unchanged, so it need not be text.
            Progress::Passing(tail) if tail.is_empty() => {
                if chunk.is_last {
                    body.state = Progress::Ended(body.received as usize);
                }
                return Ok(Taken::Chunk(Collected::Pass));
            }
            Progress::Passing(_) | Progress::Held(..) | Progress::Broken => tail.after(&chunk.bytes),
        };
        let after = match after {
            Ok(after) if after.is_empty() || !chunk.is_last => after,
            // Also with `--fail-open`: the held bytes cannot be sent in front of bytes that are not
            // text.
            _ => {
                self.bytes -= body.mark_broken();
                return Err(Lost::bytes(NOT_TEXT));
            }
        };
        let ended = |body: &PartialBody| Progress::Ended(body.received as usize);
        match std::mem::replace(&mut body.state, Progress::Broken) {
            Progress::Passing(tail) => {
                let mut text = tail.bytes().to_vec();
                text.extend_from_slice(&chunk.bytes);
                text.truncate(text.len() - after.bytes().len());
                body.state = if chunk.is_last { ended(body) } else { Progress::Passing(after) };
                Ok(Taken::Chunk(Collected::Forward(text)))
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
                    return Ok(Taken::GiveBack(failure, pieces));
                }
                pieces.push(chunk.bytes);
                if chunk.is_last {
                    body.state = ended(body);
                    return Ok(Taken::Whole(pieces));
                }
                self.bytes += pieces.capacity;
                body.state = Progress::Held(pieces, after);
                Ok(Taken::Chunk(Collected::Held))
            }
            Progress::Broken | Progress::Ended(_) => unreachable!("these were answered above"),
        }
    }

    /// Checks that the chunk may be added to a body of `held` bytes.
    fn room(&mut self, chunk: &RequestChunk<'_>, held: usize, now: Instant) -> Result<(), Failure> {
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
        // The capacity of a piece may grow to twice its length.
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

    /// Evicts idle bodies. Returns false if there was a search recently, or none was found.
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

    /// Drops the bytes of bodies that have been idle for longer than `kept` or take too long, and
    /// forgets bodies whose requests must have ended.
    pub(super) fn sweep(&mut self, kept: Duration, now: Instant) {
        let bytes = &mut self.bytes;
        self.bodies.retain(|_, body| {
            let silent = now.duration_since(body.touched);
            if matches!(body.state, Progress::Ended(_)) {
                return silent <= kept;
            }
            if silent > kept || now.duration_since(body.began) > LONGEST {
                *bytes -= body.mark_broken();
            }
            silent <= REMEMBERED
        });
    }
}
