//! Writes the JSON object that a hook is given, directly from the event.
//!
//! The object of a later hook repeats fields of the request's earlier events. [`Context`] keeps
//! them as JSON, so that they only need to be copied.

use zentinel_wasm_contract::event::{
    BodyChunk, BodyError, Data, GuardrailInspect, Headers, RequestComplete, RequestHeaders, ResponseHeaders, WebsocketFrame,
};
use zentinel_wasm_contract::header::{self, HeaderCase};
use zentinel_wasm_contract::json::{escaped, field, key, optional_field, plain_field, string};

/// The fields of a request that its later hooks are given, as JSON without the braces.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Context {
    /// The whole request object, for `on_request_body`.
    pub request: Box<[u8]>,
    /// `method`, `uri` and `client_ip`, for the response hooks.
    pub brief: Box<[u8]>,
    /// `status`, `headers` and `header_values` of the response, for `on_response_body`. Empty until
    /// the response is known.
    pub response: Box<[u8]>,
}

impl Context {
    /// Memory that the fields take, in bytes.
    pub fn size(&self) -> usize {
        self.request.len() + self.brief.len() + self.response.len()
    }
}

/// Writes the request object.
pub fn request(out: &mut Vec<u8>, event: &RequestHeaders<'_>, case: HeaderCase) {
    out.push(b'{');
    let metadata = &event.metadata;
    let (ip, port) = address(&metadata.client_ip, metadata.client_port);
    field(out, "method", &event.method);
    field(out, "uri", &event.uri);
    field(out, "client_ip", ip);
    field(out, "correlation_id", &metadata.correlation_id);
    headers(out, &event.headers, case);
    optional_field(out, "protocol", metadata.protocol.as_deref());
    optional_field(out, "server_name", metadata.server_name.as_deref());
    if let Some(port) = port {
        plain_field(out, "client_port", port);
    }
    optional_field(out, "request_id", metadata.request_id.as_deref());
    optional_field(out, "route_id", metadata.route_id.as_deref());
    optional_field(out, "upstream_id", metadata.upstream_id.as_deref());
    optional_field(out, "timestamp", metadata.timestamp.as_deref());
    optional_field(out, "traceparent", metadata.traceparent.as_deref());
    optional_field(out, "tls_version", metadata.tls_version.as_deref());
    out.push(b'}');
}

/// The fields for later hooks, given the object that [`request`] wrote.
pub fn context(event: &RequestHeaders<'_>, object: &[u8]) -> Context {
    let mut brief = Vec::new();
    field(&mut brief, "method", &event.method);
    field(&mut brief, "uri", &event.uri);
    field(&mut brief, "client_ip", address(&event.metadata.client_ip, 0).0);
    Context { request: inside(object).into(), brief: brief.into(), response: Box::default() }
}

/// Writes the response object.
pub fn response(out: &mut Vec<u8>, event: &ResponseHeaders<'_>, context: Option<&Context>, case: HeaderCase) {
    out.push(b'{');
    field(out, "correlation_id", &event.correlation_id);
    response_fields(out, event, case);
    fields(out, context.map(|context| &context.brief));
    out.push(b'}');
}

/// The fields of a response for `on_response_body`.
pub fn response_context(event: &ResponseHeaders<'_>, case: HeaderCase) -> Box<[u8]> {
    let mut out = Vec::new();
    response_fields(&mut out, event, case);
    out.into()
}

fn response_fields(out: &mut Vec<u8>, event: &ResponseHeaders<'_>, case: HeaderCase) {
    plain_field(out, "status", event.status);
    headers(out, &event.headers, case);
}

/// Writes the object of a chunk of a request body.
///
/// # Errors
///
/// The chunk is larger than `limit` bytes, or invalid base64.
pub fn request_body(out: &mut Vec<u8>, event: &BodyChunk<'_>, context: Option<&Context>, limit: usize) -> Result<(), BodyError> {
    out.push(b'{');
    match context {
        // The fields of the request contain the id.
        Some(context) => fields(out, Some(&context.request)),
        None => field(out, "correlation_id", &event.correlation_id),
    }
    body(out, event, limit)?;
    plain_field(out, "bytes_received", event.bytes_received.unwrap_or(0));
    out.push(b'}');
    Ok(())
}

/// Writes the object of a chunk of a response body.
///
/// # Errors
///
/// The chunk is larger than `limit` bytes, or invalid base64.
pub fn response_body(out: &mut Vec<u8>, event: &BodyChunk<'_>, context: Option<&Context>, limit: usize) -> Result<(), BodyError> {
    out.push(b'{');
    field(out, "correlation_id", &event.correlation_id);
    fields(out, context.map(|context| &context.brief));
    fields(out, context.map(|context| &context.response));
    body(out, event, limit)?;
    plain_field(out, "bytes_sent", event.bytes_sent.unwrap_or(0));
    out.push(b'}');
    Ok(())
}

/// Writes the object of a WebSocket frame.
///
/// # Errors
///
/// The payload is larger than `limit` bytes, or invalid base64.
pub fn websocket_frame(out: &mut Vec<u8>, event: &WebsocketFrame<'_>, limit: usize) -> Result<(), BodyError> {
    out.push(b'{');
    field(out, "correlation_id", &event.correlation_id);
    field(out, "opcode", &event.opcode);
    data(out, ["data", "data_encoding"], &event.data, limit)?;
    plain_field(out, "client_to_server", event.client_to_server);
    plain_field(out, "frame_index", event.frame_index);
    plain_field(out, "fin", event.fin);
    optional_field(out, "route_id", event.route_id.as_deref());
    field(out, "client_ip", address(&event.client_ip, 0).0);
    out.push(b'}');
    Ok(())
}

/// Writes the object of a guardrail inspection.
///
/// # Errors
///
/// The text is larger than `limit` bytes.
pub fn guardrail_inspect(out: &mut Vec<u8>, event: &GuardrailInspect<'_>, limit: usize) -> Result<(), BodyError> {
    BodyError::check(event.content.len(), limit)?;
    out.push(b'{');
    field(out, "correlation_id", &event.correlation_id);
    field(out, "inspection_type", &event.inspection_type);
    field(out, "content", &event.content);
    optional_field(out, "model", event.model.as_deref());
    key(out, "categories");
    out.push(b'[');
    for (at, category) in event.categories.iter().enumerate() {
        if at > 0 {
            out.push(b',');
        }
        string(out, category);
    }
    out.push(b']');
    optional_field(out, "route_id", event.route_id.as_deref());
    key(out, "metadata");
    out.push(b'{');
    for (at, (name, value)) in event.metadata.0.iter().enumerate() {
        if at > 0 {
            out.push(b',');
        }
        string(out, name);
        out.push(b':');
        string(out, value);
    }
    out.extend_from_slice(b"}}");
    Ok(())
}

/// Writes the object of a completed request.
pub fn request_complete(out: &mut Vec<u8>, event: &RequestComplete<'_>) {
    out.push(b'{');
    field(out, "correlation_id", &event.correlation_id);
    plain_field(out, "status", event.status);
    plain_field(out, "duration_ms", event.duration_ms);
    plain_field(out, "request_body_size", event.request_body_size);
    plain_field(out, "response_body_size", event.response_body_size);
    plain_field(out, "upstream_attempts", event.upstream_attempts);
    optional_field(out, "error", event.error.as_deref());
    out.push(b'}');
}

/// The fields of a JSON object without its braces.
fn inside(object: &[u8]) -> &[u8] {
    object.strip_prefix(b"{").and_then(|rest| rest.strip_suffix(b"}")).unwrap_or_default()
}

/// Appends fields that are JSON already.
fn fields(out: &mut Vec<u8>, fields: Option<impl AsRef<[u8]>>) {
    if let Some(fields) = fields.as_ref().map(AsRef::as_ref)
        && !fields.is_empty()
    {
        if out.last() != Some(&b'{') {
            out.push(b',');
        }
        out.extend_from_slice(fields);
    }
}

/// Appends `headers`, and `header_values` for those with several values, because a joined line does
/// not show where a value ends.
fn headers(out: &mut Vec<u8>, headers: &Headers<'_>, case: HeaderCase) {
    // A name that begins with a colon is not a header (RFC 9113, 8.3). Proxies up to 0.6.45 send
    // `:method` and `:path` among the headers.
    let real = || headers.0.iter().filter(|(name, _)| !name.starts_with(':'));
    let name_of = |out: &mut Vec<u8>, name: &str| {
        if out.last() != Some(&b'{') {
            out.push(b',');
        }
        out.push(b'"');
        header::write_name(out, name, case);
        out.extend_from_slice(b"\":");
    };

    let mut several = false;
    key(out, "headers");
    out.push(b'{');
    for (name, values) in real() {
        name_of(out, name);
        if let [value] = values.as_slice() {
            string(out, value);
            continue;
        }
        several |= values.as_slice().len() > 1;
        out.push(b'"');
        for (at, value) in values.as_slice().iter().enumerate() {
            if at > 0 {
                out.extend_from_slice(header::separator(name).as_bytes());
            }
            escaped(out, value);
        }
        out.push(b'"');
    }
    out.push(b'}');
    if !several {
        return;
    }
    key(out, "header_values");
    out.push(b'{');
    for (name, values) in real().filter(|(_, values)| values.as_slice().len() > 1) {
        name_of(out, name);
        out.push(b'[');
        for (at, value) in values.as_slice().iter().enumerate() {
            if at > 0 {
                out.push(b',');
            }
            string(out, value);
        }
        out.push(b']');
    }
    out.push(b'}');
}

fn body(out: &mut Vec<u8>, event: &BodyChunk<'_>, limit: usize) -> Result<(), BodyError> {
    data(out, ["body", "body_encoding"], &event.data, limit)?;
    plain_field(out, "chunk_index", event.chunk_index);
    plain_field(out, "is_last", event.is_last);
    match event.total_size {
        Some(size) => plain_field(out, "total_size", size),
        None => plain_field(out, "total_size", "null"),
    }
    Ok(())
}

/// Appends bytes as text if they are UTF-8, else as base64, and the name of the encoding.
fn data(out: &mut Vec<u8>, [name, encoding]: [&str; 2], data: &Data<'_>, limit: usize) -> Result<(), BodyError> {
    let bytes = data.bytes(limit)?;
    match simdutf8::basic::from_utf8(&bytes) {
        Ok(text) => {
            field(out, name, text);
            field(out, encoding, "utf-8");
        }
        Err(_) => {
            key(out, name);
            out.push(b'"');
            match data {
                Data::Base64(text) => out.extend_from_slice(text.as_bytes()),
                Data::Raw(bytes) => base64_simd::STANDARD.encode_append(bytes, out),
            }
            out.push(b'"');
            field(out, encoding, "base64");
        }
    }
    Ok(())
}

/// Splits an address into IP and port: `192.0.2.1:80`, `[2001:db8::1]:80`, `[2001:db8::1]`, or an
/// address alone. `port` takes precedence, unless it is 0.
fn address(text: &str, port: u32) -> (&str, Option<u32>) {
    let given = Some(port).filter(|&port| port != 0);
    let (ip, inline) = if let Some(rest) = text.strip_prefix('[') {
        match rest.split_once(']') {
            Some((ip, rest)) => (ip, rest.strip_prefix(':')),
            None => (text, None),
        }
    } else {
        match text.split_once(':') {
            // With a second colon this is an IPv6 address, which has no port without brackets.
            Some((ip, rest)) if !rest.contains(':') => (ip, Some(rest)),
            _ => (text, None),
        }
    };
    let inline = inline.and_then(|port| port.parse::<u16>().ok()).filter(|&port| port != 0).map(u32::from);
    (ip, given.or(inline))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};
    use zentinel_wasm_contract::event::HeaderValues;

    fn request_object(event: &str, case: HeaderCase) -> Value {
        let event: RequestHeaders<'_> = serde_json::from_str(event).unwrap();
        let mut out = Vec::new();
        request(&mut out, &event, case);
        serde_json::from_slice(&out).unwrap()
    }

    const PAGE_EVENT: &str = r#"{
        "metadata": {"correlation_id": "abc123", "request_id": "r", "client_ip": "192.168.1.100:4711", "client_port": 0, "server_name": null,
                     "protocol": "HTTP/1.1", "tls_version": null, "tls_cipher": null, "route_id": "all", "upstream_id": null,
                     "timestamp": "2026-01-01T00:00:00Z"},
        "correlation_id": "abc123", "method": "GET", "uri": "/api/users?page=1",
        "headers": {":method": ["GET"], "content-type": ["application/json"], "user-agent": ["Mozilla/5.0..."]}
    }"#;

    #[test]
    fn writes_the_request_object_of_the_product_page() {
        let object = request_object(PAGE_EVENT, HeaderCase::Canonical);
        let golden: Value = serde_json::from_str(include_str!("../golden/request.json")).unwrap();
        for (name, value) in golden.as_object().unwrap() {
            assert_eq!(&object[name], value, "{name}");
        }
        assert_eq!(object["client_port"], 4711);
        assert_eq!(object["route_id"], "all");
        for unknown in ["server_name", "upstream_id", "tls_version", "traceparent", "header_values"] {
            assert!(object.get(unknown).is_none(), "{unknown}");
        }
    }

    #[test]
    fn keeps_header_names_as_received() {
        let object = request_object(PAGE_EVENT, HeaderCase::Lower);
        assert_eq!(object["headers"], json!({"content-type": "application/json", "user-agent": "Mozilla/5.0..."}));
    }

    #[test]
    fn joins_and_lists_several_values() {
        let event: ResponseHeaders<'_> = serde_json::from_str(
            r#"{"correlation_id":"c","status":200,"headers":{"set-cookie":["a=1","b=\"2\""],"cookie":["x","y"],"age":["1"],"vary":[]}}"#,
        )
        .unwrap();
        let mut out = Vec::new();
        response(&mut out, &event, None, HeaderCase::Canonical);
        assert_eq!(
            serde_json::from_slice::<Value>(&out).unwrap(),
            json!({
                "correlation_id": "c", "status": 200,
                "headers": {"Set-Cookie": "a=1, b=\"2\"", "Cookie": "x; y", "Age": "1", "Vary": ""},
                "header_values": {"Set-Cookie": ["a=1", "b=\"2\""], "Cookie": ["x", "y"]},
            })
        );
    }

    #[test]
    fn later_hooks_get_fields_of_their_request() {
        let event: RequestHeaders<'_> = serde_json::from_str(PAGE_EVENT).unwrap();
        let mut object = Vec::new();
        request(&mut object, &event, HeaderCase::Canonical);
        let mut context = context(&event, &object);

        let chunk: BodyChunk<'_> =
            serde_json::from_str(r#"{"correlation_id":"abc123","data":"aGk=","is_last":true,"total_size":null,"bytes_received":2}"#)
                .unwrap();
        let mut out = Vec::new();
        request_body(&mut out, &chunk, Some(&context), 100).unwrap();
        let value: Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(value["uri"], "/api/users?page=1");
        assert_eq!(value["headers"]["User-Agent"], "Mozilla/5.0...");
        assert_eq!(value["body"], "hi");
        assert_eq!(value["total_size"], Value::Null);

        let head: ResponseHeaders<'_> =
            serde_json::from_str(r#"{"correlation_id":"abc123","status":404,"headers":{"etag":["x"]}}"#).unwrap();
        let mut out = Vec::new();
        response(&mut out, &head, Some(&context), HeaderCase::Canonical);
        let value: Value = serde_json::from_slice(&out).unwrap();
        assert_eq!((&value["status"], &value["method"], &value["client_ip"]), (&json!(404), &json!("GET"), &json!("192.168.1.100")));

        context.response = response_context(&head, HeaderCase::Canonical);
        let mut out = Vec::new();
        response_body(&mut out, &chunk, Some(&context), 100).unwrap();
        assert_eq!(
            serde_json::from_slice::<Value>(&out).unwrap(),
            json!({
                "correlation_id": "abc123", "method": "GET", "uri": "/api/users?page=1", "client_ip": "192.168.1.100", "status": 404,
                "headers": {"ETag": "x"}, "body": "hi", "body_encoding": "utf-8", "chunk_index": 0, "is_last": true, "total_size": null,
                "bytes_sent": 0,
            })
        );
    }

    #[test]
    fn bytes_that_are_no_text_stay_base64() {
        let chunk = BodyChunk {
            correlation_id: "c".into(),
            data: Data::Raw(b"\xff\x00"),
            is_last: false,
            total_size: Some(2),
            chunk_index: 3,
            bytes_received: Some(2),
            bytes_sent: None,
        };
        let mut out = Vec::new();
        request_body(&mut out, &chunk, None, 2).unwrap();
        assert_eq!(
            serde_json::from_slice::<Value>(&out).unwrap(),
            json!({"correlation_id": "c", "body": "/wA=", "body_encoding": "base64", "chunk_index": 3, "is_last": false, "total_size": 2,
                   "bytes_received": 2})
        );
    }

    #[test]
    fn rejects_a_body_over_the_limit() {
        let chunk = |data| BodyChunk {
            correlation_id: "c".into(),
            data,
            is_last: true,
            total_size: None,
            chunk_index: 0,
            bytes_received: None,
            bytes_sent: None,
        };
        let mut out = Vec::new();
        assert_eq!(request_body(&mut out, &chunk(Data::Raw(b"123")), None, 2), Err(BodyError::TooLarge { size: 3, limit: 2 }));
        assert_eq!(response_body(&mut out, &chunk(Data::Base64("MTIz".into())), None, 2), Err(BodyError::TooLarge { size: 3, limit: 2 }));
        assert_eq!(response_body(&mut out, &chunk(Data::Base64("M".into())), None, 2), Err(BodyError::InvalidBase64));
        request_body(&mut out, &chunk(Data::Base64("MTI=".into())), None, 2).unwrap();
    }

    #[test]
    fn splits_addresses() {
        assert_eq!(address("192.0.2.1:80", 0), ("192.0.2.1", Some(80)));
        assert_eq!(address("192.0.2.1", 81), ("192.0.2.1", Some(81)));
        assert_eq!(address("[2001:db8::1]:80", 0), ("2001:db8::1", Some(80)));
        assert_eq!(address("[2001:db8::1]", 0), ("2001:db8::1", None));
        assert_eq!(address("2001:db8::1", 0), ("2001:db8::1", None));
        assert_eq!(address("unknown", 0), ("unknown", None));
        assert_eq!(address("", 0), ("", None));
    }

    proptest! {
        #[test]
        fn writes_json_for_any_event(
            method in any::<String>(),
            name in any::<String>(),
            values in proptest::collection::vec(any::<String>(), 0..3),
        ) {
            let event = RequestHeaders {
                metadata: serde_json::from_str(r#"{"correlation_id":"c"}"#).unwrap(),
                method: method.as_str().into(),
                uri: name.as_str().into(),
                headers: Headers(vec![(name.as_str().into(), HeaderValues::Many(values.iter().map(|v| v.as_str().into()).collect()))]),
            };
            let mut out = Vec::new();
            request(&mut out, &event, HeaderCase::Canonical);
            let object: Value = serde_json::from_slice(&out).unwrap();
            prop_assert_eq!(&object["method"], &json!(method));
        }

        #[test]
        fn any_bytes_arrive_unchanged(bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
            let mut out = b"{".to_vec();
            data(&mut out, ["body", "body_encoding"], &Data::Raw(&bytes), 100).unwrap();
            out.push(b'}');
            let object: Value = serde_json::from_slice(&out).unwrap();
            let text = object["body"].as_str().unwrap();
            let is_text = object["body_encoding"] == "utf-8";
            let back = if is_text { text.as_bytes().to_vec() } else { base64_simd::STANDARD.decode_to_vec(text).unwrap() };
            prop_assert_eq!(back, bytes);
        }
    }
}
