//! Response bodies, of which unread chunks are tracked.
//!
//! What a client does not read stays in memory, whichever call it made, so it must time out. Each
//! chunk is tracked from its creation until HTTP/2 has written all of it.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use hyper::body::{Body, Frame, SizeHint};
use tokio::time::Instant;
use tonic::Status;

/// The chunks of one connection that are not written completely. Clones share them.
#[derive(Clone, Default)]
pub(super) struct Unwritten(Arc<Mutex<Chunks>>);

#[derive(Default)]
struct Chunks {
    created: u64,
    /// For each chunk, by its number: when a part of it was last written, or else when it was
    /// created.
    progress: BTreeMap<u64, Instant>,
}

impl Unwritten {
    fn lock(&self) -> MutexGuard<'_, Chunks> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Since when the slowest chunk has made no progress.
    pub(super) fn since(&self) -> Option<Instant> {
        self.lock().progress.values().min().copied()
    }

    fn chunk(&self, bytes: Bytes) -> UnwrittenChunk {
        let mut chunks = self.lock();
        chunks.created += 1;
        let number = chunks.created;
        chunks.progress.insert(number, Instant::now());
        drop(chunks);
        UnwrittenChunk { bytes, number, unwritten: self.clone() }
    }
}

/// A chunk of a response body.
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
            self.unwritten.lock().progress.insert(self.number, Instant::now());
        }
    }
}

impl Drop for UnwrittenChunk {
    fn drop(&mut self) {
        self.unwritten.lock().progress.remove(&self.number);
    }
}

/// The body of a response, whose chunks are tracked.
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
    fn a_chunk_is_tracked_until_it_is_written() {
        let unwritten = Unwritten::default();
        assert_eq!(unwritten.since(), None);
        let mut first = unwritten.chunk(Bytes::from_static(b"first"));
        let created = unwritten.since().unwrap();
        let second = unwritten.chunk(Bytes::from_static(b"second"));
        assert_eq!(unwritten.since(), Some(created));
        // A chunk that is written in parts gets new time with each part.
        first.advance(1);
        let second_created = unwritten.since().unwrap();
        assert!(second_created > created);
        drop(second);
        let advanced = unwritten.since().unwrap();
        assert!(advanced > second_created);
        drop(first);
        assert_eq!(unwritten.since(), None);
    }
}
