//! Lines in the log that clients cause. A client can come again and again, so that each kind of line has a budget, whoever causes it.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Lines of one kind that may be logged at once.
const BURST: f64 = 20.0;

/// Lines of one kind that may be logged per second after that.
const PER_SECOND: f64 = 5.0;

/// Bounds how often one kind of line is logged: 20 at once, then 5 a second.
#[derive(Debug, Default)]
pub struct RateLimit(Mutex<Budget>);

#[derive(Debug, Default)]
struct Budget {
    /// Lines of the burst that are used up.
    used: f64,
    admitted: Option<Instant>,
    suppressed: u64,
}

impl RateLimit {
    /// A budget that nothing was taken from.
    pub const fn new() -> Self {
        Self(Mutex::new(Budget { used: 0.0, admitted: None, suppressed: 0 }))
    }

    /// Whether a line may be logged now, and how many were left out before it.
    pub fn admit(&self) -> Option<u64> {
        let mut budget = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let passed = budget.admitted.map_or(0.0, |then| now.duration_since(then).as_secs_f64());
        let used = (budget.used - passed * PER_SECOND).max(0.0) + 1.0;
        if used > BURST {
            budget.suppressed += 1;
            return None;
        }
        budget.used = used;
        budget.admitted = Some(now);
        Some(std::mem::take(&mut budget.suppressed))
    }
}

/// Logs as the macro of `tracing` that is named first does, but for one place in the code no more often than a [`RateLimit`] allows. The field
/// `suppressed` counts the lines that were left out before.
#[macro_export]
macro_rules! log_limited {
    ($level:ident, $($line:tt)+) => {{
        static LIMIT: $crate::log::RateLimit = $crate::log::RateLimit::new();
        if let Some(suppressed) = LIMIT.admit() {
            ::tracing::$level!(suppressed, $($line)+);
        }
    }};
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_off_and_counted() {
        let limit = RateLimit::new();
        let admitted = (0..100_000).filter(|_| limit.admit().is_some()).count();
        assert!(admitted >= BURST as usize && admitted < 10_000, "{admitted}");
        assert!(limit.0.lock().unwrap().suppressed > 0);
    }
}
