//! `ProcessEvent`: a single event in a call of its own.

use std::sync::Arc;

use bytes::Bytes;
use tonic::{Code, Status};
use zentinel_wasm_bounds::run_blocking_if_large;
use zentinel_wasm_contract::{Arrival, Handler, Hook};

use super::encode::GrpcEncoder;
use super::event::{Unreadable, event, invalid, read};
use super::handshake::agree;
use super::proto::proxy_to_agent::Message;
use super::status::with_reason;
use super::{message, proto};
use crate::limits::{MAX_ID, TOO_LONG_ID};
use crate::phase::Phase;

/// Answers a single message.
pub(super) async fn answer<H: Handler>(handler: Arc<H>, bytes: Bytes) -> Result<proto::AgentToProxy, Status> {
    let encoder = |phase, id: &str| GrpcEncoder { peer: Arc::default(), phase, correlation_id: Arc::from(id) };
    let reject = |unreadable: Unreadable| {
        let Unreadable { hook, correlation_id, reason } = unreadable;
        let id = correlation_id
            .filter(|id| id.len() <= MAX_ID && hook != Hook::Configure)
            .ok_or_else(|| with_reason(Code::InvalidArgument, &format!("invalid message: {reason}")))?;
        Ok(handler.reject(hook, invalid(hook, &reason), encoder(Phase { hook, chunk_index: 0 }, &id)))
    };
    let len = bytes.len();
    let message = match run_blocking_if_large(len, || read(bytes)) {
        Ok(message) => message,
        Err(unreadable) => return reject(unreadable),
    };
    let call = match run_blocking_if_large(len, || event(&message)) {
        Some(Ok(event)) if event.correlation_id().len() > MAX_ID => return Err(Status::invalid_argument(TOO_LONG_ID)),
        Some(Ok(event)) => {
            run_blocking_if_large(len, || handler.handle(&event, Arrival::Alone, encoder(Phase::of(&event), event.correlation_id())))
        }
        Some(Err(unreadable)) => return reject(unreadable),
        None => {
            let response = match message {
                Message::Handshake(request) => message::handshake(handler.capabilities(), agree(&request, &handler).await.err()),
                Message::Ping(ping) => message::pong(ping),
                _ => return Err(Status::unimplemented("only events, handshakes and pings are accepted without a stream")),
            };
            return Ok(proto::AgentToProxy { message: Some(response) });
        }
    };
    drop(message);
    Ok(call.await)
}
