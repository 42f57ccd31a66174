//! Decodes a message of the proxy into an event that borrows from it.

use bytes::Bytes;
use prost::Message as _;
use zentinel_wasm_contract::event::{
    BodyChunk, Data, GuardrailInspect, Metadata, RequestComplete, RequestHeaders, ResponseHeaders, WebsocketFrame,
};
use zentinel_wasm_contract::{Event, Failure, FailureKind, Hook, MAX_ENTRIES, Pairs, Text};

use super::fields::{FieldValue, Fields};
use super::headers::grouped;
use super::proto;
use super::proto::proxy_to_agent::Message;
use super::timestamp::rfc3339;

/// Most fields of a message: the most headers that are allowed, and other fields.
const MAX_FIELDS: usize = MAX_ENTRIES + 1000;

/// An undecodable message. It may be an event, so it must not be ignored.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Unreadable {
    /// Hook of the event's field. An unknown field counts as request headers.
    pub(super) hook: Hook,
    /// Correlation id of the event, if it can be extracted.
    pub(super) correlation_id: Option<String>,
    /// Why it is invalid.
    pub(super) reason: String,
}

/// Decodes a message of the proxy.
pub(super) fn read(bytes: Bytes) -> Result<Message, Unreadable> {
    // Counted before decoding, because a header can take many times its bytes on the wire.
    let fields = Fields(&bytes).map(|(_, value)| 1 + value.bytes().map_or(0, |inner| Fields(inner).take(MAX_FIELDS).count()));
    if fields.take(MAX_FIELDS).sum::<usize>() > MAX_FIELDS {
        return Err(Unreadable::new(&bytes, format!("more than {MAX_ENTRIES} headers")));
    }
    let reason = match proto::ProxyToAgent::decode(bytes.clone()) {
        Ok(proto::ProxyToAgent { message: Some(message) }) => return Ok(message),
        Ok(proto::ProxyToAgent { message: None }) => "unknown kind of message".to_owned(),
        Err(error) => error.to_string(),
    };
    Err(Unreadable::new(&bytes, reason))
}

impl Unreadable {
    fn new(bytes: &[u8], reason: String) -> Self {
        let (hook, correlation_id) = match Fields(bytes).last() {
            Some((number, FieldValue::Bytes(inner))) => {
                let id = Fields(inner).last_of(1);
                let id = match (number, id) {
                    // The first field of request headers is the metadata, which has the id.
                    (2, Some(FieldValue::Bytes(metadata))) => Fields(metadata).last_of(1),
                    (_, id) => id,
                };
                (hook_of(number), id.and_then(FieldValue::text).map(str::to_owned))
            }
            _ => (Hook::RequestHeaders, None),
        };
        Self { hook, correlation_id, reason }
    }
}

/// The failure with which an undecodable event is rejected.
pub(super) fn invalid(hook: Hook, reason: &str) -> Failure {
    Failure::new(FailureKind::InvalidEvent, format!("invalid event for `{hook}`: {reason}"))
}

/// Hook of the field of an event or configuration.
const fn hook_of(number: u32) -> Hook {
    match number {
        3 => Hook::RequestBody,
        4 => Hook::ResponseHeaders,
        5 => Hook::ResponseBody,
        6 => Hook::WebsocketFrame,
        7 => Hook::GuardrailInspect,
        8 => Hook::RequestComplete,
        10 => Hook::Configure,
        _ => Hook::RequestHeaders,
    }
}

/// Returns the event in a message, or `None` if the message is not an event.
///
/// # Errors
///
/// The event is invalid.
pub(super) fn event(message: &Message) -> Option<Result<Event<'_>, Unreadable>> {
    Some(Ok(match message {
        Message::RequestHeaders(event) => match request_headers(event) {
            Some(event) => Event::RequestHeaders(event),
            None => return unreadable(Hook::RequestHeaders, "", "no metadata"),
        },
        Message::RequestBodyChunk(chunk) => Event::RequestBody(body_chunk(chunk)),
        Message::ResponseHeaders(event) => match u16::try_from(event.status_code) {
            Ok(status) => Event::ResponseHeaders(ResponseHeaders {
                correlation_id: Text::from(event.correlation_id.as_str()),
                status,
                headers: grouped(&event.headers),
            }),
            Err(_) => return unreadable(Hook::ResponseHeaders, &event.correlation_id, "status code out of range"),
        },
        Message::ResponseBodyChunk(chunk) => Event::ResponseBody(body_chunk(chunk)),
        Message::WebsocketFrame(frame) => match opcode(frame.frame_type) {
            Some(opcode) => Event::WebsocketFrame(WebsocketFrame {
                correlation_id: Text::from(frame.correlation_id.as_str()),
                opcode: Text::borrowed(opcode),
                data: Data::Raw(&frame.payload),
                client_to_server: frame.client_to_server,
                frame_index: 0,
                fin: true,
                route_id: None,
                client_ip: Text::default(),
            }),
            None => return unreadable(Hook::WebsocketFrame, &frame.correlation_id, "unknown frame type"),
        },
        Message::Guardrail(event) => Event::GuardrailInspect(guardrail(event)),
        Message::RequestComplete(event) => Event::RequestComplete(RequestComplete {
            correlation_id: Text::from(event.correlation_id.as_str()),
            status: u16::try_from(event.status_code).unwrap_or_default(),
            duration_ms: event.duration_ms,
            request_body_size: event.bytes_received,
            response_body_size: event.bytes_sent,
            upstream_attempts: 0,
            error: event.error.as_deref().map(Text::from),
        }),
        Message::Handshake(_) | Message::Cancel(_) | Message::Configure(_) | Message::Ping(_) => return None,
    }))
}

fn unreadable<'a>(hook: Hook, correlation_id: &str, reason: &str) -> Option<Result<Event<'a>, Unreadable>> {
    Some(Err(Unreadable { hook, correlation_id: Some(correlation_id.to_owned()), reason: reason.to_owned() }))
}

/// Returns `None` for an empty text. The fields that are not optional in the proto file are empty
/// if they are missing.
pub(super) fn present(text: &str) -> Option<Text<'_>> {
    if text.is_empty() { None } else { Some(Text::from(text)) }
}

fn request_headers(event: &proto::RequestHeadersEvent) -> Option<RequestHeaders<'_>> {
    let metadata = event.metadata.as_ref()?;
    Some(RequestHeaders {
        metadata: Metadata {
            correlation_id: Text::from(metadata.correlation_id.as_str()),
            request_id: present(&metadata.request_id),
            client_ip: Text::from(metadata.client_ip.as_str()),
            client_port: metadata.client_port,
            server_name: metadata.server_name.as_deref().map(Text::from),
            protocol: present(&metadata.protocol).or_else(|| present(&event.http_version)),
            tls_version: metadata.tls_version.as_deref().map(Text::from),
            route_id: metadata.route_id.as_deref().map(Text::from),
            upstream_id: metadata.upstream_id.as_deref().map(Text::from),
            timestamp: rfc3339(metadata.timestamp_ms).map(Text::from),
            traceparent: metadata.traceparent.as_deref().map(Text::from),
        },
        method: Text::from(event.method.as_str()),
        uri: Text::from(event.uri.as_str()),
        headers: grouped(&event.headers),
    })
}

fn body_chunk(chunk: &proto::BodyChunkEvent) -> BodyChunk<'_> {
    BodyChunk {
        correlation_id: Text::from(chunk.correlation_id.as_str()),
        data: Data::Raw(&chunk.data),
        is_last: chunk.is_last,
        total_size: chunk.total_size,
        chunk_index: chunk.chunk_index,
        // Only one of them is used, depending on the hook.
        bytes_received: Some(chunk.bytes_transferred),
        bytes_sent: Some(chunk.bytes_transferred),
    }
}

fn guardrail(event: &proto::GuardrailInspectEvent) -> GuardrailInspect<'_> {
    let inspection_type = match event.content_type {
        // A prompt (1) or system text (3) may contain an injection; all other content may disclose
        // personal data.
        1 | 3 => "prompt_injection",
        _ => "pii_detection",
    };
    GuardrailInspect {
        correlation_id: Text::from(event.correlation_id.as_str()),
        inspection_type: Text::borrowed(inspection_type),
        content: Text::from(event.content.as_str()),
        model: event.model.as_deref().map(Text::from),
        categories: Vec::new(),
        route_id: None,
        // The module gets an object of strings; everything else is dropped.
        metadata: serde_json::from_str(&event.context_json).unwrap_or_else(|_| Pairs::default()),
    }
}

const fn opcode(frame_type: i32) -> Option<&'static str> {
    match frame_type {
        1 => Some("text"),
        2 => Some("binary"),
        3 => Some("ping"),
        4 => Some("pong"),
        5 => Some("close"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_undecodable_message_keeps_its_hook_and_id() {
        let read = |bytes: &[u8]| {
            let unreadable = read(Bytes::copy_from_slice(bytes)).unwrap_err();
            (unreadable.hook, unreadable.correlation_id)
        };
        // A body chunk (3) with the id `a`, and text as its index.
        assert_eq!(read(&[0x1a, 6, 0x0a, 1, b'a', 0x12, 1, b'x']), (Hook::RequestBody, Some("a".into())));
        // Request headers (2) with metadata (1) of id `a`, and a number as the method.
        assert_eq!(read(&[0x12, 7, 0x0a, 3, 0x0a, 1, b'a', 0x10, 1]), (Hook::RequestHeaders, Some("a".into())));
        // An event of an unknown kind (20).
        assert_eq!(read(&[0xa2, 0x01, 3, 0x0a, 1, b'a']), (Hook::RequestHeaders, Some("a".into())));
        assert_eq!(read(&[]), (Hook::RequestHeaders, None));
        assert_eq!(read(b"\xff\xff"), (Hook::RequestHeaders, None));
    }

    #[test]
    fn rejects_events_with_impossible_values() {
        let bare = Message::RequestHeaders(proto::RequestHeadersEvent::default());
        assert!(matches!(event(&bare), Some(Err(Unreadable { hook: Hook::RequestHeaders, .. }))));
        let status = Message::ResponseHeaders(proto::ResponseHeadersEvent { status_code: 70_000, ..Default::default() });
        assert!(matches!(event(&status), Some(Err(_))));
        assert!(event(&Message::Ping(proto::Ping::default())).is_none());
    }

    #[test]
    fn bodies_are_borrowed() {
        let chunk = proto::BodyChunkEvent { data: Bytes::from_static(b"\xff"), bytes_transferred: 1, ..Default::default() };
        let message = Message::ResponseBodyChunk(chunk);
        let Some(Ok(Event::ResponseBody(chunk))) = event(&message) else { panic!() };
        assert!(matches!(chunk.data, Data::Raw(b"\xff")));
        assert_eq!(chunk.bytes_sent, Some(1));
    }
}
