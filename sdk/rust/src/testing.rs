//! Events for unit tests, without Wasm and without an agent.
//!
//! ```
//! use zentinel_wasm_sdk::{Decision, Request, testing};
//!
//! fn check(request: &Request<'_>) -> Decision {
//!     match request.header("User-Agent") {
//!         Some(_) => Decision::allow(),
//!         None => Decision::block(400),
//!     }
//! }
//!
//! let event = testing::Event::request("GET", "/").header("User-Agent", "curl/8");
//! assert_eq!(check(&event.to_request()), Decision::allow());
//! let event = testing::Event::request("GET", "/");
//! assert_eq!(check(&event.to_request()), Decision::block(400));
//! ```

use crate::event::{Request, RequestBody, Response, ResponseBody};
use crate::json::{write_key, write_separator, write_string};

/// Builds an event in the agent's format.
#[derive(Clone, Debug)]
pub struct Event {
    fields: Vec<(&'static str, String)>,
    headers: Vec<(String, Vec<String>)>,
    json: std::cell::OnceCell<String>,
}

impl Event {
    /// Creates a request from a client at 192.0.2.1.
    pub fn request(method: &str, uri: &str) -> Self {
        Self::new().text("method", method).text("uri", uri).text("client_ip", "192.0.2.1").text("correlation_id", "test")
    }

    /// Creates a response.
    pub fn response(status: u16) -> Self {
        Self::new().raw("status", status.to_string()).text("correlation_id", "test")
    }

    fn new() -> Self {
        Self { fields: Vec::new(), headers: Vec::new(), json: std::cell::OnceCell::new() }
    }

    /// Appends a value to a header.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        match self.headers.iter_mut().find(|(known, _)| known.eq_ignore_ascii_case(name)) {
            Some((_, values)) => values.push(value.to_owned()),
            None => self.headers.push((name.to_owned(), vec![value.to_owned()])),
        }
        self
    }

    /// Sets the client's address.
    #[must_use]
    pub fn client_ip(self, address: &str) -> Self {
        self.text("client_ip", address)
    }

    /// Sets the body as a single chunk.
    #[must_use]
    pub fn body(self, bytes: impl AsRef<[u8]>) -> Self {
        let bytes = bytes.as_ref();
        let (body, encoding) = match std::str::from_utf8(bytes) {
            Ok(text) => (text.to_owned(), "utf-8"),
            Err(_) => {
                let mut base64 = Vec::new();
                crate::base64::encode(&mut base64, bytes);
                (base64.into_iter().map(char::from).collect(), "base64")
            }
        };
        let size = bytes.len().to_string();
        self.text("body", &body)
            .text("body_encoding", encoding)
            .raw("chunk_index", "0".to_owned())
            .raw("is_last", "true".to_owned())
            .raw("total_size", size.clone())
            .raw("bytes_received", size.clone())
            .raw("bytes_sent", size)
    }

    /// Sets any other text field of the event.
    #[must_use]
    pub fn text(self, name: &'static str, value: &str) -> Self {
        let mut json = Vec::new();
        write_string(&mut json, value);
        self.raw(name, String::from_utf8(json).unwrap_or_default())
    }

    fn raw(mut self, name: &'static str, json: String) -> Self {
        self.fields.retain(|(known, _)| *known != name);
        self.fields.push((name, json));
        self.json.take();
        self
    }

    /// Returns the event for a hook that takes a request.
    ///
    /// # Panics
    ///
    /// Never, because this type writes valid JSON.
    pub fn to_request(&self) -> Request<'_> {
        Request::parse(self.as_json()).expect("the event is valid JSON")
    }

    /// Returns the event for a hook that takes a request body.
    ///
    /// # Panics
    ///
    /// Never, because this type writes valid JSON.
    pub fn to_request_body(&self) -> RequestBody<'_> {
        RequestBody::parse(self.as_json()).expect("the event is valid JSON")
    }

    /// Returns the event for a hook that takes a response.
    ///
    /// # Panics
    ///
    /// Never, because this type writes valid JSON.
    pub fn to_response(&self) -> Response<'_> {
        Response::parse(self.as_json()).expect("the event is valid JSON")
    }

    /// Returns the event for a hook that takes a response body.
    ///
    /// # Panics
    ///
    /// Never, because this type writes valid JSON.
    pub fn to_response_body(&self) -> ResponseBody<'_> {
        ResponseBody::parse(self.as_json()).expect("the event is valid JSON")
    }

    /// Returns the JSON of the event, for example for the `call_hook` function that
    /// [`export!`](crate::export) defines.
    pub fn as_json(&self) -> &str {
        self.json.get_or_init(|| self.write())
    }

    fn write(&self) -> String {
        let mut out = b"{".to_vec();
        for (name, json) in &self.fields {
            write_key(&mut out, name);
            out.extend_from_slice(json.as_bytes());
        }
        write_key(&mut out, "headers");
        out.push(b'{');
        for (name, values) in &self.headers {
            write_separator(&mut out);
            write_string(&mut out, name);
            out.push(b':');
            let separator = if name.eq_ignore_ascii_case("cookie") { "; " } else { ", " };
            write_string(&mut out, &values.join(separator));
        }
        out.push(b'}');
        if self.headers.iter().any(|(_, values)| values.len() > 1) {
            write_key(&mut out, "header_values");
            out.push(b'{');
            for (name, values) in self.headers.iter().filter(|(_, values)| values.len() > 1) {
                write_separator(&mut out);
                write_string(&mut out, name);
                out.extend_from_slice(b":[");
                for value in values {
                    write_separator(&mut out);
                    write_string(&mut out, value);
                }
                out.push(b']');
            }
            out.push(b'}');
        }
        out.push(b'}');
        String::from_utf8(out).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::Event;

    #[test]
    fn events_can_be_read_back() {
        let event = Event::request("POST", "/ü\"?a=1")
            .header("Cookie", "a=1")
            .header("cookie", "b=2")
            .header("X-Empty", "")
            .client_ip("::1")
            .text("route_id", "api")
            .body([0xff]);
        let body = event.to_request_body();
        assert_eq!((body.method(), body.uri(), body.client_ip()), ("POST", "/ü\"?a=1", "::1"));
        assert_eq!(body.header("Cookie").as_deref(), Some("a=1; b=2"));
        assert_eq!(body.headers().values("cookie").collect::<Vec<_>>(), ["a=1", "b=2"]);
        assert_eq!(body.header("x-empty").as_deref(), Some(""));
        assert_eq!(body.route_id(), Some("api"));
        assert_eq!(body.bytes().as_deref(), Some(&[0xff][..]));
        assert!(body.is_last());
        assert_eq!(Event::response(404).to_response().status(), 404);
    }
}
