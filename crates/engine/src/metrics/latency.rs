//! Durations of recent calls.

use std::time::Instant;

use zentinel_wasm_contract::report;

/// Upper bounds of the duration buckets, in seconds: from a call of a small module to the longest
/// `--timeout-ms`. One is the default of `--timeout-ms`, so percentiles distinguish calls near that
/// deadline from those beyond it.
pub(super) const BUCKETS: [f64; 23] = [
    0.000_005, 0.000_01, 0.000_025, 0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.04, 0.05, 0.1, 0.25, 0.5,
    1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
];

/// The totals at two points in time. Calls since the earlier one are recent.
#[derive(Default)]
pub(super) struct RecentCalls {
    pub(super) earlier: CallTotals,
    pub(super) later: CallTotals,
    /// When `later` was taken.
    pub(super) at: Option<Instant>,
}

/// Durations of all calls, whatever their hook.
#[derive(Clone, Copy, Default)]
pub(super) struct CallTotals {
    pub(super) count: u64,
    pub(super) sum: f64,
    /// The number of calls at or below each of [`BUCKETS`].
    pub(super) buckets: [u64; BUCKETS.len()],
}

impl CallTotals {
    /// The calls since `earlier`.
    pub(super) fn since(mut self, earlier: &Self) -> Self {
        self.count -= earlier.count;
        self.sum -= earlier.sum;
        for (count, earlier) in self.buckets.iter_mut().zip(earlier.buckets) {
            *count -= earlier;
        }
        self
    }

    /// The duration, in seconds, below which `part` of the calls are, assuming that they are evenly
    /// distributed within each bucket.
    fn quantile(&self, part: f64) -> f64 {
        let wanted = part * self.count as f64;
        let (mut bound_below, mut below) = (0.0, 0);
        for (bound, count) in BUCKETS.into_iter().zip(self.buckets) {
            if count as f64 >= wanted && count > below {
                return bound_below + (bound - bound_below) * (wanted - below as f64) / (count - below) as f64;
            }
            (bound_below, below) = (bound, count);
        }
        bound_below
    }

    pub(super) fn latency(&self) -> report::Latency {
        const MILLISECONDS: f64 = 1000.0;
        if self.count == 0 {
            return report::Latency::default();
        }
        let [p50, p95, p99] = [0.5, 0.95, 0.99].map(|part| self.quantile(part) * MILLISECONDS);
        report::Latency { average: self.sum / self.count as f64 * MILLISECONDS, p50, p95, p99 }
    }
}
