//! The transport over a Unix socket.
//!
//! [`serve`] runs the loop of one connection. [`frame`] finds the frames in what was read,
//! [`decode`] decodes their events, with `json` as the fast path, and [`SocketEncoder`] encodes the
//! answers.

mod agent_response;
mod connection;
pub mod decode;
mod dispatch;
mod encode;
mod encoding;
mod error;
pub mod frame;
mod handshake;
mod inbox;
mod json;
mod outbox;
mod report;

pub use connection::serve;
pub use encode::SocketEncoder;
pub use encoding::Encoding;
pub use error::SocketError;
