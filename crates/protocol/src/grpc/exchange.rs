//! What waits to be sent on a stream.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use futures_util::Stream;
use prost::Message as _;
use tonic::Status;

use super::proto;
use super::proto::agent_to_proxy::Message;
use crate::session::{Session, Ticket};

/// What both halves of a stream share. They run on one task, so that neither ever waits for the lock.
pub(super) struct Exchange {
    pub(super) session: Session<proto::AgentToProxy>,
    /// Messages that wait to be taken.
    pub(super) output: VecDeque<WaitingMessage>,
    /// Memory in bytes that they take, roughly.
    pub(super) unsent: usize,
    /// How the stream ends, once the output is empty.
    end: Option<Result<(), Status>>,
    /// The response body has gone: nobody will take anything.
    pub(super) gone: bool,
    body: Option<Waker>,
    pub(super) driver: Option<Waker>,
    /// Something waits, and the driver wants to go on when nothing does any more.
    pub(super) awaits_empty: bool,
}

pub(super) struct WaitingMessage {
    /// The ticket of the event that is answered, if any.
    ticket: Option<Ticket>,
    message: proto::AgentToProxy,
    size: usize,
}

#[derive(Clone)]
pub(super) struct SharedExchange(Arc<Mutex<Exchange>>);

impl SharedExchange {
    pub(super) fn new() -> Self {
        Self(Arc::new(Mutex::new(Exchange {
            session: Session::new(),
            output: VecDeque::new(),
            unsent: 0,
            end: None,
            gone: false,
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
    pub(super) fn push(&mut self, ticket: Option<Ticket>, message: proto::AgentToProxy) {
        // A short answer takes far more as a message than it has bytes.
        let size = message.encoded_len() + size_of::<WaitingMessage>();
        self.unsent += size;
        self.output.push_back(WaitingMessage { ticket, message, size });
        self.wake_body();
    }

    pub(super) fn say(&mut self, message: Message) {
        self.push(None, proto::AgentToProxy { message: Some(message) });
    }

    pub(super) fn finish(&mut self, end: Result<(), Status>) {
        self.end = Some(end);
        self.wake_body();
    }

    fn wake_body(&mut self) {
        if let Some(body) = self.body.take() {
            body.wake();
        }
    }

    /// The next message that may still go out: answers to events that a newer one has superseded may not.
    fn pop(&mut self) -> Option<proto::AgentToProxy> {
        while let Some(WaitingMessage { ticket, message, size }) = self.output.pop_front() {
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

/// The response body of a stream.
pub(super) struct OutgoingMessages(pub(super) SharedExchange);

impl Stream for OutgoingMessages {
    type Item = Result<proto::AgentToProxy, Status>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut exchange = self.0.lock();
        let message = exchange.pop();
        if exchange.output.is_empty()
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
        exchange.gone = true;
        if let Some(driver) = exchange.driver.take() {
            driver.wake();
        }
    }
}
