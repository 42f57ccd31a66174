//! The agent's side of the Zentinel agent protocol, version 2.
//!
//! The way of an event over a Unix [`socket`]: `frame` cuts it from the stream, `decode` makes an event of it that borrows
//! from the frame, a [`Handler`](zentinel_wasm_contract::Handler) decides, and `encode` writes the decision as the proxy wants it. `connection` keeps all events of a socket
//! going at once; [`grpc`] does the same over HTTP/2.

#![forbid(unsafe_code)]
#![deny(missing_docs)]
#![deny(clippy::print_stderr, clippy::print_stdout)]

#[cfg(test)]
mod allow_all;
mod config;
pub mod grpc;
mod guardrail;
mod handshake;
mod limits;
mod phase;
mod proxy;
mod report;
mod session;
pub mod socket;
mod stage;

pub use limits::{MAX_FRAME, Timeouts};
pub use phase::Phase;
pub use proxy::Proxy;
pub use stage::Stage;
