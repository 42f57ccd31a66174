//! `health`: asks a running agent whether it decides about requests. Runs no Wasm engine.
//!
//! Whatever answers may be hung, slow or something else than an agent, so everything is bounded:
//! the time of the whole answer and its size.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::HOST;
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixStream};
use zentinel_wasm_contract::shortened;
use zentinel_wasm_protocol::socket::frame::{self, kind};

use crate::cli::{HealthOptions, HealthTarget};

/// Most bytes of an answer over HTTP: its one line is a reason, which may list a module's problems.
const MAX_HTTP_ANSWER: usize = 64 << 10;

/// Most bytes from the socket until the health report. The handshake and all reports together have
/// some kilobytes.
const MAX_SOCKET_ANSWER: usize = 1 << 20;

/// Most characters of a reason: more than a reload that fails with every problem of a module.
const MAX_REASON: usize = 5000;

/// Pause between attempts to connect while the socket's queue of clients is full.
const CONNECT_RETRY: Duration = Duration::from_millis(20);

/// The protocol's numbers of health states.
const HEALTHY: u64 = 1;
const DEGRADED: u64 = 2;
const DRAINING: u64 = 3;

/// An agent's health, as one of its addresses reports it.
struct Health {
    ready: bool,
    /// What is wrong, in one line; empty if nothing is known.
    reason: String,
}

/// Asks the agent. Returns the line about an agent that is ready.
///
/// # Errors
///
/// The line about one that is not, or that cannot be asked within the time.
pub fn run(options: &HealthOptions) -> Result<String, String> {
    // On this thread alone, because the system may refuse another one.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build();
    let runtime = runtime.map_err(|error| format!("not ready: cannot ask the agent: {error}"))?;
    let answer = runtime.block_on(async { tokio::time::timeout(options.timeout, ask(&options.target)).await });
    let limit = options.timeout.as_millis();
    let health = match answer {
        Ok(health) => health,
        Err(_) => Err(format!("no answer within {limit} ms from {}: it is starting, overloaded or hung", describe(&options.target))),
    };
    let line = match health {
        Ok(Health { ready: true, reason }) if reason.is_empty() => return Ok("ready".into()),
        Ok(Health { ready: true, reason }) => return Ok(shortened(&format!("ready, but {reason}"), MAX_REASON)),
        Ok(Health { ready: false, reason }) if reason.is_empty() => "not ready".into(),
        Ok(Health { ready: false, reason }) | Err(reason) => format!("not ready: {reason}"),
    };
    Err(shortened(&line, MAX_REASON))
}

fn describe(target: &HealthTarget) -> String {
    match target {
        HealthTarget::Socket(path) => format!("the agent at the socket `{}`", path.display()),
        HealthTarget::Admin(address) => format!("the agent at http://{address}"),
    }
}

async fn ask(target: &HealthTarget) -> Result<Health, String> {
    match target {
        HealthTarget::Socket(path) => {
            let stream = connect(path).await.map_err(|error| {
                format!("cannot connect to the socket `{}`: {error}: start the agent, or name its socket with `--socket`", path.display())
            })?;
            ask_socket(stream).await.map_err(|problem| format!("the socket `{}` {problem}", path.display()))
        }
        HealthTarget::Admin(address) => ask_admin(*address).await,
    }
}

/// Asks the admin address. `/readyz` decides, and `/healthz` has the reason.
async fn ask_admin(address: SocketAddr) -> Result<Health, String> {
    let (status, readiness) = get(address, "/readyz").await?;
    let ready = match status {
        StatusCode::OK => true,
        StatusCode::SERVICE_UNAVAILABLE => false,
        other => return Err(format!("http://{address}/readyz answers {}: is this the agent's `--admin-address`?", other.as_u16())),
    };
    let readiness = readiness.trim();
    // It says more only if it has a reason of its own.
    if !ready && !["", "not ready"].contains(&readiness) {
        return Ok(Health { ready, reason: readiness.trim_start_matches("not ready: ").to_owned() });
    }
    let health = match get(address, "/healthz").await {
        Ok((StatusCode::OK, health)) => health.trim().to_owned(),
        // Readiness is known.
        _ => String::new(),
    };
    Ok(Health { ready, reason: if health == "healthy" { String::new() } else { health } })
}

/// Status and body of a GET.
async fn get(address: SocketAddr, path: &str) -> Result<(StatusCode, String), String> {
    let stream = TcpStream::connect(address).await.map_err(|error| {
        format!("cannot connect to http://{address}: {error}: start the agent with `--admin-address`, or ask its socket with `--socket`")
    })?;
    let invalid = |error: &dyn std::error::Error| format!("http://{address}{path} gives no valid answer: {error}");
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|error| invalid(&error))?;
    // Ends with the runtime.
    tokio::spawn(connection);
    let request = Request::get(path).header(HOST, address.to_string()).body(Empty::<Bytes>::new()).map_err(|error| invalid(&error))?;
    let response = sender.send_request(request).await.map_err(|error| invalid(&error))?;
    let status = response.status();
    let body = Limited::new(response.into_body(), MAX_HTTP_ANSWER).collect().await;
    let body = body.map_err(|error| invalid(&*error))?.to_bytes();
    Ok((status, String::from_utf8_lossy(&body).into_owned()))
}

/// Connects to the socket. Its queue is full while the agent accepts nobody.
async fn connect(path: &Path) -> std::io::Result<UnixStream> {
    loop {
        match UnixStream::connect(path).await {
            Err(error) if error.kind() == ErrorKind::WouldBlock => tokio::time::sleep(CONNECT_RETRY).await,
            connected => return connected,
        }
    }
}

/// Asks as a proxy does: after the handshake, the agent reports its health.
async fn ask_socket(mut stream: UnixStream) -> Result<Health, String> {
    let failed = |error: std::io::Error| format!("failed: {error}");
    // Without a version of the proxy, it counts as a current one.
    let handshake = json!({"supported_versions": [2], "proxy_id": "health", "proxy_version": "", "config": null}).to_string();
    let mut request = Vec::new();
    frame::append(&mut request, kind::HANDSHAKE_REQUEST, |out| out.extend_from_slice(handshake.as_bytes()));
    stream.write_all(&request).await.map_err(failed)?;
    let mut received = Vec::new();
    let mut left = MAX_SOCKET_ANSWER;
    loop {
        let mut read = 0;
        while let Some((frame, len)) =
            frame::next(&received[read..]).map_err(|error| format!("is not an agent's: invalid frame: {error}"))?
        {
            if let Some(health) = read_frame(frame.kind, frame.payload)? {
                return Ok(health);
            }
            read += len;
        }
        received.drain(..read);
        match (&mut stream).take(left as u64).read_buf(&mut received).await.map_err(failed)? {
            0 if left == 0 => return Err(format!("has sent no health report within {MAX_SOCKET_ANSWER} bytes")),
            0 => return Err("closed the connection without a health report".into()),
            read => left -= read,
        }
    }
}

/// The health in a frame, if it has one.
fn read_frame(kind: u8, payload: &[u8]) -> Result<Option<Health>, String> {
    let json = || serde_json::from_slice::<Value>(payload).map_err(|error| format!("sent invalid JSON: {error}"));
    match kind {
        kind::HANDSHAKE_RESPONSE => match json()? {
            response if response["success"] == true => Ok(None),
            response => Err(format!("rejects the handshake: {}", response["error"].as_str().unwrap_or("no reason"))),
        },
        kind::HEALTH_STATUS => {
            let report = json()?;
            let state = report["state"].as_u64();
            let healthy = state == Some(HEALTHY);
            // As `/healthz` has it.
            let reason = match state {
                Some(DEGRADED) => format!("degraded: {}", report["message"].as_str().unwrap_or("no reason")),
                Some(DRAINING) => "draining".into(),
                _ => String::new(),
            };
            // Older agents do not report readiness.
            Ok(Some(Health { ready: report["ready"].as_bool().unwrap_or(healthy), reason }))
        }
        _ => Ok(None),
    }
}
