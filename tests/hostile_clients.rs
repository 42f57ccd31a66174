//! Misbehaving clients of the socket. Whatever they send or leave out, the agent survives, other
//! clients are served, and a blocked request is never answered with an allow.

#[path = "common/short_timeouts.rs"]
mod short_timeouts;

use std::collections::HashMap;

use rustix::process::Signal;
use serde_json::{Value, json};
use short_timeouts::LOGGED_TIMEOUT;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use testkit::{Agent, Connection, Program, Stop, decision, frame, id_of, kind, module, module_error, wait_for};

const AGENT: Program = Program(env!("CARGO_BIN_EXE_zentinel-wasm-agent"));

/// Every hook that is called for an event.
const EVENT_HOOKS: [&str; 7] = [
    "on_request_headers",
    "on_request_body",
    "on_response_headers",
    "on_response_body",
    "on_request_complete",
    "on_websocket_frame",
    "on_guardrail_inspect",
];

/// A deadline that calls meet on a busy machine too.
const AMPLE: [&str; 2] = ["--timeout-ms", "20000"];

/// Starts the agent with a module made from `wat`.
fn serve(wat: &str, options: &[&str]) -> (Agent, TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let module = module::write(folder.path(), "m.wasm", wat);
    (AGENT.start(&module, options), folder)
}

/// Starts the agent with a [`module::judging`].
fn agent(options: &[&str]) -> (Agent, TempDir) {
    serve(&module::judging(), &[&AMPLE[..], options].concat())
}

/// Starts the agent with a module that allows every event, so whatever reaches it is allowed.
fn lenient(options: &[&str]) -> (Agent, TempDir) {
    serve(&module::answering(&EVENT_HOOKS, r#"{"tags":["good"]}"#), &[&AMPLE[..], options].concat())
}

#[track_caller]
fn assert_good(answer: &Value) {
    assert_eq!(answer["audit"]["tags"], json!(["good"]), "{answer}");
}

#[track_caller]
fn assert_serves(connection: &mut Connection) {
    let answer = connection.get("still-there", "/");
    assert_eq!(id_of(&answer), "still-there");
    assert_good(&answer);
}

/// Waits until the agent has closed the connection.
#[track_caller]
fn assert_closed(connection: &mut Connection) {
    while connection.receive_raw().is_some() {}
}

fn event(payload: &Value) -> Vec<u8> {
    frame(kind::REQUEST_HEADERS, &serde_json::to_vec(payload).unwrap())
}

/// A valid event of each kind.
fn valid_events(id: &str) -> [(u8, Value); 7] {
    [
        (kind::REQUEST_HEADERS, testkit::request(id, "/")),
        (kind::REQUEST_BODY, testkit::request_body(id, "body")),
        (kind::RESPONSE_HEADERS, testkit::response(id, 200)),
        (kind::RESPONSE_BODY, testkit::response_body(id, "body")),
        (
            kind::REQUEST_COMPLETE,
            json!({
                "correlation_id": id, "status": 200, "duration_ms": 5, "request_body_size": 4, "response_body_size": 4, "upstream_attempts": 1,
                "error": null,
            }),
        ),
        (
            kind::WEBSOCKET_FRAME,
            json!({
                "correlation_id": id, "opcode": "text", "data": testkit::base64(b"hello"), "client_to_server": true, "frame_index": 0,
                "fin": true, "route_id": "all", "client_ip": "192.0.2.7",
            }),
        ),
        (
            kind::GUARDRAIL_INSPECT,
            json!({
                "correlation_id": id, "inspection_type": "pii_detection", "content": "hello", "model": "m", "categories": ["email"],
                "route_id": "all", "metadata": {"a": "b"},
            }),
        ),
    ]
}

fn replaced(mut event: Value, pointer: &str, value: Value) -> Value {
    *event.pointer_mut(pointer).unwrap() = value;
    event
}

/// The next answer, in any encoding. All of them have strings in the clear.
#[track_caller]
fn raw_answer(connection: &mut Connection) -> String {
    // Reports arrive all the time, so the read timeout never expires.
    let deadline = Instant::now() + testkit::PATIENCE;
    loop {
        assert!(Instant::now() < deadline, "no answer in time");
        if let (kind::AGENT_RESPONSE, payload) = connection.receive_raw().unwrap() {
            return String::from_utf8_lossy(&payload).into_owned();
        }
    }
}

/// Connects as a proxy that uses MessagePack.
#[track_caller]
fn connect_packed(agent: &Agent) -> Connection {
    let mut connection = Connection::open_silent(&agent.socket);
    connection.send(
        kind::HANDSHAKE_REQUEST,
        &json!({"supported_versions": [2], "proxy_version": "0.6.54", "supported_encodings": ["cbor", "msgpack", "json"]}),
    );
    let (_, handshake) = connection.receive().unwrap();
    assert_eq!(handshake["encoding"], "msgpack");
    connection
}

/// A value as MessagePack, with every length and number in its longest form.
fn packed(value: &Value) -> Vec<u8> {
    let begun = |kind: u8, length: usize| [&[kind][..], &(length as u32).to_be_bytes()].concat();
    match value {
        Value::Null => vec![0xc0],
        Value::Bool(value) => vec![0xc2 + u8::from(*value)],
        Value::Number(number) => match (number.as_u64(), number.as_i64()) {
            (Some(number), _) => [&[0xcf][..], &number.to_be_bytes()].concat(),
            (_, Some(number)) => [&[0xd3][..], &number.to_be_bytes()].concat(),
            _ => [&[0xcb][..], &number.as_f64().unwrap().to_be_bytes()].concat(),
        },
        Value::String(text) => [begun(0xdb, text.len()), text.clone().into_bytes()].concat(),
        Value::Array(values) => [begun(0xdd, values.len()), values.iter().flat_map(packed).collect()].concat(),
        Value::Object(fields) => {
            let fields: Vec<u8> = fields.iter().flat_map(|(name, value)| [packed(&json!(name)), packed(value)].concat()).collect();
            [begun(0xdf, value.as_object().unwrap().len()), fields].concat()
        }
    }
}

/// Sends events without reading an answer until the agent reads no more. Returns their number, and
/// the unsent rest of the last.
fn flood(connection: &Connection) -> (usize, Vec<u8>) {
    let mut writer = connection.writer();
    writer.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    for sent in 0..1_000_000 {
        let mut rest = event(&testkit::request(&format!("r{sent}"), "/"));
        while !rest.is_empty()
            && let Ok(count) = writer.write(&rest)
        {
            rest.drain(..count);
        }
        if !rest.is_empty() {
            writer.set_write_timeout(Some(testkit::PATIENCE)).unwrap();
            return (sent + 1, rest);
        }
    }
    panic!("the agent never stops reading");
}

mod handshake {
    use super::*;

    #[test]
    fn invalid_ones_close_their_connection_alone() {
        let (agent, _folder) = agent(&[]);
        let mut good = agent.connect();
        let handshake = |versions: &str| format!(r#"{{"supported_versions":{versions},"proxy_id":"x","proxy_version":"0.6.54"}}"#);
        for bytes in [
            b"GET / HTTP/1.1\r\nHost: agent\r\n\r\n".to_vec(),
            vec![0; 16],
            vec![0xff; 16],
            (16_u32 << 20 | 1).to_be_bytes().to_vec(),
            event(&testkit::request("a", "/")),
            frame(kind::HANDSHAKE_REQUEST, b""),
            frame(kind::HANDSHAKE_REQUEST, b"null"),
            frame(kind::HANDSHAKE_REQUEST, b"\xff"),
            frame(kind::HANDSHAKE_REQUEST, b"{\"supported_versions\":[2]"),
            frame(kind::HANDSHAKE_REQUEST, format!("{{\"supported_versions\":{}", "[".repeat(100_000)).as_bytes()),
            // MessagePack, which needs a handshake in JSON first.
            frame(kind::HANDSHAKE_REQUEST, b"\x81\xb2supported_versions\x91\x02"),
            frame(kind::HANDSHAKE_REQUEST, handshake("[]").as_bytes()),
            frame(kind::HANDSHAKE_REQUEST, handshake("[1]").as_bytes()),
            frame(kind::HANDSHAKE_REQUEST, handshake("[3, 4294967295]").as_bytes()),
            frame(kind::HANDSHAKE_REQUEST, handshake("[-2]").as_bytes()),
            frame(kind::HANDSHAKE_REQUEST, handshake("\"2\"").as_bytes()),
            frame(kind::HANDSHAKE_RESPONSE, handshake("[2]").as_bytes()),
        ] {
            let mut connection = Connection::open_silent(&agent.socket);
            // The agent may have closed it before all is written.
            let _ = connection.writer().write_all(&bytes);
            while let Some((got, payload)) = connection.receive_raw() {
                assert_eq!(got, kind::HANDSHAKE_RESPONSE);
                let response: Value = serde_json::from_slice(&payload).unwrap();
                assert_eq!(response["success"], false, "{bytes:?}");
                assert!(response["error"].is_string());
            }
            assert_serves(&mut good);
        }
        drop(good);
        agent.end_unharmed();
    }

    #[test]
    fn a_second_one_closes_the_connection() {
        let (agent, _folder) = agent(&[]);
        let mut connection = agent.connect();
        connection.send(kind::HANDSHAKE_REQUEST, &json!({"supported_versions": [2]}));
        assert_closed(&mut connection);
        assert_serves(&mut agent.connect());
        agent.end_unharmed();
    }
}

mod frames {
    use super::*;

    #[test]
    fn may_arrive_byte_by_byte() {
        let (agent, _folder) = agent(&[]);
        let mut connection = agent.connect();
        for byte in event(&testkit::request("slow", "/")) {
            connection.send_raw(&[byte]);
        }
        assert_good(&connection.answer());
        drop(connection);
        agent.end_unharmed();
    }

    #[test]
    fn may_be_cut_off_anywhere() {
        let (agent, _folder) = agent(&[]);
        let mut good = agent.connect();
        let whole = event(&testkit::request("cut", "/"));
        for cut in (0..whole.len()).step_by(7) {
            let mut connection = agent.connect();
            connection.send_raw(&whole[..cut]);
            drop(connection);
            let connection = Connection::open_silent(&agent.socket);
            let _ = connection.writer().write_all(&whole[..cut]);
        }
        assert_serves(&mut good);
        drop(good);
        agent.end_unharmed();
    }

    #[test]
    fn of_an_invalid_length_close_their_connection() {
        let (agent, _folder) = agent(&[]);
        for length in [0_u32, (16 << 20) + 1, u32::MAX] {
            let mut connection = agent.connect();
            connection.send_raw(&length.to_be_bytes());
            assert_closed(&mut connection);
        }
        assert_serves(&mut agent.connect());
        agent.end_unharmed();
    }

    #[test]
    fn of_unknown_kinds_are_never_allowed() {
        let (agent, _folder) = agent(&[]);
        let mut connection = agent.connect();
        for kind in
            (0..=u8::MAX).filter(|kind| !matches!(*kind, kind::HANDSHAKE_REQUEST | kind::REQUEST_HEADERS..=kind::CONFIGURE | kind::PING))
        {
            connection.send_raw(&frame(kind, b""));
            connection.send_raw(&frame(kind, b"\0\xff"));
            connection.send(kind, &testkit::request(&format!("k{kind}"), "/"));
        }
        connection.send_raw(&frame(kind::PING, b"\0echo\xff"));
        let mut answers = Vec::new();
        loop {
            match connection.receive_raw().unwrap() {
                (kind::PONG, payload) => {
                    assert_eq!(payload, b"\0echo\xff");
                    break;
                }
                (kind::AGENT_RESPONSE, payload) => answers.push(serde_json::from_slice::<Value>(&payload).unwrap()),
                _ => {}
            }
        }
        // Kinds in the range of events get the module error, because these frames have an id.
        while answers.len() < 8 {
            answers.push(connection.answer());
        }
        for answer in &answers {
            assert_eq!(module_error(answer), Some("WASM_INVALID_EVENT"), "{answer}");
            assert_eq!(decision(answer), "block");
        }
        assert_serves(&mut connection);
        drop(connection);
        agent.end_unharmed();
    }
}

mod invalid_events {
    use super::*;

    /// Events with an id that are invalid otherwise.
    fn wrong_events(id: &str) -> Vec<(u8, Vec<u8>)> {
        let mut wrong = Vec::new();
        let without = |mut event: Value, field: &str| {
            event.as_object_mut().unwrap().remove(field).unwrap();
            event
        };
        let request = testkit::request(id, "/");
        let number = json!(1);
        for field in ["method", "uri", "headers"] {
            wrong.push((kind::REQUEST_HEADERS, without(request.clone(), field)));
            for value in [number.clone(), json!(null), json!([number]), json!(true)] {
                wrong.push((kind::REQUEST_HEADERS, replaced(request.clone(), &format!("/{field}"), value)));
            }
        }
        for value in [json!({"a": {"b": "c"}}), json!({"a": [1]}), json!({"a": [["b"]]}), json!([["a", "b"]])] {
            wrong.push((kind::REQUEST_HEADERS, replaced(request.clone(), "/headers", value)));
        }
        for value in [json!("x"), json!(-1), json!(1e300), json!(u64::MAX), json!({})] {
            wrong.push((kind::REQUEST_HEADERS, replaced(request.clone(), "/metadata/client_port", value)));
        }
        // A list of the right values in the right order is not an object. The field beside it has
        // the id.
        let mut listed = replaced(request.clone(), "/metadata", json!([id, "r", "192.0.2.7:1"]));
        listed["correlation_id"] = json!(id);
        wrong.push((kind::REQUEST_HEADERS, listed));
        wrong.push((kind::GUARDRAIL_INSPECT, json!({"correlation_id": id, "content": "x", "metadata": 1})));
        let [_, (_, body), (_, response), (_, response_body), (_, complete), (_, websocket), (_, guardrail)] = valid_events(id);
        let not_base64 = ["%", "a", "====", "YQ=\n", "\u{e4}"];
        for (kind, body) in [(kind::REQUEST_BODY, &body), (kind::RESPONSE_BODY, &response_body)] {
            for field in ["data", "is_last"] {
                wrong.push((kind, without(body.clone(), field)));
                wrong.push((kind, replaced(body.clone(), &format!("/{field}"), number.clone())));
            }
            for text in not_base64 {
                wrong.push((kind, replaced(body.clone(), "/data", json!(text))));
            }
            for index in [json!(-1), json!(4_294_967_296_u64), json!("0")] {
                wrong.push((kind, replaced(body.clone(), "/chunk_index", index)));
            }
            wrong.push((kind, replaced(body.clone(), "/total_size", json!("4"))));
        }
        for (kind, event) in [(kind::RESPONSE_HEADERS, &response), (kind::REQUEST_COMPLETE, &complete)] {
            for status in [json!(-1), json!(65536), json!("200"), json!(null)] {
                wrong.push((kind, replaced(event.clone(), "/status", status)));
            }
        }
        for field in ["duration_ms", "request_body_size", "response_body_size", "upstream_attempts"] {
            for value in [json!(-1), json!(1.5), json!("1"), json!([1])] {
                wrong.push((kind::REQUEST_COMPLETE, replaced(complete.clone(), &format!("/{field}"), value)));
            }
        }
        wrong.push((kind::REQUEST_COMPLETE, replaced(complete.clone(), "/upstream_attempts", json!(4_294_967_296_u64))));
        wrong.push((kind::REQUEST_COMPLETE, replaced(complete, "/error", number.clone())));
        for field in ["opcode", "data", "client_to_server"] {
            wrong.push((kind::WEBSOCKET_FRAME, without(websocket.clone(), field)));
        }
        for field in ["opcode", "data", "client_to_server", "fin", "route_id", "client_ip"] {
            wrong.push((kind::WEBSOCKET_FRAME, replaced(websocket.clone(), &format!("/{field}"), number.clone())));
        }
        for text in not_base64 {
            wrong.push((kind::WEBSOCKET_FRAME, replaced(websocket.clone(), "/data", json!(text))));
        }
        wrong.push((kind::WEBSOCKET_FRAME, replaced(websocket, "/frame_index", json!(-1))));
        wrong.push((kind::GUARDRAIL_INSPECT, without(guardrail.clone(), "content")));
        for field in ["inspection_type", "content", "model", "categories", "route_id"] {
            wrong.push((kind::GUARDRAIL_INSPECT, replaced(guardrail.clone(), &format!("/{field}"), number.clone())));
        }
        wrong.push((kind::GUARDRAIL_INSPECT, replaced(guardrail.clone(), "/categories", json!([number]))));
        wrong.push((kind::GUARDRAIL_INSPECT, replaced(guardrail, "/metadata", json!({"a": number}))));
        // Events sent as another kind.
        wrong.push((kind::REQUEST_BODY, request));
        for kind in [kind::RESPONSE_HEADERS, kind::WEBSOCKET_FRAME, kind::GUARDRAIL_INSPECT] {
            wrong.push((kind, body.clone()));
        }
        wrong.push((kind::RESPONSE_BODY, response));
        let mut wrong: Vec<_> = wrong.into_iter().map(|(kind, event)| (kind, event.to_string().into_bytes())).collect();
        let deep = format!(r#"{{"correlation_id":"{id}","is_last":true,"data":{}"x"{}}}"#, "[".repeat(100), "]".repeat(100));
        wrong.push((kind::REQUEST_BODY, deep.into_bytes()));
        wrong
    }

    /// Sends frames without a valid event, and then a valid one, which alone is allowed. Returns
    /// the number of answers to the others.
    #[track_caller]
    fn rejections(connection: &mut Connection, encode: fn(&Value) -> Vec<u8>, wrong: &[u8]) -> usize {
        connection.send_raw(wrong);
        connection.send_raw(&frame(kind::REQUEST_HEADERS, &encode(&testkit::request("still-there", "/"))));
        let mut rejected = 0;
        loop {
            let answer = raw_answer(connection);
            if answer.contains("still-there") {
                assert!(answer.contains("good"), "{answer}");
                return rejected;
            }
            assert!(answer.contains("WASM_INVALID_EVENT") && answer.contains("block") && !answer.contains("good"), "{answer}");
            rejected += 1;
        }
    }

    fn written(event: &Value) -> Vec<u8> {
        event.to_string().into_bytes()
    }

    /// An event as MessagePack with `bytes` in place of one of its values.
    fn packed_with(event: Value, pointer: &str, bytes: &[u8]) -> Vec<u8> {
        let mark = json!("the value that is replaced");
        let (whole, mark) = (packed(&replaced(event, pointer, mark.clone())), packed(&mark));
        let at = whole.windows(mark.len()).position(|window| window == mark).unwrap();
        [&whole[..at], bytes, &whole[at + mark.len()..]].concat()
    }

    #[test]
    fn are_never_allowed() {
        for fail_open in [false, true] {
            let (agent, _folder) = lenient(if fail_open { &["--fail-open"] } else { &[] });
            let mut connection = agent.connect();
            for (at, (kind, payload)) in wrong_events("wrong").into_iter().enumerate() {
                println!("{at}: {kind:#04x} {}", String::from_utf8_lossy(&payload));
                connection.send_raw(&frame(kind, &payload));
                let answer = connection.answer();
                assert_eq!(id_of(&answer), "wrong");
                assert_eq!(answer["audit"]["reason_codes"], json!(["WASM_INVALID_EVENT"]), "{answer}");
                if fail_open {
                    assert_eq!((decision(&answer), &answer["audit"]["tags"]), ("allow", &json!(["wasm-error", "fail-open"])));
                    continue;
                }
                assert_eq!((decision(&answer), &answer["audit"]["tags"]), ("block", &json!(["wasm-error"])));
                // For these two kinds the proxy reads another field.
                match kind {
                    kind::WEBSOCKET_FRAME => {
                        let close = json!({"close": {"code": 1011, "reason": "wasm-error"}});
                        assert_eq!(answer["websocket_decision"], close);
                    }
                    kind::GUARDRAIL_INSPECT => {
                        let verdict = answer["routing_metadata"]["guardrail_response"].as_str().unwrap();
                        assert_eq!(serde_json::from_str::<Value>(verdict).unwrap()["detected"], true, "{answer}");
                    }
                    _ => {}
                }
            }
            assert_serves(&mut connection);
            drop(connection);
            agent.end_unharmed();
        }
    }

    #[test]
    fn in_messagepack_are_never_allowed() {
        let (agent, _folder) = lenient(&[]);
        let mut connection = connect_packed(&agent);
        let before = agent.resident();
        let wrong = wrong_events("wrong");
        let mut answered = 0;
        for (kind, payload) in &wrong {
            println!("{kind:#04x} {}", String::from_utf8_lossy(payload));
            let event = serde_json::from_slice(payload).unwrap();
            let more = rejections(&mut connection, packed, &frame(*kind, &packed(&event)));
            if more == 0 {
                println!("UNANSWERED");
            }
            answered += more;
        }
        // The last one nests too deep for its id to be found.
        assert_eq!(answered, wrong.len() - 1);

        let mut values = vec![
            // Extension types, and a type that does not exist.
            b"\xd4\x01a".to_vec(),
            b"\xc7\x03\x05abc".to_vec(),
            b"\xd6\xff\0\0\0\0".to_vec(),
            b"\xc1".to_vec(),
            [0x91].repeat(100_000),
            b"\x81\xa1a".repeat(100_000),
        ];
        // The greatest length of bytes, an extension type, a string, a list, and an object.
        values.extend([0xc6, 0xc9, 0xdb, 0xdd, 0xdf].map(|kind| vec![kind, 0xff, 0xff, 0xff, 0xff, 1]));
        for (kind, event) in valid_events("wrong") {
            let mut places: Vec<String> = event.as_object().unwrap().keys().map(|field| format!("/{field}")).collect();
            let inner = ["/metadata/correlation_id", "/metadata/client_ip", "/metadata/client_port", "/headers/host", "/headers/host/0"];
            places.extend(inner.map(String::from).into_iter().filter(|place| event.pointer(place).is_some()));
            for value in &values {
                for place in &places {
                    println!("{kind:#04x} {place} {:02x?}", &value[..value.len().min(8)]);
                    rejections(&mut connection, packed, &frame(kind, &packed_with(event.clone(), place, value)));
                }
                rejections(&mut connection, packed, &frame(kind, value));
            }
            // Names and values in turn, values alone, and events within lists.
            let fields = event.as_object().unwrap();
            let sides = fields.iter().flat_map(|(name, value)| [json!(name), value.clone()]).collect();
            let alone = fields.values().cloned().collect();
            for list in [sides, alone, vec![event.clone()], vec![json!("wrong"), event.clone()], Vec::new()] {
                println!("{kind:#04x} {list:?}");
                rejections(&mut connection, packed, &frame(kind, &packed(&Value::Array(list))));
            }
        }
        assert!(agent.resident() < before + (32 << 20), "{}", agent.resident() - before);
        drop(connection);
        agent.end_unharmed();
    }

    #[test]
    fn cut_off_anywhere_are_never_allowed() {
        let (agent, _folder) = lenient(&[]);
        for (mut connection, encode) in [(agent.connect(), written as fn(&Value) -> Vec<u8>), (connect_packed(&agent), packed)] {
            for (kind, event) in valid_events("cut") {
                let whole = encode(&event);
                connection.send_raw(&frame(kind, &whole));
                assert!(raw_answer(&mut connection).contains("good"), "{event}");
                let cut: Vec<u8> = (0..whole.len()).flat_map(|cut| frame(kind, &whole[..cut])).collect();
                rejections(&mut connection, encode, &cut);
            }
        }
        agent.end_unharmed();
    }

    #[test]
    fn in_the_wrong_encoding_are_never_allowed() {
        let (agent, _folder) = agent(&[]);
        // MessagePack was negotiated, and JSON arrives.
        let mut connection = connect_packed(&agent);
        connection.send(kind::REQUEST_HEADERS, &testkit::request("json", "/"));
        let answer = raw_answer(&mut connection);
        assert!(answer.contains("WASM_INVALID_EVENT") && answer.contains("block"), "{answer}");

        // JSON was negotiated, and MessagePack arrives, in which the id cannot be found.
        let mut connection = agent.connect();
        connection.send_raw(&frame(kind::REQUEST_BODY, b"\x83\xaecorrelation_id\xa1a\xa4data\xc4\x01x\xa7is_last\xc3"));
        assert_serves(&mut connection);
        drop(connection);
        agent.end_unharmed();
    }

    #[test]
    fn without_an_id_are_not_answered() {
        let (agent, _folder) = agent(&[]);
        let mut connection = agent.connect();
        let twice = format!("{{\"correlation_id\":\"a\",{}", &testkit::request_body("b", "x").to_string()[1..]);
        let deep = format!("{{\"metadata\":{}", "{\"a\":".repeat(1 << 20));
        for kind in kind::REQUEST_HEADERS..=kind::GUARDRAIL_INSPECT {
            for payload in
                [&b""[..], b"null", b"{}", b"\xff\xfe", b"{\"correlation_id\":7}", b"{\"metadata\":{}}", twice.as_bytes(), deep.as_bytes()]
            {
                connection.send_raw(&frame(kind, payload));
            }
        }
        // The next answer is that of the next valid event.
        assert_serves(&mut connection);
        drop(connection);
        agent.end_unharmed();
    }

    #[test]
    fn are_logged_under_their_hook() {
        let (agent, _folder) = lenient(&[]);
        let mut connection = agent.connect();
        for (kind, hook) in [
            (kind::REQUEST_HEADERS, "on_request_headers"),
            (kind::REQUEST_BODY, "on_request_body"),
            (kind::RESPONSE_HEADERS, "on_response_headers"),
            (kind::RESPONSE_BODY, "on_response_body"),
            (kind::REQUEST_COMPLETE, "on_request_complete"),
            (kind::WEBSOCKET_FRAME, "on_websocket_frame"),
            (kind::GUARDRAIL_INSPECT, "on_guardrail_inspect"),
        ] {
            connection.send_raw(&frame(kind, format!(r#"{{"correlation_id":"{hook}","metadata":1,"data":1,"status":"x"}}"#).as_bytes()));
            assert_eq!(connection.answer()["audit"]["reason_codes"], json!(["WASM_INVALID_EVENT"]));
            let entry =
                agent.log.wait_for_entry("the failure", |entry| entry["correlation_id"] == hook && entry["kind"] == "WASM_INVALID_EVENT");
            assert_eq!(entry["hook"], hook, "{entry}");
        }
        drop(connection);
        agent.end_unharmed();
    }
}

mod superseded {
    use super::*;

    /// Checks that no call is running and no answer is on its way.
    #[track_caller]
    fn assert_silent(agent: &Agent, connection: &mut Connection) {
        agent.admin().wait_for_metric("wasm_agent_in_flight", 0.0);
        connection.send_raw(&frame(kind::PING, b""));
        loop {
            match connection.receive().unwrap() {
                (kind::PONG, _) => return,
                (kind::AGENT_RESPONSE, answer) => panic!("unexpected answer: {answer}"),
                _ => {}
            }
        }
    }

    #[test]
    fn a_blocked_request_never_gets_the_allow_of_its_twin() {
        const TRIES: usize = 10_000;
        /// Pairs sent at once, so slow calls overlap with the twins of others.
        const WINDOW: usize = 40;

        let (agent, _folder) = agent(&[]);
        let mut connection = agent.connect();
        let mut writer = connection.writer();
        for start in (0..TRIES).step_by(WINDOW) {
            let mut expected = HashMap::new();
            for at in start..start + WINDOW {
                let id = format!("twin-{at}");
                // The proxy waits for the last one only, and would take any answer for that one's.
                // One write sends all, so the agent never answers before it has the newest.
                let uris = module::twins(at);
                let mut bytes = Vec::new();
                for uri in uris {
                    match *uri {
                        "cancel" => bytes.extend(frame(kind::CANCEL, json!({"correlation_id": id}).to_string().as_bytes())),
                        uri => bytes.extend(event(&testkit::request(&id, uri))),
                    }
                }
                writer.write_all(&bytes).unwrap();
                expected.insert(id, if uris.last() == Some(&"/blocked") { "block" } else { "allow" });
            }
            while !expected.is_empty() {
                let answer = connection.answer();
                let wanted = expected.remove(id_of(&answer)).unwrap_or_else(|| panic!("answered twice: {answer}"));
                assert_eq!(decision(&answer), wanted, "{answer}");
            }
        }
        // No answer is left that could be taken for another request's.
        assert_serves(&mut connection);
        drop((connection, writer));
        agent.end_unharmed();
    }

    #[test]
    fn only_the_newest_event_of_an_id_is_answered() {
        /// Almost as many as a connection may have in flight.
        const LIVE: usize = 190;

        // Blocks `/b...`, and loops forever on anything else.
        let code = format!(
            "(if (i32.ne (i32.load8_u offset={} (local.get $ptr)) (i32.const {})) (then (loop $ever (br $ever))))
        i64.const 0x10_00000014",
            r#"{"method":"GET","uri":"/"#.len(),
            b'b'
        );
        let refusal = r#"(data (i32.const 16) "{\"decision\":\"block\"}")"#;
        let wat = module::with_hooks(&["on_request_headers"], |_| code.clone(), refusal);
        let (agent, _folder) = serve(&wat, &["--timeout-ms", "5000", "--pool-size", "200", "--admin-address", "127.0.0.1:0"]);
        let mut connection = agent.connect();
        for _ in 0..LIVE {
            connection.send(kind::REQUEST_HEADERS, &testkit::request("same", "/slow"));
            // Without a pause, several might arrive at once, and the older ones would not be run at
            // all.
            connection.send_raw(&frame(kind::PING, b""));
            connection.report(kind::PONG);
        }
        let answer = connection.get("same", "/blocked");
        assert_eq!((id_of(&answer), decision(&answer), module_error(&answer)), ("same", "block", None), "{answer}");
        // All the others were run to their deadline.
        agent.admin().wait_for_metric(r#"wasm_agent_errors_total{kind="timeout"}"#, LIVE as f64);
        assert_silent(&agent, &mut connection);
        drop(connection);
        agent.end_unharmed();
    }

    #[test]
    fn an_event_after_a_cancel_gets_its_own_answer() {
        let (agent, _folder) = agent(&[]);
        let mut connection = agent.connect();
        let cancel = |id: &str| frame(kind::CANCEL, json!({"correlation_id": id}).to_string().as_bytes());
        for round in 0..100 {
            let id = format!("c{round}");
            connection.send_raw(&cancel("unknown"));
            connection.send_raw(&event(&testkit::request(&id, "/slow")));
            connection.send_raw(&cancel(&id));
            connection.send_raw(&cancel(&id));
            let answer = connection.ask(kind::REQUEST_HEADERS, &testkit::request(&id, "/blocked"));
            // The first event may have been answered before its cancel arrived. Then the second
            // answer is that of the second event.
            let answer = if decision(&answer) == "allow" { connection.answer() } else { answer };
            assert_eq!((id_of(&answer), decision(&answer)), (id.as_str(), "block"));
        }
        assert_serves(&mut connection);
        drop(connection);
        agent.end_unharmed();
    }

    #[test]
    fn a_cancelled_event_releases_its_instance() {
        let options = ["--timeout-ms", "50000", "--pool-size", "1", "--admin-address", "127.0.0.1:0"];
        let (agent, _folder) = serve(&module::choosing(), &options);
        let mut connection = agent.connect();
        connection.send(kind::REQUEST_HEADERS, &testkit::request("a", "/loop"));
        agent.admin().wait_for_metric("wasm_agent_in_flight", 1.0);
        connection.send(kind::CANCEL, &json!({"correlation_id": "a"}));
        assert_silent(&agent, &mut connection);
        let answer = connection.get("b", "/");
        assert_eq!((id_of(&answer), decision(&answer), module_error(&answer)), ("b", "allow", None), "{answer}");
        assert_silent(&agent, &mut connection);
        assert_eq!(agent.admin().metric(r#"wasm_agent_errors_total{kind="timeout"}"#), 0.0, "the call ran until its deadline");
        drop(connection);
        agent.end_unharmed();
    }
}

mod bounds {
    use super::*;

    /// Connections that the agent serves at once.
    const MAX_CONNECTIONS: usize = 1024;

    /// The number of entries in a directory of the agent's in /proc: file descriptors or threads.
    fn held(agent: &Agent, what: &str) -> usize {
        std::fs::read_dir(format!("/proc/{}/{what}", agent.pid().as_raw_nonzero())).unwrap().count()
    }

    #[test]
    fn large_events_reach_the_module_unchanged() {
        let options = [&AMPLE[..], &["--max-memory-mb", "128", "--max-output-bytes", "10000000", "--header-case", "lower"]].concat();
        let (agent, _folder) = serve(&module::echo(&["on_request_headers"]), &options);
        let mut connection = agent.connect();
        let many = (0..100_000).map(|at| (format!("x-{at}"), vec!["v".to_owned()])).collect();
        let long = vec![
            ("x-long".to_owned(), vec!["x".repeat(1 << 20)]),
            ("x-escaped".to_owned(), vec!["\"\\\u{1}".repeat(100_000)]),
            ("n".repeat(1 << 20), vec!["x".to_owned()]),
        ];
        let same = vec![("x-same".to_owned(), vec![String::new(); 500_000])];
        for (id, headers) in [("many", many), ("long", long), ("same", same)] {
            let headers: Vec<(String, Vec<String>)> = headers;
            let object = |value: fn(&[String]) -> Value, several: bool| {
                let wanted = headers.iter().filter(|(_, values)| !several || values.len() > 1);
                Value::Object(wanted.map(|(name, values)| (name.clone(), value(values))).collect())
            };
            let seen = module::seen(
                &connection
                    .ask(kind::REQUEST_HEADERS, &replaced(testkit::request(id, "/"), "/headers", object(|values| json!(values), false))),
            );
            // Not `assert_eq`, because it would print 10 MB.
            assert!(seen["headers"] == object(|values| json!(values.join(", ")), false), "{id}");
            let several = object(|values| json!(values), true);
            assert!(seen.get("header_values").unwrap_or(&json!({})) == &several, "{id}");
        }

        // More than the instance has memory for. Only this request fails.
        let huge = testkit::request("huge", &format!("/{}", "x".repeat(15 << 20)));
        let answer = connection.ask(kind::REQUEST_HEADERS, &huge);
        assert_eq!(module_error(&answer), Some("WASM_ALLOC_FAILED"), "{}", answer["audit"]);
        assert_eq!(module::seen(&connection.get("still-there", "/here"))["uri"], "/here");
        drop(connection);
        agent.end_unharmed();
    }

    #[test]
    fn too_many_headers_are_rejected_at_little_cost() {
        const MAX_ENTRIES: usize = 1 << 19;

        let (agent, _folder) = agent(&[]);
        let before = agent.resident();
        let mut connection = agent.connect();
        let with = |headers: Value| replaced(testkit::request("many", "/"), "/headers", headers);
        let names = |count: usize| Value::Object((0..count).map(|at| (format!("{at:x}"), json!([]))).collect());
        assert_eq!(module_error(&connection.ask(kind::REQUEST_HEADERS, &with(names(MAX_ENTRIES)))), None);
        let values = vec![""; MAX_ENTRIES / 2];
        for (event, what) in [
            (kind::REQUEST_HEADERS, with(names(MAX_ENTRIES + 1))),
            (kind::REQUEST_HEADERS, with(json!({"a": &values, "b": &values, "c": []}))),
            (kind::REQUEST_HEADERS, with(json!({"a": vec![""; MAX_ENTRIES + 1]}))),
            (
                kind::GUARDRAIL_INSPECT,
                json!({"correlation_id": "many", "inspection_type": "pii_detection", "content": "", "categories": vec![""; MAX_ENTRIES + 1]}),
            ),
        ] {
            assert_eq!(module_error(&connection.ask(event, &what)), Some("WASM_INVALID_EVENT"));
        }

        // As many values of one byte each as fit in a frame.
        let mut packed = connect_packed(&agent);
        const COUNT: u32 = 15 << 20;
        let values = [&[0xdd][..], &COUNT.to_be_bytes(), &vec![0xa0; COUNT as usize]].concat();
        let event = [b"\x82\xaecorrelation_id\xa1a\xa7headers\x81\xa1a", &values[..]].concat();
        packed.send_raw(&frame(kind::RESPONSE_HEADERS, &event));
        let answer = raw_answer(&mut packed);
        assert!(answer.contains("WASM_INVALID_EVENT"), "{answer}");
        println!("{} kB more", agent.peak().saturating_sub(before) >> 10);
        assert!(agent.peak() < before + (128 << 20), "{} kB more", (agent.peak() - before) >> 10);
        assert_serves(&mut connection);
        drop((connection, packed));
        agent.end_unharmed();
    }

    #[test]
    fn an_id_too_long_for_any_answer_is_harmless() {
        let (agent, _folder) = agent(&[]);
        let mut connection = agent.connect();
        let overhead = json!({"correlation_id": "", "data": "", "is_last": true}).to_string().len();
        let id = "x".repeat((16 << 20) - 1 - overhead);
        let event = json!({"correlation_id": id, "data": "", "is_last": true});
        connection.send(kind::REQUEST_BODY, &event);
        connection.send(kind::CANCEL, &json!({"correlation_id": &id[100..]}));
        connection.send(kind::CONFIGURE, &json!({"correlation_id": &id[100..], "config": null}));
        connection.send(kind::REQUEST_COMPLETE, &json!({"correlation_id": &id[100..], "status": "?"}));
        assert_serves(&mut connection);
        drop(connection);
        agent.end_unharmed();
    }

    #[test]
    fn unread_answers_take_bounded_memory_and_none_is_lost() {
        let (agent, _folder) = agent(&[]);
        let mut other = agent.connect();
        assert_serves(&mut other);
        let mut connection = agent.connect();
        let before = agent.resident();
        let (sent, rest) = flood(&connection);
        println!("{sent} events sent, {} kB more", agent.resident().saturating_sub(before) >> 10);
        assert!(agent.resident() < before + (32 << 20), "{}", agent.resident() - before);
        assert_serves(&mut other);
        // Once the client reads again, every answer arrives.
        let mut writer = connection.writer();
        std::thread::scope(|scope| {
            scope.spawn(|| writer.write_all(&rest).unwrap());
            let mut seen = vec![false; sent];
            for _ in 0..sent {
                let answer = connection.answer();
                assert_good(&answer);
                let at: usize = id_of(&answer)[1..].parse().unwrap();
                assert!(!std::mem::replace(&mut seen[at], true), "{at} was answered twice");
            }
        });
        drop((connection, other));
        agent.end_unharmed();
    }

    /// The events have been read already when the answers to earlier ones cannot be written any
    /// more.
    #[test]
    fn events_wait_while_answers_are_unread() {
        /// Bytes of an answer: few enough to be encoded on the connection's task.
        const ANSWER: usize = 200 << 10;
        /// Fits into one read.
        const EVENTS: usize = 800;
        /// Room for the answers at the limit, for those being written, and for what the allocator
        /// keeps.
        const ROOM: u64 = 32 << 20;

        let at = 4 << 20;
        let json = format!(r#"{{"decision":"block","body":"{}"}}"#, "x".repeat(ANSWER));
        let result = format!("i64.const {}", (at as u64) << 32 | json.len() as u64);
        let data = format!("(data (i32.const {at}) \"{}\")", json.replace('"', "\\22"));
        let (agent, _folder) = serve(
            &module::with_hooks(&["on_response_headers"], |_| result.clone(), &data),
            &[&AMPLE[..], &["--admin-address", "127.0.0.1:0"]].concat(),
        );
        let (admin, mut connection) = (agent.admin(), agent.connect());
        connection.ask(kind::RESPONSE_HEADERS, &json!({"correlation_id": "warm", "status": 200, "headers": {}}));
        let before = agent.peak();
        let event =
            |at: usize| frame(kind::RESPONSE_HEADERS, format!(r#"{{"correlation_id":"{at}","status":200,"headers":{{}}}}"#).as_bytes());
        connection.send_raw(&(0..EVENTS).flat_map(event).collect::<Vec<_>>());
        // Wait until the agent runs no more of them.
        let mut last = 0.0;
        wait_for("the agent to pause", || {
            std::thread::sleep(Duration::from_millis(100));
            let taken = admin.metric("wasm_agent_requests_total");
            (std::mem::replace(&mut last, taken) == taken && taken > 1.0).then_some(())
        });
        for _ in 0..EVENTS {
            assert_eq!(decision(&connection.answer()), "block");
        }
        let more = agent.peak() - before;
        assert!(more < ROOM, "{} MiB more", more >> 20);
        agent.end_unharmed();
    }

    #[test]
    fn connections_over_the_limit_are_rejected() {
        // This process has the other ends open.
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        rustix::process::setrlimit(rustix::process::Resource::Nofile, rustix::process::Rlimit { current: limit.maximum, ..limit }).unwrap();
        let (agent, _folder) = agent(&["--admin-address", "127.0.0.1:0"]);
        let admin = agent.admin();
        let mut good = agent.connect();
        let mut silent: Vec<UnixStream> = Vec::new();
        for _ in 0..MAX_CONNECTIONS - 1 {
            silent.push(UnixStream::connect(&agent.socket).unwrap());
        }
        admin.wait_for_metric("wasm_agent_connections", MAX_CONNECTIONS as f64);
        for _ in 0..100 {
            let mut rejected = UnixStream::connect(&agent.socket).unwrap();
            rejected.set_read_timeout(Some(testkit::PATIENCE)).unwrap();
            assert!(rejected.read(&mut [0]).map_or(true, |count| count == 0));
        }
        assert_serves(&mut good);
        drop(silent);
        admin.wait_for_metric("wasm_agent_connections", 1.0);
        assert_serves(&mut agent.connect());
        drop(good);
        agent.end_unharmed();
    }

    #[test]
    fn closed_connections_leak_nothing() {
        let (agent, _folder) = agent(&[]);
        let mut good = agent.connect();
        assert_serves(&mut good);
        let before = ["fd", "task"].map(|what| held(&agent, what));
        let resident = agent.resident();
        let whole = event(&testkit::request("churn", "/"));
        let greeting = frame(kind::HANDSHAKE_REQUEST, br#"{"supported_versions":[2]}"#);
        for at in 0..3000 {
            match at % 5 {
                0 => drop(Connection::open_silent(&agent.socket)),
                1 => Connection::open_silent(&agent.socket).send_raw(&greeting[..greeting.len() / 2]),
                2 => drop(agent.connect()),
                3 => agent.connect().send_raw(&whole[..whole.len() / 2]),
                // Closed without waiting for the answer.
                _ => agent.connect().send_raw(&whole),
            }
        }
        for (what, before) in ["fd", "task"].into_iter().zip(before) {
            wait_for(&format!("{what} to be {before} again"), || (held(&agent, what) <= before).then_some(()));
        }
        println!("{} kB more", agent.resident().saturating_sub(resident) >> 10);
        assert!(agent.resident() < resident + (32 << 20), "{}", agent.resident() - resident);
        assert_serves(&mut good);
        drop(good);
        agent.end_unharmed();
    }
}

mod fairness {
    use super::*;

    #[test]
    fn floods_do_not_starve_other_connections() {
        let (agent, _folder) = agent(&[]);
        let stop = AtomicBool::new(false);
        let flooding = std::thread::available_parallelism().map_or(4, usize::from) * 2;
        std::thread::scope(|scope| {
            for flooder in 0..flooding {
                let mut connection = agent.connect();
                let mut reader = connection.writer();
                let mut flood = Vec::new();
                for at in 0..200 {
                    flood.extend(event(&testkit::request(&format!("f{flooder}-{at}"), "/")));
                }
                scope.spawn({
                    let stop = &stop;
                    move || {
                        while !stop.load(Relaxed) {
                            connection.send_raw(&flood);
                        }
                        // Ends the reader too, once everything is answered.
                        connection.writer().shutdown(Shutdown::Write).unwrap();
                    }
                });
                scope.spawn(move || {
                    let mut sink = vec![0; 1 << 20];
                    while reader.read(&mut sink).is_ok_and(|count| count > 0) {}
                });
            }
            let stop = Stop(&stop);
            for round in 0..20 {
                let mut connection = agent.connect();
                assert_good(&connection.get(&format!("quiet-{round}"), "/"));
                assert_good(&connection.get(&format!("slow-{round}"), "/slow"));
            }
            drop(stop);
        });
        agent.end_unharmed();
    }

    #[test]
    fn a_flood_does_not_starve_a_slow_call_of_its_connection() {
        let (agent, _folder) = agent(&[]);
        let mut connection = agent.connect();
        connection.send_raw(&event(&testkit::request("slow", "/slow")));
        let stop = AtomicBool::new(false);
        let mut flood = Vec::new();
        for at in 0..200 {
            flood.extend(event(&testkit::request(&format!("f-{at}"), "/")));
        }
        let mut writer = connection.writer();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Relaxed) {
                    writer.write_all(&flood).unwrap();
                }
                writer.shutdown(Shutdown::Write).unwrap();
            });
            let stop = Stop(&stop);
            let mut others = 0;
            while id_of(&connection.answer()) != "slow" {
                others += 1;
                assert!(others < 1_000_000, "the slow call is starved");
            }
            drop(stop);
            while connection.answer_or_end().is_some() {}
        });
        agent.end_unharmed();
    }
}

mod closing {
    use super::*;

    #[test]
    fn ends_the_calls_of_the_connection() {
        let options = ["--timeout-ms", "50000", "--pool-size", "1", "--admin-address", "127.0.0.1:0"];
        let (agent, _folder) = serve(&module::choosing(), &options);
        let mut other = agent.connect();
        let mut connection = agent.connect();
        connection.send(kind::REQUEST_HEADERS, &testkit::request("a", "/loop"));
        agent.admin().wait_for_metric("wasm_agent_in_flight", 1.0);
        drop(connection);
        let answer = other.get("b", "/");
        assert_eq!((id_of(&answer), decision(&answer), module_error(&answer)), ("b", "allow", None), "{answer}");
        agent.admin().wait_for_metric("wasm_agent_connections", 1.0);
        assert_eq!(agent.admin().metric(r#"wasm_agent_errors_total{kind="timeout"}"#), 0.0, "the call ran until its deadline");
        drop(other);
        agent.end_unharmed();
    }

    #[test]
    fn one_direction_still_delivers_the_answers() {
        let (agent, _folder) = agent(&[]);
        let mut connection = agent.connect();
        for at in 0..150 {
            connection.send_raw(&event(&testkit::request(&format!("h{at}"), if at % 10 == 0 { "/slow" } else { "/" })));
        }
        // A frame that is never completed makes no difference.
        connection.send_raw(&[0, 0]);
        connection.writer().shutdown(Shutdown::Write).unwrap();
        let mut answers = 0;
        while let Some(answer) = connection.answer_or_end() {
            assert_good(&answer);
            answers += 1;
        }
        assert_eq!(answers, 150);
        agent.end_unharmed();
    }
}

mod timeouts {
    use super::*;

    /// Like the function of the outer module, with short timeouts.
    fn agent(options: &[&str]) -> (Agent, TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let module = module::write(folder.path(), "m.wasm", &module::judging());
        (short_timeouts::start(&module, &[&AMPLE[..], options].concat()), folder)
    }

    #[test]
    fn without_a_handshake() {
        let (agent, _folder) = agent(&[]);
        let mut silent = Connection::open_silent(&agent.socket);
        let mut good = agent.connect();
        assert_closed(&mut silent);
        let reason = format!("no handshake within {LOGGED_TIMEOUT}");
        agent.log.wait_for_line(&reason, |line| line.contains(&reason));
        // After the handshake a connection may be idle for as long as it likes.
        assert_serves(&mut good);
        drop(good);
        agent.end_unharmed();
    }

    #[test]
    fn without_a_handshake_while_the_agent_ends() {
        let (mut agent, _folder) = agent(&["--shutdown-grace-ms", "3600000"]);
        let mut silent = Connection::open_silent(&agent.socket);
        assert_serves(&mut agent.connect());
        agent.signal(Signal::TERM);
        assert_closed(&mut silent);
        assert_eq!(agent.wait().code(), Some(0));
    }

    #[test]
    fn within_a_frame_and_with_unread_answers() {
        let (agent, _folder) = agent(&[]);
        let mut half = agent.connect();
        let whole = event(&testkit::request("half", "/"));
        half.send_raw(&whole[..whole.len() - 1]);
        // A frame that arrives bit by bit gets no more time. This one would take 60 s.
        let mut slow = agent.connect();
        let mut writer = slow.writer();
        let drip = std::thread::spawn(move || {
            whole[..300].iter().any(|byte| {
                std::thread::sleep(Duration::from_millis(200));
                writer.write_all(&[*byte]).is_err()
            })
        });
        let mut good = agent.connect();
        let unread = agent.connect();
        flood(&unread);
        assert_closed(&mut half);
        assert!(drip.join().unwrap(), "the agent reads a frame for as long as bytes of it arrive");
        assert_closed(&mut slow);
        for reason in ["frame not completed", "answers not read"] {
            agent.log.wait_for_line(reason, |line| line.contains(reason));
        }
        assert_serves(&mut good);
        drop((unread, good));
        agent.end_unharmed();
    }
}

mod logging {
    use super::*;

    #[test]
    fn is_rate_limited() {
        let (agent, _folder) = agent(&[]);
        let mut flood = Vec::new();
        for kind in [kind::REQUEST_HEADERS, kind::CONFIGURE, kind::CANCEL, 0x50] {
            flood.extend(frame(kind, b"{").repeat(5000));
        }
        for _ in 0..3 {
            let mut connection = agent.connect();
            connection.send_raw(&flood);
            assert_serves(&mut connection);
        }
        // Connecting again and again does not get more of them logged.
        for _ in 0..500 {
            let mut connection = Connection::open_as(&agent.socket, "0.6.45");
            for kind in [kind::REQUEST_HEADERS, kind::CONFIGURE, 0x50] {
                connection.send_raw(&frame(kind, b"{"));
            }
            connection.configure(&json!({"colour": 1})).unwrap_err();
        }
        let lines = agent.log.lines().len();
        assert!(lines < 500, "{lines} lines");
        agent.end_unharmed();
    }

    #[test]
    fn has_bounded_lines() {
        let (agent, _folder) = agent(&[]);
        let long = "x".repeat(1 << 20);
        let mut connection = Connection::open_as(&agent.socket, &format!("0.6.45-{long}"));
        connection.configure(&json!({long.as_str(): 1})).unwrap_err();
        // A module error on a request with the longest id that gets an answer.
        connection.send(kind::REQUEST_HEADERS, &json!({"correlation_id": &long[..64 << 10], "uri": 1}));
        assert_eq!(module_error(&connection.answer()), Some("WASM_INVALID_EVENT"));
        connection.send(kind::REQUEST_HEADERS, &json!({"correlation_id": "c", "method": long.as_str(), &long[1..]: 1}));
        assert_eq!(module_error(&connection.answer()), Some("WASM_INVALID_EVENT"));
        let mut rejected = Connection::open_silent(&agent.socket);
        rejected.send(kind::HANDSHAKE_REQUEST, &json!({"supported_versions": vec![9; 100_000], "proxy_id": "x", "proxy_version": "x"}));
        assert_closed(&mut rejected);
        for what in ["does not support challenges", "rejected the proxy's configuration", "module error", "handshake failed"] {
            agent.log.wait_for_line(what, |line| line.contains(what));
        }
        assert!(agent.log.lines().iter().all(|line| line.len() < 10_000), "{:?}", agent.log.lines().iter().map(String::len).max());
        agent.end_unharmed();
    }
}
