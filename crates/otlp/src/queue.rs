//! The spans that wait to be exported.

use std::sync::{Mutex, MutexGuard, PoisonError};

use prometheus::IntCounter;
use tokio::sync::Notify;

use crate::spans::EventSpan;

/// Most spans that wait, as in OpenTelemetry's own libraries. They take less than 2 MiB.
pub const MAX_QUEUED: usize = 2048;

/// Spans of one request to the collector, as in OpenTelemetry's own libraries.
pub(crate) const BATCH: usize = 512;

/// A bounded queue of spans.
pub struct SpanQueue {
    spans: Mutex<Vec<EventSpan>>,
    /// There is a batch. Fewer spans wait for the next turn of the exporter, because waking its
    /// thread for each of them would cost more than the span.
    pub(crate) has_batch: Notify,
    /// Spans that were lost, here or in the exporter.
    pub(crate) dropped: IntCounter,
}

impl SpanQueue {
    /// An empty queue. `dropped` counts the spans that do not reach the collector.
    pub fn new(dropped: IntCounter) -> Self {
        // Room for all of them from the start, because a growing queue would move them on the
        // request path.
        Self { spans: Mutex::new(Vec::with_capacity(MAX_QUEUED)), has_batch: Notify::new(), dropped }
    }

    /// Takes a span, or drops and counts it if the queue is full. Never waits for the collector.
    pub fn push(&self, span: EventSpan) {
        let queued = {
            let mut spans = self.spans();
            if spans.len() < MAX_QUEUED {
                spans.push(span);
                spans.len()
            } else {
                0
            }
        };
        match queued {
            0 => self.dropped.inc(),
            BATCH => self.has_batch.notify_one(),
            _ => {}
        }
    }

    /// Moves the oldest spans, at most [`BATCH`], to `batch`.
    pub(crate) fn take(&self, batch: &mut Vec<EventSpan>) {
        let mut spans = self.spans();
        let count = spans.len().min(BATCH);
        batch.extend(spans.drain(..count));
    }

    /// The number of waiting spans.
    pub(crate) fn len(&self) -> usize {
        self.spans().len()
    }

    fn spans(&self) -> MutexGuard<'_, Vec<EventSpan>> {
        self.spans.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spans::tests::span;

    #[test]
    fn drops_and_counts_what_does_not_fit() {
        let queue = SpanQueue::new(IntCounter::new("dropped", "dropped").unwrap());
        for number in 0..MAX_QUEUED + 10 {
            queue.push(EventSpan { correlation_id: number.to_string(), ..span() });
        }
        assert_eq!((queue.len(), queue.dropped.get()), (MAX_QUEUED, 10));
        let mut batch = Vec::new();
        queue.take(&mut batch);
        assert_eq!((batch.len(), &*batch[0].correlation_id, queue.len()), (BATCH, "0", MAX_QUEUED - BATCH));
        queue.push(span());
        assert_eq!((queue.len(), queue.dropped.get()), (MAX_QUEUED - BATCH + 1, 10));
    }
}
