//! Messages other than answers: the handshake response, reports, pongs.

use std::time::{SystemTime, UNIX_EPOCH};

use zentinel_wasm_contract::report::{HealthState, Histogram, Metric, REPORT_INTERVAL, Reports};
use zentinel_wasm_contract::{Capabilities, Hook};

use super::proto;
use super::proto::agent_to_proxy::Message;
use crate::handshake::{self, AGENT_ID, AgentCapabilities, PROTOCOL_VERSION};
use crate::report::state_number;

/// Number of a hook's event over gRPC. As on the socket, except that 0 means unspecified here.
const fn event_number(hook: Hook) -> i32 {
    match hook {
        Hook::Configure => 8,
        other => handshake::event_number(other),
    }
}

/// The handshake response. With an `error`, it rejects the request.
pub(super) fn handshake(capabilities: Capabilities, error: Option<String>) -> Message {
    let AgentCapabilities { agent_id, name, version, supported_events: _, features, limits } = AgentCapabilities::new(capabilities);
    Message::Handshake(proto::HandshakeResponse {
        protocol_version: PROTOCOL_VERSION,
        capabilities: Some(proto::AgentCapabilities {
            protocol_version: PROTOCOL_VERSION,
            agent_id: agent_id.to_owned(),
            name: name.to_owned(),
            version: version.to_owned(),
            supported_events: capabilities.hooks.iter().map(event_number).collect(),
            features: Some(proto::AgentFeatures {
                streaming_body: features.streaming_body,
                websocket: features.websocket,
                guardrails: features.guardrails,
                config_push: features.config_push,
                metrics_export: features.metrics_export,
                concurrent_requests: features.concurrent_requests,
                cancellation: features.cancellation,
                flow_control: features.flow_control,
                health_reporting: features.health_reporting,
            }),
            limits: Some(proto::AgentLimits {
                max_body_size: limits.max_body_size,
                max_concurrency: limits.max_concurrency,
                preferred_chunk_size: limits.preferred_chunk_size,
                max_memory: None,
                max_processing_time_ms: None,
            }),
            health_config: Some(proto::HealthConfig {
                report_interval_ms: REPORT_INTERVAL.as_millis() as u32,
                include_load_metrics: true,
                include_resource_metrics: true,
            }),
        }),
        success: error.is_none(),
        error,
    })
}

/// The response to a ping.
pub(super) fn pong(ping: proto::Ping) -> Message {
    Message::Pong(proto::Pong { sequence: ping.sequence, ping_timestamp_ms: ping.timestamp_ms, timestamp_ms: now_ms() })
}

/// Milliseconds since 1970.
pub(super) fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64
}

/// The health report. The agent is draining for a client that asked it to drain.
pub(super) fn health(reports: &Reports, drained: bool) -> Message {
    let health = &reports.health;
    let state = if drained { &HealthState::Draining } else { &health.state };
    Message::Health(proto::HealthStatus {
        agent_id: AGENT_ID.to_owned(),
        state: state_number(state),
        message: state.message().map(str::to_owned),
        load: Some(proto::LoadMetrics {
            in_flight: health.in_flight,
            queue_depth: health.waiting,
            avg_latency_ms: health.latency.average as f32,
            p50_latency_ms: health.latency.p50 as f32,
            p95_latency_ms: health.latency.p95 as f32,
            p99_latency_ms: health.latency.p99 as f32,
            requests_processed: health.answered,
            requests_rejected: health.rejected,
            requests_timed_out: health.timed_out,
        }),
        resources: Some(proto::ResourceMetrics { connections: Some(health.connections), ..proto::ResourceMetrics::default() }),
        valid_until_ms: Some(reports.valid_until_ms()),
        timestamp_ms: reports.timestamp_ms,
        timeout_multiplier: if matches!(state, HealthState::Degraded(_)) { 1.0 } else { 0.0 },
        ..proto::HealthStatus::default()
    })
}

/// The metrics report.
pub(super) fn metrics(reports: &Reports) -> Message {
    fn parts<T>(metric: &Metric<T>) -> (String, Option<String>, std::collections::BTreeMap<String, String>) {
        (metric.name.clone(), Some(metric.help.clone()), metric.labels.iter().cloned().collect())
    }

    let counter = |metric: &Metric<u64>| {
        let (name, help, labels) = parts(metric);
        proto::CounterMetric { name, help, labels, value: metric.value }
    };
    let gauge = |metric: &Metric<f64>| {
        let (name, help, labels) = parts(metric);
        proto::GaugeMetric { name, help, labels, value: metric.value }
    };
    let histogram = |metric: &Metric<Histogram>| {
        let (name, help, labels) = parts(metric);
        let Histogram { sum, count, buckets } = &metric.value;
        let buckets = buckets.iter().map(|&(le, count)| proto::HistogramBucket { le, count }).collect();
        proto::HistogramMetric { name, help, labels, sum: *sum, count: *count, buckets }
    };
    Message::Metrics(proto::MetricsReport {
        agent_id: AGENT_ID.to_owned(),
        timestamp_ms: reports.timestamp_ms,
        interval_ms: REPORT_INTERVAL.as_millis() as u64,
        counters: reports.metrics.counters.iter().map(counter).collect(),
        gauges: reports.metrics.gauges.iter().map(gauge).collect(),
        histograms: reports.metrics.histograms.iter().map(histogram).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_have_the_numbers_of_the_proto_file() {
        assert_eq!(Hook::ALL.map(event_number), [1, 2, 3, 4, 6, 7, 5, 8]);
    }
}
