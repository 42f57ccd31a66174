//! An HTTP request through the proxy.

use crate::http::{Message, exchange};
use serde_json::Value;
use std::io;

/// A request to send through the proxy.
#[derive(Debug, Clone)]
pub struct HttpRequest {
    method: String,
    path: String,
    query: Vec<(String, String)>,
    headers: Vec<(String, String)>,
    body: Option<Vec<u8>>,
}

impl HttpRequest {
    /// A GET of `path`.
    pub fn get(path: &str) -> Self {
        Self {
            method: "GET".into(),
            path: path.into(),
            query: Vec::new(),
            headers: vec![("Host".into(), "shop.example".into())],
            body: None,
        }
    }

    /// A POST of `body` to `path`.
    pub fn post(path: &str, body: &[u8]) -> Self {
        let mut request = Self::get(path).header("Content-Type", "application/octet-stream");
        request.method = "POST".into();
        request.body = Some(body.to_vec());
        request
    }

    /// Sends the body in chunks, without announcing its length.
    pub fn chunked(self) -> Self {
        self.header("Transfer-Encoding", "chunked")
    }

    /// Adds a header field.
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// Adds a query parameter for the upstream or the module.
    pub fn query(mut self, name: &str, value: &str) -> Self {
        self.query.push((name.into(), percent_encode(value)));
        self
    }

    /// Makes `hook` of the mirror module give this answer.
    pub fn answer(self, hook: &str, answer: &Value) -> Self {
        self.query(hook, &answer.to_string())
    }

    /// Sends it to the proxy on `port` and reads the response.
    pub fn send(&self, port: u16) -> io::Result<Message> {
        let query: Vec<String> = self.query.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let target = if query.is_empty() { self.path.clone() } else { format!("{}?{}", self.path, query.join("&")) };
        let body = self.body.as_deref();
        exchange(port, &self.method, &target, &self.headers, body)
    }
}

fn percent_encode(text: &str) -> String {
    let mut encoded = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~!:".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}
