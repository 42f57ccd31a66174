//! The state that the two halves of a stream share: the driver adds messages, the response body
//! takes them.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use futures_util::Stream;
use prost::Message as _;
use tonic::Status;

use super::proto;
use super::proto::agent_to_proxy::Message;
use crate::limits::MAX_UNSENT;
use crate::session::{Session, Ticket};

/// Unanswered events and unsent messages of a stream. Both halves run on one task, so neither ever
/// waits for the lock.
pub(super) struct Exchange {
    pub(super) session: Session<proto::AgentToProxy>,
    /// Messages that the response body has not taken.
    waiting: VecDeque<WaitingMessage>,
    /// Rough memory of those messages, in bytes.
    unsent: usize,
    /// How the stream ends when no message is waiting.
    end: Option<Result<(), Status>>,
    /// The response body was dropped.
    closed: bool,
    body: Option<Waker>,
    driver: Option<Waker>,
    /// The driver is to be woken when no message is waiting.
    awaits_empty: bool,
}

struct WaitingMessage {
    /// Ticket of the event that it answers, if any.
    ticket: Option<Ticket>,
    message: proto::AgentToProxy,
    size: usize,
}

/// The handle of one half.
#[derive(Clone)]
pub(super) struct SharedExchange(Arc<Mutex<Exchange>>);

impl SharedExchange {
    pub(super) fn new() -> Self {
        Self(Arc::new(Mutex::new(Exchange {
            session: Session::new(),
            waiting: VecDeque::new(),
            unsent: 0,
            end: None,
            closed: false,
            body: None,
            driver: None,
            awaits_empty: false,
        })))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Exchange> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Exchange {
    /// Whether no message is waiting.
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Whether so much is waiting that no more events are read.
    pub(super) fn is_full(&self) -> bool {
        self.unsent >= MAX_UNSENT
    }

    /// Whether the response body was dropped, so nothing more can be sent.
    pub(super) fn is_closed(&self) -> bool {
        self.closed
    }

    /// Whether the driver is to be woken when no message is waiting.
    pub(super) fn await_empty(&mut self, awaits: bool) {
        self.awaits_empty = awaits && !self.waiting.is_empty();
    }

    /// Whether the driver has reason to continue: no message is waiting, as it awaited, or the
    /// response body was dropped.
    pub(super) fn wakes_driver(&self) -> bool {
        self.awaits_empty && self.waiting.is_empty() || self.closed
    }

    /// Stores the waker of the driver.
    pub(super) fn set_driver(&mut self, driver: &Waker) {
        self.driver = Some(driver.clone());
    }

    /// Appends the answer to an event.
    pub(super) fn answer(&mut self, ticket: Ticket, answer: proto::AgentToProxy) {
        self.push(Some(ticket), answer);
    }

    /// Appends a message that is not an answer.
    pub(super) fn control(&mut self, message: Message) {
        self.push(None, proto::AgentToProxy { message: Some(message) });
    }

    fn push(&mut self, ticket: Option<Ticket>, message: proto::AgentToProxy) {
        // A short answer takes much more memory than its encoded bytes.
        let size = message.encoded_len() + size_of::<WaitingMessage>();
        self.unsent += size;
        self.waiting.push_back(WaitingMessage { ticket, message, size });
        self.wake_body();
    }

    /// Ends the stream when the waiting messages are sent.
    pub(super) fn finish(&mut self, end: Result<(), Status>) {
        self.end = Some(end);
        self.wake_body();
    }

    fn wake_body(&mut self) {
        if let Some(body) = self.body.take() {
            body.wake();
        }
    }

    /// Takes the next message. Drops answers to events that are superseded or cancelled.
    fn pop(&mut self) -> Option<proto::AgentToProxy> {
        while let Some(WaitingMessage { ticket, message, size }) = self.waiting.pop_front() {
            self.unsent -= size;
            match ticket {
                Some(ticket) if !self.session.is_newest(ticket) => {}
                Some(ticket) => {
                    self.session.answered(ticket);
                    return Some(message);
                }
                None => return Some(message),
            }
        }
        None
    }
}

/// The response body of a stream: its messages.
pub(super) struct OutgoingMessages(pub(super) SharedExchange);

impl Stream for OutgoingMessages {
    type Item = Result<proto::AgentToProxy, Status>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut exchange = self.0.lock();
        let message = exchange.pop();
        if exchange.waiting.is_empty()
            && exchange.awaits_empty
            && let Some(driver) = exchange.driver.take()
        {
            driver.wake();
        }
        if let Some(message) = message {
            return Poll::Ready(Some(Ok(message)));
        }
        match exchange.end.take() {
            Some(Ok(())) => Poll::Ready(None),
            Some(Err(status)) => Poll::Ready(Some(Err(status))),
            None => {
                exchange.body = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl Drop for OutgoingMessages {
    fn drop(&mut self) {
        let mut exchange = self.0.lock();
        exchange.closed = true;
        if let Some(driver) = exchange.driver.take() {
            driver.wake();
        }
    }
}
