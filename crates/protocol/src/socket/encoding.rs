//! Encodings of payloads on the socket.

use serde::{Deserialize, Serialize};

/// Encoding of the payloads of a connection. The handshake itself is always JSON.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Encoding {
    /// JSON, bodies as base64. Used by the published proxy.
    #[default]
    Json,
    /// MessagePack: maps with named fields, bodies as bytes.
    MessagePack,
}

impl Encoding {
    /// Its name in the handshake.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Json => "json",
            Self::MessagePack => "msgpack",
        }
    }
}
