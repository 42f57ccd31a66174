//! Why a connection has ended.

use std::io;
use std::time::Duration;

use super::frame::FrameError;

/// Why a connection has ended before the client closed it.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The socket failed.
    #[error("the socket failed: {0}")]
    Io(#[from] io::Error),
    /// The client sent what are no frames.
    #[error("invalid frame: {0}")]
    Frame(#[from] FrameError),
    /// The first frame was not a handshake, or not one that can be agreed to.
    #[error("handshake failed: {0}")]
    Handshake(String),
    /// The client was too slow.
    #[error("{0} within {1:?}")]
    Timeout(&'static str, Duration),
    /// A part of an answer was out when a newer event of the same id arrived.
    #[error("an answer that was partly sent is superseded by a newer event")]
    Superseded,
}
