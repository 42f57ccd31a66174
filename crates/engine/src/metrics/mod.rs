//! The agent's metrics. Their names do not change, because dashboards and alerts use them.

mod decisions;
mod latency;

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use prometheus::{
    Encoder, Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};
use zentinel_wasm_contract::report::{self, REPORT_INTERVAL};
use zentinel_wasm_contract::{FailureKind, Hook, Hooks};
use zentinel_wasm_runtime::PoolStats;

use crate::outcome::DecisionKind;
use decisions::DecisionCounters;
pub(crate) use decisions::RuleHits;
use latency::{BUCKETS, CallTotals, RecentCalls};

/// The agent's metrics.
pub struct Metrics {
    registry: Registry,
    /// Events answered.
    pub requests: IntCounter,
    /// Events answered with a block, including module errors.
    pub blocked: IntCounter,
    /// Events allowed because of a module error.
    pub fail_open: IntCounter,
    /// Answers whose routing metadata was dropped, because gRPC has no field for it.
    pub routing_metadata_lost: IntCounter,
    /// Events in flight.
    pub in_flight: IntGauge,
    /// Events whose correlation id belonged to another event or request that was, or may have been,
    /// in flight.
    pub(crate) id_collisions: IntCounter,
    decisions: DecisionCounters,
    /// How often the module names each rule.
    pub(crate) rule_hits: Arc<RuleHits>,
    errors: Vec<IntCounter>,
    durations: Vec<Histogram>,
    pool_available: IntGauge,
    pool_waiting: IntGauge,
    discarded: IntCounter,
    guest_memory: IntGauge,
    failed_starts: IntCounter,
    /// The number of failed starts that `failed_starts` includes.
    counted_failed_starts: AtomicU64,
    /// The value of `discarded`. The counter can only be incremented, and two concurrent observers
    /// would both add the difference.
    discarded_seen: AtomicU64,
    /// By their result: success, failure.
    reloads: [IntCounter; 2],
    module_info: IntGaugeVec,
    /// 0 while the last reload of the files has failed.
    pub(crate) last_reload_successful: IntGauge,
    /// 1 while a proxy's configuration is rejected.
    pub(crate) config_rejected: IntGauge,
    timeout: Gauge,
    circuit_open: IntGauge,
    hook_circuits: Vec<IntGauge>,
    connections: IntGauge,
    recent: Mutex<RecentCalls>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// Metrics that have counted nothing.
    ///
    /// # Panics
    ///
    /// Never: names and labels are constants, and a test makes them.
    pub fn new() -> Self {
        let registry = Registry::new();
        let register = |collector: Box<dyn prometheus::core::Collector>| registry.register(collector).expect("the names are distinct");
        macro_rules! metric {
            ($ty:ident, $name:literal, $help:literal) => {{
                let metric = $ty::new($name, $help).expect("the name is valid");
                register(Box::new(metric.clone()));
                metric
            }};
            ($ty:ident, $opts:expr, $labels:expr) => {{
                let metric = $ty::new($opts, $labels).expect("the name is valid");
                register(Box::new(metric.clone()));
                metric
            }};
        }
        let errors = metric!(IntCounterVec, Opts::new("wasm_agent_errors_total", "Module errors, by kind."), &["kind"]);
        let decisions =
            metric!(IntCounterVec, Opts::new("wasm_agent_decisions_total", "Events answered, by decision."), &["hook", "decision"]);
        let rule_hits = metric!(
            IntCounterVec,
            Opts::new(
                "wasm_agent_rule_hits_total",
                "Answers that name a rule, by rule; `other` counts those without a series of their own."
            ),
            &["rule_id"]
        );
        let durations = metric!(
            HistogramVec,
            HistogramOpts::new("wasm_agent_call_duration_seconds", "Time from an event's arrival to its answer, including waiting.")
                .buckets(BUCKETS.to_vec()),
            &["hook"]
        );
        let hook_circuits = metric!(
            IntGaugeVec,
            Opts::new("wasm_agent_hook_circuit_open", "1 while the circuit breaker of a hook is open, because every call of it failed."),
            &["hook"]
        );
        let last_reload_successful = metric!(
            IntGauge,
            "wasm_agent_last_reload_successful",
            "1 if the last reload of the files succeeded or there was none, 0 if it failed."
        );
        last_reload_successful.set(1);
        // These are counted before and outside of any agent.
        let reloads =
            metric!(IntCounterVec, Opts::new("wasm_agent_reloads_total", "Changes of module or settings, by result."), &["result"]);
        Self {
            requests: metric!(IntCounter, "wasm_agent_requests_total", "Events answered."),
            blocked: metric!(IntCounter, "wasm_agent_requests_blocked_total", "Events answered with a block, including module errors."),
            fail_open: metric!(IntCounter, "wasm_agent_fail_open_total", "Events allowed because of a module error."),
            routing_metadata_lost: metric!(
                IntCounter,
                "wasm_agent_routing_metadata_lost_total",
                "Answers whose routing metadata was dropped, because gRPC has no field for it."
            ),
            in_flight: metric!(IntGauge, "wasm_agent_in_flight", "Events in flight."),
            id_collisions: metric!(
                IntCounter,
                "wasm_agent_id_collisions_total",
                "Events whose correlation id belonged to another event or request that was, or may have been, in flight."
            ),
            decisions: DecisionCounters::new(&decisions),
            rule_hits: Arc::new(RuleHits::new(rule_hits)),
            errors: FailureKind::ALL.iter().map(|kind| errors.with_label_values(&[kind.label()])).collect(),
            durations: Hook::ALL.iter().map(|hook| durations.with_label_values(&[hook.export()])).collect(),
            pool_available: metric!(IntGauge, "wasm_agent_pool_available", "Instances that are free."),
            pool_waiting: metric!(IntGauge, "wasm_agent_pool_waiting", "Calls that are waiting for an instance."),
            discarded: metric!(IntCounter, "wasm_agent_instances_discarded_total", "Instances discarded after a module error."),
            guest_memory: metric!(
                IntGauge,
                "wasm_agent_guest_memory_max_bytes",
                "Largest linear memory of any instance since the module or its settings changed."
            ),
            failed_starts: metric!(
                IntCounter,
                "wasm_agent_instance_start_failures_total",
                "Failures to create an instance while the module serves. Each is retried."
            ),
            counted_failed_starts: AtomicU64::new(0),
            discarded_seen: AtomicU64::new(0),
            // Every series exists from the start, because a series that appears with value 1 is not
            // an increase for Prometheus.
            reloads: ["success", "failure"].map(|result| reloads.with_label_values(&[result])),
            module_info: metric!(
                IntGaugeVec,
                Opts::new("wasm_agent_module_info", "The module that is serving, by its SHA-256."),
                &["sha256"]
            ),
            last_reload_successful,
            config_rejected: metric!(
                IntGauge,
                "wasm_agent_proxy_config_rejected",
                "1 after a proxy's configuration was rejected, until one is accepted."
            ),
            timeout: metric!(Gauge, "wasm_agent_timeout_seconds", "Deadline of a call, from the options or the proxy's configuration."),
            circuit_open: metric!(IntGauge, "wasm_agent_circuit_open", "1 while the circuit breaker of any hook is open."),
            hook_circuits: Hook::ALL.iter().map(|hook| hook_circuits.with_label_values(&[hook.export()])).collect(),
            connections: metric!(IntGauge, "wasm_agent_connections", "Connections of proxies."),
            recent: Mutex::default(),
            registry,
        }
    }

    /// Adds a counter of the process, for example of its log.
    ///
    /// # Panics
    ///
    /// There is a metric of that name already.
    #[must_use]
    pub fn with(self, counter: &IntCounter) -> Self {
        self.registry.register(Box::new(counter.clone())).expect("the names are distinct");
        self
    }

    /// Counts an answer.
    pub(crate) fn decided(&self, hook: Hook, decision: DecisionKind) {
        self.decisions.count(hook, decision);
        if decision == DecisionKind::Block {
            self.blocked.inc();
        }
    }

    /// Counts a module error.
    pub(crate) fn error(&self, kind: FailureKind) {
        self.errors[kind as usize].inc();
    }

    /// Module errors of a kind so far.
    pub(crate) fn errors(&self, kind: FailureKind) -> u64 {
        self.errors[kind as usize].get()
    }

    /// Counts a call.
    pub(crate) fn called(&self, hook: Hook, duration: Duration) {
        self.durations[hook as usize].observe(duration.as_secs_f64());
    }

    /// Counts a reload.
    pub(crate) fn reloaded(&self, good: bool) {
        let [success, failure] = &self.reloads;
        if good { success } else { failure }.inc();
    }

    /// Records which module serves.
    pub(crate) fn serving(&self, digest: &str) {
        self.module_info.reset();
        self.module_info.with_label_values(&[digest]).set(1);
    }

    /// Updates the metrics of the pool. `discarded` is the total of all pools.
    pub(crate) fn observe(&self, pool: PoolStats, discarded: u64) {
        self.pool_available.set(pool.available as i64);
        self.pool_waiting.set(pool.waiting as i64);
        self.discarded.inc_by(discarded.saturating_sub(self.discarded_seen.fetch_max(discarded, Relaxed)));
    }

    /// Updates the metrics of the policy: hooks whose circuit is open, and the deadline.
    pub(crate) fn policy(&self, open: Hooks, timeout: Duration) {
        self.circuit_open.set(i64::from(open != Hooks::default()));
        for (hook, circuit) in Hook::ALL.into_iter().zip(&self.hook_circuits) {
            circuit.set(i64::from(open.contains(hook)));
        }
        self.timeout.set(timeout.as_secs_f64());
    }

    /// Updates the metrics of the instances.
    pub(crate) fn instances(&self, largest_memory: usize, failed_starts: u64) {
        self.guest_memory.set(largest_memory as i64);
        // Several callers may pass the same number.
        self.failed_starts.inc_by(failed_starts.saturating_sub(self.counted_failed_starts.fetch_max(failed_starts, Relaxed)));
    }

    /// Durations of the calls of the last 10 to 20 s.
    pub(crate) fn recent_latency(&self, now: Instant) -> report::Latency {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let calls = self.calls();
        if recent.at.is_none_or(|at| now.saturating_duration_since(at) >= REPORT_INTERVAL) {
            recent.earlier = std::mem::replace(&mut recent.later, calls);
            recent.at = Some(now);
        }
        calls.since(&recent.earlier).latency()
    }

    fn calls(&self) -> CallTotals {
        let mut calls = CallTotals::default();
        for metric in self.durations.iter().map(prometheus::core::Metric::metric) {
            let histogram = metric.get_histogram();
            calls.count += histogram.get_sample_count();
            calls.sum += histogram.get_sample_sum();
            for (sum, bucket) in calls.buckets.iter_mut().zip(histogram.get_bucket()) {
                *sum += bucket.cumulative_count();
            }
        }
        calls
    }

    /// Counts a connection until the guard is dropped.
    pub(crate) fn connected(&self) -> impl Drop + Send + use<> {
        struct Connected(IntGauge);

        impl Drop for Connected {
            fn drop(&mut self) {
                self.0.dec();
            }
        }

        self.connections.inc();
        Connected(self.connections.clone())
    }

    /// Connections of proxies.
    pub(crate) fn connections(&self) -> u32 {
        self.connections.get() as u32
    }

    /// All metrics in the text format of Prometheus.
    pub fn text(&self) -> Vec<u8> {
        let mut out = Vec::new();
        // Writing to a vector does not fail.
        let _ = TextEncoder::new().encode(&self.registry.gather(), &mut out);
        out
    }

    /// All metrics in the form of reports to proxies.
    pub fn report(&self) -> report::Series {
        let mut report = report::Series::default();
        for family in self.registry.gather() {
            for metric in family.get_metric() {
                let labels = metric.get_label().iter().map(|label| (label.name().to_owned(), label.value().to_owned())).collect();
                let (name, help) = (family.name().to_owned(), family.help().to_owned());
                match family.get_field_type() {
                    prometheus::proto::MetricType::COUNTER => {
                        let value = metric.get_counter().get_value() as u64;
                        report.counters.push(report::Metric { name, help, labels, value });
                    }
                    prometheus::proto::MetricType::HISTOGRAM => {
                        let histogram = metric.get_histogram();
                        let count = histogram.get_sample_count();
                        let mut buckets: Vec<_> =
                            histogram.get_bucket().iter().map(|bucket| (bucket.upper_bound(), bucket.cumulative_count())).collect();
                        buckets.push((f64::INFINITY, count));
                        let value = report::Histogram { sum: histogram.get_sample_sum(), count, buckets };
                        report.histograms.push(report::Metric { name, help, labels, value });
                    }
                    _ => {
                        let value = metric.get_gauge().get_value();
                        report.gauges.push(report::Metric { name, help, labels, value });
                    }
                }
            }
        }
        report
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_do_not_change() {
        let metrics = Metrics::new();
        metrics.serving("abc");
        let text = String::from_utf8(metrics.text()).unwrap();
        let mut names: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
        names.sort_unstable();
        assert_eq!(
            names,
            [
                "wasm_agent_call_duration_seconds histogram",
                "wasm_agent_circuit_open gauge",
                "wasm_agent_connections gauge",
                "wasm_agent_decisions_total counter",
                "wasm_agent_errors_total counter",
                "wasm_agent_fail_open_total counter",
                "wasm_agent_guest_memory_max_bytes gauge",
                "wasm_agent_hook_circuit_open gauge",
                "wasm_agent_id_collisions_total counter",
                "wasm_agent_in_flight gauge",
                "wasm_agent_instance_start_failures_total counter",
                "wasm_agent_instances_discarded_total counter",
                "wasm_agent_last_reload_successful gauge",
                "wasm_agent_module_info gauge",
                "wasm_agent_pool_available gauge",
                "wasm_agent_pool_waiting gauge",
                "wasm_agent_proxy_config_rejected gauge",
                "wasm_agent_reloads_total counter",
                "wasm_agent_requests_blocked_total counter",
                "wasm_agent_requests_total counter",
                "wasm_agent_routing_metadata_lost_total counter",
                "wasm_agent_rule_hits_total counter",
                "wasm_agent_timeout_seconds gauge",
            ]
        );
        for line in [
            r#"wasm_agent_errors_total{kind="trap"} 0"#,
            r#"wasm_agent_decisions_total{decision="block",hook="on_request_headers"} 0"#,
            r#"wasm_agent_decisions_total{decision="detect",hook="on_guardrail_inspect"} 0"#,
            r#"wasm_agent_rule_hits_total{rule_id="other"} 0"#,
            r#"wasm_agent_reloads_total{result="success"} 0"#,
            "wasm_agent_last_reload_successful 1",
            r#"wasm_agent_hook_circuit_open{hook="on_request_body"} 0"#,
            r#"wasm_agent_reloads_total{result="failure"} 0"#,
            r#"wasm_agent_call_duration_seconds_bucket{hook="on_request_body",le="60"} 0"#,
            r#"wasm_agent_module_info{sha256="abc"} 1"#,
            r#"wasm_agent_call_duration_seconds_count{hook="on_request_headers"} 0"#,
        ] {
            assert!(text.lines().any(|found| found == line), "{line}");
        }
    }

    #[test]
    fn all_series_exist_from_the_start() {
        let series = |metrics: &Metrics| {
            let text = String::from_utf8(metrics.text()).unwrap();
            let lines = text.lines().filter(|line| !line.starts_with('#'));
            lines.map(|line| line.rsplit_once(' ').unwrap().0.to_owned()).collect::<Vec<_>>()
        };
        let metrics = Metrics::new();
        metrics.serving("abc");
        let before = series(&metrics);
        FailureKind::ALL.into_iter().for_each(|kind| metrics.error(kind));
        Hook::ALL.into_iter().for_each(|hook| metrics.called(hook, Duration::from_secs(1)));
        for hook in Hook::ALL {
            DecisionKind::ALL.into_iter().for_each(|decision| metrics.decided(hook, decision));
        }
        [true, false].into_iter().for_each(|good| metrics.reloaded(good));
        assert_eq!(series(&metrics), before);
    }

    #[test]
    fn concurrent_observers_count_once() {
        use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

        const EACH: u64 = 20_000;
        let (metrics, discarded) = (Metrics::new(), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..EACH {
                        let now = discarded.fetch_add(1, SeqCst) + 1;
                        metrics.observe(PoolStats::default(), now);
                    }
                });
            }
        });
        assert_eq!(metrics.discarded.get(), discarded.load(SeqCst));
    }

    #[test]
    fn latencies_are_recent() {
        let (metrics, start) = (Metrics::new(), Instant::now());
        assert_eq!(metrics.recent_latency(start), report::Latency::default());
        for _ in 0..98 {
            metrics.called(Hook::RequestHeaders, Duration::from_micros(75));
        }
        metrics.called(Hook::RequestBody, Duration::from_millis(500));
        metrics.called(Hook::RequestBody, Duration::from_secs(100));
        let report::Latency { average, p50, p95, p99 } = metrics.recent_latency(start);
        assert!((average - 1005.07).abs() < 0.1, "{average}");
        assert!((0.05..=0.1).contains(&p50) && (0.05..=0.1).contains(&p95), "{p50} {p95}");
        assert!((p99 - 500.0).abs() < 0.1, "{p99}");
        assert!(metrics.recent_latency(start + REPORT_INTERVAL).average > 1000.0);
        metrics.called(Hook::RequestHeaders, Duration::from_secs(50));
        let late = metrics.recent_latency(start + 2 * REPORT_INTERVAL);
        assert_eq!(late.average, 50_000.0);
        assert!((30_000.0..=60_000.0).contains(&late.p50), "{late:?}");
        assert_eq!(metrics.recent_latency(start + 3 * REPORT_INTERVAL - Duration::from_secs(1)), late);
        assert_eq!(metrics.recent_latency(start + 3 * REPORT_INTERVAL), report::Latency::default());
    }

    #[test]
    fn reports_have_the_same_values() {
        let metrics = Metrics::new();
        metrics.requests.inc();
        metrics.called(Hook::RequestHeaders, Duration::from_micros(20));
        let report = metrics.report();
        let counter = report.counters.iter().find(|counter| counter.name == "wasm_agent_requests_total").unwrap();
        assert_eq!(counter.value, 1);
        let called = report.histograms.iter().find(|histogram| histogram.labels == [("hook".into(), "on_request_headers".into())]).unwrap();
        assert_eq!((called.value.count, called.value.buckets.last()), (1, Some(&(f64::INFINITY, 1))));
    }
}
