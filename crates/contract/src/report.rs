//! Health and metrics, as the agent reports them to the proxies.

use std::time::Duration;

/// How often health and metrics are reported to the proxies: the interval of the published crates.
pub const REPORT_INTERVAL: Duration = Duration::from_secs(10);

/// Health and metrics at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reports {
    /// The moment, in milliseconds since 1970.
    pub timestamp_ms: u64,
    /// Agent health and load.
    pub health: Health,
    /// Every metric series.
    pub metrics: Series,
}

/// Agent health.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum HealthState {
    /// Nothing is wrong.
    #[default]
    Healthy,
    /// The agent serves, but something is wrong: the reason, for people.
    Degraded(String),
    /// The agent finishes what is in flight and exits, or was asked to.
    Draining,
}

impl HealthState {
    /// The reason, for people.
    pub fn message(&self) -> Option<&str> {
        match self {
            Self::Healthy => None,
            Self::Degraded(reason) => Some(reason),
            Self::Draining => Some("the agent is draining"),
        }
    }
}

/// Agent health and load.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Health {
    /// Agent health.
    pub state: HealthState,
    /// Whether the module decides about requests right now.
    pub ready: bool,
    /// Events in flight.
    pub in_flight: u32,
    /// Calls that are waiting for an instance.
    pub waiting: u32,
    /// Events answered.
    pub answered: u64,
    /// Events rejected without a call, because no instance was free or the circuit was open.
    pub rejected: u64,
    /// Calls that exceeded their deadline.
    pub timed_out: u64,
    /// Recent time from an event's arrival to its answer.
    pub latency: Latency,
    /// Connections of proxies.
    pub connections: u32,
}

/// How long calls took, in milliseconds. All zero if there were none, because the published types
/// require numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Latency {
    /// The mean.
    pub average: f64,
    /// The median.
    pub p50: f64,
    /// The 95th percentile.
    pub p95: f64,
    /// The 99th percentile.
    pub p99: f64,
}

/// Every metric series.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Series {
    /// Values that only grow.
    pub counters: Vec<Metric<u64>>,
    /// Values that rise and fall.
    pub gauges: Vec<Metric<f64>>,
    /// Distributions.
    pub histograms: Vec<Metric<Histogram>>,
}

/// One series.
#[derive(Clone, Debug, PartialEq)]
pub struct Metric<T> {
    /// Name of the metric.
    pub name: String,
    /// What the metric counts or measures.
    pub help: String,
    /// Labels that distinguish it from other series of the metric.
    pub labels: Vec<(String, String)>,
    /// The value.
    pub value: T,
}

/// A distribution.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Histogram {
    /// Sum of all values.
    pub sum: f64,
    /// Number of all values.
    pub count: u64,
    /// Upper bounds, and the number of values at or below each. The last bound is infinite.
    pub buckets: Vec<(f64, u64)>,
}

impl Reports {
    /// Until when the health is valid, in milliseconds since 1970. Two reports may get lost.
    pub const fn valid_until_ms(&self) -> u64 {
        self.timestamp_ms + 3 * REPORT_INTERVAL.as_millis() as u64
    }
}
