//! The unanswered events of one connection.
//!
//! The proxy finds the request of an answer by its correlation id, and a client may choose that id.
//! If a second event of an id arrives before the first is answered, the proxy waits for the second
//! only, and would take an answer to the first for an answer to the second: a blocked request could
//! come back allowed. Therefore an answer is sent only while its event is the newest of its id.

use std::hash::BuildHasher;
use std::pin::Pin;

use futures_util::future::{AbortHandle, Abortable, Aborted};
use futures_util::stream::{FuturesUnordered, StreamExt};
use hashbrown::{DefaultHashBuilder, HashMap};
use zentinel_wasm_contract::Arrival;

/// A running call. Its output is an encoded answer.
pub(crate) type Call<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Identifies one event among those with its correlation id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ticket {
    /// Keyed hash of the correlation id.
    id: u64,
    sequence: u64,
    /// Whether it superseded another event of its id.
    pub(crate) arrival: Arrival,
}

/// The newest event of an id.
struct Newest {
    sequence: u64,
    /// Aborts its call, once that is pending.
    abort: Option<AbortHandle>,
}

type Pending<T> = Pin<Box<dyn Future<Output = Option<(Ticket, T)>> + Send>>;

/// The unanswered events of one connection, and their pending calls.
pub(crate) struct Session<T> {
    hasher: DefaultHashBuilder,
    newest: HashMap<u64, Newest>,
    sequence: u64,
    pending: FuturesUnordered<Pending<T>>,
}

impl<T: Send + 'static> Session<T> {
    pub(crate) fn new() -> Self {
        Self { hasher: DefaultHashBuilder::default(), newest: HashMap::new(), sequence: 0, pending: FuturesUnordered::new() }
    }

    /// Registers a new event of this id. Older events of the id will not be answered.
    pub(crate) fn arrived(&mut self, correlation_id: &str) -> Ticket {
        // A collision of two ids loses an answer: once in 2^64 pairs. The hash is keyed, so a
        // client cannot search for one.
        let id = self.hasher.hash_one(correlation_id);
        self.sequence += 1;
        let superseded = self.newest.insert(id, Newest { sequence: self.sequence, abort: None });
        let arrival = if superseded.is_some() { Arrival::Superseding } else { Arrival::Alone };
        Ticket { id, sequence: self.sequence, arrival }
    }

    /// Whether an event may still be answered.
    pub(crate) fn is_newest(&self, ticket: Ticket) -> bool {
        self.newest.get(&ticket.id).is_some_and(|newest| newest.sequence == ticket.sequence)
    }

    /// Whether an event of this id is to be answered.
    pub(crate) fn awaits(&self, correlation_id: &str) -> bool {
        self.newest.contains_key(&self.hasher.hash_one(correlation_id))
    }

    /// Whether any event is to be answered.
    pub(crate) fn awaits_any(&self) -> bool {
        !self.newest.is_empty()
    }

    /// Removes an event whose answer is being sent.
    pub(crate) fn answered(&mut self, ticket: Ticket) {
        if self.is_newest(ticket) {
            self.newest.remove(&ticket.id);
        }
    }

    /// Aborts the call for the newest event of this id, because the proxy cancelled it.
    pub(crate) fn cancel(&mut self, correlation_id: &str) {
        if let Some(newest) = self.newest.remove(&self.hasher.hash_one(correlation_id))
            && let Some(abort) = newest.abort
        {
            abort.abort();
        }
    }

    /// Adds a call that was polled and is pending.
    pub(crate) fn push(&mut self, ticket: Ticket, call: Call<T>) {
        let (abort, registration) = AbortHandle::new_pair();
        match self.newest.get_mut(&ticket.id) {
            Some(newest) if newest.sequence == ticket.sequence => newest.abort = Some(abort),
            // Superseded or cancelled: its answer would not be sent.
            _ => return,
        }
        let call = Abortable::new(call, registration);
        self.pending.push(Box::pin(async move {
            match call.await {
                Ok(answer) => Some((ticket, answer)),
                Err(Aborted) => None,
            }
        }));
    }

    /// Number of pending calls.
    pub(crate) fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Ready with the next finished call, or with `None` for an aborted one. Never ready while no
    /// call is pending.
    pub(crate) fn poll_finished(&mut self, context: &mut std::task::Context<'_>) -> std::task::Poll<Option<(Ticket, T)>> {
        match self.pending.poll_next_unpin(context) {
            std::task::Poll::Ready(Some(finished)) => std::task::Poll::Ready(finished),
            _ => std::task::Poll::Pending,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_newest_event_of_an_id_is_answered() {
        let mut session = Session::<()>::new();
        let first = session.arrived("a");
        let other = session.arrived("b");
        assert!(session.is_newest(first));
        let second = session.arrived("a");
        assert_eq!([first, other, second].map(|ticket| ticket.arrival), [Arrival::Alone, Arrival::Alone, Arrival::Superseding]);
        assert!(!session.is_newest(first) && session.is_newest(second) && session.is_newest(other));
        session.answered(first);
        assert!(session.is_newest(second));
        session.answered(second);
        assert_eq!(session.arrived("a").arrival, Arrival::Alone);
        assert!(!session.is_newest(second) && session.is_newest(other));
    }

    #[tokio::test]
    async fn a_cancelled_call_is_dropped_and_not_answered() {
        let mut session = Session::<()>::new();
        let ticket = session.arrived("a");
        session.push(ticket, Box::pin(std::future::pending()));
        session.cancel("a");
        assert!(!session.is_newest(ticket));
        assert_eq!(std::future::poll_fn(|context| session.poll_finished(context)).await, None);
        assert_eq!(session.pending(), 0);
    }
}
