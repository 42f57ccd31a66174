//! The agent's log: one line an entry on standard error, JSON unless told otherwise, and bounded.

use std::io::IsTerminal;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use tracing_subscriber::EnvFilter;

use crate::cli::LogFormat;

/// Sets the log up. `RUST_LOG` beats `verbose`.
pub fn init(format: LogFormat, verbose: bool) {
    let default = if verbose { "debug" } else { "info" };
    let filter = EnvFilter::builder().with_default_directive(tracing::Level::ERROR.into());
    let filter = match std::env::var("RUST_LOG").ok().filter(|filter| !filter.is_empty()) {
        Some(wanted) if !verbose => filter.parse_lossy(wanted),
        _ => filter.parse_lossy(default),
    };
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Json => builder.json().flatten_event(true).with_current_span(false).with_span_list(false).init(),
        LogFormat::Text => builder.with_ansi(std::io::stderr().is_terminal()).with_target(false).init(),
    }
}

/// Lines of one kind that may be logged at once.
const BURST: f64 = 20.0;

/// Lines of one kind that may be logged per second after that.
const PER_SECOND: f64 = 5.0;

/// Bounds how often one kind of line is logged.
#[derive(Debug)]
pub(crate) struct RateLimit(Mutex<Budget>);

#[derive(Debug)]
struct Budget {
    lines: f64,
    refilled: Instant,
    suppressed: u64,
}

impl RateLimit {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(Budget { lines: BURST, refilled: Instant::now(), suppressed: 0 }))
    }

    /// Whether a line may be logged now, and how many were left out before it.
    pub(crate) fn admit(&self) -> Option<u64> {
        let mut budget = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        budget.lines = (budget.lines + now.duration_since(budget.refilled).as_secs_f64() * PER_SECOND).min(BURST);
        budget.refilled = now;
        if budget.lines < 1.0 {
            budget.suppressed += 1;
            return None;
        }
        budget.lines -= 1.0;
        Some(std::mem::take(&mut budget.suppressed))
    }
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
