//! Reads from a socket.

use std::io;
use std::time::Duration;

use rustix::buffer::spare_capacity;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::time::Instant;

use crate::limits::MAX_FRAME;

/// Room that is made in the buffer before a read, in bytes. A busy connection's events are read by the dozen.
pub(super) const READ_ROOM: usize = 64 << 10;

/// What a connection keeps of its buffer between frames, in bytes: bodies that come in pieces of usual sizes need no new memory for each.
const MAX_KEPT: usize = 256 << 10;

/// Bytes that have arrived and were not taken yet.
#[derive(Default)]
pub(super) struct Inbox {
    buffer: Vec<u8>,
    taken: usize,
    /// When the first byte of what is there arrived.
    since: Option<Instant>,
}

/// What a read has found.
pub(super) enum ReadOutcome {
    Some,
    Nothing,
    End,
}

impl Inbox {
    /// One with bytes that have arrived already.
    #[cfg(test)]
    pub(super) fn of(buffer: Vec<u8>) -> Self {
        Self { buffer, ..Self::default() }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.buffer[self.taken..]
    }

    pub(super) fn len(&self) -> usize {
        self.buffer.len() - self.taken
    }

    pub(super) fn consume(&mut self, len: usize) {
        self.taken += len;
        self.since = None;
        if self.taken == self.buffer.len() {
            self.taken = 0;
            if self.buffer.capacity() > MAX_KEPT {
                self.buffer = Vec::new();
            } else {
                self.buffer.clear();
            }
        }
    }

    pub(super) fn read(&mut self, stream: &UnixStream) -> io::Result<ReadOutcome> {
        if self.buffer.capacity() - self.buffer.len() < READ_ROOM / 4 {
            self.buffer.drain(..self.taken);
            self.taken = 0;
            // Grown by what has arrived, not by what a frame claims to be.
            let room = self.buffer.len().clamp(READ_ROOM, MAX_FRAME);
            self.buffer.reserve(room);
        }
        let before = self.buffer.len();
        let read = stream.try_io(Interest::READABLE, || {
            let read = rustix::io::retry_on_intr(|| rustix::io::read(stream, spare_capacity(&mut self.buffer)))?;
            // A short read has emptied the socket: saying so spares the call that would only find out.
            if read > 0 && self.buffer.len() < self.buffer.capacity() { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(read) }
        });
        match read {
            Ok(0) => Ok(ReadOutcome::End),
            Ok(_) => Ok(ReadOutcome::Some),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && self.buffer.len() > before => Ok(ReadOutcome::Some),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if self.len() > 0 && self.since.is_none() {
                    self.since = Some(Instant::now());
                }
                Ok(ReadOutcome::Nothing)
            }
            Err(error) => Err(error),
        }
    }

    /// Takes what has arrived since the last read, whatever the runtime knows of it. An end or a failure it will know soon enough.
    pub(super) fn look_again(&mut self, stream: &UnixStream) {
        if self.buffer.len() < self.buffer.capacity() {
            let _ = rustix::io::read(stream, spare_capacity(&mut self.buffer));
        }
    }

    /// When an incomplete frame has taken too long, if one is awaited.
    pub(super) fn stalled_at(&self, reading: bool, stall: Duration) -> Option<Instant> {
        self.since.filter(|_| reading && self.len() > 0).map(|since| since + stall)
    }
}
