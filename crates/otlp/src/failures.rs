//! Logs that a collector cannot be reached, and that it can again.

use std::time::Duration;

use tokio::time::Instant;
use tracing::{info, warn};
use zentinel_wasm_bounds::RateLimit;

use crate::endpoint::Endpoint;

/// Time between two lines about the same failure.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// What a message to a collector is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Signal {
    Traces,
    Metrics,
}

impl Signal {
    /// Its part of the path.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Traces => "traces",
            Self::Metrics => "metrics",
        }
    }
}

/// What the log says about a collector.
pub(crate) struct FailureLog {
    /// A collector that fails every other request gets no more than a line a minute either.
    limit: RateLimit,
    /// Whether the last export of each signal failed.
    failing: [bool; 2],
    logged: Option<Instant>,
    /// The number of lost spans in the last line.
    dropped: u64,
}

impl FailureLog {
    pub(crate) fn new() -> Self {
        Self { limit: RateLimit::new(4.0, 1.0 / LOG_INTERVAL.as_secs_f64()), failing: [false; 2], logged: None, dropped: 0 }
    }

    /// Logs a failed export. `dropped` is the number of spans lost so far.
    pub(crate) fn failed(&mut self, signal: Signal, endpoint: &Endpoint, reason: &str, is_temporary: bool, dropped: u64) {
        // A collector that cannot be reached fails both signals for one reason.
        let is_known = self.failing[signal as usize] || is_temporary && self.failing != [false; 2];
        self.failing[signal as usize] = true;
        // A collector that takes no metrics is no reason for a line a minute.
        let is_worth_repeating = is_temporary || dropped > self.dropped;
        if (!is_known || self.is_due() && is_worth_repeating) && self.admits(dropped) {
            warn!(dropped, "cannot export to `--otlp-endpoint {endpoint}`, spans may be lost: {reason}");
        }
    }

    /// Logs that exports succeed again, or that spans were lost although they do.
    pub(crate) fn succeeded(&mut self, signal: Signal, endpoint: &Endpoint, dropped: u64) {
        let has_failed = std::mem::replace(&mut self.failing[signal as usize], false);
        if has_failed && self.failing == [false; 2] {
            if self.admits(dropped) {
                info!(dropped, "exporting to `--otlp-endpoint {endpoint}` again");
            }
        } else if !has_failed && dropped > self.dropped && self.is_due() && self.admits(dropped) {
            warn!(dropped, "spans were lost because there were more than `--otlp-endpoint {endpoint}` took");
        }
    }

    fn is_due(&self) -> bool {
        self.logged.is_none_or(|logged| logged.elapsed() >= LOG_INTERVAL)
    }

    /// Whether a line may be logged, which is then assumed to be.
    fn admits(&mut self, dropped: u64) -> bool {
        let admits = self.limit.admit().is_some();
        if admits {
            self.logged = Some(Instant::now());
            self.dropped = dropped;
        }
        admits
    }
}
