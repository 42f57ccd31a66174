//! What the agent reports of itself without being asked, on either transport.

use std::time::Duration;

use serde::ser::{Serialize, Serializer};
use serde_json::{Value, json};

use crate::AGENT_ID;

/// How often health and metrics are reported to the proxies. What the published crates use.
pub const REPORT_INTERVAL: Duration = Duration::from_secs(10);

/// Health and metrics at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reports {
    /// When that was, in milliseconds since 1970.
    pub timestamp_ms: u64,
    /// How the agent is.
    pub health: Health,
    /// What it has counted.
    pub metrics: Metrics,
}

/// How the agent is, in itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum State {
    /// All is well.
    #[default]
    Healthy,
    /// It serves, but something is wrong.
    Degraded(String),
    /// It finishes what is in flight and ends, or was asked to.
    Draining,
}

impl State {
    /// The number of the protocol.
    pub const fn number(&self) -> i32 {
        match self {
            Self::Healthy => 1,
            Self::Degraded(_) => 2,
            Self::Draining => 3,
        }
    }

    /// What there is to say about it.
    pub fn message(&self) -> Option<&str> {
        match self {
            Self::Healthy => None,
            Self::Degraded(reason) => Some(reason),
            Self::Draining => Some("the agent is draining"),
        }
    }
}

/// How the agent is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Health {
    /// In itself.
    pub state: State,
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

/// What the agent has counted.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metrics {
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
    /// Until when the health may be believed: two reports may get lost.
    pub const fn valid_until_ms(&self) -> u64 {
        self.timestamp_ms + 3 * REPORT_INTERVAL.as_millis() as u64
    }

    /// The health, as the socket's JSON.
    pub(crate) fn health_json(&self) -> Value {
        let health = &self.health;
        let latency = &health.latency;
        let state = match &health.state {
            State::Healthy => json!({"status": "healthy"}),
            State::Degraded(_) => json!({"status": "degraded", "disabled_features": [], "timeout_multiplier": 1.0}),
            State::Draining => json!({"status": "draining", "eta_ms": null}),
        };
        json!({
            "agent_id": AGENT_ID,
            // The published client reads a number, the published types an object: both find what they look for.
            "state": health.state.number(),
            "health_state": state,
            "message": health.state.message(),
            "load": {
                "in_flight": health.in_flight, "queue_depth": health.waiting,
                "avg_latency_ms": latency.average, "p50_latency_ms": latency.p50, "p95_latency_ms": latency.p95, "p99_latency_ms": latency.p99,
                "requests_processed": health.answered, "requests_rejected": health.rejected, "requests_timed_out": health.timed_out,
            },
            "resources": {"connections": health.connections},
            "valid_until_ms": self.valid_until_ms(),
            "timestamp_ms": self.timestamp_ms,
        })
    }

    /// The metrics, as the socket's JSON.
    pub(crate) fn metrics_json(&self) -> Value {
        let Metrics { counters, gauges, histograms } = &self.metrics;
        json!({
            "agent_id": AGENT_ID, "timestamp_ms": self.timestamp_ms, "interval_ms": REPORT_INTERVAL.as_millis() as u64,
            "counters": counters.iter().map(|metric| metric.json(json!({"value": metric.value}))).collect::<Vec<_>>(),
            "gauges": gauges.iter().map(|metric| metric.json(json!({"value": metric.value}))).collect::<Vec<_>>(),
            "histograms": histograms.iter().map(|metric| metric.json(json!({
                "sum": metric.value.sum,
                "count": metric.value.count,
                "buckets": metric.value.buckets.iter().map(|(le, count)| json!({"le": Bound(*le), "count": count})).collect::<Vec<_>>(),
            }))).collect::<Vec<_>>(),
        })
    }
}

impl<T> Metric<T> {
    /// The series as JSON, with the fields of `value`.
    fn json(&self, mut value: Value) -> Value {
        value["name"] = json!(self.name);
        value["help"] = json!(self.help);
        value["labels"] = self.labels.iter().map(|(name, value)| (name.clone(), Value::from(value.as_str()))).collect();
        value
    }
}

/// An upper bound. JSON has no infinite number: the published types take this text for it.
struct Bound(f64);

impl Serialize for Bound {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.0.is_finite() { serializer.serialize_f64(self.0) } else { serializer.serialize_str("+Inf") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_is_said_as_number_and_as_object() {
        for (state, number, status) in
            [(State::Healthy, 1, "healthy"), (State::Degraded("why".into()), 2, "degraded"), (State::Draining, 3, "draining")]
        {
            let reports = Reports { health: Health { state, ..Health::default() }, ..Reports::default() };
            let json = reports.health_json();
            assert_eq!((&json["state"], &json["health_state"]["status"]), (&json!(number), &json!(status)));
        }
    }

    #[test]
    fn the_last_bucket_has_no_number() {
        let histogram = Histogram { sum: 1.5, count: 2, buckets: vec![(1.0, 1), (f64::INFINITY, 2)] };
        let metric = Metric { name: "n".into(), help: "h".into(), labels: vec![("hook".into(), "x".into())], value: histogram };
        let metrics = Metrics { histograms: vec![metric], ..Metrics::default() };
        let json = Reports { timestamp_ms: 1, metrics, ..Reports::default() }.metrics_json();
        assert_eq!(
            json["histograms"],
            json!([{"name": "n", "help": "h", "labels": {"hook": "x"}, "sum": 1.5, "count": 2,
                    "buckets": [{"le": 1.0, "count": 1}, {"le": "+Inf", "count": 2}]}])
        );
    }
}
