//! What becomes of a WebSocket frame.

use crate::text::Text;

/// What becomes of a WebSocket frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WebsocketDecision<'a> {
    /// The frame goes on.
    Allow,
    /// The frame is left out.
    Drop,
    /// The connection is closed.
    Close {
        /// Close code (RFC 6455, 7.4), 1000 to 4999.
        code: u16,
        /// Reason, at most 123 bytes.
        reason: Text<'a>,
    },
}
