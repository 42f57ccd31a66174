//! How payloads are written on the socket.

/// How payloads are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Encoding {
    /// What the published proxy speaks.
    #[default]
    Json,
    /// Maps with named fields, bodies as bytes.
    MessagePack,
}

impl Encoding {
    /// The name in the handshake.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Json => "json",
            Self::MessagePack => "msgpack",
        }
    }
}
