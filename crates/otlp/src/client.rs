//! A connection to a collector.

use std::fmt::Display;
use std::net::ToSocketAddrs as _;
use std::sync::Arc;

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{CONTENT_TYPE, HOST, HeaderValue, USER_AGENT};
use hyper::{HeaderMap, Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::ClientConfig;
use tokio_rustls::rustls::pki_types::ServerName;

use crate::endpoint::Endpoint;
use crate::headers::Headers;

/// Makes the TLS configuration of a connection. It is called for each one, so new certificates are
/// used without a restart. The error is one line.
pub type TlsSource = Box<dyn Fn() -> Result<Arc<ClientConfig>, String> + Send>;

/// Largest body of a response, in bytes: counts of what was rejected, and a message.
const MAX_RESPONSE: usize = 64 << 10;

/// Longest reason in the log, in characters.
pub(crate) const MAX_REASON: usize = 300;

/// Why a request failed.
#[derive(Debug)]
pub(crate) struct RequestError {
    /// One line for the log.
    pub(crate) reason: String,
    /// The same request may succeed later.
    pub(crate) is_temporary: bool,
}

impl RequestError {
    fn temporary(what: &str, error: impl Display) -> Self {
        Self { reason: format!("{what}: {error}"), is_temporary: true }
    }
}

/// A client of one collector, with at most one connection.
pub(crate) struct Client {
    endpoint: Endpoint,
    headers: HeaderMap,
    tls: Option<TlsSource>,
    connection: Option<Connection>,
}

struct Connection {
    sender: SendRequest<Full<Bytes>>,
    /// The task that reads and writes, which is aborted when this is dropped.
    _task: JoinSet<()>,
}

impl Client {
    pub(crate) fn new(endpoint: Endpoint, Headers(mut headers): Headers, tls: Option<TlsSource>) -> Self {
        let content_type = HeaderValue::from_static("application/x-protobuf");
        headers.insert(CONTENT_TYPE, content_type);
        let agent = HeaderValue::from_static(concat!("zentinel-wasm-agent/", env!("CARGO_PKG_VERSION")));
        headers.entry(USER_AGENT).or_insert(agent);
        if let Ok(host) = HeaderValue::from_str(&endpoint.authority) {
            headers.insert(HOST, host);
        }
        Self { endpoint, headers, tls, connection: None }
    }

    pub(crate) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Sends a message of one signal and returns the body of the response. Must not be used again
    /// without a new connection if the future is dropped, which it ensures.
    ///
    /// # Errors
    ///
    /// The collector did not accept the message.
    pub(crate) async fn post(&mut self, signal: &str, message: &Bytes) -> Result<Bytes, RequestError> {
        let (mut connection, is_used) = match self.connection.take() {
            Some(connection) if !connection.sender.is_closed() => (connection, true),
            _ => (self.connect().await?, false),
        };
        let mut sent = connection.sender.send_request(self.request(signal, message)).await;
        if sent.is_err() && is_used {
            // The collector may have closed the connection because it was idle.
            connection = self.connect().await?;
            sent = connection.sender.send_request(self.request(signal, message)).await;
        }
        let response = sent.map_err(|error| RequestError::temporary("no response", with_source(&error)))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_RESPONSE).collect().await;
        let body = body.map_err(|error| RequestError::temporary("no whole response", error))?.to_bytes();
        if connection.sender.ready().await.is_ok() {
            self.connection = Some(connection);
        }
        if status.is_success() {
            return Ok(body);
        }
        // As OTLP defines it.
        let is_temporary = matches!(
            status,
            StatusCode::TOO_MANY_REQUESTS | StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT
        );
        Err(RequestError { reason: format!("{} was answered with {status}", self.endpoint.path_of(signal)), is_temporary })
    }

    fn request(&self, signal: &str, message: &Bytes) -> Request<Full<Bytes>> {
        let mut request = Request::new(Full::new(message.clone()));
        *request.method_mut() = Method::POST;
        // It consists of the path of a valid URL and a constant.
        *request.uri_mut() = self.endpoint.path_of(signal).parse().unwrap_or_default();
        *request.headers_mut() = self.headers.clone();
        request
    }

    async fn connect(&self) -> Result<Connection, RequestError> {
        let Endpoint { host, port, .. } = &self.endpoint;
        // Blocks nothing but this thread, which does nothing else. Tokio's own resolver would need
        // another one.
        let addresses =
            (host.as_str(), *port).to_socket_addrs().map_err(|error| RequestError::temporary("cannot resolve the host", error))?;
        let addresses: Vec<_> = addresses.collect();
        let stream = TcpStream::connect(&addresses[..]).await.map_err(|error| RequestError::temporary("cannot connect", error))?;
        // A failure only makes it slower.
        let _ = stream.set_nodelay(true);
        let Some(tls) = &self.tls else { return handshake(stream).await };
        let config = tls().map_err(|reason| RequestError { reason, is_temporary: true })?;
        let name = ServerName::try_from(host.clone()).map_err(|error| RequestError::temporary("invalid host", error))?;
        let stream = TlsConnector::from(config).connect(name, stream).await;
        handshake(stream.map_err(|error| RequestError::temporary("TLS failed", error))?).await
    }
}

async fn handshake(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Result<Connection, RequestError> {
    let handshake = http1::handshake(TokioIo::new(stream)).await;
    let (sender, connection) = handshake.map_err(|error| RequestError::temporary("cannot connect", error))?;
    let mut task = JoinSet::new();
    task.spawn(async {
        // The request fails too then.
        let _ = connection.await;
    });
    Ok(Connection { sender, _task: task })
}

/// hyper's errors do not show their cause, such as a closed connection.
fn with_source(error: &hyper::Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}
