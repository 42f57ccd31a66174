//! The gRPC transport.
//!
//! `server` keeps a whole HTTP/2 connection on one task: hyper's state machine and the streams within it. The streams are those of `process_stream` (a
//! proxy's events), `control_stream` (requests to drain, configurations) and `health` (the standard health service). What comes in passes `inbound`, which
//! awaits no message for ever. Messages are read by `event`, headers mostly by `borrowed`, and written by `encode` and `message`; `fields` finds its
//! way in the bytes of a message.

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

/// Reads a message as the streams do, and shows the event in it. For fuzzing, which needs a way in that does not lead through HTTP/2.
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
