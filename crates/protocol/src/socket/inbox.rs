//! The buffered reader of a connection.

use std::io;
use std::time::Duration;

use rustix::buffer::spare_capacity;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::time::Instant;

use crate::limits::MAX_FRAME;

/// Free space in the buffer before a read, in bytes: one read takes dozens of events from a busy
/// connection.
pub(super) const READ_ROOM: usize = 64 << 10;

/// Capacity that an empty buffer keeps, in bytes, so body chunks of the usual sizes need no new
/// allocation each.
const MAX_KEPT: usize = 256 << 10;

/// Received bytes that are not consumed yet.
#[derive(Default)]
pub(super) struct Inbox {
    buffer: Vec<u8>,
    /// Bytes at the start of `buffer` that are consumed.
    consumed: usize,
    /// When a read first left an incomplete frame in the buffer.
    incomplete_since: Option<Instant>,
}

/// Result of a read.
pub(super) enum ReadOutcome {
    /// Bytes were read, and there may be more.
    Data,
    /// The socket is empty.
    Empty,
    /// The client has closed its side.
    Closed,
}

impl Inbox {
    /// An inbox that has received `buffer`.
    pub(super) fn of(buffer: Vec<u8>) -> Self {
        Self { buffer, ..Self::default() }
    }

    /// The bytes that are not consumed.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.buffer[self.consumed..]
    }

    /// Number of bytes that are not consumed.
    pub(super) fn len(&self) -> usize {
        self.buffer.len() - self.consumed
    }

    /// The bytes that are not consumed.
    pub(super) fn into_bytes(mut self) -> Vec<u8> {
        self.buffer.drain(..self.consumed);
        self.buffer
    }

    /// Consumes a frame of `len` bytes.
    pub(super) fn consume(&mut self, len: usize) {
        self.consumed += len;
        self.incomplete_since = None;
        if self.consumed == self.buffer.len() {
            self.consumed = 0;
            if self.buffer.capacity() > MAX_KEPT {
                self.buffer = Vec::new();
            } else {
                self.buffer.clear();
            }
        }
    }

    /// Reads once, as much as fits.
    pub(super) fn read(&mut self, stream: &UnixStream) -> io::Result<ReadOutcome> {
        if self.buffer.capacity() - self.buffer.len() < READ_ROOM / 4 {
            self.buffer.drain(..self.consumed);
            self.consumed = 0;
            // Grows with what was received, not with the length that a frame claims.
            let room = self.buffer.len().clamp(READ_ROOM, MAX_FRAME);
            self.buffer.reserve(room);
        }
        let before = self.buffer.len();
        let read = stream.try_io(Interest::READABLE, || {
            let read = rustix::io::retry_on_intr(|| rustix::io::read(stream, spare_capacity(&mut self.buffer)))?;
            // A short read emptied the socket. `WouldBlock` clears the readiness, which saves the
            // system call that would only find that out.
            if read > 0 && self.buffer.len() < self.buffer.capacity() { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(read) }
        });
        match read {
            Ok(0) => Ok(ReadOutcome::Closed),
            Ok(_) => Ok(ReadOutcome::Data),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && self.buffer.len() > before => Ok(ReadOutcome::Data),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if self.len() > 0 && self.incomplete_since.is_none() {
                    self.incomplete_since = Some(Instant::now());
                }
                Ok(ReadOutcome::Empty)
            }
            Err(error) => Err(error),
        }
    }

    /// Reads again without regard to the readiness that the runtime knows. An end or an error is
    /// left for the next [`read`](Self::read).
    pub(super) fn read_again(&mut self, stream: &UnixStream) {
        if self.buffer.len() < self.buffer.capacity() {
            let _ = rustix::io::read(stream, spare_capacity(&mut self.buffer));
        }
    }

    /// When an incomplete frame times out. `None` if there is none, or if the agent is not
    /// `reading`.
    pub(super) fn stalled_at(&self, reading: bool, stall: Duration) -> Option<Instant> {
        self.incomplete_since.filter(|_| reading && self.len() > 0).map(|since| since + stall)
    }
}
