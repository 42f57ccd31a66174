//! The thread that sends spans and metrics to a collector.

use std::io;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use hyper::body::Bytes;
use prost::Message as _;
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::warn;
use zentinel_wasm_contract::report::{REPORT_INTERVAL, Series};
use zentinel_wasm_contract::shortened;

use crate::client::{Client, MAX_REASON, RequestError, TlsSource};
use crate::endpoint::Endpoint;
use crate::failures::{FailureLog, Signal};
use crate::headers::Headers;
use crate::ids::Ids;
use crate::metrics::MetricEncoder;
use crate::proto::ExportMetricsServiceResponse;
use crate::proto::ExportTraceServiceResponse;
use crate::queue::{BATCH, MAX_QUEUED, SpanQueue};
use crate::resource::ResourceEnvironment;
use crate::spans::SpanEncoder;

/// Time to export what is left when the process ends. A collector takes a full queue within
/// milliseconds; one that does not must not delay a service manager.
pub const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// Longest time that a span waits for others of its batch.
const BATCH_INTERVAL: Duration = Duration::from_secs(1);

/// Time from the connection to the response. Meanwhile spans are queued.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Most attempts to send a batch. A restart of a collector is over by then.
const ATTEMPTS: u32 = 3;

/// Pause after the first failure. It doubles up to [`MAX_PAUSE`] while every request fails.
const FIRST_PAUSE: Duration = Duration::from_secs(1);

/// Longest pause after a failure.
const MAX_PAUSE: Duration = Duration::from_secs(30);

/// What is exported where.
pub struct ExporterConfig {
    /// The collector.
    pub endpoint: Endpoint,
    /// Headers of all requests.
    pub headers: Headers,
    /// The TLS configuration. The connection is not encrypted without it.
    pub tls: Option<TlsSource>,
    /// The path of the module, an attribute of spans.
    pub module_path: String,
    /// What the environment says about this process.
    pub environment: ResourceEnvironment,
    /// The agent's metrics, or `None` until it serves.
    pub series: Box<dyn Fn() -> Option<Series> + Send>,
}

/// A running exporter.
pub struct Exporter {
    /// When to stop, if the process is ending.
    deadline: watch::Sender<Option<Instant>>,
    /// Closes when the thread has ended.
    ended: mpsc::Receiver<()>,
}

impl Exporter {
    /// Starts the thread that exports the spans of `queue`, and metrics as often as the agent
    /// reports them to the proxies.
    ///
    /// # Errors
    ///
    /// The system cannot start the thread.
    pub fn start(config: ExporterConfig, queue: Arc<SpanQueue>) -> io::Result<Self> {
        let (deadline, closing) = watch::channel(None);
        let (ending, ended) = mpsc::channel();
        // Has no other threads.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        thread::Builder::new().name("otlp".into()).spawn(move || {
            runtime.block_on(Export::new(config, queue, closing).run());
            drop(ending);
        })?;
        Ok(Self { deadline, ended })
    }

    /// Exports what is left, for [`FLUSH_TIMEOUT`] at most.
    pub fn close(self) {
        self.deadline.send_replace(Some(Instant::now() + FLUSH_TIMEOUT));
        // The thread may be resolving a name, which cannot be interrupted.
        let _ = self.ended.recv_timeout(FLUSH_TIMEOUT + FLUSH_TIMEOUT / 4);
    }
}

/// The state of the thread.
struct Export {
    client: Client,
    queue: Arc<SpanQueue>,
    spans: SpanEncoder,
    metrics: MetricEncoder,
    series: Box<dyn Fn() -> Option<Series> + Send>,
    closing: watch::Receiver<Option<Instant>>,
    log: FailureLog,
    /// The pause after the next failure.
    pause: Duration,
}

impl Export {
    fn new(config: ExporterConfig, queue: Arc<SpanQueue>, closing: watch::Receiver<Option<Instant>>) -> Self {
        let mut ids = Ids::new();
        let resource = config.environment.resource(&mut ids);
        Self {
            client: Client::new(config.endpoint, config.headers, config.tls),
            queue,
            metrics: MetricEncoder::new(resource.clone()),
            spans: SpanEncoder { resource, ids, module_path: config.module_path },
            series: config.series,
            closing,
            log: FailureLog::new(),
            pause: FIRST_PAUSE,
        }
    }

    async fn run(mut self) {
        let mut metrics_due = Instant::now();
        loop {
            self.export_spans().await;
            if Instant::now() >= metrics_due && self.export_metrics().await {
                metrics_due = Instant::now() + REPORT_INTERVAL;
            }
            if self.is_closing() {
                break;
            }
            if self.queue.len() >= BATCH {
                continue;
            }
            tokio::select! {
                () = self.queue.has_batch.notified() => {}
                () = tokio::time::sleep(BATCH_INTERVAL) => {}
                _ = self.closing.wait_for(Option::is_some) => {}
            }
        }
        self.export_spans().await;
        // The last values, which nobody else will ever see.
        self.export_metrics().await;
        let left = self.queue.len();
        if left > 0 {
            warn!("{left} spans were not exported within {FLUSH_TIMEOUT:?}");
        }
    }

    /// Exports the spans of a full queue at most, in batches, so the metrics get their turn.
    async fn export_spans(&mut self) {
        let mut batch = Vec::with_capacity(BATCH);
        for _ in 0..MAX_QUEUED / BATCH {
            if self.has_expired() {
                return;
            }
            self.queue.take(&mut batch);
            if batch.is_empty() {
                return;
            }
            let count = batch.len() as u64;
            let message = Bytes::from(self.spans.request(&mut batch).encode_to_vec());
            let rejected = self.deliver(Signal::Traces, &message, ATTEMPTS).await.unwrap_or(count);
            self.queue.dropped.inc_by(rejected.min(count));
        }
    }

    /// Exports the metrics as they are now. Returns whether there are any.
    async fn export_metrics(&mut self) -> bool {
        let Some(series) = (self.series)() else { return false };
        let message = Bytes::from(self.metrics.request(&series).encode_to_vec());
        // Once, because the values of the next export include these.
        self.deliver(Signal::Metrics, &message, 1).await;
        true
    }

    /// Sends a message. If the collector has accepted it, returns how many of its spans or metrics
    /// it has rejected nevertheless.
    async fn deliver(&mut self, signal: Signal, message: &Bytes, attempts: u32) -> Option<u64> {
        for _ in 0..attempts {
            match self.attempt(signal, message).await {
                Ok(response) => {
                    self.pause = FIRST_PAUSE;
                    let (rejected, reason) = rejected(signal, response);
                    if rejected > 0 {
                        let reason = format!("some {} were rejected: {reason}", signal.name());
                        self.failed(signal, &RequestError { reason, is_temporary: false });
                    } else {
                        self.log.succeeded(signal, self.client.endpoint(), self.queue.dropped.get());
                    }
                    return Some(rejected);
                }
                Err(error) => {
                    self.failed(signal, &error);
                    if !error.is_temporary || self.is_closing() {
                        return None;
                    }
                    let pause = self.pause;
                    self.pause = (2 * pause).min(MAX_PAUSE);
                    tokio::select! {
                        () = tokio::time::sleep(pause) => {}
                        _ = self.closing.wait_for(Option::is_some) => {}
                    }
                }
            }
        }
        None
    }

    async fn attempt(&mut self, signal: Signal, message: &Bytes) -> Result<Bytes, RequestError> {
        let expired = expired(self.closing.clone());
        let timed_out = |reason: String| Err(RequestError { reason, is_temporary: true });
        tokio::select! {
            response = tokio::time::timeout(REQUEST_TIMEOUT, self.client.post(signal.name(), message)) => match response {
                Ok(response) => response,
                Err(_) => timed_out(format!("no response within {REQUEST_TIMEOUT:?}")),
            },
            () = expired => timed_out("the agent has shut down".to_owned()),
        }
    }

    fn failed(&mut self, signal: Signal, error: &RequestError) {
        let reason = shortened(&error.reason, MAX_REASON);
        self.log.failed(signal, self.client.endpoint(), &reason, error.is_temporary, self.queue.dropped.get());
    }

    fn is_closing(&self) -> bool {
        self.closing.borrow().is_some() || self.closing.has_changed().is_err()
    }

    /// Whether there is no time left to export anything.
    fn has_expired(&self) -> bool {
        self.closing.borrow().is_some_and(|deadline| Instant::now() >= deadline)
    }
}

/// Waits until there is no time left.
async fn expired(mut closing: watch::Receiver<Option<Instant>>) {
    if let Some(deadline) = closing.wait_for(Option::is_some).await.ok().and_then(|deadline| *deadline) {
        tokio::time::sleep_until(deadline).await;
    }
}

/// The number of spans or metrics that the collector did not take, and why.
fn rejected(signal: Signal, response: Bytes) -> (u64, String) {
    // Most responses are empty, and one that is invalid says nothing.
    let (rejected, reason) = match signal {
        Signal::Traces => {
            let partial = ExportTraceServiceResponse::decode(response).unwrap_or_default().partial_success;
            partial.map(|partial| (partial.rejected_spans, partial.error_message)).unwrap_or_default()
        }
        Signal::Metrics => {
            let partial = ExportMetricsServiceResponse::decode(response).unwrap_or_default().partial_success;
            partial.map(|partial| (partial.rejected_data_points, partial.error_message)).unwrap_or_default()
        }
    };
    (u64::try_from(rejected).unwrap_or(0), reason)
}
