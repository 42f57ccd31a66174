//! The agent's metrics as OTLP. The names are those that Prometheus scrapes.

use std::time::{SystemTime, UNIX_EPOCH};

use zentinel_wasm_contract::report;

use crate::proto::ExportMetricsServiceRequest;
use crate::proto::KeyValue;
use crate::proto::Resource;
use crate::proto::{
    AggregationTemporality, Gauge, Histogram, HistogramDataPoint, Metric, NumberDataPoint, ResourceMetrics, ScopeMetrics, Sum, metric,
    number_data_point,
};
use crate::proto::{scope, text};

/// Nanoseconds since 1970.
fn nanos(time: SystemTime) -> u64 {
    u64::try_from(time.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos()).unwrap_or(u64::MAX)
}

/// Makes requests to a collector from metrics.
pub(crate) struct MetricEncoder {
    resource: Resource,
    /// When counting began.
    start: u64,
}

impl MetricEncoder {
    /// Counting begins now.
    pub(crate) fn new(resource: Resource) -> Self {
        Self { resource, start: nanos(SystemTime::now()) }
    }

    pub(crate) fn request(&self, series: &report::Series) -> ExportMetricsServiceRequest {
        let now = nanos(SystemTime::now());
        let temporality = AggregationTemporality::Cumulative.into();
        let mut metrics = Vec::new();
        metrics.extend(families(&series.counters, |counters| {
            let point = |counter: &report::Metric<u64>| {
                let value = number_data_point::Value::AsInt(i64::try_from(counter.value).unwrap_or(i64::MAX));
                self.number(&counter.labels, now, value)
            };
            let data_points = counters.iter().map(point).collect();
            metric::Data::Sum(Sum { data_points, aggregation_temporality: temporality, is_monotonic: true })
        }));
        metrics.extend(families(&series.gauges, |gauges| {
            let point = |gauge: &report::Metric<f64>| self.number(&gauge.labels, now, number_data_point::Value::AsDouble(gauge.value));
            metric::Data::Gauge(Gauge { data_points: gauges.iter().map(point).collect() })
        }));
        metrics.extend(families(&series.histograms, |histograms| {
            let data_points = histograms.iter().map(|histogram| self.histogram(histogram, now)).collect();
            metric::Data::Histogram(Histogram { data_points, aggregation_temporality: temporality })
        }));
        let scope_metrics = vec![ScopeMetrics { scope: Some(scope()), metrics }];
        ExportMetricsServiceRequest { resource_metrics: vec![ResourceMetrics { resource: Some(self.resource.clone()), scope_metrics }] }
    }

    fn number(&self, labels: &[(String, String)], now: u64, value: number_data_point::Value) -> NumberDataPoint {
        NumberDataPoint { attributes: attributes(labels), start_time_unix_nano: self.start, time_unix_nano: now, value: Some(value) }
    }

    fn histogram(&self, histogram: &report::Metric<report::Histogram>, now: u64) -> HistogramDataPoint {
        let report::Histogram { sum, buckets, .. } = &histogram.value;
        let mut count = 0;
        // The counts of a report include those of the buckets before. Observations between two
        // reads may make one smaller.
        let mut bucket_counts = Vec::with_capacity(buckets.len());
        for &(_, up_to) in buckets {
            bucket_counts.push(up_to.saturating_sub(count));
            count = count.max(up_to);
        }
        HistogramDataPoint {
            attributes: attributes(&histogram.labels),
            start_time_unix_nano: self.start,
            time_unix_nano: now,
            count,
            sum: Some(*sum),
            bucket_counts,
            explicit_bounds: buckets.iter().map(|(bound, _)| *bound).filter(|bound| bound.is_finite()).collect(),
        }
    }
}

/// One metric for each name. The series of one name follow one another.
fn families<T>(series: &[report::Metric<T>], data: impl Fn(&[report::Metric<T>]) -> metric::Data) -> impl Iterator<Item = Metric> {
    series.chunk_by(|one, next| one.name == next.name).map(move |family| {
        let report::Metric { name, help, .. } = &family[0];
        Metric { name: name.clone(), description: help.clone(), unit: unit(name).to_owned(), data: Some(data(family)) }
    })
}

/// The unit that a name ends in (UCUM).
fn unit(name: &str) -> &'static str {
    match name.trim_end_matches("_total").rsplit('_').next() {
        Some("seconds") => "s",
        Some("bytes") => "By",
        _ => "",
    }
}

fn attributes(labels: &[(String, String)]) -> Vec<KeyValue> {
    labels.iter().map(|(name, value)| text(name, value)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metric<T>(name: &str, label: Option<&str>, value: T) -> report::Metric<T> {
        let labels = label.map(|label| ("kind".to_owned(), label.to_owned())).into_iter().collect();
        report::Metric { name: name.into(), help: "help".into(), labels, value }
    }

    fn encoded(series: &report::Series) -> Vec<Metric> {
        let mut request = MetricEncoder::new(Resource::default()).request(series);
        request.resource_metrics.remove(0).scope_metrics.remove(0).metrics
    }

    #[test]
    fn series_of_one_name_are_one_metric() {
        let counters = vec![metric("a_total", Some("x"), 1), metric("a_total", Some("y"), 2), metric("b_total", None, 3)];
        let metrics = encoded(&report::Series { counters, ..Default::default() });
        let [a, b] = metrics.as_slice() else { panic!("{metrics:?}") };
        assert_eq!((&*a.name, &*a.description, &*b.name), ("a_total", "help", "b_total"));
        let Some(metric::Data::Sum(sum)) = &a.data else { panic!("{a:?}") };
        assert!(sum.is_monotonic && sum.aggregation_temporality() == AggregationTemporality::Cumulative);
        let points: Vec<_> = sum.data_points.iter().map(|point| (point.attributes.clone(), point.value)).collect();
        let point = |label: &str, value| (vec![text("kind", label)], Some(number_data_point::Value::AsInt(value)));
        assert_eq!(points, [point("x", 1), point("y", 2)]);
        assert!(sum.data_points.iter().all(|point| 0 < point.start_time_unix_nano && point.start_time_unix_nano <= point.time_unix_nano));
    }

    #[test]
    fn gauges_have_units() {
        let gauges = vec![metric("memory_max_bytes", None, 1.5)];
        let metrics = encoded(&report::Series { gauges, ..Default::default() });
        let Some(metric::Data::Gauge(gauge)) = &metrics[0].data else { panic!("{metrics:?}") };
        assert_eq!((&*metrics[0].unit, gauge.data_points[0].value), ("By", Some(number_data_point::Value::AsDouble(1.5))));
    }

    #[test]
    fn counts_of_buckets_do_not_include_those_before() {
        let value = report::Histogram { sum: 7.5, count: 6, buckets: vec![(0.5, 1), (1.0, 3), (f64::INFINITY, 6)] };
        let metrics = encoded(&report::Series { histograms: vec![metric("a_seconds", None, value)], ..Default::default() });
        let Some(metric::Data::Histogram(histogram)) = &metrics[0].data else { panic!("{metrics:?}") };
        let point = &histogram.data_points[0];
        assert_eq!((&*metrics[0].unit, point.count, point.sum), ("s", 6, Some(7.5)));
        assert_eq!((&*point.bucket_counts, &*point.explicit_bounds), (&[1, 2, 3][..], &[0.5, 1.0][..]));
    }
}
