//! A token bucket, and log lines that are bounded by one.

use std::num::NonZeroU64;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// A token bucket: a burst of events, and then so many per second.
#[derive(Debug)]
pub struct RateLimit {
    burst: f64,
    per_second: f64,
    bucket: Mutex<Bucket>,
}

#[derive(Debug)]
struct Bucket {
    /// Tokens of the burst that are in use.
    used: f64,
    admitted: Option<Instant>,
    suppressed: u64,
}

impl RateLimit {
    /// A full bucket of `burst` tokens, refilled with `per_second` tokens per second.
    pub const fn new(burst: f64, per_second: f64) -> Self {
        Self { burst, per_second, bucket: Mutex::new(Bucket { used: 0.0, admitted: None, suppressed: 0 }) }
    }

    /// A limit for log lines of one kind that clients can cause: 20 at once, then 5 per second.
    ///
    /// A client can reconnect as often as it likes, so the limit belongs to the kind of line and
    /// not to a connection.
    pub const fn per_log_line() -> Self {
        Self::new(20.0, 5.0)
    }

    /// Takes a token and returns how many events were suppressed since the last one. That is `None`
    /// instead of 0, because a log line leaves out a field that is `None`. Without a token, returns
    /// `None` and counts the event as suppressed.
    pub fn admit(&self) -> Option<Option<NonZeroU64>> {
        let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let passed = bucket.admitted.map_or(0.0, |then| now.saturating_duration_since(then).as_secs_f64());
        let used = (bucket.used - passed * self.per_second).max(0.0) + 1.0;
        if used > self.burst {
            bucket.suppressed += 1;
            return None;
        }
        bucket.used = used;
        bucket.admitted = Some(now);
        Some(NonZeroU64::new(std::mem::take(&mut bucket.suppressed)))
    }

    /// Events that were suppressed since the last admitted one.
    pub fn suppressed(&self) -> u64 {
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner).suppressed
    }
}

/// Logs like the `tracing` macro named first, but at most as often as [`RateLimit::per_log_line`]
/// admits for this place in the code. The field `suppressed` counts the lines left out before,
/// if any.
#[macro_export]
macro_rules! log_limited {
    ($level:ident, $($line:tt)+) => {{
        static LIMIT: $crate::RateLimit = $crate::RateLimit::per_log_line();
        if let Some(suppressed) = LIMIT.admit() {
            $crate::tracing::$level!(suppressed, $($line)+);
        }
    }};
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_suppressed_and_counted() {
        let limit = RateLimit::per_log_line();
        let admitted = (0..100_000).filter(|_| limit.admit().is_some()).count();
        // The refill during the loop is small, however slow the machine is.
        assert!((20..10_000).contains(&admitted), "{admitted}");
        assert!(limit.suppressed() > 0);
    }

    #[test]
    fn the_burst_is_exact() {
        let limit = RateLimit::new(3.0, 0.0);
        assert_eq!((0..5).filter(|_| limit.admit().is_some()).count(), 3);
        assert_eq!(limit.suppressed(), 2);
    }

    #[test]
    fn the_suppressed_events_are_returned_once() {
        // A token every 10 ms.
        let limit = RateLimit::new(1.0, 100.0);
        assert_eq!(limit.admit(), Some(None));
        let mut suppressed = 0;
        let counted = loop {
            match limit.admit() {
                Some(counted) => break counted,
                None => suppressed += 1,
            }
        };
        assert_eq!(counted, NonZeroU64::new(suppressed));
        assert_eq!(limit.suppressed(), 0);
    }
}
