//! The writer of a connection.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::time::Instant;

use super::error::SocketError;
use super::frame;
use crate::limits::MAX_UNSENT;
use crate::session::{Session, Ticket};

/// Rough memory of a waiting frame besides its bytes, in bytes: many short frames count too.
const FRAME_OVERHEAD: usize = 64;

/// Frames that one system call writes at most.
const WRITE_SLICES: usize = 64;

/// Frames that are waiting to be written.
#[derive(Default)]
pub(super) struct Outbox {
    /// Each with the ticket of the event that it answers, if any.
    frames: VecDeque<(Option<Ticket>, Vec<u8>)>,
    /// Bytes of the first frame that are written.
    written: usize,
    /// Rough memory of the frames, in bytes.
    unsent: usize,
    /// Since when the socket accepts nothing.
    blocked_since: Option<Instant>,
}

impl Outbox {
    pub(super) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Number of waiting frames.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.frames.len()
    }

    /// Whether so much waits that no more events are read or run.
    pub(super) fn is_full(&self) -> bool {
        self.unsent >= MAX_UNSENT
    }

    /// Appends the answer to an event.
    pub(super) fn answer(&mut self, ticket: Ticket, answer: Vec<u8>) {
        self.push(Some(ticket), answer);
    }

    /// Appends a frame that is not an answer.
    pub(super) fn control(&mut self, kind: u8, payload: &[u8]) {
        let mut out = Vec::new();
        frame::append(&mut out, kind, |out| out.extend_from_slice(payload));
        self.push(None, out);
    }

    fn push(&mut self, ticket: Option<Ticket>, frame: Vec<u8>) {
        self.unsent += frame.len() + FRAME_OVERHEAD;
        self.frames.push_back((ticket, frame));
    }

    /// Drops the answers to events that are superseded or cancelled.
    fn retain_newest(&mut self, session: &Session<Vec<u8>>) -> Result<(), SocketError> {
        let stale = |ticket: &Option<Ticket>| ticket.is_some_and(|ticket| !session.is_newest(ticket));
        if self.written > 0 && self.frames.front().is_some_and(|(ticket, _)| stale(ticket)) {
            return Err(SocketError::Superseded);
        }
        let unsent = &mut self.unsent;
        self.frames.retain(|(ticket, frame)| {
            let stale = stale(ticket);
            if stale {
                *unsent -= frame.len() + FRAME_OVERHEAD;
            }
            !stale
        });
        Ok(())
    }

    /// Writes as much as the socket accepts.
    pub(super) fn write(&mut self, stream: &UnixStream, session: &mut Session<Vec<u8>>) -> Result<(), SocketError> {
        if self.frames.is_empty() {
            return Ok(());
        }
        self.retain_newest(session)?;
        if self.frames.is_empty() {
            self.blocked_since = None;
        }
        while let Some((_, first)) = self.frames.front() {
            let mut slices = [IoSlice::new(&[]); WRITE_SLICES];
            slices[0] = IoSlice::new(&first[self.written..]);
            let count = self.frames.len().min(WRITE_SLICES);
            for (slice, (_, frame)) in slices[1..count].iter_mut().zip(self.frames.iter().skip(1)) {
                *slice = IoSlice::new(frame);
            }
            match stream.try_write_vectored(&slices[..count]) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
                Ok(written) => self.advance(written, session),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.blocked_since.get_or_insert_with(Instant::now);
                    return Ok(());
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Accounts for `written` bytes.
    fn advance(&mut self, written: usize, session: &mut Session<Vec<u8>>) {
        self.blocked_since = None;
        self.unsent -= written;
        self.written += written;
        while let Some((ticket, frame)) = self.frames.front()
            && frame.len() <= self.written
        {
            if let Some(ticket) = ticket {
                session.answered(*ticket);
            }
            self.written -= frame.len();
            self.unsent -= FRAME_OVERHEAD;
            self.frames.pop_front();
        }
    }

    /// When the client has not read anything for too long.
    pub(super) fn stalled_at(&self, stall: Duration) -> Option<Instant> {
        self.blocked_since.map(|since| since + stall)
    }
}
