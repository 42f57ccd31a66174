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
    #[error("the client sent {0}")]
    Frame(#[from] FrameError),
    /// The first frame was not a handshake, or not one that can be agreed to.
    #[error("the handshake failed: {0}")]
    Handshake(String),
    /// The client was too slow.
    #[error("the client {0} for {1:?}")]
    Stalled(&'static str, Duration),
    /// A part of an answer was out when a newer event of the same id arrived.
    #[error("an answer was superseded while it was being sent")]
    Superseded,
}
