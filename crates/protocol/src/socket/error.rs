//! Errors that end a connection.

use std::io;
use std::time::Duration;

use super::frame::FrameError;

/// Why the agent closed a connection on the Unix socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Reading from or writing to the socket failed.
    #[error("the socket failed: {0}")]
    Io(#[from] io::Error),
    /// The client sent an invalid frame.
    #[error("invalid frame: {0}")]
    Frame(#[from] FrameError),
    /// The first frame is not a handshake request, or the agent rejected the request.
    #[error("handshake failed: {0}")]
    Handshake(String),
    /// The client kept the agent waiting: what did not happen, and within which time.
    #[error("{0} within {1:?}")]
    Timeout(&'static str, Duration),
    /// A newer event of the same id arrived when its predecessor's answer was partly sent.
    #[error("an answer that was partly sent is superseded by a newer event")]
    Superseded,
}
