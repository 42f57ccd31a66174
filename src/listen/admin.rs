//! The HTTP address for operators: `/metrics`, `/healthz`, `/readyz`.

use std::convert::Infallible;
use std::net::SocketAddr;
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
use tracing::{debug, info};
use zentinel_wasm_bounds::log_limited;
use zentinel_wasm_contract::report::HealthState;

use crate::logging;
use zentinel_wasm_engine::agent::Agent;

/// Connections at once: a scraper or two, and a person.
const MAX_CONNECTIONS: usize = 32;

/// Time that a connection has, from its first byte to the last of its one answer: a few kilobytes each way.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Pause after the system has refused a connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What is said until there is an agent.
const STARTING: &str = "starting\n";

/// Binds the address.
///
/// # Errors
///
/// The address cannot be had.
pub async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("cannot serve `--admin-address {address}`"))
}

/// Serves the address for ever, also before there is an agent: until then it is starting, which may take as long as its module is compiled.
pub async fn serve(listener: TcpListener, agent: Arc<OnceLock<Arc<Agent>>>) {
    if let Ok(address) = listener.local_addr() {
        info!("serving /metrics, /healthz and /readyz on http://{address}");
    }
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        // Waiting for a slot keeps further clients in the system's queue, which is bounded too.
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                log_limited!(warn, "cannot accept a connection on the admin address: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let agent = Arc::clone(&agent);
        tokio::spawn(async move {
            let _slot = slot;
            serve_one(stream, TIMEOUT, |request| respond(request, agent.get().map(|agent| &**agent))).await;
        });
    }
}

/// Answers the first request of a connection and closes it: a client that sent many and read nothing would hold its slot for ever. Scrapers
/// connect anew.
async fn serve_one<S>(stream: S, timeout: Duration, respond: impl Fn(&Request<Incoming>) -> Response<Full<Bytes>>)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let service = service_fn(|request| {
        let response = respond(&request);
        async move { Ok::<_, Infallible>(response) }
    });
    // The timeout is over the whole.
    let served = http1::Builder::new().keep_alive(false).header_read_timeout(None).serve_connection(TokioIo::new(stream), service);
    match tokio::time::timeout(timeout, served).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!("a connection on the admin address has failed: {error}"),
        Err(_) => debug!("a connection on the admin address has taken too long"),
    }
}

fn respond(request: &Request<Incoming>, agent: Option<&Agent>) -> Response<Full<Bytes>> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n");
    }
    match request.uri().path() {
        "/metrics" => {
            // All names are there from the start, and nothing has been counted yet.
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
        "/readyz" => match agent.map(Agent::is_ready) {
            None => text(StatusCode::SERVICE_UNAVAILABLE, STARTING),
            Some(true) => text(StatusCode::OK, "ready\n"),
            Some(false) => text(StatusCode::SERVICE_UNAVAILABLE, "not ready\n"),
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
    async fn a_client_that_does_not_read_or_says_nothing_is_not_waited_for() {
        for request in ["GET / HTTP/1.1\r\nHost: a\r\n\r\n", "GET", ""] {
            // The answer does not fit in.
            let (mut client, server) = tokio::io::duplex(64);
            client.write_all(request.as_bytes()).await.unwrap();
            serve_one(server, Duration::from_millis(1), |_| text(StatusCode::OK, "x".repeat(1000))).await;
        }
    }
}
