//! Spans and metrics for a collector (OTLP).

use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, OnceLock};

use anyhow::Context as _;
use prometheus::IntCounter;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};
use zentinel_wasm_engine::{Agent, Observer, Outcome};
use zentinel_wasm_otlp::{Endpoint, EventSpan, Exporter, ExporterConfig, Headers, ResourceEnvironment, SpanQueue, TlsSource, TraceParent};

use crate::listen::tls::certificates;
use crate::process::NO_THREADS;

/// Spans that did not reach the collector.
pub(crate) static DROPPED: LazyLock<IntCounter> = LazyLock::new(|| {
    let help = "Spans lost because `--otlp-endpoint` was full, slow or not reachable.";
    IntCounter::new("wasm_agent_otlp_dropped_total", help).expect("the name is valid")
});

/// Where spans and metrics go.
#[derive(Clone, Debug)]
pub struct OtlpOptions {
    /// The collector.
    pub endpoint: Endpoint,
    /// Headers of all requests.
    pub headers: Headers,
    /// Root certificates that verify the collector's certificate.
    pub ca: Option<PathBuf>,
    /// The path of the module, an attribute of spans.
    pub module: PathBuf,
}

impl OtlpOptions {
    /// Checks the certificates.
    ///
    /// # Errors
    ///
    /// They cannot be used.
    pub fn check(&self) -> anyhow::Result<()> {
        self.ca.as_deref().map_or(Ok(()), |ca| client_config(ca).map(|_| ()))
    }

    /// Starts the exporter, which reads the metrics of `agent` once there is one. Returns it with
    /// the observer of its spans.
    ///
    /// # Errors
    ///
    /// The certificates cannot be used, or the system cannot start the thread.
    pub fn start(self, agent: Arc<OnceLock<Arc<Agent>>>) -> anyhow::Result<(Exporter, Arc<dyn Observer>)> {
        let queue = Arc::new(SpanQueue::new(DROPPED.clone()));
        let config = ExporterConfig {
            endpoint: self.endpoint,
            headers: self.headers,
            tls: self.ca.map(tls).transpose()?,
            module_path: self.module.display().to_string(),
            environment: ResourceEnvironment::read(),
            series: Box::new(move || agent.get().map(|agent| agent.metrics().report())),
        };
        let exporter = Exporter::start(config, Arc::clone(&queue)).context(NO_THREADS)?;
        Ok((exporter, Arc::new(Spans(queue))))
    }
}

/// Checks the certificates now and reads them again for each connection.
fn tls(ca: PathBuf) -> anyhow::Result<TlsSource> {
    client_config(&ca)?;
    Ok(Box::new(move || client_config(&ca).map_err(|error| format!("{error:#}"))))
}

fn client_config(ca: &Path) -> anyhow::Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    // Of the authorities of a whole system, some may not be usable.
    let (usable, _) = roots.add_parsable_certificates(certificates("--otlp-ca", ca)?);
    anyhow::ensure!(usable > 0, "cannot use `--otlp-ca {}`: none of its certificates is a CA certificate", ca.display());
    // Named explicitly, as for the gRPC address.
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider())).with_safe_default_protocol_versions()?;
    Ok(Arc::new(builder.with_root_certificates(roots).with_no_client_auth()))
}

/// Makes spans from outcomes.
struct Spans(Arc<SpanQueue>);

impl Observer for Spans {
    fn observe(&self, outcome: &Arc<Outcome>) {
        if !outcome.is_exported && outcome.error.is_none() {
            // No work was done.
            return;
        }
        let parent = outcome.traceparent.as_deref().and_then(TraceParent::parse);
        if parent.is_some_and(|parent| !parent.sampled) {
            return;
        }
        self.0.push(EventSpan {
            parent,
            request: outcome.request,
            correlation_id: outcome.correlation_id.clone(),
            module: outcome.module.clone(),
            hook: outcome.hook,
            decision: outcome.answer.decision.name(),
            status: outcome.answer.status,
            error: outcome.error,
            fail_open: outcome.fail_open,
            arrived: outcome.arrived,
            duration: outcome.duration,
            waiting: outcome.times.waiting,
            in_guest: outcome.times.in_guest,
        });
    }
}
