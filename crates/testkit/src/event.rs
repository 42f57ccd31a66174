//! Events as today's proxy sends them. Each is a JSON object, so tests can change fields.

use serde_json::{Value, json};

/// A request's headers: a GET of `uri`.
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

/// A request's body, whole in one chunk.
pub fn request_body(id: &str, body: impl AsRef<[u8]>) -> Value {
    let body = body.as_ref();
    json!({
        "correlation_id": id, "data": base64(body), "is_last": true, "total_size": body.len(), "chunk_index": 0,
        "bytes_received": body.len(),
    })
}

/// A response's headers.
pub fn response(id: &str, status: u16) -> Value {
    json!({"correlation_id": id, "status": status, "headers": {"content-type": ["text/plain"], "set-cookie": ["a=1", "b=2"]}})
}

/// A response's body, whole in one chunk.
pub fn response_body(id: &str, body: impl AsRef<[u8]>) -> Value {
    let body = body.as_ref();
    json!({
        "correlation_id": id, "data": base64(body), "is_last": true, "total_size": body.len(), "chunk_index": 0,
        "bytes_sent": body.len(),
    })
}

/// Standard base64 with padding, as bodies are encoded in JSON.
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

/// JSON that nests no deeper than every reader accepts, but has a key after which `serde_json` may
/// parse a string as JSON, which again contains such a string, and so on. A reader that follows all
/// of them overflows its stack.
pub fn nested_texts() -> String {
    let mut text = String::from("1");
    for _ in 0..60 {
        let quoted = text.replace('\\', "\\u005c").replace('"', "\\u0022");
        text = format!("{}{{\"$serde_json::private::RawValue\":\"{quoted}\"}}{}", "[".repeat(110), "]".repeat(110));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_matches_the_vectors_of_the_rfc() {
        let vectors = [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")];
        for (plain, encoded) in vectors {
            assert_eq!(base64(plain.as_bytes()), encoded);
        }
    }
}
