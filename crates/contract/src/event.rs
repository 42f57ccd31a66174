//! The events of the proxy, borrowed from their messages.
//!
//! The fields are named as in version 2 of the agent protocol on the Unix socket, and the types can
//! be read from JSON and from MessagePack. gRPC messages are converted to the same types.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};

use crate::failure::{Failure, FailureKind};
use crate::hook::Hook;
use crate::text::{self, Object, Pairs, Text};

/// One event of one request.
#[derive(Clone, Debug)]
pub enum Event<'a> {
    /// The request line and headers are known.
    RequestHeaders(RequestHeaders<'a>),
    /// A chunk of the request body has arrived.
    RequestBody(BodyChunk<'a>),
    /// The status and headers of the response are known.
    ResponseHeaders(ResponseHeaders<'a>),
    /// A chunk of the response body has arrived.
    ResponseBody(BodyChunk<'a>),
    /// A frame of an upgraded connection has arrived.
    WebsocketFrame(WebsocketFrame<'a>),
    /// A text is to be inspected.
    GuardrailInspect(GuardrailInspect<'a>),
    /// The request is complete.
    RequestComplete(RequestComplete<'a>),
}

impl Event<'_> {
    /// The hook that takes this event.
    pub const fn hook(&self) -> Hook {
        match self {
            Self::RequestHeaders(_) => Hook::RequestHeaders,
            Self::RequestBody(_) => Hook::RequestBody,
            Self::ResponseHeaders(_) => Hook::ResponseHeaders,
            Self::ResponseBody(_) => Hook::ResponseBody,
            Self::WebsocketFrame(_) => Hook::WebsocketFrame,
            Self::GuardrailInspect(_) => Hook::GuardrailInspect,
            Self::RequestComplete(_) => Hook::RequestComplete,
        }
    }

    /// The id by which the proxy finds the request of an answer. The client may have chosen it.
    pub fn correlation_id(&self) -> &str {
        match self {
            Self::RequestHeaders(event) => &event.metadata.correlation_id,
            Self::RequestBody(event) | Self::ResponseBody(event) => &event.correlation_id,
            Self::ResponseHeaders(event) => &event.correlation_id,
            Self::WebsocketFrame(event) => &event.correlation_id,
            Self::GuardrailInspect(event) => &event.correlation_id,
            Self::RequestComplete(event) => &event.correlation_id,
        }
    }
}

/// Event 0x10: the request line and headers.
#[derive(Clone, Debug, Deserialize)]
#[serde(bound(deserialize = "'de: 'a"))]
pub struct RequestHeaders<'a> {
    /// Where the request comes from and where it goes.
    #[serde(deserialize_with = "object")]
    pub metadata: Metadata<'a>,
    /// HTTP method.
    pub method: Text<'a>,
    /// Path and query.
    pub uri: Text<'a>,
    /// Headers of the request.
    pub headers: Headers<'a>,
}

/// What is known of a request besides its headers.
#[derive(Clone, Debug, Deserialize)]
#[serde(bound(deserialize = "'de: 'a"))]
pub struct Metadata<'a> {
    /// Id of the request between the proxy and its agents.
    pub correlation_id: Text<'a>,
    /// Id of the request within the proxy.
    #[serde(default)]
    pub request_id: Option<Text<'a>>,
    /// Address of the client, to which the proxy appends the port.
    #[serde(default)]
    pub client_ip: Text<'a>,
    /// Port of the client; 0 if it is part of `client_ip`.
    #[serde(default)]
    pub client_port: u32,
    /// Server name that the client asked for.
    #[serde(default)]
    pub server_name: Option<Text<'a>>,
    /// HTTP version.
    #[serde(default)]
    pub protocol: Option<Text<'a>>,
    /// TLS version.
    #[serde(default)]
    pub tls_version: Option<Text<'a>>,
    /// Route that matched.
    #[serde(default)]
    pub route_id: Option<Text<'a>>,
    /// Upstream that was chosen.
    #[serde(default)]
    pub upstream_id: Option<Text<'a>>,
    /// Time of the request (RFC 3339).
    #[serde(default)]
    pub timestamp: Option<Text<'a>>,
    /// Trace context (W3C).
    #[serde(default)]
    pub traceparent: Option<Text<'a>>,
}

/// Event 0x12: the status and headers of the response.
#[derive(Clone, Debug, Deserialize)]
#[serde(bound(deserialize = "'de: 'a"))]
pub struct ResponseHeaders<'a> {
    /// See [`Metadata::correlation_id`].
    pub correlation_id: Text<'a>,
    /// HTTP status.
    pub status: u16,
    /// Headers of the response.
    pub headers: Headers<'a>,
}

/// Events 0x11 and 0x13: a chunk of a request or response body.
#[derive(Clone, Debug, Deserialize)]
#[serde(bound(deserialize = "'de: 'a"))]
pub struct BodyChunk<'a> {
    /// See [`Metadata::correlation_id`].
    pub correlation_id: Text<'a>,
    /// The bytes.
    pub data: Data<'a>,
    /// Whether the body ends here.
    pub is_last: bool,
    /// Size of the whole body in bytes, if known.
    #[serde(default)]
    pub total_size: Option<u64>,
    /// Index of this chunk, from 0.
    #[serde(default)]
    pub chunk_index: u32,
    /// Bytes of a request body so far.
    #[serde(default)]
    pub bytes_received: Option<u64>,
    /// Bytes of a response body so far.
    #[serde(default)]
    pub bytes_sent: Option<u64>,
}

/// Event 0x15: a WebSocket frame.
#[derive(Clone, Debug, Deserialize)]
#[serde(bound(deserialize = "'de: 'a"))]
pub struct WebsocketFrame<'a> {
    /// See [`Metadata::correlation_id`].
    pub correlation_id: Text<'a>,
    /// `text`, `binary`, `ping`, `pong`, `close` or `continuation`.
    pub opcode: Text<'a>,
    /// The payload.
    pub data: Data<'a>,
    /// Whether the client sent the frame.
    pub client_to_server: bool,
    /// Index of this frame in its direction, from 0.
    #[serde(default)]
    pub frame_index: u64,
    /// Whether this is the last frame of its message.
    #[serde(default = "yes")]
    pub fin: bool,
    /// Route that matched.
    #[serde(default)]
    pub route_id: Option<Text<'a>>,
    /// Address of the client.
    #[serde(default)]
    pub client_ip: Text<'a>,
}

const fn yes() -> bool {
    true
}

/// Event 0x16: a text to be inspected.
#[derive(Clone, Debug, Deserialize)]
#[serde(bound(deserialize = "'de: 'a"))]
pub struct GuardrailInspect<'a> {
    /// See [`Metadata::correlation_id`].
    pub correlation_id: Text<'a>,
    /// `prompt_injection` or `pii_detection`.
    #[serde(default)]
    pub inspection_type: Text<'a>,
    /// The text.
    pub content: Text<'a>,
    /// Language model that the text goes to or comes from.
    #[serde(default)]
    pub model: Option<Text<'a>>,
    /// Kinds of personal data to look for.
    #[serde(default, borrow, deserialize_with = "text::list")]
    pub categories: Vec<Text<'a>>,
    /// Route that matched.
    #[serde(default)]
    pub route_id: Option<Text<'a>>,
    /// Further information about the request.
    #[serde(default)]
    pub metadata: Pairs<'a>,
}

/// Event 0x14: the request is complete.
#[derive(Clone, Debug, Deserialize)]
#[serde(bound(deserialize = "'de: 'a"))]
pub struct RequestComplete<'a> {
    /// See [`Metadata::correlation_id`].
    pub correlation_id: Text<'a>,
    /// HTTP status that the client received.
    #[serde(default)]
    pub status: u16,
    /// Duration, in milliseconds.
    #[serde(default)]
    pub duration_ms: u64,
    /// Bytes of the request body.
    #[serde(default)]
    pub request_body_size: u64,
    /// Bytes of the response body.
    #[serde(default)]
    pub response_body_size: u64,
    /// Number of attempts to reach an upstream.
    #[serde(default)]
    pub upstream_attempts: u32,
    /// What went wrong.
    #[serde(default)]
    pub error: Option<Text<'a>>,
}

fn object<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<T, D::Error> {
    Object::deserialize(deserializer).map(|Object(value)| value)
}

/// Headers in the order received, each with its values.
#[derive(Clone, Debug, Default)]
pub struct Headers<'a>(pub Vec<(Text<'a>, HeaderValues<'a>)>);

impl<'a> Headers<'a> {
    /// The values of the first header of this name, regardless of case.
    pub fn get(&self, name: &str) -> Option<&[Text<'a>]> {
        self.0.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, values)| values.as_slice())
    }
}

/// The values of one header, nearly always one.
#[derive(Clone, Debug)]
pub enum HeaderValues<'a> {
    /// One value.
    One(Text<'a>),
    /// None, or several.
    Many(Vec<Text<'a>>),
}

impl<'a> HeaderValues<'a> {
    /// The values as a slice.
    pub fn as_slice(&self) -> &[Text<'a>] {
        match self {
            Self::One(value) => std::slice::from_ref(value),
            Self::Many(values) => values,
        }
    }

    /// Appends a value.
    pub fn push(&mut self, value: Text<'a>) {
        match self {
            Self::One(first) => *self = Self::Many(vec![std::mem::take(first), value]),
            Self::Many(values) => values.push(value),
        }
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Headers<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeadersVisitor;

        impl<'de> Visitor<'de> for HeadersVisitor {
            type Value = Headers<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of header names and their values")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                // Most requests have 10 to 20 headers. A client's claim about the size is not
                // trusted.
                let mut headers = Vec::with_capacity(16);
                let mut entries = 0;
                while let Some((name, values)) = map.next_entry::<_, HeaderValues<'de>>()? {
                    // A name without values takes as much memory as one with a value.
                    entries += values.as_slice().len().max(1);
                    text::check_entries(entries)?;
                    headers.push((name, values));
                }
                Ok(Headers(headers))
            }
        }

        deserializer.deserialize_map(HeadersVisitor)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for HeaderValues<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ValuesVisitor;

        impl<'de> Visitor<'de> for ValuesVisitor {
            type Value = HeaderValues<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of strings")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
                let Some(first) = seq.next_element()? else {
                    return Ok(HeaderValues::Many(Vec::new()));
                };
                let mut values = HeaderValues::One(first);
                while let Some(value) = seq.next_element()? {
                    values.push(value);
                    text::check_entries(values.as_slice().len())?;
                }
                Ok(values)
            }
        }

        deserializer.deserialize_seq(ValuesVisitor)
    }
}

/// Bytes of a body: base64 if the encoding carries only text, else raw.
#[derive(Clone, Debug)]
pub enum Data<'a> {
    /// Base64 with padding (RFC 4648).
    Base64(Text<'a>),
    /// The bytes themselves.
    Raw(&'a [u8]),
}

impl Data<'_> {
    /// Number of bytes, decoded. Approximate for invalid base64.
    pub fn size(&self) -> usize {
        match self {
            Self::Raw(bytes) => bytes.len(),
            Self::Base64(text) => {
                let padding = text.bytes().rev().take(2).take_while(|byte| *byte == b'=').count();
                (text.len() / 4 * 3).saturating_sub(padding)
            }
        }
    }

    /// The bytes, decoded.
    ///
    /// # Errors
    ///
    /// There are more than `limit` bytes, or the base64 is invalid.
    pub fn bytes(&self, limit: usize) -> Result<Cow<'_, [u8]>, BodyError> {
        let bytes = match self {
            Self::Raw(bytes) => Cow::Borrowed(*bytes),
            Self::Base64(text) => {
                // Check the size before decoding.
                BodyError::check((text.len() / 4 * 3).saturating_sub(2), limit)?;
                Cow::Owned(base64_simd::STANDARD.decode_to_vec(text.as_bytes()).map_err(|_| BodyError::InvalidBase64)?)
            }
        };
        BodyError::check(bytes.len(), limit)?;
        Ok(bytes)
    }
}

/// Why a body cannot be given to a module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BodyError {
    /// The body is larger than the limit.
    TooLarge {
        /// Size of the body, in bytes.
        size: usize,
        /// The limit, in bytes.
        limit: usize,
    },
    /// The proxy sent invalid base64.
    InvalidBase64,
}

impl fmt::Display for BodyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLarge { size, limit } => {
                write!(f, "the body has {size} bytes, more than the limit of {limit}: raise `--max-body-bytes`")
            }
            Self::InvalidBase64 => f.write_str("the proxy sent a body of invalid base64"),
        }
    }
}

impl std::error::Error for BodyError {}

impl From<BodyError> for Failure {
    fn from(error: BodyError) -> Self {
        let kind = match error {
            BodyError::TooLarge { .. } => FailureKind::BodyLimit,
            BodyError::InvalidBase64 => FailureKind::InvalidEvent,
        };
        Self::new(kind, error.to_string())
    }
}

impl BodyError {
    /// Checks a body's size, in bytes.
    ///
    /// # Errors
    ///
    /// The size is over `limit`.
    pub fn check(size: usize, limit: usize) -> Result<(), Self> {
        if size > limit { Err(Self::TooLarge { size, limit }) } else { Ok(()) }
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Data<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct DataVisitor;

        impl<'de> Visitor<'de> for DataVisitor {
            type Value = Data<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("base64 text or bytes")
            }

            fn visit_borrowed_str<E>(self, value: &'de str) -> Result<Self::Value, E> {
                Ok(Data::Base64(Text::from(value)))
            }

            fn visit_str<E>(self, value: &str) -> Result<Self::Value, E> {
                Ok(Data::Base64(Text::from(value.to_owned())))
            }

            fn visit_borrowed_bytes<E>(self, value: &'de [u8]) -> Result<Self::Value, E> {
                Ok(Data::Raw(value))
            }
        }

        deserializer.deserialize_any(DataVisitor)
    }
}
