//! Decodes the payload of a frame into an event that borrows from it.

use serde::Deserialize;
use serde::de::IgnoredAny;
use zentinel_wasm_contract::event::{GuardrailInspect, RequestComplete, WebsocketFrame};
use zentinel_wasm_contract::{Event, Text, shortened};

use super::encoding::Encoding;
use super::frame::kind;
use super::json;
use crate::config::Config;

/// Deepest nesting of a MessagePack payload. Events are four levels deep. Decoding is recursive, so
/// a client must not choose the depth.
const MAX_DEPTH: usize = 64;

/// Why a payload is not what its frame type requires.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct DecodeError(String);

impl DecodeError {
    /// Shortens the error, because libraries quote what the client has sent.
    fn new(error: impl ToString) -> Self {
        const SHOWN: usize = 1000;
        Self(shortened(&error.to_string(), SHOWN))
    }
}

fn read<'a, T: Deserialize<'a>>(encoding: Encoding, payload: &'a [u8]) -> Result<T, DecodeError> {
    // serde would also accept an array, field by field.
    if !is_object(encoding, payload) {
        return Err(DecodeError("not an object".into()));
    }
    match encoding {
        Encoding::Json => serde_json::from_str(text(payload)?).map_err(DecodeError::new),
        Encoding::MessagePack => {
            let mut deserializer = rmp_serde::Deserializer::from_read_ref(payload);
            deserializer.set_max_depth(MAX_DEPTH);
            T::deserialize(&mut deserializer).map_err(DecodeError::new)
        }
    }
}

fn is_object(encoding: Encoding, payload: &[u8]) -> bool {
    match encoding {
        Encoding::Json => payload.trim_ascii_start().first() == Some(&b'{'),
        // Maps of up to 15, 2^16 and 2^32 entries
        // (<https://github.com/msgpack/msgpack/blob/master/spec.md>).
        Encoding::MessagePack => matches!(payload.first(), Some(0x80..=0x8f | 0xde | 0xdf)),
    }
}

/// Checks the UTF-8 of all JSON at once, so no string is checked again.
fn text(payload: &[u8]) -> Result<&str, DecodeError> {
    simdutf8::basic::from_utf8(payload).map_err(|_| DecodeError("not valid UTF-8".into()))
}

/// Decodes an event with the fast reader `fast` if it accepts the payload, and otherwise with
/// serde.
fn read_fast<'a, T: Deserialize<'a>>(encoding: Encoding, payload: &'a [u8], fast: fn(&'a str) -> Option<T>) -> Result<T, DecodeError> {
    if encoding == Encoding::Json
        && let Some(event) = fast(text(payload)?)
    {
        return Ok(event);
    }
    read(encoding, payload)
}

/// Decodes the event of a frame of type `kind`.
///
/// # Errors
///
/// The payload is not such an event, or `kind` is not the type of an event.
pub fn event(encoding: Encoding, kind: u8, payload: &[u8]) -> Result<Event<'_>, DecodeError> {
    Ok(match kind {
        kind::REQUEST_HEADERS => Event::RequestHeaders(read_fast(encoding, payload, json::request_headers)?),
        kind::REQUEST_BODY => Event::RequestBody(read_fast(encoding, payload, json::body_chunk)?),
        kind::RESPONSE_HEADERS => Event::ResponseHeaders(read_fast(encoding, payload, json::response_headers)?),
        kind::RESPONSE_BODY => Event::ResponseBody(read_fast(encoding, payload, json::body_chunk)?),
        kind::REQUEST_COMPLETE => Event::RequestComplete(read::<RequestComplete<'_>>(encoding, payload)?),
        kind::WEBSOCKET_FRAME => Event::WebsocketFrame(read::<WebsocketFrame<'_>>(encoding, payload)?),
        kind::GUARDRAIL_INSPECT => Event::GuardrailInspect(read::<GuardrailInspect<'_>>(encoding, payload)?),
        _ => return Err(DecodeError(format!("unknown frame type {kind:#04x}"))),
    })
}

/// The fields of a configuration event that the agent reads.
#[derive(Debug, Deserialize)]
pub struct Configure<'a> {
    /// Id for the answer.
    #[serde(default, borrow)]
    pub correlation_id: Text<'a>,
    /// The configuration: a JSON object, or null for none.
    #[serde(default)]
    pub config: Config,
}

/// Decodes a configuration event.
///
/// # Errors
///
/// The payload is not a configuration event.
pub fn configure(encoding: Encoding, payload: &[u8]) -> Result<Configure<'_>, DecodeError> {
    read(encoding, payload)
}

/// Extracts the correlation id of an undecodable frame, or of a cancellation, which has nothing
/// else.
///
/// Cancellations are JSON in either encoding, because the published client sends them as JSON.
pub fn correlation_id(encoding: Encoding, kind: u8, payload: &[u8]) -> Option<Text<'_>> {
    #[derive(Deserialize)]
    struct Id<'a> {
        #[serde(default, borrow)]
        correlation_id: Option<Text<'a>>,
        #[serde(default, borrow)]
        metadata: Option<Bare<'a>>,
        #[serde(default, rename = "headers")]
        _headers: IgnoredAny,
    }

    /// The metadata, or the event if its metadata is invalid.
    #[derive(Deserialize)]
    struct Bare<'a> {
        #[serde(default, borrow)]
        correlation_id: Option<Text<'a>>,
    }

    let other = (encoding != Encoding::Json).then_some(Encoding::Json);
    std::iter::once(encoding).chain(other).find_map(|encoding| {
        let Ok(id) = read::<Id<'_>>(encoding, payload) else {
            return read::<Bare<'_>>(encoding, payload).ok()?.correlation_id;
        };
        let nested = id.metadata.and_then(|metadata| metadata.correlation_id);
        // The place where an event of this type has its id comes first.
        if kind == kind::REQUEST_HEADERS { nested.or(id.correlation_id) } else { id.correlation_id.or(nested) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn both_encodings_decode_to_the_same_event() {
        let json = serde_json::json!({
            "metadata": {"correlation_id": "c", "request_id": "r", "client_ip": "192.0.2.1:1", "client_port": 0, "server_name": null, "protocol": "HTTP/1.1",
                         "tls_version": null, "tls_cipher": null, "route_id": null, "upstream_id": null, "timestamp": "t"},
            "method": "GET", "uri": "/ü\n", "headers": {"a": ["1"], "b": ["2", "3"]},
        });
        let msgpack = rmp_serde::to_vec_named(&json).unwrap();
        let json = json.to_string();
        let from_json = event(Encoding::Json, kind::REQUEST_HEADERS, json.as_bytes()).unwrap();
        let from_msgpack = event(Encoding::MessagePack, kind::REQUEST_HEADERS, &msgpack).unwrap();
        assert_eq!(format!("{from_json:?}").replace("Owned(", "Borrowed("), format!("{from_msgpack:?}").replace("Owned(", "Borrowed("));
    }

    #[test]
    fn bodies_are_bytes_or_base64() {
        #[derive(serde::Serialize)]
        struct Chunk<'a> {
            correlation_id: &'a str,
            data: Bytes<'a>,
            is_last: bool,
        }
        struct Bytes<'a>(&'a [u8]);
        impl serde::Serialize for Bytes<'_> {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_bytes(self.0)
            }
        }
        let raw = rmp_serde::to_vec_named(&Chunk { correlation_id: "c", data: Bytes(b"\xff"), is_last: true }).unwrap();
        let Event::RequestBody(chunk) = event(Encoding::MessagePack, kind::REQUEST_BODY, &raw).unwrap() else { panic!() };
        assert!(matches!(chunk.data, zentinel_wasm_contract::event::Data::Raw(b"\xff")));
        let text = rmp_serde::to_vec_named(&serde_json::json!({"correlation_id": "c", "data": "/w==", "is_last": true})).unwrap();
        let Event::RequestBody(chunk) = event(Encoding::MessagePack, kind::REQUEST_BODY, &text).unwrap() else { panic!() };
        assert!(matches!(chunk.data, zentinel_wasm_contract::event::Data::Base64(_)));
    }

    #[test]
    fn finds_the_id_of_an_invalid_event() {
        let id = |payload: &str| correlation_id(Encoding::Json, kind::REQUEST_HEADERS, payload.as_bytes()).map(|id| id.to_string());
        assert_eq!(id(r#"{"correlation_id":"a","headers":5}"#).as_deref(), Some("a"));
        assert_eq!(id(r#"{"metadata":{"correlation_id":"a","x":[]},"method":1}"#).as_deref(), Some("a"));
        assert_eq!(id(r#"{"correlation_id":"a","metadata":1}"#).as_deref(), Some("a"));
        assert_eq!(id(r#"{"method":1}"#), None);
        assert_eq!(id(r#"["a"]"#), None);
        assert_eq!(id("nonsense"), None);
        assert_eq!(correlation_id(Encoding::MessagePack, kind::CANCEL, br#"{"correlation_id":"a"}"#).as_deref(), Some("a"));
        let both = br#"{"correlation_id":"a","metadata":{"correlation_id":"b"},"data":1}"#;
        assert_eq!(correlation_id(Encoding::Json, kind::REQUEST_BODY, both).as_deref(), Some("a"));
        assert_eq!(correlation_id(Encoding::Json, kind::REQUEST_HEADERS, both).as_deref(), Some("b"));
    }

    #[test]
    fn rejects_deep_nesting() {
        let mut deep = vec![0x91; 1 << 20];
        assert!(event(Encoding::MessagePack, kind::REQUEST_HEADERS, &deep).is_err());
        deep.insert(0, 0x81);
        deep.insert(1, 0xa1);
        deep.insert(2, b'x');
        assert!(event(Encoding::MessagePack, kind::REQUEST_HEADERS, &deep).is_err());
        let json = format!("{{\"x\":{}", "[".repeat(1 << 20));
        assert!(event(Encoding::Json, kind::REQUEST_HEADERS, json.as_bytes()).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_accepted_or_rejected(kind in any::<u8>(), bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            for encoding in [Encoding::Json, Encoding::MessagePack] {
                let _ = event(encoding, kind, &bytes);
                let _ = configure(encoding, &bytes);
                let _ = correlation_id(encoding, kind, &bytes);
            }
        }
    }
}
