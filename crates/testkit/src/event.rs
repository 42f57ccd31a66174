//! Events as today's proxy sends them.

use serde_json::{Value, json};

/// The event of a GET, as today's proxy sends it.
pub fn request(id: &str, uri: &str) -> Value {
    json!({
        "metadata": {
            "correlation_id": id, "request_id": format!("r-{id}"), "client_ip": "192.0.2.7:50123", "client_port": 0, "server_name": "example.org",
            "protocol": "HTTP/1.1", "tls_version": null, "tls_cipher": null, "route_id": "all", "upstream_id": "backend",
            "timestamp": "2026-01-02T03:04:05Z", "traceparent": null,
        },
        "method": "GET",
        "uri": uri,
        "headers": {"host": ["example.org"], "user-agent": ["curl/8.0"]},
    })
}

/// The event of a request body that is one chunk.
pub fn request_body(id: &str, body: &str) -> Value {
    json!({
        "correlation_id": id, "data": base64(body.as_bytes()), "is_last": true, "total_size": body.len(), "chunk_index": 0,
        "bytes_received": body.len(),
    })
}

/// The event of a response's headers.
pub fn response(id: &str, status: u16) -> Value {
    json!({"correlation_id": id, "status": status, "headers": {"content-type": ["text/plain"], "set-cookie": ["a=1", "b=2"]}})
}

/// The event of a response body that is one chunk.
pub fn response_body(id: &str, body: &str) -> Value {
    json!({
        "correlation_id": id, "data": base64(body.as_bytes()), "is_last": true, "total_size": body.len(), "chunk_index": 0,
        "bytes_sent": body.len(),
    })
}

pub fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for chunk in bytes.chunks(3) {
        let group = chunk.iter().fold(0_u32, |group, byte| group << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for at in 0..4 {
            let digit = ALPHABET[(group >> (18 - 6 * at)) as usize & 63];
            out.push(if at <= chunk.len() { char::from(digit) } else { '=' });
        }
    }
    out
}

/// JSON that is no deeper than any reader takes, but holds a key that serde_json may take for more JSON in the text behind it, and so on: deeper than a
/// stack has room for, where that is followed.
pub fn nested_texts() -> String {
    let mut text = String::from("1");
    for _ in 0..60 {
        let quoted = text.replace('\\', "\\u005c").replace('"', "\\u0022");
        text = format!("{}{{\"$serde_json::private::RawValue\":\"{quoted}\"}}{}", "[".repeat(110), "]".repeat(110));
    }
    text
}
