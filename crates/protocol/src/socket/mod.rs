//! The transport over a Unix socket.
//!
//! [`serve`] runs the loop of one connection. [`frame`] finds the frames in what was read,
//! [`decode`] decodes their events, with `json` as the fast path, and [`SocketEncoder`] encodes the
//! answers. A connection can be [paused](Paused), and then be served by another process.

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
mod paused;
mod report;

pub use connection::{resume, serve};
pub use encode::SocketEncoder;
pub use encoding::Encoding;
pub use error::SocketError;
pub use paused::{ConnectionState, Ended, Paused};
