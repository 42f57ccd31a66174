//! Events, encoded once before the load starts, so sending one only copies it and writes its id.
//!
//! They are made with the published crate's types and not with the testkit, so the load is what the
//! proxy sends, whatever the agent's own tests take for it.

use std::collections::HashMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use zentinel_agent_protocol::grpc_v2::{self, proxy_to_agent};
use zentinel_agent_protocol::{RequestBodyChunkEvent, RequestHeadersEvent, RequestMetadata};

use crate::decision::Expected;
use crate::wire::{Wire, grpc_message, socket_frame};

const REQUEST_HEADERS: u8 = 0x10;
const REQUEST_BODY: u8 = 0x11;

/// As long as the UUIDs that the proxy makes. The last digits identify the request.
const ID_TEMPLATE: &str = "5d0c6f1e-9a84-4b7d-8e21-000000000000";
/// Hexadecimal digits at the end of an id, written for each event.
pub(crate) const ID_DIGITS: usize = 12;

/// Requests prepared for each number of headers: enough that two consecutive ones always differ.
const VARIANTS: usize = 32;
/// One request in this many goes to `/admin`, which the product page's module blocks.
const ADMIN_EVERY: usize = 8;

/// One encoded event and the positions of its id.
pub(crate) struct Event {
    bytes: Vec<u8>,
    ids: Vec<usize>,
    pub(crate) expected: Expected,
}

impl Event {
    fn new(bytes: Vec<u8>, expected: Expected) -> Self {
        let ids = memchr::memmem::find_iter(&bytes, ID_TEMPLATE.as_bytes()).map(|at| at + ID_TEMPLATE.len() - ID_DIGITS).collect();
        Self { bytes, ids, expected }
    }

    /// Appends the event to `output` under the id that ends in `number`.
    pub(crate) fn write(&self, number: u64, output: &mut Vec<u8>) {
        let start = output.len();
        output.extend_from_slice(&self.bytes);
        for &at in &self.ids {
            let digits = &mut output[start + at..start + at + ID_DIGITS];
            for (place, digit) in digits.iter_mut().rev().enumerate() {
                *digit = b"0123456789abcdef"[(number >> (4 * place)) as usize & 0xf];
            }
        }
    }
}

/// The number at the end of an id that [`Event::write`] made.
pub(crate) fn number_of(id: &[u8]) -> Option<u64> {
    let digits = id.strip_prefix(&ID_TEMPLATE.as_bytes()[..ID_TEMPLATE.len() - ID_DIGITS])?;
    if digits.len() != ID_DIGITS {
        return None;
    }
    u64::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}

/// One request: its events, each sent after the answer to the previous one.
pub(crate) struct Request {
    pub(crate) events: Vec<Event>,
}

/// The requests of a load.
pub(crate) struct Mix {
    requests: Vec<Request>,
    looping: Option<(u64, Request)>,
}

pub(crate) struct MixOptions {
    pub(crate) wire: Wire,
    pub(crate) headers: Vec<usize>,
    pub(crate) body_bytes: Option<usize>,
    pub(crate) headers_before_body: bool,
    pub(crate) admin_blocked: bool,
    pub(crate) loop_every: Option<u64>,
}

impl Mix {
    pub(crate) fn new(options: &MixOptions) -> Self {
        let wire = options.wire;
        let body = options.body_bytes.map(body_text);
        let mut requests = Vec::new();
        for variant in 0..VARIANTS {
            for &count in &options.headers {
                let admin = requests.len() % ADMIN_EVERY == ADMIN_EVERY - 1;
                let uri =
                    if admin { format!("/admin/users?page={variant}") } else { format!("/api/v1/orders/{variant}?sort=date&limit=50") };
                let expected = if admin && options.admin_blocked { Expected::Block(403) } else { Expected::Allow };
                let mut events = Vec::new();
                if body.is_none() || options.headers_before_body {
                    events.push(headers_event(wire, &uri, count, variant, expected));
                }
                if let Some(body) = &body {
                    events.push(body_event(wire, body));
                }
                requests.push(Request { events });
                // Bodies are all the same, and many copies of a large one would only fill memory.
                if body.is_some() && requests.len() == ADMIN_EVERY {
                    break;
                }
            }
            if body.is_some() && requests.len() >= ADMIN_EVERY {
                break;
            }
        }
        let looping = options.loop_every.map(|every| {
            let event = headers_event(wire, "/loop", options.headers[0], 0, Expected::Any);
            (every, Request { events: vec![event] })
        });
        Self { requests, looping }
    }

    /// The `index`th request of a connection, and whether the module should loop on it.
    pub(crate) fn request(&self, index: u64) -> (&Request, bool) {
        if let Some((every, request)) = &self.looping
            && index % every == every - 1
        {
            return (request, true);
        }
        (&self.requests[index as usize % self.requests.len()], false)
    }
}

/// The event that a starting agent answers first.
pub(crate) fn first_event(wire: Wire) -> Event {
    headers_event(wire, "/api/v1/orders/1", 12, 0, Expected::Allow)
}

fn headers_event(wire: Wire, uri: &str, count: usize, variant: usize, expected: Expected) -> Event {
    let event = RequestHeadersEvent {
        metadata: RequestMetadata {
            correlation_id: ID_TEMPLATE.to_owned(),
            request_id: format!("req-{variant:08}"),
            client_ip: format!("203.0.113.{}:{}", 1 + variant, 40_000 + variant),
            client_port: 0,
            server_name: Some("shop.example.com".to_owned()),
            protocol: "HTTP/1.1".to_owned(),
            tls_version: None,
            tls_cipher: None,
            route_id: Some("all".to_owned()),
            upstream_id: Some("backend".to_owned()),
            timestamp: "2026-01-15T09:30:00.123456789+00:00".to_owned(),
            traceparent: None,
        },
        method: "GET".to_owned(),
        uri: uri.to_owned(),
        headers: headers(count, variant),
    };
    let bytes = match wire {
        Wire::Json => socket_frame(REQUEST_HEADERS, &json(&event)),
        Wire::Msgpack => socket_frame(REQUEST_HEADERS, &message_pack(&event)),
        Wire::Grpc => grpc_message(proxy_to_agent::Message::RequestHeaders(grpc_v2::RequestHeadersEvent {
            metadata: Some(grpc_v2::RequestMetadata {
                correlation_id: event.metadata.correlation_id,
                request_id: event.metadata.request_id,
                client_ip: event.metadata.client_ip,
                client_port: 0,
                server_name: event.metadata.server_name,
                protocol: event.metadata.protocol,
                tls_version: None,
                route_id: event.metadata.route_id,
                upstream_id: event.metadata.upstream_id,
                timestamp_ms: 1_768_469_400_123,
                traceparent: None,
            }),
            method: event.method,
            uri: event.uri,
            http_version: "HTTP/1.1".to_owned(),
            headers: event
                .headers
                .into_iter()
                .flat_map(|(name, values)| values.into_iter().map(move |value| grpc_v2::Header { name: name.clone(), value }))
                .collect(),
        })),
    };
    Event::new(bytes, expected)
}

fn body_event(wire: Wire, body: &str) -> Event {
    let size = body.len();
    let bytes = match wire {
        Wire::Json => socket_frame(
            REQUEST_BODY,
            &json(&RequestBodyChunkEvent {
                correlation_id: ID_TEMPLATE.to_owned(),
                data: STANDARD.encode(body),
                is_last: true,
                total_size: Some(size),
                chunk_index: 0,
                bytes_received: size,
            }),
        ),
        Wire::Msgpack => {
            // The published client's binary chunk: the same fields, with the data as raw bytes.
            #[derive(serde::Serialize)]
            struct Chunk<'a> {
                correlation_id: &'a str,
                #[serde(with = "serde_bytes")]
                data: &'a [u8],
                is_last: bool,
                total_size: usize,
                chunk_index: u32,
                bytes_received: usize,
            }
            socket_frame(
                REQUEST_BODY,
                &message_pack(&Chunk {
                    correlation_id: ID_TEMPLATE,
                    data: body.as_bytes(),
                    is_last: true,
                    total_size: size,
                    chunk_index: 0,
                    bytes_received: size,
                }),
            )
        }
        Wire::Grpc => grpc_message(proxy_to_agent::Message::RequestBodyChunk(grpc_v2::BodyChunkEvent {
            correlation_id: ID_TEMPLATE.to_owned(),
            chunk_index: 0,
            data: body.as_bytes().to_vec(),
            is_last: true,
            total_size: Some(size as u64),
            bytes_transferred: size as u64,
            proxy_buffer_available: 0,
            timestamp_ms: 1_768_469_400_123,
        })),
    };
    Event::new(bytes, Expected::Allow)
}

/// As the published client writes it: through a generic value, with the id added at the top level.
fn json<T: serde::Serialize>(event: &T) -> Vec<u8> {
    let mut value = serde_json::to_value(event).expect("an event is a JSON object");
    value["correlation_id"] = ID_TEMPLATE.into();
    serde_json::to_vec(&value).expect("a JSON value can be written")
}

fn message_pack<T: serde::Serialize>(event: &T) -> Vec<u8> {
    rmp_serde::to_vec_named(event).expect("an event can be written as MessagePack")
}

/// Headers that browsers and API clients send, in lower case as the proxy forwards them, followed
/// by generated ones.
fn headers(count: usize, variant: usize) -> HashMap<String, Vec<String>> {
    let usual = [
        ("host", "shop.example.com".to_owned()),
        (
            "user-agent",
            format!(
                "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/{}.0.0.0 Safari/537.36",
                120 + variant % 8
            ),
        ),
        ("accept", "application/json, text/plain, */*".to_owned()),
        ("accept-encoding", "gzip, deflate, br, zstd".to_owned()),
        ("accept-language", "en-GB,en;q=0.9,de;q=0.7".to_owned()),
        ("connection", "keep-alive".to_owned()),
        ("cookie", format!("session=9f8e7d6c5b4a{variant:04}; theme=dark; consent=\"yes\"")),
        ("referer", "https://shop.example.com/orders".to_owned()),
        ("authorization", "Bearer eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.c2lnbmF0dXJl".to_owned()),
        ("content-type", "application/json".to_owned()),
        ("cache-control", "no-cache".to_owned()),
        ("x-forwarded-for", format!("198.51.100.{}", 1 + variant)),
    ];
    usual
        .into_iter()
        .map(|(name, value)| (name.to_owned(), vec![value]))
        .chain((0..).map(|extra| (format!("x-extra-header-{extra}"), vec![format!("value-{extra}-{variant}-of-a-usual-length")])))
        .take(count)
        .collect()
}

/// JSON text with a few escapes and non-ASCII letters, as in real bodies.
fn body_text(bytes: usize) -> String {
    let mut text = String::with_capacity(bytes + 128);
    let mut line = 0;
    while text.len() < bytes {
        text.push_str(&format!("{{\"line\": {line}, \"article\": \"tea, green\", \"note\": \"caf\u{e9} \\\"no. {line}\\\"\"}},\n"));
        line += 1;
    }
    let end = (0..=bytes).rev().find(|&end| text.is_char_boundary(end)).expect("0 is a boundary");
    text.truncate(end);
    text.extend(std::iter::repeat_n(' ', bytes - end));
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::PREFIX;

    fn options(wire: Wire) -> MixOptions {
        MixOptions { wire, headers: vec![4, 12], body_bytes: None, headers_before_body: false, admin_blocked: true, loop_every: None }
    }

    #[test]
    fn a_written_id_reads_back() {
        for wire in [Wire::Json, Wire::Msgpack, Wire::Grpc] {
            let mix = Mix::new(&options(wire));
            let event = &mix.request(0).0.events[0];
            let mut output = Vec::new();
            event.write(0xabc_def_012_345, &mut output);
            let expected = format!("{}abcdef012345", &ID_TEMPLATE[..24]);
            let places = memchr::memmem::find_iter(&output, expected.as_bytes()).count();
            assert_eq!(places, if wire == Wire::Json { 2 } else { 1 });
            assert_eq!(number_of(expected.as_bytes()), Some(0xabc_def_012_345));
        }
    }

    #[test]
    fn an_event_parses_as_the_published_type() {
        let mix = Mix::new(&options(Wire::Json));
        let mut output = Vec::new();
        mix.request(1).0.events[0].write(7, &mut output);
        let event: RequestHeadersEvent = serde_json::from_slice(&output[PREFIX..]).unwrap();
        assert_eq!(event.headers.len(), 12);
        assert!(event.metadata.correlation_id.ends_with("000000000007"));
    }

    #[test]
    fn one_request_in_eight_goes_to_admin() {
        let mix = Mix::new(&options(Wire::Json));
        let blocked = (0..64).filter(|&index| mix.request(index).0.events[0].expected == Expected::Block(403)).count();
        assert_eq!(blocked, 8);
    }

    #[test]
    fn a_body_has_the_requested_size() {
        for bytes in [0, 1, 57, 4096] {
            assert_eq!(body_text(bytes).len(), bytes);
        }
    }
}
