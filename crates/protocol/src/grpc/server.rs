//! One HTTP/2 connection.
//!
//! Reading, the calls of all streams, and writing share one task. So an event does not move between
//! threads, and everything that belongs to the connection ends with it.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::Poll;
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt};
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio::time::Instant;
use zentinel_wasm_contract::Handler;

use super::outbound::{OutboundBody, Unwritten};
use super::services::Services;
use super::tasks::Tasks;
use crate::limits::Timeouts;
use crate::stage::Stage;

/// Concurrent streams of one connection. A proxy opens one stream, or one for each single event, of
/// which it has no more than this in flight.
const MAX_STREAMS: u32 = 100;

/// Largest header list of a call, in bytes. A call has about six short headers.
const MAX_HEADERS: u32 = 16 << 10;

/// Checks for unread responses within the stall timeout: every 5 s by default.
const STALL_CHECKS: u32 = 6;

/// Why the agent closed a gRPC connection.
#[derive(Debug, thiserror::Error)]
pub enum GrpcError {
    /// The connection failed, or the client violated HTTP/2.
    #[error("HTTP/2 failed: {0}")]
    Http(String),
    /// The client kept the agent waiting: what did not happen, and within which time.
    #[error("{0} within {1:?}")]
    Timeout(&'static str, Duration),
}

/// Serves one gRPC connection until the client closes it or the agent shuts down.
///
/// # Errors
///
/// The client violates HTTP/2 or exceeds a timeout, or the connection fails.
pub fn serve<H, IO>(
    io: IO,
    handler: Arc<H>,
    stage: watch::Receiver<Stage>,
    timeouts: &Timeouts,
) -> impl Future<Output = Result<(), GrpcError>> + Send + use<H, IO>
where
    H: Handler,
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    run(io, handler, stage, *timeouts)
}

async fn run<H, IO>(io: IO, handler: Arc<H>, mut stage: watch::Receiver<Stage>, timeouts: Timeouts) -> Result<(), GrpcError>
where
    H: Handler,
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let tasks = Tasks::default();
    let called = Arc::new(AtomicBool::new(false));
    let unwritten = Unwritten::default();
    let service = {
        let (tasks, stage, called, unwritten) = (tasks.clone(), stage.clone(), Arc::clone(&called), unwritten.clone());
        let drained = Arc::new(watch::Sender::new(false));
        service_fn(move |request| {
            called.store(true, Relaxed);
            let services = Services {
                handler: Arc::clone(&handler),
                stage: stage.clone(),
                drained: Arc::clone(&drained),
                tasks: tasks.clone(),
                timeouts,
            };
            let unwritten = unwritten.clone();
            async move { Ok::<_, std::convert::Infallible>(services.call(request).await.map(|body| OutboundBody::new(body, unwritten))) }
        })
    };
    let connection = http2::Builder::new(tasks.clone())
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HEADERS)
        .keep_alive_interval(timeouts.keep_alive)
        .keep_alive_timeout(timeouts.keep_alive_reply)
        .serve_connection(TokioIo::new(io), service);
    let mut connection = pin!(connection);
    let mut running = FuturesUnordered::new();
    let mut first_call = pin!(tokio::time::sleep_until(Instant::now() + timeouts.handshake));
    let (mut awaits_call, mut ending) = (true, false);
    let mut stall_check = tokio::time::interval(timeouts.stall / STALL_CHECKS);
    loop {
        tokio::select! {
            biased;
            ended = std::future::poll_fn(|context| loop {
                if let Poll::Ready(ended) = connection.as_mut().poll(context) {
                    return Poll::Ready(ended.map_err(|error| GrpcError::Http(with_causes(&error))));
                }
                running.extend(tasks.take());
                while let Poll::Ready(Some(())) = running.poll_next_unpin(context) {}
                let started = tasks.take();
                if started.is_empty() {
                    return Poll::Pending;
                }
                running.extend(started);
            }) => return ended,
            // If the sender is gone, the agent has shut down too.
            _ = stage.wait_for(|stage| *stage > Stage::Serving), if !ending => {
                ending = true;
                // Nothing is in flight, and the client may not even speak HTTP/2.
                if !called.load(Relaxed) {
                    return Ok(());
                }
                connection.as_mut().graceful_shutdown();
            }
            () = &mut first_call, if awaits_call => {
                if !called.load(Relaxed) {
                    return Err(GrpcError::Timeout("no call", timeouts.handshake));
                }
                awaits_call = false;
            }
            _ = stall_check.tick() => {
                if unwritten.since().is_some_and(|since| since.elapsed() >= timeouts.stall) {
                    return Err(GrpcError::Timeout("answers not read", timeouts.stall));
                }
            }
        }
    }
}

/// The error and its causes.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::allow_all::AllowAll;

    #[tokio::test]
    async fn a_connection_without_a_call_times_out() {
        const SHORT: Duration = Duration::from_millis(50);
        let (_client, server) = tokio::io::duplex(1024);
        let stage = watch::Sender::new(Stage::Serving);
        let timeouts = Timeouts { handshake: SHORT, ..Timeouts::default() };
        let ended = serve(server, AllowAll::new(Duration::ZERO), stage.subscribe(), &timeouts).await;
        assert!(matches!(ended, Err(GrpcError::Timeout("no call", SHORT))), "{ended:?}");
    }
}
