//! The Unix socket.

mod agent_response;
mod connection;
pub mod decode;
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
