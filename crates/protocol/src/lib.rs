//! The agent's side of the Zentinel agent protocol, version 2.
//!
//! The way of an event over a Unix [`socket`]: `frame` cuts it from the stream, `decode` makes an event of it that borrows
//! from the frame, a [`Handler`](zentinel_wasm_contract::Handler) decides, and `encode` writes the decision as the proxy wants it. `connection` keeps all events of a socket
//! going at once; [`grpc`] does the same over HTTP/2.

#![forbid(unsafe_code)]
#![deny(missing_docs)]
#![deny(clippy::print_stderr, clippy::print_stdout)]

pub mod grpc;
mod session;
pub mod socket;

pub use socket::connection::Stage;
pub use socket::encode::{Encoding, Phase, Proxy, Wire};

/// Name that the agent goes by in the protocol and in logs.
pub const AGENT_ID: &str = "zentinel-wasm-agent";

/// Version of the protocol that is spoken.
pub const PROTOCOL_VERSION: u32 = 2;
