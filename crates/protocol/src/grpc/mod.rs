//! The transport over gRPC.
//!
//! [`serve`] runs a whole HTTP/2 connection on one task: hyper's state machine and the streams
//! within it. `services` dispatches calls: `process_stream` and `process_event` answer events,
//! `control_stream` takes drain requests and configurations, `health` is the standard health
//! service.
//!
//! Request bodies pass through `inbound` and response bodies through `outbound`, so incomplete
//! messages and unread responses both time out. `event` decodes messages, with `borrowed` as the
//! fast path for headers; `encode` and `message` make the responses.

mod borrowed;
mod codec;
mod control_stream;
mod encode;
mod event;
mod exchange;
mod fields;
mod handshake;
mod headers;
mod health;
pub mod health_proto;
mod inbound;
mod message;
mod outbound;
mod process_event;
mod process_stream;
pub mod proto;
mod server;
mod services;
mod status;
mod tasks;
mod timestamp;

pub use server::{GrpcError, serve};
pub use services::MAX_MESSAGE;

/// Decodes a message as the streams do and passes its event to `show`. For fuzzing without HTTP/2.
#[doc(hidden)]
pub fn read_event(message: bytes::Bytes, show: impl Fn(&zentinel_wasm_contract::Event<'_>)) {
    if let Some(event) = borrowed::headers(&message) {
        show(&event);
    }
    if let Ok(message) = event::read(message)
        && let Some(Ok(event)) = event::event(&message)
    {
        show(&event);
    }
}
