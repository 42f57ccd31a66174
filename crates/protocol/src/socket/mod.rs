//! The Unix socket.

pub mod connection;
pub mod decode;
pub mod encode;
pub mod frame;
pub mod handshake;
mod json;
pub(crate) mod report;

pub use connection::{ConnectionError, HANDSHAKE_TIMEOUT, serve};
