//! Reports as JSON.

use serde::ser::{Serialize, Serializer};
use serde_json::{Value, json};
use zentinel_wasm_contract::report::{HealthState, Metric, REPORT_INTERVAL, Reports, Series};

use crate::handshake::AGENT_ID;
use crate::report::state_number;

/// The health report.
pub(crate) fn health_json(reports: &Reports) -> Value {
    let health = &reports.health;
    let latency = &health.latency;
    let state = match &health.state {
        HealthState::Healthy => json!({"status": "healthy"}),
        HealthState::Degraded(_) => json!({"status": "degraded", "disabled_features": [], "timeout_multiplier": 1.0}),
        HealthState::Draining => json!({"status": "draining", "eta_ms": null}),
    };
    json!({
        "agent_id": AGENT_ID,
        // The published client reads a number, the published types an object.
        "state": state_number(&health.state),
        "health_state": state,
        "message": health.state.message(),
        // Not of the protocol: for `zentinel-wasm-agent health`.
        "ready": health.ready,
        "load": {
            "in_flight": health.in_flight, "queue_depth": health.waiting,
            "avg_latency_ms": latency.average, "p50_latency_ms": latency.p50, "p95_latency_ms": latency.p95, "p99_latency_ms": latency.p99,
            "requests_processed": health.answered, "requests_rejected": health.rejected, "requests_timed_out": health.timed_out,
        },
        "resources": {"connections": health.connections},
        "valid_until_ms": reports.valid_until_ms(),
        "timestamp_ms": reports.timestamp_ms,
    })
}

/// The metrics report.
pub(crate) fn metrics_json(reports: &Reports) -> Value {
    let Series { counters, gauges, histograms } = &reports.metrics;
    json!({
        "agent_id": AGENT_ID, "timestamp_ms": reports.timestamp_ms, "interval_ms": REPORT_INTERVAL.as_millis() as u64,
        "counters": counters.iter().map(|metric| series_json(metric, json!({"value": metric.value}))).collect::<Vec<_>>(),
        "gauges": gauges.iter().map(|metric| series_json(metric, json!({"value": metric.value}))).collect::<Vec<_>>(),
        "histograms": histograms.iter().map(|metric| series_json(metric, json!({
            "sum": metric.value.sum,
            "count": metric.value.count,
            "buckets": metric.value.buckets.iter().map(|(le, count)| json!({"le": Bound(*le), "count": count})).collect::<Vec<_>>(),
        }))).collect::<Vec<_>>(),
    })
}

/// One series, with the fields of `value`.
fn series_json<T>(metric: &Metric<T>, mut value: Value) -> Value {
    value["name"] = json!(metric.name);
    value["help"] = json!(metric.help);
    value["labels"] = metric.labels.iter().map(|(name, value)| (name.clone(), Value::from(value.as_str()))).collect();
    value
}

/// Upper bound of a bucket. JSON has no infinity; the published types read `+Inf` for it.
struct Bound(f64);

impl Serialize for Bound {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.0.is_finite() { serializer.serialize_f64(self.0) } else { serializer.serialize_str("+Inf") }
    }
}

#[cfg(test)]
mod tests {
    use zentinel_wasm_contract::report::{Health, Histogram};

    use super::*;

    #[test]
    fn the_health_state_is_a_number_and_an_object() {
        for (state, number, status) in [
            (HealthState::Healthy, 1, "healthy"),
            (HealthState::Degraded("why".into()), 2, "degraded"),
            (HealthState::Draining, 3, "draining"),
        ] {
            let reports = Reports { health: Health { state, ready: number < 3, ..Health::default() }, ..Reports::default() };
            let json = health_json(&reports);
            assert_eq!(json["ready"], number < 3);
            assert_eq!((&json["state"], &json["health_state"]["status"]), (&json!(number), &json!(status)));
        }
    }

    #[test]
    fn the_bound_of_the_last_bucket_is_inf() {
        let histogram = Histogram { sum: 1.5, count: 2, buckets: vec![(1.0, 1), (f64::INFINITY, 2)] };
        let metric = Metric { name: "n".into(), help: "h".into(), labels: vec![("hook".into(), "x".into())], value: histogram };
        let metrics = Series { histograms: vec![metric], ..Series::default() };
        let json = metrics_json(&Reports { timestamp_ms: 1, metrics, ..Reports::default() });
        assert_eq!(
            json["histograms"],
            json!([{"name": "n", "help": "h", "labels": {"hook": "x"}, "sum": 1.5, "count": 2,
                    "buckets": [{"le": 1.0, "count": 1}, {"le": "+Inf", "count": 2}]}])
        );
    }
}
