//! One body in collection.

use std::time::Instant;

use super::chunk::RequestChunk;
use super::pieces::Pieces;
use super::tail::Tail;
use crate::bodies::Length;

pub(super) struct PartialBody {
    pub(super) number: Option<u64>,
    /// Index of the next chunk.
    pub(super) next: u32,
    /// Bytes so far, as counted by the proxy.
    pub(super) received: u64,
    pub(super) state: Progress,
    pub(super) began: Instant,
    pub(super) touched: Instant,
}

pub(super) enum Progress {
    /// Its chunks are held.
    Held(Pieces, Tail),
    /// An error was allowed, so the rest passes, after these first bytes of a code point.
    Passing(Tail),
    /// Further chunks are rejected.
    Broken,
    /// It has ended, with this number of bytes. The proxy may resend it, as one chunk, to another
    /// upstream connection.
    Ended(usize),
}

impl PartialBody {
    /// Whether its request has ended, given the number of the request of a new chunk.
    pub(super) fn is_over(&self, number: Option<u64>) -> bool {
        matches!(self.state, Progress::Ended(_)) || self.number.zip(number).is_some_and(|(own, other)| own != other)
    }

    /// Whether more chunks are expected.
    pub(super) fn is_open(&self) -> bool {
        matches!(self.state, Progress::Held(..) | Progress::Passing(_))
    }

    /// Returns why `chunk` does not continue this body, if so.
    pub(super) fn problem_with(&self, chunk: &RequestChunk<'_>) -> Option<String> {
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
            // With a known length, the sum above detects a body that is sent twice.
            (Progress::Held(pieces, _), _) if pieces.equal(&chunk.bytes) => Some(
                "a chunk repeats the whole body before it: the proxy may be resending the body to another upstream connection".to_owned(),
            ),
            _ => None,
        }
    }

    /// Rejects the body from now on. Returns the number of bytes of memory freed.
    pub(super) fn mark_broken(&mut self) -> usize {
        match std::mem::replace(&mut self.state, Progress::Broken) {
            Progress::Held(pieces, _) => pieces.capacity,
            Progress::Passing(_) | Progress::Broken | Progress::Ended(_) => 0,
        }
    }
}
