//! One HTTP/2 connection, all of it on one task: reading, the streams' calls, and writing. An event takes no detour over other threads that way, and
//! whatever belongs to the connection ends with it.

use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::{BoxStream, FuturesUnordered, StreamExt};
use hyper::body::Incoming;
use hyper::rt::Executor;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use prost::Message;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio::time::Instant;
use tonic::body::Body;
use tonic::server::{Grpc, ServerStreamingService, StreamingService, UnaryService};
use tonic::{Request, Response, Status, Streaming};

use super::codec::Codec;
use super::inbound::Inbound;
use super::outbound::{Outbound, Unwritten};
use super::{MAX_MESSAGE, SERVICE, control_stream, health, process_stream};
use crate::socket::connection::{HANDSHAKE_TIMEOUT, STALL_TIMEOUT, Stage};
use zentinel_wasm_contract::Handler;

/// Streams at once on one connection. A proxy opens one; single events take one each, and a proxy has no more than this under way.
const MAX_STREAMS: u32 = 100;

/// Largest header list of a call, in bytes. A call has half a dozen short headers.
const MAX_HEADERS: u32 = 16 << 10;

/// How often a silent client is asked whether it is still there.
const KEEP_ALIVE: Duration = Duration::from_secs(60);

/// Time that it has to say so.
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(20);

/// How often is looked for answers that nobody takes.
const LOOK: Duration = Duration::from_secs(5);

/// Why a connection has ended before the client closed it.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The client broke off, or does not speak HTTP/2.
    #[error("HTTP/2 failed: {0}")]
    Http(String),
    /// The client was too slow.
    #[error("the client {0} for {1:?}")]
    Stalled(&'static str, Duration),
}

type Task = BoxFuture<'static, Result<(), ConnectionError>>;

/// Tasks of the connection that were started and not polled yet.
#[derive(Clone, Default)]
struct Tasks(Arc<Mutex<Vec<Task>>>);

impl Tasks {
    fn start(&self, task: Task) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(task);
    }

    fn take(&self) -> Vec<Task> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for Tasks {
    fn execute(&self, task: F) {
        self.start(Box::pin(async {
            task.await;
            Ok(())
        }));
    }
}

/// Serves one connection until its client closes it, or the agent has come to its end.
///
/// # Errors
///
/// The client breaks the protocol or stalls, or the connection fails.
pub async fn serve<H, IO>(io: IO, handler: Arc<H>, mut stage: watch::Receiver<Stage>) -> Result<(), ConnectionError>
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
            let services =
                Services { handler: Arc::clone(&handler), stage: stage.clone(), drained: Arc::clone(&drained), tasks: tasks.clone() };
            let unwritten = unwritten.clone();
            async move { Ok::<_, std::convert::Infallible>(services.call(request).await.map(|body| Outbound::new(body, unwritten))) }
        })
    };
    let connection = http2::Builder::new(tasks.clone())
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HEADERS)
        .keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .serve_connection(TokioIo::new(io), service);
    let mut connection = pin!(connection);
    let mut running = FuturesUnordered::new();
    let mut first_call = pin!(tokio::time::sleep_until(Instant::now() + HANDSHAKE_TIMEOUT));
    let (mut awaits_call, mut ending) = (true, false);
    let mut look = tokio::time::interval(LOOK);
    loop {
        tokio::select! {
            biased;
            ended = std::future::poll_fn(|context| loop {
                if let Poll::Ready(ended) = connection.as_mut().poll(context) {
                    return Poll::Ready(ended.map_err(|error| ConnectionError::Http(chain(&error))));
                }
                running.extend(tasks.take());
                while let Poll::Ready(Some(ended)) = running.poll_next_unpin(context) {
                    if let Err(error) = ended {
                        return Poll::Ready(Err(error));
                    }
                }
                let started = tasks.take();
                if started.is_empty() {
                    return Poll::Pending;
                }
                running.extend(started);
            }) => return ended,
            // Without a sender the agent is at its end too.
            _ = stage.wait_for(|stage| *stage > Stage::Serving), if !ending => {
                ending = true;
                // It has nothing in flight, and may never have meant to.
                if !called.load(Relaxed) {
                    return Ok(());
                }
                connection.as_mut().graceful_shutdown();
            }
            () = &mut first_call, if awaits_call => {
                if !called.load(Relaxed) {
                    return Err(ConnectionError::Stalled("made no call", HANDSHAKE_TIMEOUT));
                }
                awaits_call = false;
            }
            _ = look.tick() => {
                if unwritten.since().is_some_and(|since| since.elapsed() >= STALL_TIMEOUT) {
                    return Err(ConnectionError::Stalled("took no answer", STALL_TIMEOUT));
                }
            }
        }
    }
}

/// An error with what has caused it.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// The services as one call finds them.
struct Services<H> {
    handler: Arc<H>,
    stage: watch::Receiver<Stage>,
    /// Whether the client has asked for a drain. Ends with the connection.
    drained: Arc<watch::Sender<bool>>,
    tasks: Tasks,
}

impl<H: Handler> Services<H> {
    async fn call(self, request: http::Request<Incoming>) -> http::Response<Body> {
        let path = request.uri().path().strip_prefix('/').and_then(|path| path.split_once('/'));
        match path {
            Some((SERVICE, "ProcessStream")) => grpc().streaming(ProcessStream(self), request.map(Inbound::of_many)).await,
            Some((SERVICE, "ProcessEvent")) => grpc().unary(ProcessEvent(self), request.map(Inbound::of_one)).await,
            Some((SERVICE, "ControlStream")) => grpc().streaming(ControlStream(self), request.map(Inbound::of_many)).await,
            Some((health::HEALTH, "Check")) => grpc().unary(HealthCheck(self), request.map(Inbound::of_one)).await,
            Some((health::HEALTH, "Watch")) => grpc().server_streaming(HealthWatch(self), request.map(Inbound::of_one)).await,
            _ => Status::unimplemented("there is no such method here").into_http(),
        }
    }
}

/// No limit for what is sent: answers have theirs, reports are short.
fn grpc<M: Message + 'static>() -> Grpc<Codec<M>> {
    Grpc::new(Codec::new()).max_decoding_message_size(MAX_MESSAGE)
}

type Outcome<T> = BoxFuture<'static, Result<Response<T>, Status>>;

fn done<T: Send + 'static>(outcome: Result<T, Status>) -> Outcome<T> {
    Box::pin(std::future::ready(outcome.map(Response::new)))
}

struct ProcessStream<H>(Services<H>);

impl<H: Handler> StreamingService<Bytes> for ProcessStream<H> {
    type Response = super::proto::AgentToProxy;
    type ResponseStream = process_stream::Answers;
    type Future = Outcome<Self::ResponseStream>;

    fn call(&mut self, request: Request<Streaming<Bytes>>) -> Self::Future {
        // Nothing is read before the response has begun: the proxy's client says nothing until then.
        let (answers, driver) =
            process_stream::open(Arc::clone(&self.0.handler), self.0.stage.clone(), self.0.drained.subscribe(), request.into_inner());
        self.0.tasks.start(Box::pin(driver));
        done(Ok(answers))
    }
}

struct ProcessEvent<H>(Services<H>);

impl<H: Handler> UnaryService<Bytes> for ProcessEvent<H> {
    type Response = super::proto::AgentToProxy;
    type Future = Outcome<Self::Response>;

    fn call(&mut self, request: Request<Bytes>) -> Self::Future {
        let handler = Arc::clone(&self.0.handler);
        Box::pin(async move { process_stream::answer_one(handler, request.into_inner()).await.map(Response::new) })
    }
}

struct ControlStream<H>(Services<H>);

impl<H: Handler> StreamingService<Bytes> for ControlStream<H> {
    type Response = super::proto::ProxyControl;
    type ResponseStream = BoxStream<'static, Result<Self::Response, Status>>;
    type Future = Outcome<Self::ResponseStream>;

    fn call(&mut self, request: Request<Streaming<Bytes>>) -> Self::Future {
        let answers =
            control_stream::open(Arc::clone(&self.0.handler), self.0.stage.clone(), Arc::clone(&self.0.drained), request.into_inner());
        done(Ok(answers.boxed()))
    }
}

struct HealthCheck<H>(Services<H>);

impl<H: Handler> UnaryService<Bytes> for HealthCheck<H> {
    type Response = super::health_proto::HealthCheckResponse;
    type Future = Outcome<Self::Response>;

    fn call(&mut self, request: Request<Bytes>) -> Self::Future {
        done(health::check(&*self.0.handler, *self.0.drained.borrow(), request.into_inner()))
    }
}

struct HealthWatch<H>(Services<H>);

impl<H: Handler> ServerStreamingService<Bytes> for HealthWatch<H> {
    type Response = super::health_proto::HealthCheckResponse;
    type ResponseStream = BoxStream<'static, Result<Self::Response, Status>>;
    type Future = Outcome<Self::ResponseStream>;

    fn call(&mut self, request: Request<Bytes>) -> Self::Future {
        done(health::watch(&self.0.handler, self.0.stage.clone(), self.0.drained.subscribe(), request.into_inner()).map(StreamExt::boxed))
    }
}
