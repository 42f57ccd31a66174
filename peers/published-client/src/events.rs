//! Events as the proxy sends them.

use std::collections::HashMap;

use zentinel_agent_protocol::{
    BinaryRequestBodyChunkEvent, BinaryResponseBodyChunkEvent, RequestHeadersEvent, RequestMetadata, ResponseHeadersEvent,
};

/// The start of a request.
pub fn request(id: &str, uri: &str, headers: &[(&str, &str)]) -> RequestHeadersEvent {
    RequestHeadersEvent {
        metadata: RequestMetadata {
            correlation_id: id.to_owned(),
            request_id: format!("request-of-{id}"),
            client_ip: "203.0.113.7:54321".to_owned(),
            client_port: 0,
            server_name: Some("shop.example.com".to_owned()),
            protocol: "HTTP/1.1".to_owned(),
            tls_version: None,
            tls_cipher: None,
            route_id: Some("all".to_owned()),
            upstream_id: None,
            timestamp: "2026-01-15T09:30:00.123456789+00:00".to_owned(),
            traceparent: None,
        },
        method: "GET".to_owned(),
        uri: uri.to_owned(),
        headers: header_map(headers),
    }
}

/// The whole body of a request in one chunk, as the proxy streams it. It carries no total size,
/// because the agent would treat such a body as buffered.
pub fn request_body(id: &str, body: &[u8]) -> BinaryRequestBodyChunkEvent {
    BinaryRequestBodyChunkEvent::new(id, body.to_vec(), 0, true)
}

/// The start of a response.
pub fn response(id: &str, status: u16, headers: &[(&str, &str)]) -> ResponseHeadersEvent {
    ResponseHeadersEvent { correlation_id: id.to_owned(), status, headers: header_map(headers) }
}

/// The whole body of a response in one chunk.
pub fn response_body(id: &str, body: &[u8]) -> BinaryResponseBodyChunkEvent {
    BinaryResponseBodyChunkEvent::new(id, body.to_vec(), 0, true).with_total_size(body.len())
}

fn header_map(headers: &[(&str, &str)]) -> HashMap<String, Vec<String>> {
    let mut map: HashMap<String, Vec<String>> = HashMap::new();
    for (name, value) in headers {
        map.entry((*name).to_owned()).or_default().push((*value).to_owned());
    }
    map
}
