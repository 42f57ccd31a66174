//! The events of one connection that are not answered yet.
//!
//! The proxy finds the request of an answer by its correlation id, and a client may choose that id. When a second event of an id arrives before the
//! first is answered, the proxy waits for the second only, and would take the answer to the first for it: a blocked request could come back
//! allowed. So an answer goes out only while its event is the newest of its id.

use std::hash::BuildHasher;
use std::pin::Pin;

use futures_util::future::{AbortHandle, Abortable, Aborted};
use futures_util::stream::{FuturesUnordered, StreamExt};
use hashbrown::{DefaultHashBuilder, HashMap};

use zentinel_wasm_contract::Arrival;

/// A call under way, whose outcome is an answer ready to be sent.
pub(crate) type Call<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// One event's place among those of its id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ticket {
    id: u64,
    sequence: u64,
    /// How it met others of its id.
    pub(crate) arrival: Arrival,
}

struct Newest {
    sequence: u64,
    abort: Option<AbortHandle>,
}

type Pending<T> = Pin<Box<dyn Future<Output = Option<(Ticket, T)>> + Send>>;

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

    /// An event of this id has arrived: older ones of it will not be answered.
    pub(crate) fn arrived(&mut self, correlation_id: &str) -> Ticket {
        // Two ids of one hash cost an answer, once in 2^64 pairs; the hash is keyed, so that a client cannot look for them.
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

    /// The answer to an event goes out now.
    pub(crate) fn answered(&mut self, ticket: Ticket) {
        if self.is_newest(ticket) {
            self.newest.remove(&ticket.id);
        }
    }

    /// The proxy no longer wants the answer to the newest event of this id.
    pub(crate) fn cancel(&mut self, correlation_id: &str) {
        if let Some(newest) = self.newest.remove(&self.hasher.hash_one(correlation_id))
            && let Some(abort) = newest.abort
        {
            abort.abort();
        }
    }

    /// Keeps a call going that was polled already and did not end.
    pub(crate) fn keep(&mut self, ticket: Ticket, call: Call<T>) {
        let (abort, registration) = AbortHandle::new_pair();
        match self.newest.get_mut(&ticket.id) {
            Some(newest) if newest.sequence == ticket.sequence => newest.abort = Some(abort),
            // Nobody will see its answer.
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

    /// Calls that have not ended.
    pub(crate) fn pending(&self) -> usize {
        self.pending.len()
    }

    /// The next call that ends, or None as soon as one was cancelled. Never ready while nothing is pending.
    pub(crate) fn poll_ended(&mut self, context: &mut std::task::Context<'_>) -> std::task::Poll<Option<(Ticket, T)>> {
        match self.pending.poll_next_unpin(context) {
            std::task::Poll::Ready(Some(ended)) => std::task::Poll::Ready(ended),
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
    async fn a_cancelled_call_ends_and_is_not_answered() {
        let mut session = Session::<()>::new();
        let ticket = session.arrived("a");
        session.keep(ticket, Box::pin(std::future::pending()));
        session.cancel("a");
        assert!(!session.is_newest(ticket));
        assert_eq!(std::future::poll_fn(|context| session.poll_ended(context)).await, None);
        assert_eq!(session.pending(), 0);
    }
}
