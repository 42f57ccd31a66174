//! One body that is being collected.

use std::time::Instant;

use super::chunk::RequestChunk;
use super::pieces::Pieces;
use super::tail::Tail;
use crate::bodies::Length;

pub(super) struct PartialBody {
    pub(super) number: Option<u64>,
    /// Index of the next chunk.
    pub(super) next: u32,
    /// Bytes so far, as the proxy counts them.
    pub(super) received: u64,
    pub(super) state: Progress,
    pub(super) began: Instant,
    pub(super) touched: Instant,
}

pub(super) enum Progress {
    /// Its chunks are held.
    Held(Pieces, Tail),
    /// An error has been allowed: the rest passes, after these first bytes of a code point.
    Passing(Tail),
    /// Nothing of it is taken any more.
    Broken,
    /// It has ended and had so many bytes. The proxy may send it again, as one chunk, to another upstream connection.
    Ended(usize),
}

impl PartialBody {
    /// Whether its request has ended, by what is known of the one of a new chunk.
    pub(super) fn is_over(&self, number: Option<u64>) -> bool {
        matches!(self.state, Progress::Ended(_)) || self.number.zip(number).is_some_and(|(own, other)| own != other)
    }

    /// Whether more of it is awaited.
    pub(super) fn is_open(&self) -> bool {
        matches!(self.state, Progress::Held(..) | Progress::Passing(_))
    }

    /// Why a chunk does not go on where this body stands.
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
            // The chunks of a body whose length is known must add up; only here could a second time go unnoticed.
            (Progress::Held(pieces, _), _) if pieces.equal(&chunk.bytes) => Some(
                "a chunk repeats the whole body before it: the proxy may be resending the body to another upstream connection".to_owned(),
            ),
            _ => None,
        }
    }

    /// Gives it up, and returns how much memory that frees.
    pub(super) fn mark_broken(&mut self) -> usize {
        match std::mem::replace(&mut self.state, Progress::Broken) {
            Progress::Held(pieces, _) => pieces.capacity,
            Progress::Passing(_) | Progress::Broken | Progress::Ended(_) => 0,
        }
    }
}
