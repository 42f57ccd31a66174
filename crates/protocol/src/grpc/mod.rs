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
mod fields;
mod health;
mod inbound;
mod message;
mod outbound;
mod process_stream;
mod server;

pub use server::{ConnectionError, serve};

/// The messages, as `proto/agent_v2.proto` has them.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/zentinel.agent.v2.rs"));
}

/// The messages of the standard health service, as `proto/health.proto` has them.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod health_proto {
    include!(concat!(env!("OUT_DIR"), "/grpc.health.v1.rs"));
}

/// Largest message that is read, in bytes: the largest body that may be handed to a module, and room for what stands around it. A body over the
/// module's own limit must arrive, so that it is answered.
pub const MAX_MESSAGE: usize = crate::socket::frame::MAX_FRAME + (1 << 20);

/// Largest answer that is sent, in bytes, its correlation id apart: the proxy's client takes 4 MiB, and one message above that would end its stream
/// with everything on it.
pub const MAX_ANSWER: usize = (4 << 20) - crate::socket::connection::MAX_ID;

/// The agent's service.
pub const SERVICE: &str = "zentinel.agent.v2.AgentServiceV2";

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
