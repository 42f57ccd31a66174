//! The HTTP address for operators: `/metrics`, `/healthz` and `/readyz`.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::Context as _;
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tracing::{debug, info};
use zentinel_wasm_contract::report::HealthState;
use zentinel_wasm_engine::Agent;

use super::accept::{AcceptErrors, tcp_listener};
use crate::logging;

/// Connections at once: a scraper or two, and a person.
const MAX_CONNECTIONS: usize = 32;

/// Time from the first byte of a connection to the last of its one response: each way takes a few
/// kilobytes.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);

/// Response of `/healthz` and `/readyz` until there is an agent.
const STARTING: &str = "starting\n";

/// A bound address.
pub struct AdminServer(TcpListener);

impl AdminServer {
    /// Binds `address`.
    ///
    /// # Errors
    ///
    /// The system cannot bind the address.
    pub async fn bind(address: SocketAddr) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(address).await.with_context(|| format!("cannot serve `--admin-address {address}`"))?;
        Ok(Self(listener))
    }

    /// The listener that another process has bound.
    ///
    /// # Errors
    ///
    /// The system does not accept the listener.
    pub(crate) fn adopt(listener: OwnedFd) -> io::Result<Self> {
        Ok(Self(tcp_listener(listener)?))
    }

    /// Serves the address until the process ends, on a task of its own.
    pub fn spawn(self, agent: Arc<OnceLock<Arc<Agent>>>) -> AdminTask {
        let address = self.0.local_addr().ok();
        let listener = rustix::io::fcntl_dupfd_cloexec(&self.0, 0).ok();
        let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        AdminTask { task: tokio::spawn(self.serve(agent, Arc::clone(&permits))), permits, listener, address }
    }

    /// Serves the address until the process ends. There is no agent yet while its module is being
    /// compiled, which may take long; until then the address reports that it is starting.
    async fn serve(self, agent: Arc<OnceLock<Arc<Agent>>>, permits: Arc<Semaphore>) {
        let Self(listener) = self;
        if let Ok(address) = listener.local_addr() {
            info!("serving /metrics, /healthz and /readyz on http://{address}");
        }
        let errors = AcceptErrors::new("a connection on the admin address");
        loop {
            // Waiting for a permit leaves further clients in the system's queue, which is bounded
            // too.
            let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    errors.log_and_pause(&error).await;
                    continue;
                }
            };
            let agent = Arc::clone(&agent);
            tokio::spawn(async move {
                let _permit = permit;
                serve_one_request(stream, CONNECTION_TIMEOUT, |request| respond(request, agent.get().map(|agent| &**agent))).await;
            });
        }
    }
}

/// A served address.
pub struct AdminTask {
    task: JoinHandle<()>,
    /// All are free when no connection is open.
    permits: Arc<Semaphore>,
    /// A duplicate, for another process.
    listener: Option<OwnedFd>,
    address: Option<SocketAddr>,
}

impl AdminTask {
    pub(crate) fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    /// The listener, for another process.
    pub(crate) fn listener(&self) -> Option<(OwnedFd, SocketAddr)> {
        self.listener.as_ref().and_then(|listener| listener.try_clone().ok()).zip(self.address)
    }

    /// Accepts no more connections. Returns when those that were accepted have ended.
    pub(crate) async fn stop(self) {
        self.task.abort();
        let _ = self.permits.acquire_many(MAX_CONNECTIONS as u32).await;
    }
}

/// Serves the first request of a connection and closes it, because a client that sent many and read
/// nothing would hold its permit forever. Scrapers open a new connection.
async fn serve_one_request<S>(stream: S, timeout: Duration, respond: impl Fn(&Request<Incoming>) -> Response<Full<Bytes>>)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let service = service_fn(|request| {
        let response = respond(&request);
        async move { Ok::<_, Infallible>(response) }
    });
    // Headers need no timeout of their own: `timeout` covers the whole connection.
    let served = http1::Builder::new().keep_alive(false).header_read_timeout(None).serve_connection(TokioIo::new(stream), service);
    match tokio::time::timeout(timeout, served).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!("a connection on the admin address failed: {error}"),
        Err(_) => debug!("a connection on the admin address timed out"),
    }
}

fn respond(request: &Request<Incoming>, agent: Option<&Agent>) -> Response<Full<Bytes>> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n");
    }
    match request.uri().path() {
        "/metrics" => {
            // Without an agent, all metrics exist and are zero.
            let metrics = agent.map_or_else(|| logging::metrics().text(), |agent| agent.metrics().text());
            let mut response = Response::new(Full::from(metrics));
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; version=0.0.4"));
            response
        }
        "/healthz" => match agent.map(Agent::health) {
            None => text(StatusCode::OK, STARTING),
            Some(HealthState::Healthy) => text(StatusCode::OK, "healthy\n"),
            Some(HealthState::Degraded(reason)) => text(StatusCode::OK, format!("degraded: {reason}\n")),
            Some(HealthState::Draining) => text(StatusCode::OK, "draining\n"),
        },
        "/readyz" => match agent.map(Agent::not_ready) {
            None => text(StatusCode::SERVICE_UNAVAILABLE, STARTING),
            Some(None) => text(StatusCode::OK, "ready\n"),
            Some(Some(reason)) => text(StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {reason}\n")),
        },
        _ => text(StatusCode::NOT_FOUND, "try /metrics, /healthz or /readyz\n"),
    }
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt as _;

    #[tokio::test]
    async fn closes_clients_that_do_not_read_or_send() {
        for request in ["GET / HTTP/1.1\r\nHost: a\r\n\r\n", "GET", ""] {
            // Smaller than the response.
            let (mut client, server) = tokio::io::duplex(64);
            client.write_all(request.as_bytes()).await.unwrap();
            serve_one_request(server, Duration::from_millis(1), |_| text(StatusCode::OK, "x".repeat(1000))).await;
        }
    }
}
