//! What a collector has received, decoded.

// Every test binary has its own copy and uses only a part of it.
#![allow(dead_code, unreachable_pub)]

use std::collections::BTreeMap;

use prost::Message as _;
use testkit::{Collector, wait_for};
use zentinel_wasm_otlp::proto::ExportMetricsServiceRequest;
use zentinel_wasm_otlp::proto::ExportTraceServiceRequest;
use zentinel_wasm_otlp::proto::KeyValue;
use zentinel_wasm_otlp::proto::Span;
use zentinel_wasm_otlp::proto::any_value::Value;
use zentinel_wasm_otlp::proto::metric::Data;
use zentinel_wasm_otlp::proto::{Metric, number_data_point};

/// A received span.
#[derive(Clone, Debug)]
pub struct Received {
    pub span: Span,
    pub attributes: BTreeMap<String, String>,
    /// The attributes of the process.
    pub resource: BTreeMap<String, String>,
}

impl Received {
    pub fn trace_id(&self) -> String {
        hex(&self.span.trace_id)
    }

    pub fn parent(&self) -> String {
        hex(&self.span.parent_span_id)
    }

    pub fn id(&self) -> &str {
        &self.attributes["wasm.correlation_id"]
    }
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn attributes(attributes: &[KeyValue]) -> BTreeMap<String, String> {
    let text = |attribute: &KeyValue| match attribute.value.as_ref().and_then(|value| value.value.as_ref()) {
        Some(Value::StringValue(text)) => text.clone(),
        Some(Value::IntValue(number)) => number.to_string(),
        other => panic!("{other:?}"),
    };
    attributes.iter().map(|attribute| (attribute.key.clone(), text(attribute))).collect()
}

/// The spans that a collector has received so far.
#[track_caller]
pub fn spans(collector: &Collector) -> Vec<Received> {
    let mut received = Vec::new();
    for post in collector.posts().into_iter().filter(|post| post.path.ends_with("/v1/traces")) {
        assert_eq!(post.header("content-type"), Some("application/x-protobuf"));
        for of_resource in ExportTraceServiceRequest::decode(&*post.body).unwrap().resource_spans {
            let resource = attributes(&of_resource.resource.unwrap().attributes);
            for span in of_resource.scope_spans.into_iter().flat_map(|scope| scope.spans) {
                received.push(Received { attributes: attributes(&span.attributes), span, resource: resource.clone() });
            }
        }
    }
    received
}

/// Waits for the span of the event with this id and hook.
#[track_caller]
pub fn span_of(collector: &Collector, id: &str, hook: &str) -> Received {
    let is_wanted = |received: &Received| received.id() == id && received.attributes["wasm.hook"] == hook;
    wait_for(&format!("the span of {hook} of {id}"), || spans(collector).into_iter().find(is_wanted))
}

/// The values in the last export of metrics as the lines of a scrape, except for the lines of
/// types.
pub fn scraped(collector: &Collector) -> BTreeMap<String, f64> {
    let posts = collector.posts();
    let Some(post) = posts.iter().rfind(|post| post.path.ends_with("/v1/metrics")) else { return BTreeMap::new() };
    let message = ExportMetricsServiceRequest::decode(&*post.body).unwrap();
    let mut lines = BTreeMap::new();
    for metric in message.resource_metrics.into_iter().flat_map(|resource| resource.scope_metrics).flat_map(|scope| scope.metrics) {
        lines.extend(lines_of(&metric));
    }
    lines
}

fn lines_of(metric: &Metric) -> Vec<(String, f64)> {
    let name = &metric.name;
    let series = |suffix: &str, labels: &[KeyValue], more: Option<String>| {
        let labels = attributes(labels).into_iter().map(|(name, value)| format!("{name}={value:?}"));
        let labels: Vec<_> = labels.chain(more.map(|bound| format!("le={bound:?}"))).collect();
        if labels.is_empty() { format!("{name}{suffix}") } else { format!("{name}{suffix}{{{}}}", labels.join(",")) }
    };
    let numbers = match metric.data.as_ref().unwrap() {
        Data::Sum(sum) => &sum.data_points,
        Data::Gauge(gauge) => &gauge.data_points,
        Data::Histogram(histogram) => {
            let mut lines = Vec::new();
            for point in &histogram.data_points {
                let bounds = point.explicit_bounds.iter().map(f64::to_string).chain(["+Inf".to_owned()]);
                let mut sum = 0;
                for (bound, count) in bounds.zip(&point.bucket_counts) {
                    sum += count;
                    lines.push((series("_bucket", &point.attributes, Some(bound)), sum as f64));
                }
                lines.push((series("_count", &point.attributes, None), point.count as f64));
                lines.push((series("_sum", &point.attributes, None), point.sum.unwrap()));
            }
            return lines;
        }
    };
    let value = |value| match value {
        Some(number_data_point::Value::AsInt(value)) => value as f64,
        Some(number_data_point::Value::AsDouble(value)) => value,
        None => panic!("no value of {name}"),
    };
    numbers.iter().map(|point| (series("", &point.attributes, None), value(point.value))).collect()
}
