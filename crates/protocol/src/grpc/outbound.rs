//! Bodies of responses. What a client does not take stays in memory, however its call was made, so that it is not kept for ever: each chunk is known from
//! when it was made until HTTP/2 has written it out.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use hyper::body::{Body, Frame, SizeHint};
use tokio::time::Instant;
use tonic::Status;

/// Chunks of one connection that were not written yet. Clones share them.
#[derive(Clone, Default)]
pub(super) struct Unwritten(Arc<Mutex<Chunks>>);

#[derive(Default)]
struct Chunks {
    made: u64,
    /// For each, by its number: when the last of it was taken, or it was made.
    taken: BTreeMap<u64, Instant>,
}

impl Unwritten {
    fn lock(&self) -> MutexGuard<'_, Chunks> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Since when nothing was taken of the chunk that waits longest.
    pub(super) fn since(&self) -> Option<Instant> {
        self.lock().taken.values().min().copied()
    }

    fn chunk(&self, bytes: Bytes) -> UnwrittenChunk {
        let mut chunks = self.lock();
        chunks.made += 1;
        let number = chunks.made;
        chunks.taken.insert(number, Instant::now());
        drop(chunks);
        UnwrittenChunk { bytes, number, unwritten: self.clone() }
    }
}

/// A part of a body.
pub(super) struct UnwrittenChunk {
    bytes: Bytes,
    number: u64,
    unwritten: Unwritten,
}

impl Buf for UnwrittenChunk {
    fn remaining(&self) -> usize {
        self.bytes.remaining()
    }

    fn chunk(&self) -> &[u8] {
        self.bytes.chunk()
    }

    fn advance(&mut self, count: usize) {
        self.bytes.advance(count);
        if self.bytes.has_remaining() {
            self.unwritten.lock().taken.insert(self.number, Instant::now());
        }
    }
}

impl Drop for UnwrittenChunk {
    fn drop(&mut self) {
        self.unwritten.lock().taken.remove(&self.number);
    }
}

/// The body of a response.
pub(super) struct OutboundBody<B = tonic::body::Body> {
    body: B,
    unwritten: Unwritten,
}

impl<B> OutboundBody<B> {
    pub(super) fn new(body: B, unwritten: Unwritten) -> Self {
        Self { body, unwritten }
    }
}

impl<B: Body<Data = Bytes, Error = Status> + Unpin> Body for OutboundBody<B> {
    type Data = UnwrittenChunk;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<UnwrittenChunk>, Status>>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.body).poll_frame(context);
        polled.map_ok(|frame| frame.map_data(|bytes| this.unwritten.chunk(bytes)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_is_known_until_it_is_written() {
        let unwritten = Unwritten::default();
        assert_eq!(unwritten.since(), None);
        let mut first = unwritten.chunk(Bytes::from_static(b"first"));
        let made = unwritten.since().unwrap();
        let second = unwritten.chunk(Bytes::from_static(b"second"));
        assert_eq!(unwritten.since(), Some(made));
        // One that is taken bit by bit is given its time anew.
        first.advance(1);
        let second_made = unwritten.since().unwrap();
        assert!(second_made > made);
        drop(second);
        let advanced = unwritten.since().unwrap();
        assert!(advanced > second_made);
        drop(first);
        assert_eq!(unwritten.since(), None);
    }
}
