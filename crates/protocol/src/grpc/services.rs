//! Dispatches calls to the services.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::{BoxStream, StreamExt};
use hyper::body::Incoming;
use prost::Message;
use tokio::sync::watch;
use tonic::body::Body;
use tonic::server::{Grpc, ServerStreamingService, StreamingService, UnaryService};
use tonic::{Request, Response, Status, Streaming};
use zentinel_wasm_contract::Handler;

use super::codec::Codec;
use super::inbound::InboundBody;
use super::proto::SERVICE;
use super::tasks::Tasks;
use super::{control_stream, exchange, health, health_proto, process_event, process_stream, proto};
use crate::limits::{MAX_FRAME, Timeouts};
use crate::stage::Stage;

/// Largest message that is read, in bytes: the largest body that a module may be given, and room
/// for the other fields. A body above the module's own limit must be read too, in order to be
/// answered.
pub const MAX_MESSAGE: usize = MAX_FRAME + (1 << 20);

/// What a call needs of its connection.
pub(super) struct Services<H> {
    pub(super) handler: Arc<H>,
    pub(super) stage: watch::Receiver<Stage>,
    /// Whether the client asked the agent to drain, for the time of this connection.
    pub(super) drained: Arc<watch::Sender<bool>>,
    pub(super) tasks: Tasks,
    pub(super) timeouts: Timeouts,
}

impl<H: Handler> Services<H> {
    pub(super) async fn call(self, request: http::Request<Incoming>) -> http::Response<Body> {
        let stall = self.timeouts.stall;
        let (one, many) = (|body| InboundBody::of_one(body, stall), |body| InboundBody::of_many(body, stall));
        let path = request.uri().path().strip_prefix('/').and_then(|path| path.split_once('/'));
        match path {
            Some((SERVICE, "ProcessStream")) => grpc().streaming(ProcessStream(self), request.map(many)).await,
            Some((SERVICE, "ProcessEvent")) => grpc().unary(ProcessEvent(self), request.map(one)).await,
            Some((SERVICE, "ControlStream")) => grpc().streaming(ControlStream(self), request.map(many)).await,
            Some((health::HEALTH, "Check")) => grpc().unary(HealthCheck(self), request.map(one)).await,
            Some((health::HEALTH, "Watch")) => grpc().server_streaming(HealthWatch(self), request.map(one)).await,
            _ => Status::unimplemented("unknown method").into_http(),
        }
    }
}

/// Sets no limit for sent messages, because answers have one already and reports are short.
fn grpc<M: Message + 'static>() -> Grpc<Codec<M>> {
    Grpc::new(Codec::new()).max_decoding_message_size(MAX_MESSAGE)
}

type Outcome<T> = BoxFuture<'static, Result<Response<T>, Status>>;

fn done<T: Send + 'static>(outcome: Result<T, Status>) -> Outcome<T> {
    Box::pin(std::future::ready(outcome.map(Response::new)))
}

struct ProcessStream<H>(Services<H>);

impl<H: Handler> StreamingService<Bytes> for ProcessStream<H> {
    type Response = proto::AgentToProxy;
    type ResponseStream = exchange::OutgoingMessages;
    type Future = Outcome<Self::ResponseStream>;

    fn call(&mut self, request: Request<Streaming<Bytes>>) -> Self::Future {
        // The response must start before anything is read, because the proxy's client sends nothing
        // until then.
        let (messages, driver) = process_stream::open(
            Arc::clone(&self.0.handler),
            self.0.stage.clone(),
            self.0.drained.subscribe(),
            self.0.timeouts,
            request.into_inner(),
        );
        self.0.tasks.start(Box::pin(driver));
        done(Ok(messages))
    }
}

struct ProcessEvent<H>(Services<H>);

impl<H: Handler> UnaryService<Bytes> for ProcessEvent<H> {
    type Response = proto::AgentToProxy;
    type Future = Outcome<Self::Response>;

    fn call(&mut self, request: Request<Bytes>) -> Self::Future {
        let handler = Arc::clone(&self.0.handler);
        Box::pin(async move { process_event::answer(handler, request.into_inner()).await.map(Response::new) })
    }
}

struct ControlStream<H>(Services<H>);

impl<H: Handler> StreamingService<Bytes> for ControlStream<H> {
    type Response = proto::ProxyControl;
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
    type Response = health_proto::HealthCheckResponse;
    type Future = Outcome<Self::Response>;

    fn call(&mut self, request: Request<Bytes>) -> Self::Future {
        done(health::check(&*self.0.handler, *self.0.drained.borrow(), request.into_inner()))
    }
}

struct HealthWatch<H>(Services<H>);

impl<H: Handler> ServerStreamingService<Bytes> for HealthWatch<H> {
    type Response = health_proto::HealthCheckResponse;
    type ResponseStream = BoxStream<'static, Result<Self::Response, Status>>;
    type Future = Outcome<Self::ResponseStream>;

    fn call(&mut self, request: Request<Bytes>) -> Self::Future {
        done(health::watch(&self.0.handler, self.0.stage.clone(), self.0.drained.subscribe(), request.into_inner()).map(StreamExt::boxed))
    }
}
