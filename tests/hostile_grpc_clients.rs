//! Misbehaving clients of the gRPC address. Whatever they send or leave out, the agent survives,
//! other clients are served, and a blocked request is never answered with an allow.

#[path = "common/grpc.rs"]
mod client;

#[path = "common/http2.rs"]
mod http2;

#[path = "common/short_timeouts.rs"]
mod short_timeouts;

use client::{
    AMPLE, CONTROL_STREAM, Client, HEALTH_CHECK, HEALTH_WATCH, PROCESS_EVENT, PROCESS_STREAM, Stream, address, body, configure, drain, get,
    handshake, is_allow, module_error, patiently,
};
use http2::{Wire, flag, frame, framed, kind};
use prost::Message as _;
use serde_json::{Value, json};
use short_timeouts::LOGGED_TIMEOUT;
use std::collections::{BTreeSet, HashMap};
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use testkit::{Agent, PATIENCE, Program, Stop, module, wait_for};
use tokio::sync::mpsc;
use tonic::{Code, Status, Streaming};
use zentinel_wasm_protocol::grpc::MAX_MESSAGE;
use zentinel_wasm_protocol::grpc::health_proto::health_check_response::ServingStatus;
use zentinel_wasm_protocol::grpc::proto;
use zentinel_wasm_protocol::grpc::proto::agent_response::Decision;
use zentinel_wasm_protocol::grpc::proto::agent_to_proxy::Message as FromAgent;
use zentinel_wasm_protocol::grpc::proto::proxy_to_agent::Message as ToAgent;

const AGENT: Program = Program(env!("CARGO_BIN_EXE_zentinel-wasm-agent"));

/// Streams that the agent serves at once on a connection.
const MAX_STREAMS: usize = 100;

/// How much more memory a client that exceeds a limit may cost the agent, in bytes.
const BOUNDED: u64 = 32 << 20;

/// Starts the agent with a [`module::judging`].
fn agent(options: &[&str]) -> (Agent, TempDir) {
    client::serve(&module::judging(), &[&AMPLE[..], options].concat())
}

/// A client that behaves correctly.
async fn well_behaved(agent: &Agent) -> Stream {
    Client::connect(agent).await.process().await
}

#[track_caller]
fn assert_good(answer: &proto::AgentResponse) {
    assert_eq!(answer.audit.as_ref().unwrap().tags, ["good"], "{answer:?}");
}

async fn assert_serves(good: &mut Stream) {
    let answer = good.ask(get("still-there", "/")).await;
    assert_eq!(answer.correlation_id, "still-there");
    assert_good(&answer);
    let answer = good.ask(get("still-blocked", "/blocked")).await;
    assert!(answer.correlation_id == "still-blocked" && !is_allow(&answer), "{answer:?}");
}

/// A message as it is sent on a stream.
fn message(message: ToAgent) -> Vec<u8> {
    framed(&encoded(message))
}

fn encoded(message: ToAgent) -> Vec<u8> {
    proto::ProxyToAgent { message: Some(message) }.encode_to_vec()
}

fn cancel(id: &str) -> ToAgent {
    ToAgent::Cancel(proto::CancelRequest { correlation_id: id.into(), reason: 1, ..Default::default() })
}

fn ping() -> ToAgent {
    ToAgent::Ping(proto::Ping { sequence: 7, timestamp_ms: 8 })
}

/// A length-delimited field of a message. Number and length must fit in a byte each.
fn field(number: u8, value: &[u8]) -> Vec<u8> {
    let mut bytes = vec![number << 3 | 2, value.len() as u8];
    bytes.extend_from_slice(value);
    bytes
}

/// A connection whose frames the test writes itself.
fn wire(agent: &Agent) -> Wire {
    Wire::connect(address(agent))
}

/// Such a connection with a stream of events, after its handshake.
fn processing(agent: &Agent) -> (Wire, u32) {
    let mut wire = wire(agent);
    let stream = process(&mut wire);
    (wire, stream)
}

/// Opens a stream of events and completes the handshake.
fn process(wire: &mut Wire) -> u32 {
    let stream = wire.open(PROCESS_STREAM);
    wire.data(stream, &message(handshake(&[2], "0.6.54")), false);
    match receive(wire, stream) {
        Some(FromAgent::Handshake(handshake)) if handshake.success => stream,
        other => panic!("no handshake: {other:?}"),
    }
}

/// The next message of a stream, or None at its end.
#[track_caller]
fn receive(wire: &mut Wire, stream: u32) -> Option<FromAgent> {
    let bytes = wire.message(stream)?;
    proto::AgentToProxy::decode(&*bytes).unwrap().message
}

/// The next answer on a stream, or None at its end.
#[track_caller]
fn answer_or_end(wire: &mut Wire, stream: u32) -> Option<proto::AgentResponse> {
    // Reports arrive all the time, so the read timeout never expires.
    let deadline = Instant::now() + PATIENCE;
    loop {
        assert!(Instant::now() < deadline, "no answer in time");
        match receive(wire, stream)? {
            FromAgent::Response(response) => return Some(response),
            FromAgent::Health(_) | FromAgent::Metrics(_) => {}
            other => panic!("no answer: {other:?}"),
        }
    }
}

#[track_caller]
fn answer(wire: &mut Wire, stream: u32) -> proto::AgentResponse {
    answer_or_end(wire, stream).expect("the agent ended the stream before it answered")
}

/// Waits until the agent has closed the connection.
#[track_caller]
fn assert_closed(wire: &mut Wire) {
    while wire.receive().is_some() {}
}

/// How a call ends. Messages before the end are ignored.
async fn ended<M: prost::Message + Default + 'static>((to, mut from): (mpsc::Sender<Vec<u8>>, Streaming<M>)) -> Result<(), Status> {
    let _open = to;
    while patiently(from.message()).await?.is_some() {}
    Ok(())
}

/// Events with an id that are invalid otherwise.
fn wrong_events(id: &str) -> Vec<Vec<u8>> {
    let (id_alone, number, text) = (field(1, id.as_bytes()), [0x28, 1], b"\xff\xfe");
    let mut wrong = Vec::new();
    // The id of request headers is within their metadata.
    let request = |rest: &[u8]| field(2, &[&field(1, &id_alone), rest].concat());
    for at in [2, 3, 4] {
        // Invalid UTF-8, and a number instead of a string.
        wrong.push(request(&field(at, text)));
        wrong.push(request(&[at << 3, 1]));
    }
    wrong.push(request(&field(5, text)));
    wrong.push(request(&field(5, &field(1, text))));
    // A port that is a string, a time of eight bytes.
    wrong.push(field(2, &field(1, &[&id_alone[..], &field(4, b"1")].concat())));
    wrong.push(field(2, &field(1, &[&id_alone[..], &[0x51, 0, 0, 0, 0, 0, 0, 0, 0]].concat())));
    // Body chunks of either direction whose index or end is a string, or whose data is a number.
    for direction in [3, 5] {
        wrong.push(field(direction, &[&id_alone[..], &field(2, b"x")].concat()));
        wrong.push(field(direction, &[&id_alone[..], &[0x18, 1]].concat()));
        wrong.push(field(direction, &[&id_alone[..], &field(4, b"")].concat()));
        // Groups do not exist in proto3.
        wrong.push(field(direction, &[&id_alone[..], &[0x13]].concat()));
    }
    let response = |status_code| {
        ToAgent::ResponseHeaders(proto::ResponseHeadersEvent { correlation_id: id.into(), status_code, ..Default::default() })
    };
    wrong.extend([65_536, u32::MAX].map(|status| encoded(response(status))));
    wrong.push(field(4, &[&id_alone[..], &field(2, b"200")].concat()));
    let websocket =
        |frame_type| ToAgent::WebsocketFrame(proto::WebSocketFrameEvent { correlation_id: id.into(), frame_type, ..Default::default() });
    wrong.extend([0, 6, -1].map(|kind| encoded(websocket(kind))));
    wrong.push(field(7, &[&id_alone[..], &field(2, text)].concat()));
    // Unknown kinds, and a known kind with the wrong content.
    wrong.extend([12, 13, 15].map(|kind| field(kind, &id_alone)));
    wrong.push(field(14, &[&id_alone[..], &number].concat()));
    // After a valid one: the last one counts, and it is invalid.
    wrong.push([encoded(get("other", "/")), field(3, &[&id_alone[..], &field(2, b"x")].concat())].concat());
    wrong
}

/// Sends events without opening a window for an answer until the agent reads no more. Returns their
/// number, and the unsent rest of the last.
fn flood(wire: &mut Wire, stream: u32) -> (usize, Vec<u8>) {
    wire.opens_windows(false);
    for sent in 0..1_000_000 {
        // Long enough to reach the limit of bytes before any limit of frames.
        let bytes = message(get(&format!("r{sent}"), &format!("/{}", "x".repeat(300))));
        let rest = wire.data_until_full(stream, &bytes);
        if !rest.is_empty() {
            return (sent + 1, rest);
        }
    }
    panic!("the agent never stops reading");
}

mod connections {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn that_are_not_http_2_are_closed() {
        let (agent, _folder) = agent(&[]);
        let mut good = well_behaved(&agent).await;
        // The start of a ClientHello of TLS 1.2.
        let hello = [&b"\x16\x03\x01\x00\xc8\x01\x00\x00\xc4\x03\x03"[..], &[0x5a; 200]].concat();
        let event = testkit::frame(testkit::kind::HANDSHAKE_REQUEST, b"{\"supported_versions\":[2]}");
        for noise in [
            b"GET / HTTP/1.1\r\nHost: agent\r\n\r\n".to_vec(),
            b"PRI * HTTP/1.1\r\n\r\nSM\r\n\r\n".to_vec(),
            b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n".to_vec(),
            hello,
            event,
            vec![0; 4096],
            vec![0xff; 4096],
        ] {
            let mut socket = TcpStream::connect(address(&agent)).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket.write_all(&noise).unwrap();
            // The agent closes the connection, with or without a GOAWAY.
            let ended = socket.read_to_end(&mut Vec::new());
            assert!(!ended.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock), "the connection stays open after {noise:?}");
            assert_serves(&mut good).await;
        }
        agent.end_unharmed();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn that_break_the_protocol_are_closed() {
        let (agent, _folder) = agent(&[]);
        let mut good = well_behaved(&agent).await;
        let opened = frame(kind::HEADERS, flag::END_HEADERS, 1, &http2::headers(PROCESS_STREAM, &[]));
        for (what, bytes) in [
            ("a frame of 16 MiB", b"\xff\xff\xff\x00\x00\x00\x00\x00\x01".to_vec()),
            ("data on a stream that was never opened", frame(kind::DATA, 0, 1, b"x")),
            ("data on no stream", frame(kind::DATA, 0, 0, b"x")),
            ("headers on no stream", frame(kind::HEADERS, flag::END_HEADERS, 0, b"")),
            ("a stream of the server's", frame(kind::HEADERS, flag::END_HEADERS, 2, &http2::headers(PROCESS_STREAM, &[]))),
            ("invalid headers", frame(kind::HEADERS, flag::END_HEADERS, 1, &[0xff; 100])),
            ("padding longer than its frame", frame(kind::HEADERS, flag::END_HEADERS | flag::PADDED, 1, &[0xff, 0])),
            ("a continuation of nothing", frame(kind::CONTINUATION, flag::END_HEADERS, 1, b"")),
            ("a reset of a stream that was never opened", frame(kind::RST_STREAM, 0, 1, &[0; 4])),
            ("a reset that is too short", [&opened[..], &frame(kind::RST_STREAM, 0, 1, b"x")].concat()),
            ("settings that are cut off", frame(kind::SETTINGS, 0, 0, b"x")),
            ("settings that are forbidden", frame(kind::SETTINGS, 0, 0, &[0, 4, 0xff, 0xff, 0xff, 0xff])),
            ("settings on a stream", frame(kind::SETTINGS, 0, 1, b"")),
            ("a push", frame(kind::PUSH_PROMISE, flag::END_HEADERS, 1, &[0, 0, 0, 2])),
            ("a ping that is too long", frame(kind::PING, 0, 0, &[0; 9])),
            ("a window that does not open", frame(kind::WINDOW_UPDATE, 0, 0, &[0; 4])),
            ("a window that is too wide", frame(kind::WINDOW_UPDATE, 0, 0, &[0x7f, 0xff, 0xff, 0xff])),
            ("another frame within headers", [&frame(kind::HEADERS, 0, 1, b"")[..], &frame(kind::PING, 0, 0, &[0; 8])].concat()),
        ] {
            println!("{what}");
            let mut wire = wire(&agent);
            wire.raw(&bytes);
            assert_closed(&mut wire);
            assert_serves(&mut good).await;
        }
        agent.end_unharmed();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn may_end_anywhere() {
        let (agent, _folder) = agent(&[]);
        let mut good = well_behaved(&agent).await;
        let data = [message(handshake(&[2], "0.6.54")), message(get("cut", "/slow"))].concat();
        let whole = [
            http2::PREFACE.to_vec(),
            frame(kind::SETTINGS, 0, 0, b""),
            frame(kind::HEADERS, flag::END_HEADERS, 1, &http2::headers(PROCESS_STREAM, &[])),
            frame(kind::DATA, 0, 1, &data),
        ]
        .concat();
        for cut in (0..=whole.len()).step_by(7) {
            let mut socket = TcpStream::connect(address(&agent)).unwrap();
            socket.write_all(&whole[..cut]).unwrap();
        }
        assert_serves(&mut good).await;
        agent.end_unharmed();
    }
}

mod messages {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn may_arrive_byte_by_byte() {
        let (agent, _folder) = agent(&[]);
        let mut wire = wire(&agent);
        // Two streams at once, so partial messages exist side by side, and empty frames in between.
        let streams = [wire.open(PROCESS_STREAM), wire.open(PROCESS_STREAM)];
        let data = [message(handshake(&[2], "0.6.54")), message(get("slow", "/")), message(get("slower", "/blocked"))].concat();
        for (at, byte) in data.iter().enumerate() {
            for stream in streams {
                wire.raw(&frame(kind::DATA, 0, stream, &[*byte]));
                if at % 16 == 0 {
                    wire.raw(&frame(kind::DATA, 0, stream, b""));
                }
            }
        }
        for stream in streams {
            assert!(matches!(receive(&mut wire, stream), Some(FromAgent::Handshake(handshake)) if handshake.success));
            let mut answers = [answer(&mut wire, stream), answer(&mut wire, stream)];
            answers.sort_by_key(|answer| answer.correlation_id.len());
            assert_good(&answers[0]);
            assert!(answers[1].correlation_id == "slower" && !is_allow(&answers[1]));
        }
        drop(wire);
        agent.end_unharmed();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn over_the_limit_end_their_stream_alone() {
        let (agent, _folder) = agent(&[]);
        let mut client = Client::connect(&agent).await;
        let mut good = client.process().await;
        let too_large = vec![0; MAX_MESSAGE + 1];
        let stream = client.process().await;
        stream.send_raw(too_large.clone()).await;
        assert_eq!(stream.end().await.unwrap_err().code(), Code::OutOfRange);
        let control = client.streaming::<proto::ProxyControl>(CONTROL_STREAM).await;
        control.0.send(too_large.clone()).await.unwrap();
        assert_eq!(ended(control).await.unwrap_err().code(), Code::OutOfRange);
        for method in [PROCESS_EVENT, HEALTH_CHECK] {
            let rejected = client.unary::<proto::AgentToProxy>(method, too_large.clone()).await;
            assert_eq!(rejected.unwrap_err().code(), Code::OutOfRange, "{method}");
        }
        assert_serves(&mut good).await;
        agent.end_unharmed();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn of_an_invalid_format_end_their_stream_alone() {
        let (agent, _folder) = agent(&[]);
        let mut good = well_behaved(&agent).await;
        let (mut wire, other) = processing(&agent);
        let event = encoded(get("framed-badly", "/"));
        let prefixed = |compressed: u8, length: usize| [&[compressed][..], &(length as u32).to_be_bytes(), &event].concat();
        for (what, bytes) in [
            ("compressed, though no compression was negotiated", prefixed(1, event.len())),
            ("an unknown flag", prefixed(2, event.len())),
            ("a flag of all bits", prefixed(0xff, event.len())),
            ("more than the limit is announced", prefixed(0, MAX_MESSAGE + 1)),
            ("the greatest length is announced", prefixed(0, u32::MAX as usize)),
            ("cut off", prefixed(0, event.len() + 1)),
            ("cut off within its length", vec![0, 0, 0]),
            ("no prefix", b"GET / HTTP/1.1\r\n\r\n".to_vec()),
        ] {
            println!("{what}");
            // On a stream of events after its handshake and instead of it, and in each other call.
            let after = process(&mut wire);
            for stream in [after, wire.open(PROCESS_STREAM), wire.open(PROCESS_EVENT), wire.open(CONTROL_STREAM), wire.open(HEALTH_WATCH)] {
                wire.data(stream, &bytes, true);
                assert_eq!(answer_or_end(&mut wire, stream), None);
            }
            wire.data(other, &message(get("beside", "/")), false);
            assert_good(&answer(&mut wire, other));
        }
        assert_serves(&mut good).await;
        drop(wire);
        agent.end_unharmed();
    }
}

mod handshake {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn streams_that_begin_with_anything_else_are_rejected() {
        let (agent, _folder) = agent(&[]);
        let mut client = Client::connect(&agent).await;
        let mut good = client.process().await;
        for first in [
            Vec::new(),
            b"\xff\xff".to_vec(),
            field(20, &field(1, b"a")),
            // Versions that are a string.
            field(1, &field(1, b"\xff")),
            encoded(body("a", "x")),
            encoded(ping()),
            encoded(cancel("a")),
            encoded(configure("{}")),
            encoded(handshake(&[], "0.6.54")),
            encoded(handshake(&[1, 3, u32::MAX], "0.6.54")),
            encoded(ToAgent::Handshake(proto::HandshakeRequest {
                supported_versions: vec![2],
                config_json: r#"{"colour":1}"#.into(),
                ..Default::default()
            })),
            encoded(ToAgent::Handshake(proto::HandshakeRequest {
                supported_versions: vec![2],
                config_json: "{".into(),
                ..Default::default()
            })),
        ] {
            let (to, mut from) = client.streaming::<proto::AgentToProxy>(PROCESS_STREAM).await;
            to.send(first.clone()).await.unwrap();
            // The next message is ignored, and may arrive after the end.
            let _ = to.send(encoded(get("after", "/"))).await;
            let rejection = loop {
                match patiently(from.message()).await {
                    Ok(Some(proto::AgentToProxy { message: Some(FromAgent::Handshake(handshake)) })) => {
                        assert!(!handshake.success, "{first:?}")
                    }
                    Ok(other) => panic!("{other:?} after {first:?}"),
                    Err(status) => break status,
                }
            };
            assert_eq!(rejection.code(), Code::FailedPrecondition, "{first:?}");
        }
        // A second handshake is rejected as well.
        let stream = client.process().await;
        stream.send(handshake(&[2], "0.6.54")).await;
        assert_eq!(stream.end().await.unwrap_err().code(), Code::FailedPrecondition);
        assert_serves(&mut good).await;
        agent.end_unharmed();
    }
}

mod invalid_events {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn are_never_allowed() {
        for fail_open in [false, true] {
            let (agent, _folder) = agent(if fail_open { &["--fail-open"] } else { &[] });
            let mut client = Client::connect(&agent).await;
            let mut stream = client.process().await;
            let assert_rejected = |answer: &proto::AgentResponse, id: &str| {
                assert_eq!((module_error(answer), answer.correlation_id.as_str()), (Some("WASM_INVALID_EVENT"), id));
                assert_eq!(is_allow(answer), fail_open, "{answer:?}");
                let tags: &[&str] = if fail_open { &["wasm-error", "fail-open"] } else { &["wasm-error"] };
                assert_eq!(answer.audit.as_ref().unwrap().tags, tags);
            };
            for bytes in wrong_events("wrong") {
                println!("{}", bytes.escape_ascii());
                stream.send_raw(bytes.clone()).await;
                let on_stream = stream.answer().await;
                let alone: proto::AgentToProxy = client.unary(PROCESS_EVENT, bytes).await.unwrap();
                let Some(FromAgent::Response(alone)) = alone.message else { panic!("no answer: {alone:?}") };
                for answer in [on_stream, alone] {
                    assert_rejected(&answer, "wrong");
                }
            }
            // Headers without metadata have an empty id.
            stream.send_raw(field(2, b"")).await;
            assert_rejected(&stream.answer().await, "");
            assert_serves(&mut stream).await;
            agent.end_unharmed();
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn cut_off_anywhere_are_never_allowed() {
        let (agent, _folder) = agent(&[]);
        let mut client = Client::connect(&agent).await;
        let mut stream = client.process().await;
        for event in [get("cut", "/"), body("cut", "x")] {
            let whole = encoded(event);
            for cut in 0..whole.len() {
                stream.send_raw(whole[..cut].to_vec()).await;
                let alone = client.unary::<proto::AgentToProxy>(PROCESS_EVENT, whole[..cut].to_vec()).await;
                assert_eq!(alone.unwrap_err().code(), Code::InvalidArgument, "{cut}");
            }
        }
        // Truncated events have no id, so the next answers are those of the next valid events.
        assert_serves(&mut stream).await;
        agent.log.wait_for_line("an event without an id", |line| line.contains("without a usable correlation id"));
        agent.end_unharmed();
    }
}

mod calls {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn of_unknown_methods_are_rejected() {
        let (agent, _folder) = agent(&[]);
        let mut good = well_behaved(&agent).await;
        let mut wire = wire(&agent);
        let event = message(get("astray", "/"));
        for path in [
            "/",
            "//",
            "/zentinel.agent.v2.AgentServiceV2",
            "/zentinel.agent.v2.AgentServiceV2/",
            "/zentinel.agent.v2.AgentServiceV2/processevent",
            "/zentinel.agent.v2.AgentServiceV2/ProcessEvent/",
            "/zentinel.agent.v2.AgentServiceV2//ProcessEvent",
            "/zentinel.agent.v1.AgentService/ProcessEvent",
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            "*",
        ] {
            let stream = wire.open(path);
            wire.data(stream, &event, true);
            assert_eq!(wire.message(stream), None, "{path}");
        }
        // A compression that the agent does not support.
        let stream = wire.open_with(PROCESS_EVENT, &[("grpc-encoding", "gzip")]);
        wire.data(stream, &[&[1], &event[1..]].concat(), true);
        assert_eq!(wire.message(stream), None);
        // A call without an event.
        let stream = wire.open(PROCESS_EVENT);
        wire.data(stream, b"", true);
        assert_eq!(wire.message(stream), None);
        let stream = process(&mut wire);
        wire.data(stream, &message(get("here", "/")), false);
        assert_good(&answer(&mut wire, stream));
        assert_serves(&mut good).await;
        drop(wire);
        agent.end_unharmed();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn misusing_the_control_stream_change_nothing() {
        let (agent, _folder) = agent(&[]);
        let mut client = Client::connect(&agent).await;
        let mut good = client.process().await;
        let (control, mut answers) = client.streaming::<proto::ProxyControl>(CONTROL_STREAM).await;
        let mut misuse = wrong_events("control");
        misuse.extend([
            Vec::new(),
            b"\xff\xff\xff".to_vec(),
            encoded(handshake(&[2], "0.6.54")),
            encoded(get("control", "/")),
            encoded(body("control", "x")),
            encoded(cancel("control")),
            encoded(ping()),
            // A drain with an unknown field, and one whose time is a string.
            field(3, &[0x20, 1]),
            field(3, &field(1, b"1000")),
            drain()[..drain().len() - 1].to_vec(),
        ]);
        for message in misuse.iter().cycle().take(5000) {
            patiently(control.send(message.clone())).await.unwrap();
        }
        // The answer to a configuration comes after all that was sent before it. Nothing of an
        // invalid one is applied.
        for (config, reason) in
            [(r#"{"fail-open":true,"colour":1}"#, "unknown key `colour`"), ("{", "is not JSON"), ("{\"pool-size\":-1}", "pool-size")]
        {
            let configure = proto::ConfigureEvent { config_json: config.into(), ..Default::default() };
            let configure = proto::ProxyControl { message: Some(proto::proxy_control::Message::Configure(configure)) };
            control.send(configure.encode_to_vec()).await.unwrap();
            match patiently(answers.message()).await.unwrap().unwrap().message {
                Some(proto::proxy_control::Message::ConfigResponse(response)) => {
                    assert!(!response.accepted && response.error.as_ref().unwrap().contains(reason), "{response:?}");
                }
                other => panic!("no answer: {other:?}"),
            }
        }
        assert_eq!(client.health("").await.unwrap(), ServingStatus::Serving);
        assert!(!is_allow(
            &good.ask(ToAgent::ResponseHeaders(proto::ResponseHeadersEvent { status_code: 70_000, ..Default::default() })).await
        ));
        assert_serves(&mut good).await;
        agent.end_unharmed();
    }
}

mod superseded {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_blocked_request_never_gets_the_allow_of_its_twin() {
        const TRIES: usize = 10_000;
        /// Pairs sent at once, so slow calls overlap with the twins of others.
        const WINDOW: usize = 40;

        let (agent, _folder) = agent(&[]);
        let mut good = well_behaved(&agent).await;
        let (mut wire, stream) = processing(&agent);
        for start in (0..TRIES).step_by(WINDOW) {
            let mut expected = HashMap::new();
            let mut all = Vec::new();
            for at in start..start + WINDOW {
                let id = format!("twin-{at}");
                // The proxy waits for the last one only, and would take any answer for that one's.
                // One frame has all, so the agent never answers before it has the newest.
                let mut bytes = Vec::new();
                for uri in module::twins(at) {
                    bytes.extend(message(if *uri == "cancel" { cancel(&id) } else { get(&id, uri) }));
                }
                all.extend(frame(kind::DATA, 0, stream, &bytes));
                expected.insert(id, module::twins(at).last() == Some(&"/blocked"));
            }
            wire.raw(&all);
            while !expected.is_empty() {
                let answer = answer(&mut wire, stream);
                let blocked = expected.remove(&answer.correlation_id).unwrap_or_else(|| panic!("answered twice: {answer:?}"));
                assert_eq!(!is_allow(&answer), blocked, "{answer:?}");
                assert_eq!(module_error(&answer), None, "{answer:?}");
            }
        }
        // No answer is left that could be taken for another request's.
        wire.data(stream, &message(get("last", "/")), false);
        assert_eq!(answer(&mut wire, stream).correlation_id, "last");
        assert_serves(&mut good).await;
        drop(wire);
        agent.end_unharmed();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn twins_that_arrive_together_get_one_answer() {
        let (agent, _folder) = agent(&[]);
        let (mut wire, stream) = processing(&agent);
        let others =
            |name: &str, count: usize| -> Vec<u8> { (0..count).flat_map(|at| message(get(&format!("{name}-{at}"), "/"))).collect() };
        // More events than the agent runs before it sends answers.
        for before in 0..70 {
            for between in [0, 1, 30] {
                let id = format!("twin-{before}-{between}");
                // One frame, so all arrive together.
                let bytes =
                    [others("before", before), message(get(&id, "/allowed")), others("between", between), message(get(&id, "/blocked"))];
                wire.raw(&frame(kind::DATA, 0, stream, &bytes.concat()));
                for _ in 0..=before + between {
                    let answer = answer(&mut wire, stream);
                    assert!(is_allow(&answer) != (answer.correlation_id == id), "{answer:?}, {before} before and {between} between");
                }
            }
        }
        wire.data(stream, &message(get("last", "/")), false);
        assert_eq!(answer(&mut wire, stream).correlation_id, "last");
        drop(wire);
        agent.end_unharmed();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn streams_that_share_ids_are_independent() {
        const IDS: usize = 2500;
        const STREAMS: usize = 4;
        const WINDOW: usize = 20;
        const URIS: [&str; 8] = ["/allowed", "/blocked", "/allowed", "/blocked", "/slow", "/blocked", "/allowed", "/blocked"];

        let (agent, _folder) = agent(&[]);
        let mut wires = [wire(&agent), wire(&agent)];
        let streams: Vec<(usize, u32)> = (0..STREAMS).map(|at| (at % 2, process(&mut wires[at % 2]))).collect();
        // Each stream asks about another URI under the same id.
        let uri = |id: usize, place: usize| URIS[(id + place) % URIS.len()];
        for start in (0..IDS).step_by(WINDOW) {
            for id in start..start + WINDOW {
                for (place, (wire, stream)) in streams.iter().enumerate() {
                    wires[*wire].data(*stream, &message(get(&id.to_string(), uri(id, place))), false);
                }
            }
            for (place, (wire, stream)) in streams.iter().enumerate() {
                let mut awaited: BTreeSet<usize> = (start..start + WINDOW).collect();
                while !awaited.is_empty() {
                    let answer = answer(&mut wires[*wire], *stream);
                    let id = answer.correlation_id.parse().unwrap();
                    assert!(awaited.remove(&id), "answered twice: {answer:?}");
                    assert_eq!(is_allow(&answer), uri(id, place) != "/blocked", "{answer:?}");
                }
            }
        }
        // Calls for single events are independent too.
        let [wire, _] = &mut wires;
        for round in 0..20 {
            let calls: Vec<(u32, &str)> = (0..40).map(|at| (wire.open(PROCESS_EVENT), uri(round, at))).collect();
            for (stream, uri) in &calls {
                wire.data(*stream, &message(get("alone", uri)), true);
            }
            for (stream, uri) in calls {
                assert_eq!(is_allow(&answer(wire, stream)), uri != "/blocked");
                assert_eq!(answer_or_end(wire, stream), None);
            }
        }
        drop(wires);
        agent.end_unharmed();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_event_after_a_cancel_gets_its_own_answer() {
        let (agent, _folder) = agent(&[]);
        let mut stream = well_behaved(&agent).await;
        for round in 0..100 {
            let id = format!("c{round}");
            stream.send(cancel("unknown")).await;
            stream.send(get(&id, "/slow")).await;
            stream.send(cancel(&id)).await;
            stream.send(cancel(&id)).await;
            let answer = stream.ask(get(&id, "/blocked")).await;
            // The first event may have been answered before its cancel arrived. Then the second
            // answer is that of the second event.
            let answer = if is_allow(&answer) { stream.answer().await } else { answer };
            assert!(answer.correlation_id == id && !is_allow(&answer), "{answer:?}");
        }
        assert_serves(&mut stream).await;
        agent.end_unharmed();
    }
}

mod bounds {
    use super::*;

    /// The input that a [`module::revealing`] returned.
    #[track_caller]
    fn seen(answer: &proto::AgentResponse) -> Value {
        match &answer.decision {
            Some(Decision::Block(proto::BlockDecision { body: Some(body), .. })) => serde_json::from_str(body).unwrap(),
            _ => panic!("no input in {answer:?}"),
        }
    }

    fn with_headers(id: &str, headers: &[(String, String)]) -> ToAgent {
        let headers = headers.iter().map(|(name, value)| proto::Header { name: name.clone(), value: value.clone() }).collect();
        match get(id, "/") {
            ToAgent::RequestHeaders(event) => ToAgent::RequestHeaders(proto::RequestHeadersEvent { headers, ..event }),
            other => other,
        }
    }

    /// Connections that the agent serves at once.
    const MAX_CONNECTIONS: usize = 256;

    #[tokio::test(flavor = "multi_thread")]
    async fn large_events_reach_the_module_unchanged() {
        let options = [&AMPLE[..], &["--max-memory-mb", "128", "--max-output-bytes", "10000000", "--header-case", "lower"]].concat();
        let (agent, _folder) = client::serve(&module::revealing(&["on_request_headers"]), &options);
        let mut stream = well_behaved(&agent).await;
        let many: Vec<(String, String)> = (0..100_000).map(|at| (format!("x-{at}"), "v".into())).collect();
        // Few enough bytes for an answer.
        let long = vec![
            ("x-long".into(), "x".repeat(1 << 20)),
            ("x-escaped".into(), "\"\\\u{1}".repeat(100_000)),
            ("n".repeat(1 << 20), "x".into()),
        ];
        for (id, headers) in [("many", many), ("long", long)] {
            let seen = seen(&stream.ask(with_headers(id, &headers)).await);
            // Not `assert_eq`, because it would print megabytes.
            assert!(seen["headers"] == Value::Object(headers.into_iter().map(|(name, value)| (name, value.into())).collect()), "{id}");
        }
        let same = vec![("x-same".to_owned(), String::new()); 500_000];
        let seen_same = seen(&stream.ask(with_headers("same", &same)).await);
        assert!(seen_same["header_values"] == json!({"x-same": vec![""; 500_000]}));

        // More than the instance has memory for. Only this request fails.
        let answer = stream.ask(get("huge", &format!("/{}", "x".repeat(15 << 20)))).await;
        assert_eq!(module_error(&answer), Some("WASM_ALLOC_FAILED"));
        assert!(!is_allow(&answer));
        assert_eq!(seen(&stream.ask(get("still-there", "/here")).await)["uri"], "/here");
        agent.end_unharmed();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn too_many_headers_are_rejected_at_little_cost() {
        const MAX_ENTRIES: usize = 1 << 19;

        let (agent, _folder) = agent(&[]);
        let mut stream = well_behaved(&agent).await;
        assert_serves(&mut stream).await;
        let before = agent.resident();
        // Two bytes each, so up to as many as fit in a message.
        for count in [MAX_ENTRIES + 1001, 8 << 20] {
            let headers = vec![proto::Header::default(); count];
            let event = match get("many", "/") {
                ToAgent::RequestHeaders(event) => proto::RequestHeadersEvent { headers, ..event },
                _ => unreachable!(),
            };
            let answer = stream.ask(ToAgent::RequestHeaders(event)).await;
            assert_eq!(module_error(&answer), Some("WASM_INVALID_EVENT"));
        }
        println!("{} kB more", agent.peak().saturating_sub(before) >> 10);
        assert!(agent.peak() < before + (128 << 20), "{} kB more", (agent.peak() - before) >> 10);
        assert_serves(&mut stream).await;
        agent.end_unharmed();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn announced_lengths_take_no_memory() {
        const CONNECTIONS: usize = 5;

        let (agent, _folder) = agent(&[]);
        let mut good = well_behaved(&agent).await;
        assert_serves(&mut good).await;
        let before = agent.resident();
        let mut held = Vec::new();
        for _ in 0..CONNECTIONS {
            let mut wire = wire(&agent);
            let streams: Vec<_> = (0..MAX_STREAMS).map(|_| wire.open(PROCESS_STREAM)).collect();
            for stream in &streams {
                let announced = [&message(handshake(&[2], "0.6.54"))[..], &[0], &(MAX_MESSAGE as u32).to_be_bytes(), b"begun"].concat();
                wire.data(*stream, &announced, false);
            }
            for stream in streams {
                assert!(matches!(receive(&mut wire, stream), Some(FromAgent::Handshake(handshake)) if handshake.success));
            }
            assert!(wire.settle());
            held.push(wire);
        }
        assert_serves(&mut good).await;
        println!("{} kB more", agent.resident().saturating_sub(before) >> 10);
        assert!(agent.resident() < before + BOUNDED, "{}", agent.resident() - before);
        drop(held);
        agent.end_unharmed();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn closed_windows_take_bounded_memory_and_lose_no_answer() {
        let (agent, _folder) = agent(&[]);
        let mut good = well_behaved(&agent).await;
        assert_serves(&mut good).await;
        let (mut wire, stream) = processing(&agent);
        let before = agent.resident();
        let (sent, rest) = flood(&mut wire, stream);
        println!("{sent} events sent, {} kB more", agent.resident().saturating_sub(before) >> 10);
        assert!(agent.resident() < before + BOUNDED, "{}", agent.resident() - before);
        assert_serves(&mut good).await;
        // Another stream of the same connection waits, and is not lost.
        let other = wire.open(PROCESS_STREAM);
        // Once the client reads again, every answer arrives.
        wire.opens_windows(true);
        wire.data(stream, &rest, false);
        let mut seen = vec![false; sent];
        for _ in 0..sent {
            let answer = answer(&mut wire, stream);
            assert_good(&answer);
            let at: usize = answer.correlation_id[1..].parse().unwrap();
            assert!(!std::mem::replace(&mut seen[at], true), "{at} was answered twice");
        }
        wire.data(other, &message(handshake(&[2], "0.6.54")), false);
        assert!(matches!(receive(&mut wire, other), Some(FromAgent::Handshake(handshake)) if handshake.success));
        assert_serves(&mut good).await;
        drop(wire);
        agent.end_unharmed();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn many_closed_windows_take_bounded_memory() {
        let (agent, _folder) = agent(&["--max-body-bytes", "1000000"]);
        let mut good = well_behaved(&agent).await;
        assert_serves(&mut good).await;
        let before = agent.resident();
        let mut held = Vec::new();
        for _ in 0..5 {
            let mut wire = wire(&agent);
            wire.opens_windows(false);
            // Each of them gets every report of the agent as well.
            for _ in 0..MAX_STREAMS {
                let stream = wire.open(PROCESS_STREAM);
                let bytes = [message(handshake(&[2], "0.6.54")), message(get("stuck", "/"))].concat();
                wire.raw(&frame(kind::DATA, 0, stream, &bytes));
            }
            assert!(wire.settle());
            held.push(wire);
        }
        assert_serves(&mut good).await;
        println!("{} kB more", agent.resident().saturating_sub(before) >> 10);
        assert!(agent.resident() < before + BOUNDED, "{}", agent.resident() - before);
        drop(held);
        assert_serves(&mut good).await;
        agent.end_unharmed();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn endless_headers_are_not_collected() {
        /// Far more than the limit for the headers of a call.
        const LIMIT: usize = 64 << 20;

        let (agent, _folder) = agent(&[]);
        let mut good = well_behaved(&agent).await;
        assert_serves(&mut good).await;
        let before = agent.resident();
        let fields = http2::header("x-more", &"x".repeat(1000)).repeat(16);
        let index = b"\x82".repeat(16 << 10);
        for more in [&fields[..], &index, b""] {
            let mut wire = wire(&agent);
            wire.raw(&frame(kind::HEADERS, 0, 1, &http2::headers(PROCESS_STREAM, &[])));
            let burst = frame(kind::CONTINUATION, 0, 1, more).repeat(64);
            let mut sent = 0;
            while wire.raw(&burst) {
                sent += burst.len();
                assert!(sent < LIMIT, "the agent never stops reading headers");
            }
            assert_closed(&mut wire);
            assert_serves(&mut good).await;
        }
        // Headers that end but are too many: the call is rejected, and the connection stays open or
        // is closed.
        let mut wire = wire(&agent);
        let stream = wire.open_with(PROCESS_EVENT, &[("x-much", "x".repeat(15 << 10).as_str())]);
        wire.data(stream, &message(get("much", "/")), true);
        let _ = wire.message(stream);
        let large = [http2::headers(PROCESS_EVENT, &[]), fields.clone(), fields.clone()].concat();
        let stream = wire.next_stream();
        let (first, rest) = large.split_at(16 << 10);
        wire.raw(&frame(kind::HEADERS, flag::END_STREAM, stream, first));
        let (second, rest) = rest.split_at(rest.len().min(16 << 10));
        wire.raw(&frame(kind::CONTINUATION, if rest.is_empty() { flag::END_HEADERS } else { 0 }, stream, second));
        if !rest.is_empty() {
            wire.raw(&frame(kind::CONTINUATION, flag::END_HEADERS, stream, rest));
        }
        assert_eq!(wire.message(stream), None);
        println!("{} kB more", agent.resident().saturating_sub(before) >> 10);
        assert!(agent.resident() < before + BOUNDED, "{}", agent.resident() - before);
        assert_serves(&mut good).await;
        drop(wire);
        agent.end_unharmed();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn unread_replies_to_frames_take_bounded_memory() {
        let (agent, _folder) = agent(&[]);
        let mut good = well_behaved(&agent).await;
        assert_serves(&mut good).await;
        let before = agent.resident();
        let call = |stream: u32| frame(kind::HEADERS, flag::END_HEADERS | flag::END_STREAM, stream, &http2::headers("/nowhere", &[]));
        let settings = frame(kind::SETTINGS, 0, 0, &[0, 4, 0, 1, 0, 0]);
        for what in ["pings", "settings", "calls", "empty data"] {
            let mut wire = wire(&agent);
            let stream = wire.next_stream();
            wire.raw(&frame(kind::HEADERS, flag::END_HEADERS, stream, &http2::headers(PROCESS_STREAM, &[])));
            let mut sent = 0;
            // Until the agent reads no more, or closes the connection.
            while sent < 32 << 20 {
                let burst = match what {
                    "pings" => frame(kind::PING, 0, 0, &[7; 8]).repeat(1000),
                    "settings" => settings.repeat(1000),
                    "empty data" => frame(kind::DATA, 0, stream, b"").repeat(1000),
                    _ => (0..1000).flat_map(|_| call(wire.next_stream())).collect(),
                };
                if !wire.raw_until_full(&burst) {
                    break;
                }
                sent += burst.len();
            }
            println!("{what}: {sent} bytes read, {} kB more", agent.resident().saturating_sub(before) >> 10);
            assert_serves(&mut good).await;
            assert!(agent.resident() < before + BOUNDED, "{}", agent.resident() - before);
        }
        agent.end_unharmed();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn streams_over_the_limit_are_rejected() {
        let (agent, _folder) = agent(&[]);
        let mut good = well_behaved(&agent).await;
        let mut wire = wire(&agent);
        let streams: Vec<u32> = (0..3 * MAX_STREAMS)
            .map(|_| {
                let stream = wire.open(PROCESS_STREAM);
                wire.raw(&frame(kind::DATA, 0, stream, &message(handshake(&[2], "0.6.54"))));
                stream
            })
            .collect();
        let (mut served, mut rejected) = (Vec::new(), 0);
        for stream in streams {
            match receive(&mut wire, stream) {
                Some(FromAgent::Handshake(handshake)) if handshake.success => served.push(stream),
                None => rejected += 1,
                other => panic!("no handshake: {other:?}"),
            }
        }
        assert_eq!((served.len(), rejected), (MAX_STREAMS, 2 * MAX_STREAMS));
        for stream in &served {
            wire.data(*stream, &message(get("first", "/")), false);
            wire.data(*stream, &message(get("second", "/blocked")), false);
        }
        for stream in served {
            let mut answers = [answer(&mut wire, stream), answer(&mut wire, stream)];
            answers.sort_by(|one, other| one.correlation_id.cmp(&other.correlation_id));
            assert_good(&answers[0]);
            assert!(!is_allow(&answers[1]));
        }
        assert_serves(&mut good).await;
        drop(wire);
        agent.end_unharmed();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn connections_over_the_limit_are_rejected() {
        let (agent, _folder) = agent(&["--admin-address", "127.0.0.1:0"]);
        let admin = agent.admin();
        let mut good = well_behaved(&agent).await;
        let address = address(&agent);
        let silent: Vec<TcpStream> = (0..MAX_CONNECTIONS - 1).map(|_| TcpStream::connect(address).unwrap()).collect();
        admin.wait_for_metric("wasm_agent_connections", MAX_CONNECTIONS as f64);
        for _ in 0..100 {
            let mut rejected = TcpStream::connect(address).unwrap();
            rejected.set_read_timeout(Some(PATIENCE)).unwrap();
            assert!(rejected.read(&mut [0]).map_or_else(|error| error.kind() == std::io::ErrorKind::ConnectionReset, |count| count == 0));
        }
        assert_serves(&mut good).await;
        drop(silent);
        admin.wait_for_metric("wasm_agent_connections", 1.0);
        let mut another = well_behaved(&agent).await;
        assert_serves(&mut another).await;
        agent.end_unharmed();
    }
}

mod resets {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn in_quick_succession_are_harmless() {
        let (agent, _folder) = agent(&["--admin-address", "127.0.0.1:0"]);
        let mut good = well_behaved(&agent).await;
        assert_serves(&mut good).await;
        let before = agent.resident();
        let data = [message(handshake(&[2], "0.6.54")), message(get("reset", "/slow"))].concat();
        // Streams reset without data, with an event in a stream, and with a call for an event.
        for (path, data) in [(PROCESS_STREAM, Vec::new()), (PROCESS_STREAM, data), (PROCESS_EVENT, message(get("reset", "/slow")))] {
            let mut wire = wire(&agent);
            let mut streams = 0;
            while streams < 20_000 {
                let mut burst = Vec::new();
                for _ in 0..MAX_STREAMS {
                    let stream = wire.next_stream();
                    burst.extend(frame(kind::HEADERS, flag::END_HEADERS, stream, &http2::headers(path, &[])));
                    if !data.is_empty() {
                        burst.extend(frame(kind::DATA, flag::END_STREAM, stream, &data));
                    }
                    burst.extend(frame(kind::RST_STREAM, 0, stream, &8_u32.to_be_bytes()));
                }
                streams += MAX_STREAMS;
                // The agent may close the connection before the end.
                if !wire.raw(&burst) || !wire.settle() {
                    break;
                }
            }
            println!("{streams} streams of {path} with {} bytes", data.len());
            assert_serves(&mut good).await;
        }
        // Calls that had begun are ended, and their instances released.
        agent.admin().wait_for_metric("wasm_agent_in_flight", 0.0);
        println!("{} kB more", agent.resident().saturating_sub(before) >> 10);
        assert!(agent.resident() < before + BOUNDED, "{}", agent.resident() - before);
        assert_serves(&mut good).await;
        agent.end_unharmed();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn release_instances() {
        let options = ["--timeout-ms", "50000", "--pool-size", "2"];
        let (agent, _directory) = client::serve(&module::choosing(), &options);
        let (mut wire, other) = processing(&agent);
        for _ in 0..50 {
            let streams: Vec<u32> = (0..10).map(|_| process(&mut wire)).collect();
            for stream in streams {
                wire.data(stream, &message(get("loop", "/loop")), false);
                wire.raw(&frame(kind::RST_STREAM, 0, stream, &8_u32.to_be_bytes()));
            }
            // There are two instances, and each loop would keep one for longer than this test
            // waits.
            wire.data(other, &message(get("next", "/")), false);
            assert!(is_allow(&answer(&mut wire, other)));
        }
        drop(wire);
        agent.end_unharmed();
    }
}

mod fairness {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn floods_do_not_starve_other_connections() {
        let (agent, _folder) = agent(&[]);
        let stop = Arc::new(AtomicBool::new(false));
        let flooding = std::thread::available_parallelism().map_or(4, usize::from) * 2;
        let flooders: Vec<_> = (0..flooding)
            .map(|flooder| {
                let (mut wire, stream) = processing(&agent);
                let stop = Arc::clone(&stop);
                std::thread::spawn(move || {
                    let (mut sent, mut answered) = (0, 0);
                    while !stop.load(Relaxed) {
                        // Enough events in flight for the agent to always have more to read.
                        while sent < answered + 400 {
                            let flood: Vec<u8> = (sent..sent + 50).flat_map(|at| message(get(&format!("f{flooder}-{at}"), "/"))).collect();
                            wire.data(stream, &flood, false);
                            sent += 50;
                        }
                        answer(&mut wire, stream);
                        answered += 1;
                    }
                })
            })
            .collect();
        let stop = Stop(&stop);
        for round in 0..8 {
            let mut good = well_behaved(&agent).await;
            assert_good(&good.ask(get(&format!("quiet-{round}"), "/")).await);
            assert_good(&good.ask(get(&format!("slow-{round}"), "/slow")).await);
        }
        drop(stop);
        for flooder in flooders {
            flooder.join().unwrap();
        }
        agent.end_unharmed();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_flood_does_not_starve_a_slow_call_of_its_stream() {
        let (agent, _folder) = agent(&[]);
        let (mut wire, stream) = processing(&agent);
        wire.data(stream, &message(get("slow", "/slow")), false);
        let mut in_flight = 0;
        let mut others = 0;
        loop {
            while in_flight < 200 {
                let flood: Vec<u8> = (0..50).flat_map(|at| message(get(&format!("f-{others}-{in_flight}-{at}"), "/"))).collect();
                wire.data(stream, &flood, false);
                in_flight += 50;
            }
            if answer(&mut wire, stream).correlation_id == "slow" {
                break;
            }
            in_flight -= 1;
            others += 1;
            assert!(others < 1_000_000, "the slow call is starved");
        }
        drop(wire);
        agent.end_unharmed();
    }
}

mod closing {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn one_direction_still_delivers_the_answers() {
        let (agent, _folder) = agent(&[]);
        let (mut wire, stream) = processing(&agent);
        // Would end after 10 s without a handshake.
        let silent = wire.open(PROCESS_STREAM);
        for at in 0..150 {
            wire.data(stream, &message(get(&format!("h{at}"), if at % 10 == 0 { "/slow" } else { "/" })), false);
        }
        wire.data(stream, b"", true);
        let mut answers = 0;
        while let Some(answer) = answer_or_end(&mut wire, stream) {
            assert_good(&answer);
            answers += 1;
        }
        assert_eq!(answers, 150);
        assert!(!wire.has_ended(silent), "the half-closed stream stays open after its last answer");
        drop(wire);
        agent.end_unharmed();
    }
}

mod timeouts {
    use super::*;

    /// Like the function of the outer module, with short timeouts.
    fn agent() -> (Agent, TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let module = module::write(folder.path(), "module.wasm", &module::judging());
        (short_timeouts::start(&module, &[&AMPLE[..], &["--grpc-address", "127.0.0.1:0"]].concat()), folder)
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn without_a_call_or_handshake() {
        let (agent, _folder) = agent();
        let mut good = well_behaved(&agent).await;
        let mut silent = TcpStream::connect(address(&agent)).unwrap();
        silent.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut half = TcpStream::connect(address(&agent)).unwrap();
        half.set_read_timeout(Some(PATIENCE)).unwrap();
        half.write_all(&http2::PREFACE[..10]).unwrap();
        let mut without_a_call = wire(&agent);
        let mut client = Client::connect(&agent).await;
        let without_a_handshake = client.streaming::<proto::AgentToProxy>(PROCESS_STREAM).await;
        assert_eq!(ended(without_a_handshake).await.unwrap_err().code(), Code::DeadlineExceeded);
        for socket in [&mut silent, &mut half] {
            // The agent may send its settings before it closes the connection.
            socket.read_to_end(&mut Vec::new()).unwrap();
        }
        assert_closed(&mut without_a_call);
        agent.log.wait_for_line("the reason", |line| line.contains("no call within"));
        // After the handshake a stream may be idle for as long as it likes.
        assert_serves(&mut good).await;
        drop(without_a_call);
        agent.end_unharmed();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn within_a_message_and_with_unread_answers() {
        let (agent, _folder) = agent();
        // A client that reads nothing stalls its own connection.
        let (mut unread, full) = processing(&agent);
        flood(&mut unread, full);
        // So does one that makes a call for each event and opens no window for the answer, or one
        // byte.
        let unread_calls: Vec<_> = [0_u32, 1]
            .into_iter()
            .map(|window| {
                let mut wire = wire(&agent);
                wire.opens_windows(false);
                const INITIAL_WINDOW_SIZE: u8 = 4;
                wire.raw(&frame(kind::SETTINGS, 0, 0, &[0, INITIAL_WINDOW_SIZE, 0, 0, 0, 0]));
                let stream = wire.open(PROCESS_EVENT);
                wire.data(stream, &message(get("unread", "/")), true);
                if window > 0 {
                    wire.raw(&frame(kind::WINDOW_UPDATE, 0, stream, &window.to_be_bytes()));
                }
                wire
            })
            .collect();
        // One that sends half a message loses that stream alone.
        let (mut wire, good) = processing(&agent);
        let event = message(get("half", "/"));
        let mut halves = Vec::new();
        for len in [1, 5, event.len() - 1] {
            let stream = process(&mut wire);
            wire.data(stream, &event[..len], false);
            halves.push(stream);
        }
        for (call, half) in [
            (PROCESS_EVENT, &event[..20]),
            (PROCESS_EVENT, b""),
            // Whole messages without an end of the stream.
            (PROCESS_EVENT, &event),
            (HEALTH_CHECK, &[0; 5]),
            (HEALTH_CHECK, b""),
            (HEALTH_WATCH, b""),
            (CONTROL_STREAM, &[0; 3]),
        ] {
            let stream = wire.open(call);
            wire.data(stream, half, false);
            halves.push(stream);
        }
        let silent = wire.open(CONTROL_STREAM);
        // A message that arrives bit by bit gets no more time. This one would take 60 s.
        let (mut slow, dripping) = processing(&agent);
        let whole = message(get("slow", &format!("/{}", "x".repeat(300))));
        let drip = std::thread::spawn(move || {
            whole[..300].iter().any(|byte| {
                std::thread::sleep(Duration::from_millis(200));
                slow.data(dripping, &[*byte], false);
                !slow.settle() || slow.has_ended(dripping)
            })
        });
        for stream in halves {
            assert!(answer_or_end(&mut wire, stream).is_none());
        }
        assert!(drip.join().unwrap(), "the agent reads a message for as long as bytes of it arrive");
        wire.data(good, &event, false);
        assert_good(&answer(&mut wire, good));
        assert!(!wire.has_ended(silent) && !wire.has_ended(good));
        for reason in [&format!("message not completed within {LOGGED_TIMEOUT}"), "answers not read"] {
            agent.log.wait_for_line(reason, |line| line.contains(reason));
        }
        for mut wire in unread_calls {
            wait_for("the connection to be closed", || (!wire.settle()).then_some(()));
        }
        assert_serves(&mut well_behaved(&agent).await).await;
        drop((unread, wire));
        agent.end_unharmed();
    }
}

mod logging {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn is_rate_limited() {
        let (agent, _folder) = agent(&[]);
        for _ in 0..3 {
            let mut stream = well_behaved(&agent).await;
            for _ in 0..1000 {
                for wrong in [&b"\xff\xff\xff"[..], b"", &field(2, b"")] {
                    stream.send_raw(wrong.to_vec()).await;
                }
                // Two of the three have no id. That of the third is empty.
                assert_eq!(module_error(&stream.answer().await), Some("WASM_INVALID_EVENT"));
            }
            assert_serves(&mut stream).await;
        }
        let address = address(&agent);
        for _ in 0..1000 {
            // Wait until the agent closes it, so no more than one is open.
            let mut socket = TcpStream::connect(address).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket.write_all(&[0; 64]).unwrap();
            let _ = socket.read_to_end(&mut Vec::new());
        }
        // Streams that are rejected, fail, or cannot be answered.
        let mut wire = wire(&agent);
        for _ in 0..300 {
            for wrong in [message(get("too-early", "/")), message(handshake(&[1], "0.6.54"))] {
                let stream = wire.open(PROCESS_STREAM);
                wire.data(stream, &wrong, false);
                while receive(&mut wire, stream).is_some() {}
            }
            for wrong in [message(handshake(&[2], "0.6.54")), message(configure("{")), framed(b"\xff"), vec![7; 5]] {
                let stream = process(&mut wire);
                wire.data(stream, &wrong, true);
                while receive(&mut wire, stream).is_some() {}
            }
        }
        let control = wire.open(CONTROL_STREAM);
        wire.data(control, &framed(&drain()).repeat(1000), true);
        agent.log.wait_for_line("the drain", |line| line.contains("asked the agent to drain"));
        assert!(wire.settle());
        let lines = agent.log.lines().len();
        assert!(lines < 500, "{lines} lines");
        agent.end_unharmed();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn has_bounded_lines() {
        let (agent, _folder) = agent(&[]);
        let long = "x".repeat(1 << 20);
        let mut stream = Client::connect(&agent).await.process_as(&format!("0.6.45-{long}")).await;
        // Neither is answered, because the id would not fit into an answer.
        stream.send(get(&long, "/")).await;
        stream.send_raw([field(2, b""), vec![0x0a], encoded(get(&long, "/"))].concat()).await;
        assert_serves(&mut stream).await;
        let mut client = Client::connect(&agent).await;
        assert!(client.unary::<proto::AgentToProxy>(PROCESS_EVENT, encoded(get(&long, "/"))).await.is_err());
        let rejected = client.process().await;
        rejected.send(configure(&format!(r#"{{"{long}":1}}"#))).await;
        assert_eq!(rejected.end().await.unwrap_err().code(), Code::FailedPrecondition);
        for what in ["does not support challenges", "cannot answer", "rejected the proxy's configuration"] {
            agent.log.wait_for_line(what, |line| line.contains(what));
        }
        assert!(agent.log.lines().iter().all(|line| line.len() < 10_000), "{:?}", agent.log.lines().iter().map(String::len).max());
        agent.end_unharmed();
    }
}
