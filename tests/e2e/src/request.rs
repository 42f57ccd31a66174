//! One request through the proxy.

use crate::http::{Message, exchange};
use serde_json::Value;
use std::io;

/// A request to be sent through the proxy.
#[derive(Debug, Clone)]
pub struct Ask {
    method: String,
    path: String,
    query: Vec<(String, String)>,
    headers: Vec<(String, String)>,
    body: Option<Vec<u8>>,
}

impl Ask {
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
        let mut ask = Self::get(path).header("Content-Type", "application/octet-stream");
        ask.method = "POST".into();
        ask.body = Some(body.to_vec());
        ask
    }

    /// Sends the body in chunks, without telling its length beforehand.
    pub fn chunked(self) -> Self {
        self.header("Transfer-Encoding", "chunked")
    }

    /// Adds a header field.
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// Adds a query parameter, for the upstream or for the guest.
    pub fn query(mut self, name: &str, value: &str) -> Self {
        self.query.push((name.into(), percent_encode(value)));
        self
    }

    /// Tells the mirror guest what `hook` is to answer.
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
