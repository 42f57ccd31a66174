//! Health and metrics, as the agent reports them to the proxy.

use std::time::Duration;

/// How often health and metrics are reported to the proxies. What the published crates use.
pub const REPORT_INTERVAL: Duration = Duration::from_secs(10);

/// Health and metrics at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reports {
    /// When that was, in milliseconds since 1970.
    pub timestamp_ms: u64,
    /// Agent health and load.
    pub health: Health,
    /// Every metric series.
    pub metrics: Series,
}

/// Agent health.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum HealthState {
    /// All is well.
    #[default]
    Healthy,
    /// It serves, but something is wrong.
    Degraded(String),
    /// It finishes what is in flight and ends, or was asked to.
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
    /// Events under way.
    pub in_flight: u32,
    /// Calls that wait for an instance.
    pub waiting: u32,
    /// Events answered.
    pub answered: u64,
    /// Events that no module has decided about, because none had time or worked.
    pub rejected: u64,
    /// Calls that did not end before their deadline.
    pub timed_out: u64,
    /// Time from an event's arrival to its answer, lately.
    pub latency: Latency,
    /// Connections of proxies.
    pub connections: u32,
}

/// How long calls took, in milliseconds. All zero when there were none: the published types require numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Latency {
    /// The mean.
    pub average: f64,
    /// Half of the calls took no longer.
    pub p50: f64,
    /// 95 of 100 took no longer.
    pub p95: f64,
    /// 99 of 100 took no longer.
    pub p99: f64,
}

/// Every metric series.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Series {
    /// Numbers that only grow.
    pub counters: Vec<Metric<u64>>,
    /// Numbers that come and go.
    pub gauges: Vec<Metric<f64>>,
    /// Distributions.
    pub histograms: Vec<Metric<Histogram>>,
}

/// One series.
#[derive(Clone, Debug, PartialEq)]
pub struct Metric<T> {
    /// Its name.
    pub name: String,
    /// What it says.
    pub help: String,
    /// What tells it from others of its name.
    pub labels: Vec<(String, String)>,
    /// Its value.
    pub value: T,
}

/// A distribution.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Histogram {
    /// Sum of all values.
    pub sum: f64,
    /// Number of all values.
    pub count: u64,
    /// Upper bounds, and how many values lie at or below each. The last bound is infinite.
    pub buckets: Vec<(f64, u64)>,
}

impl Reports {
    /// Until when the health is valid, in milliseconds since 1970: two reports may get lost.
    pub const fn valid_until_ms(&self) -> u64 {
        self.timestamp_ms + 3 * REPORT_INTERVAL.as_millis() as u64
    }
}
