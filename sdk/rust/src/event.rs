//! Events, which the hooks take.

use std::borrow::Cow;
use std::ops::Deref;

use crate::base64;
use crate::json::{self, Value};

/// The fields of an event. Strings are decoded once, when the event is parsed, and borrowed unless
/// they contain an escape.
#[derive(Clone, Debug)]
struct Fields<'a>(Vec<(Cow<'a, str>, Field<'a>)>);

#[derive(Clone, Debug)]
enum Field<'a> {
    Text(Cow<'a, str>),
    Other(Value<'a>),
}

impl<'a> Fields<'a> {
    fn parse(text: &'a str) -> Result<Self, json::Error> {
        // More than any event has today, so the list does not grow while it is filled.
        let mut fields = Vec::with_capacity(24);
        json::read_object(text, |key, value| {
            let field = value.as_str().map_or(Field::Other(value), Field::Text);
            fields.push((key.as_str(), field));
        })?;
        Ok(Self(fields))
    }

    /// Returns the last field of this name.
    fn get(&self, name: &str) -> Option<&Field<'a>> {
        self.0.iter().rev().find(|(key, _)| key == name).map(|(_, field)| field)
    }

    fn text(&self, name: &str) -> Option<&str> {
        match self.get(name)? {
            Field::Text(text) => Some(text),
            Field::Other(_) => None,
        }
    }

    fn value(&self, name: &str) -> Option<Value<'a>> {
        match self.get(name)? {
            Field::Text(_) => None,
            Field::Other(value) => Some(*value),
        }
    }

    fn number(&self, name: &str) -> Option<u64> {
        self.value(name)?.as_u64()
    }

    fn flag(&self, name: &str) -> bool {
        self.value(name).and_then(Value::as_bool).unwrap_or(false)
    }

    fn headers(&self) -> Headers<'a> {
        Headers { joined: self.value("headers"), lists: self.value("header_values") }
    }
}

/// The headers of a request or response. Names are compared case-insensitively.
#[derive(Clone, Copy, Debug)]
pub struct Headers<'a> {
    joined: Option<Value<'a>>,
    lists: Option<Value<'a>>,
}

impl<'a> Headers<'a> {
    /// Returns the value of a header. Multiple values are joined with `; ` for Cookie, otherwise
    /// with `, `.
    pub fn get(&self, name: &str) -> Option<Cow<'a, str>> {
        find(self.joined, name)?.as_str()
    }

    /// Returns each value of a header, for headers whose values cannot be joined, such as
    /// Set-Cookie.
    pub fn values(&self, name: &str) -> impl Iterator<Item = Cow<'a, str>> + use<'a> {
        let list = find(self.lists, name);
        let single = if list.is_some() { None } else { self.get(name) };
        list.into_iter().flat_map(Value::elements).filter_map(Value::as_str).chain(single)
    }

    /// Whether the header exists, even if it is empty.
    pub fn contains(&self, name: &str) -> bool {
        find(self.joined, name).is_some()
    }

    /// Returns names and values. Multiple values of a header are joined.
    pub fn iter(&self) -> impl Iterator<Item = (Cow<'a, str>, Cow<'a, str>)> + use<'a> {
        let members = self.joined.into_iter().flat_map(Value::members);
        members.filter_map(|(key, value)| Some((key.as_str(), value.as_str()?)))
    }
}

fn find<'a>(object: Option<Value<'a>>, name: &str) -> Option<Value<'a>> {
    let named = object?.members().filter(|(key, _)| key.is_ignoring_case(name));
    named.last().map(|(_, value)| value)
}

/// Getters of text fields: `""` if the field is missing.
macro_rules! texts {
    ($($(#[$meta:meta])* $name:ident),+ $(,)?) => {
        $($(#[$meta])* pub fn $name(&self) -> &str {
            self.fields.text(stringify!($name)).unwrap_or_default()
        })+
    };
}

/// Getters of optional text fields.
macro_rules! optional_texts {
    ($($(#[$meta:meta])* $name:ident),+ $(,)?) => {
        $($(#[$meta])* pub fn $name(&self) -> Option<&str> {
            self.fields.text(stringify!($name))
        })+
    };
}

/// The getters that request and response bodies share.
macro_rules! body {
    ($so_far:literal) => {
        /// The text of this chunk, or `None` if its bytes are not valid UTF-8.
        pub fn text(&self) -> Option<&str> {
            if self.is_base64() { None } else { Some(self.fields.text("body").unwrap_or_default()) }
        }

        /// The bytes of this chunk, or `None` if the agent sent invalid base64.
        pub fn bytes(&self) -> Option<Cow<'_, [u8]>> {
            let body = self.fields.text("body").unwrap_or_default();
            if self.is_base64() { base64::decode(body).map(Cow::Owned) } else { Some(Cow::Borrowed(body.as_bytes())) }
        }

        /// The index of this chunk, from 0.
        pub fn chunk_index(&self) -> u64 {
            self.fields.number("chunk_index").unwrap_or(0)
        }

        /// Whether this is the last chunk of the body.
        pub fn is_last(&self) -> bool {
            self.fields.flag("is_last")
        }

        /// The size of the whole body in bytes, if known.
        pub fn total_size(&self) -> Option<u64> {
            self.fields.number("total_size")
        }

        /// The number of bytes of the body so far, including this chunk.
        pub fn bytes_so_far(&self) -> u64 {
            self.fields.number($so_far).unwrap_or(0)
        }

        fn is_base64(&self) -> bool {
            self.fields.text("body_encoding") == Some("base64")
        }
    };
}

/// A request whose headers have arrived.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    fields: Fields<'a>,
}

impl<'a> Request<'a> {
    /// Parses the agent's JSON.
    ///
    /// # Errors
    ///
    /// Fails if `json` is not a JSON object.
    pub fn parse(json: &'a str) -> Result<Self, json::Error> {
        Fields::parse(json).map(|fields| Self { fields })
    }

    texts! {
        /// The method, such as `GET`.
        method,
        /// The path and query, as the client sent them.
        uri,
        /// The client's address, without a port.
        client_ip,
        /// Identifies the request in logs. The client may have chosen it.
        correlation_id,
    }

    optional_texts! {
        /// The protocol, such as `HTTP/1.1`.
        protocol,
        /// The server name, from TLS or the Host header.
        server_name,
        /// The proxy's own id of the request.
        request_id,
        /// The route that matched.
        route_id,
        /// The selected upstream.
        upstream_id,
        /// The time when the request arrived (RFC 3339).
        timestamp,
        /// The W3C trace context.
        traceparent,
        /// The TLS version.
        tls_version,
    }

    /// The path: the URI without the query.
    pub fn path(&self) -> &str {
        self.uri().split('?').next().unwrap_or_default()
    }

    /// The query, without the question mark.
    pub fn query(&self) -> Option<&str> {
        self.uri().split_once('?').map(|(_, query)| query)
    }

    /// The client's port.
    pub fn client_port(&self) -> Option<u64> {
        self.fields.number("client_port")
    }

    /// The headers.
    pub fn headers(&self) -> Headers<'a> {
        self.fields.headers()
    }

    /// The value of a header. See [`Headers::get`].
    pub fn header(&self, name: &str) -> Option<Cow<'a, str>> {
        self.headers().get(name)
    }
}

/// A chunk of a request body. It dereferences to its request, as far as the agent knows it.
#[derive(Clone, Debug)]
pub struct RequestBody<'a>(Request<'a>);

impl<'a> RequestBody<'a> {
    /// Parses the agent's JSON.
    ///
    /// # Errors
    ///
    /// Fails if `json` is not a JSON object.
    pub fn parse(json: &'a str) -> Result<Self, json::Error> {
        Request::parse(json).map(Self)
    }

    body!("bytes_received");
}

impl<'a> Deref for RequestBody<'a> {
    type Target = Request<'a>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

/// A response whose headers have arrived.
#[derive(Clone, Debug)]
pub struct Response<'a> {
    fields: Fields<'a>,
}

impl<'a> Response<'a> {
    /// Parses the agent's JSON.
    ///
    /// # Errors
    ///
    /// Fails if `json` is not a JSON object.
    pub fn parse(json: &'a str) -> Result<Self, json::Error> {
        Fields::parse(json).map(|fields| Self { fields })
    }

    texts! {
        /// Identifies the request in logs. The client may have chosen it.
        correlation_id,
    }

    optional_texts! {
        /// The method of the request, if the agent knows it.
        method,
        /// The path and query of the request, if the agent knows them.
        uri,
        /// The client's address, if the agent knows it.
        client_ip,
    }

    /// The status code.
    pub fn status(&self) -> u16 {
        self.fields.number("status").and_then(|status| u16::try_from(status).ok()).unwrap_or(0)
    }

    /// The headers.
    pub fn headers(&self) -> Headers<'a> {
        self.fields.headers()
    }

    /// The value of a header. See [`Headers::get`].
    pub fn header(&self, name: &str) -> Option<Cow<'a, str>> {
        self.headers().get(name)
    }
}

/// A chunk of a response body. It dereferences to its response, as far as the agent knows it.
#[derive(Clone, Debug)]
pub struct ResponseBody<'a>(Response<'a>);

impl<'a> ResponseBody<'a> {
    /// Parses the agent's JSON.
    ///
    /// # Errors
    ///
    /// Fails if `json` is not a JSON object.
    pub fn parse(json: &'a str) -> Result<Self, json::Error> {
        Response::parse(json).map(Self)
    }

    body!("bytes_sent");
}

impl<'a> Deref for ResponseBody<'a> {
    type Target = Response<'a>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

/// A WebSocket frame.
#[derive(Clone, Debug)]
pub struct WebsocketFrame<'a> {
    fields: Fields<'a>,
}

/// The opcode of a WebSocket frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opcode {
    /// The next part of a fragmented message.
    Continuation,
    /// A text message.
    Text,
    /// A binary message.
    Binary,
    /// Closes the connection.
    Close,
    /// A ping.
    Ping,
    /// A pong, the answer to a ping.
    Pong,
}

/// The direction of a WebSocket frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the client to the server.
    ToServer,
    /// From the server to the client.
    ToClient,
}

impl<'a> WebsocketFrame<'a> {
    /// Parses the agent's JSON.
    ///
    /// # Errors
    ///
    /// Fails if `json` is not a JSON object.
    pub fn parse(json: &'a str) -> Result<Self, json::Error> {
        Fields::parse(json).map(|fields| Self { fields })
    }

    texts! {
        /// Identifies the upgraded request in logs. The client may have chosen it.
        correlation_id,
        /// The client's address.
        client_ip,
    }

    optional_texts! {
        /// The route that matched.
        route_id,
    }

    /// The opcode, if it is a known one.
    pub fn opcode(&self) -> Option<Opcode> {
        Some(match self.fields.text("opcode")? {
            "continuation" => Opcode::Continuation,
            "text" => Opcode::Text,
            "binary" => Opcode::Binary,
            "close" => Opcode::Close,
            "ping" => Opcode::Ping,
            "pong" => Opcode::Pong,
            _ => return None,
        })
    }

    /// The direction of the frame.
    pub fn direction(&self) -> Direction {
        if self.fields.flag("client_to_server") { Direction::ToServer } else { Direction::ToClient }
    }

    /// The index of this frame in its direction, from 0.
    pub fn frame_index(&self) -> u64 {
        self.fields.number("frame_index").unwrap_or(0)
    }

    /// Whether this is the last frame of a message.
    pub fn is_final(&self) -> bool {
        self.fields.flag("fin")
    }

    /// The text of the payload, or `None` if its bytes are not valid UTF-8.
    pub fn text(&self) -> Option<&str> {
        if self.is_base64() { None } else { Some(self.fields.text("data").unwrap_or_default()) }
    }

    /// The bytes of the payload, or `None` if the agent sent invalid base64.
    pub fn bytes(&self) -> Option<Cow<'_, [u8]>> {
        let data = self.fields.text("data").unwrap_or_default();
        if self.is_base64() { base64::decode(data).map(Cow::Owned) } else { Some(Cow::Borrowed(data.as_bytes())) }
    }

    fn is_base64(&self) -> bool {
        self.fields.text("data_encoding") == Some("base64")
    }
}

/// Text to inspect for prompt injection or personal data.
#[derive(Clone, Debug)]
pub struct Guardrail<'a> {
    fields: Fields<'a>,
}

/// The kind of a guardrail inspection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InspectionKind {
    /// Attempts to override the instructions of a language model.
    PromptInjection,
    /// Personal data.
    PiiDetection,
}

impl<'a> Guardrail<'a> {
    /// Parses the agent's JSON.
    ///
    /// # Errors
    ///
    /// Fails if `json` is not a JSON object.
    pub fn parse(json: &'a str) -> Result<Self, json::Error> {
        Fields::parse(json).map(|fields| Self { fields })
    }

    texts! {
        /// Identifies the request in logs. The client may have chosen it.
        correlation_id,
        /// The text to inspect.
        content,
    }

    optional_texts! {
        /// The language model that receives or produced the text.
        model,
        /// The route that matched.
        route_id,
    }

    /// The kind of inspection, if it is a known one.
    pub fn kind(&self) -> Option<InspectionKind> {
        Some(match self.fields.text("inspection_type")? {
            "prompt_injection" => InspectionKind::PromptInjection,
            "pii_detection" => InspectionKind::PiiDetection,
            _ => return None,
        })
    }

    /// The categories of personal data to look for, such as `email`.
    pub fn categories(&self) -> impl Iterator<Item = Cow<'a, str>> + use<'a> {
        self.fields.value("categories").into_iter().flat_map(Value::elements).filter_map(Value::as_str)
    }

    /// A field of the metadata.
    pub fn metadata(&self, name: &str) -> Option<Cow<'a, str>> {
        self.fields.value("metadata")?.get(name)?.as_str()
    }
}

/// The end of a request.
#[derive(Clone, Debug)]
pub struct Completion<'a> {
    fields: Fields<'a>,
}

impl<'a> Completion<'a> {
    /// Parses the agent's JSON.
    ///
    /// # Errors
    ///
    /// Fails if `json` is not a JSON object.
    pub fn parse(json: &'a str) -> Result<Self, json::Error> {
        Fields::parse(json).map(|fields| Self { fields })
    }

    texts! {
        /// Identifies the request in logs. The client may have chosen it.
        correlation_id,
    }

    optional_texts! {
        /// The error, if there was one.
        error,
    }

    /// The status code that the client received.
    pub fn status(&self) -> u16 {
        self.fields.number("status").and_then(|status| u16::try_from(status).ok()).unwrap_or(0)
    }

    /// The duration of the request, in milliseconds.
    pub fn duration_ms(&self) -> u64 {
        self.fields.number("duration_ms").unwrap_or(0)
    }

    /// The size of the request body in bytes.
    pub fn request_body_size(&self) -> u64 {
        self.fields.number("request_body_size").unwrap_or(0)
    }

    /// The size of the response body in bytes.
    pub fn response_body_size(&self) -> u64 {
        self.fields.number("response_body_size").unwrap_or(0)
    }

    /// The number of attempts to reach an upstream.
    pub fn upstream_attempts(&self) -> u64 {
        self.fields.number("upstream_attempts").unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOLDEN: &str = include_str!("../../../crates/guest-json/golden/request.json");

    #[test]
    fn reads_the_golden_request() {
        let request = Request::parse(GOLDEN).unwrap();
        assert_eq!(request.method(), "GET");
        assert_eq!(request.uri(), "/api/users?page=1");
        assert_eq!(request.path(), "/api/users");
        assert_eq!(request.query(), Some("page=1"));
        assert_eq!(request.client_ip(), "192.168.1.100");
        assert_eq!(request.correlation_id(), "abc123");
        assert_eq!(request.header("content-TYPE").as_deref(), Some("application/json"));
        assert_eq!(request.header("Accept"), None);
        assert_eq!(request.headers().iter().count(), 2);
        assert_eq!(request.tls_version(), None);
    }

    #[test]
    fn borrows_text_from_the_json() {
        let request = Request::parse(GOLDEN).unwrap();
        assert!(matches!(request.header("User-Agent"), Some(Cow::Borrowed("Mozilla/5.0..."))));
        assert!(GOLDEN.as_bytes().as_ptr_range().contains(&request.uri().as_ptr()));
    }

    #[test]
    fn reads_objects_of_unexpected_shape() {
        let json = r#" {"x":[{"y":[]}],"headers":{"\u0055ser-agent":"a\"b","X":null},"ur\u0069":"\/admin","uri":"\/a","method":1,
            "client_port":1e400,"header_values":[]} "#;
        let request = Request::parse(json).unwrap();
        assert_eq!(request.uri(), "/a");
        assert_eq!(request.method(), "");
        assert_eq!(request.client_port(), None);
        assert_eq!(request.header("user-agent").as_deref(), Some("a\"b"));
        assert_eq!(request.header("x"), None);
        assert!(request.headers().contains("x"));
        assert_eq!(request.headers().values("X").count(), 0);
        assert!(Request::parse("{}").unwrap().headers().get("a").is_none());
        for json in ["", "[]", "null", "{", "{\"a\":1}x", "{\"a\":1,}", "{1:1}"] {
            assert!(Request::parse(json).is_err(), "{json:?} was accepted");
        }
    }

    #[test]
    fn returns_header_values_joined_and_as_a_list() {
        let json = r#"{"status":200,"headers":{"Set-Cookie":"a=1, b=2","Via":"x"},"header_values":{"Set-Cookie":["a=1","b=2"]}}"#;
        let response = Response::parse(json).unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.header("set-cookie").as_deref(), Some("a=1, b=2"));
        assert_eq!(response.headers().values("set-cookie").collect::<Vec<_>>(), ["a=1", "b=2"]);
        assert_eq!(response.headers().values("via").collect::<Vec<_>>(), ["x"]);
        assert_eq!(response.headers().values("none").count(), 0);
    }

    #[test]
    fn bodies_are_text_or_bytes_and_include_their_request() {
        let json = r#"{"method":"POST","body":"a\nb","body_encoding":"utf-8","chunk_index":1,"is_last":true,"total_size":null,"bytes_received":7}"#;
        let body = RequestBody::parse(json).unwrap();
        assert_eq!(body.method(), "POST");
        assert_eq!(body.text(), Some("a\nb"));
        assert_eq!(body.bytes().as_deref(), Some(&b"a\nb"[..]));
        assert_eq!((body.chunk_index(), body.is_last(), body.total_size(), body.bytes_so_far()), (1, true, None, 7));

        let body = ResponseBody::parse(r#"{"status":200,"body":"/wA=","body_encoding":"base64","bytes_sent":2}"#).unwrap();
        assert_eq!(body.status(), 200);
        assert_eq!(body.text(), None);
        assert_eq!(body.bytes().as_deref(), Some(&[0xff, 0][..]));
        assert!(!body.is_last());
        assert_eq!(body.bytes_so_far(), 2);
        assert_eq!(ResponseBody::parse(r#"{"body":"*","body_encoding":"base64"}"#).unwrap().bytes(), None);
    }

    #[test]
    fn reads_frames_inspections_and_completions() {
        let frame = WebsocketFrame::parse(
            r#"{"opcode":"text","data":"hi","data_encoding":"utf-8","client_to_server":true,"frame_index":3,"fin":true,"client_ip":"::1"}"#,
        )
        .unwrap();
        assert_eq!(frame.opcode(), Some(Opcode::Text));
        assert_eq!(frame.direction(), Direction::ToServer);
        assert_eq!((frame.frame_index(), frame.is_final(), frame.text()), (3, true, Some("hi")));

        let guardrail =
            Guardrail::parse(r#"{"inspection_type":"pii_detection","content":"x","categories":["ssn","email"],"metadata":{"a":"b"}}"#)
                .unwrap();
        assert_eq!(guardrail.kind(), Some(InspectionKind::PiiDetection));
        assert_eq!(guardrail.categories().collect::<Vec<_>>(), ["ssn", "email"]);
        assert_eq!(guardrail.metadata("a").as_deref(), Some("b"));

        let completion = Completion::parse(r#"{"status":504,"duration_ms":31,"upstream_attempts":2,"error":"timeout"}"#).unwrap();
        assert_eq!((completion.status(), completion.duration_ms()), (504, 31));
        assert_eq!((completion.upstream_attempts(), completion.error()), (2, Some("timeout")));
    }
}
