//! Clients of the socket that misbehave: whatever they send or leave out, the agent lives, other clients are served, and a blocked request never comes
//! back allowed.

mod common;

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use common::{Agent, Connection, Stop, decision, frame, id_of, kind, module, module_error, wait_for};
use serde_json::{Value, json};

/// Connections that the agent serves at once.
const MAX_CONNECTIONS: usize = 1024;

/// Starts the agent on a [`module::judging`].
fn agent(options: &[&str]) -> (Agent, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let module = module::write(folder.path(), "m.wasm", &module::judging());
    let mut all = vec!["--timeout-ms", "20000"];
    all.extend(options);
    (Agent::start(&module, &all), folder)
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

#[test]
fn what_is_no_handshake_closes_its_connection_alone() {
    let (agent, _folder) = agent(&[]);
    let mut good = agent.connect();
    let handshake = |versions: &str| format!(r#"{{"supported_versions":{versions},"proxy_id":"x","proxy_version":"0.6.54"}}"#);
    for bytes in [
        b"GET / HTTP/1.1\r\nHost: agent\r\n\r\n".to_vec(),
        vec![0; 16],
        vec![0xff; 16],
        (16_u32 << 20 | 1).to_be_bytes().to_vec(),
        event(&common::request("a", "/")),
        frame(kind::HANDSHAKE_REQUEST, b""),
        frame(kind::HANDSHAKE_REQUEST, b"null"),
        frame(kind::HANDSHAKE_REQUEST, b"\xff"),
        frame(kind::HANDSHAKE_REQUEST, b"{\"supported_versions\":[2]"),
        frame(kind::HANDSHAKE_REQUEST, format!("{{\"supported_versions\":{}", "[".repeat(100_000)).as_bytes()),
        // MessagePack, which is never spoken before the handshake.
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
fn a_second_handshake_closes_the_connection() {
    let (agent, _folder) = agent(&[]);
    let mut connection = agent.connect();
    connection.send(kind::HANDSHAKE_REQUEST, &json!({"supported_versions": [2]}));
    assert_closed(&mut connection);
    assert_serves(&mut agent.connect());
    agent.end_unharmed();
}

#[test]
fn a_connection_that_ends_anywhere_harms_nobody() {
    let (agent, _folder) = agent(&[]);
    let mut good = agent.connect();
    let whole = event(&common::request("cut", "/"));
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
fn a_frame_that_comes_byte_by_byte_is_understood() {
    let (agent, _folder) = agent(&[]);
    let mut connection = agent.connect();
    for byte in event(&common::request("slow", "/")) {
        connection.send_raw(&[byte]);
    }
    assert_good(&connection.answer());
    drop(connection);
    agent.end_unharmed();
}

#[test]
fn a_frame_over_the_limit_closes_its_connection() {
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
fn types_that_nobody_knows_are_passed_over_and_never_allowed() {
    let (agent, _folder) = agent(&[]);
    let mut connection = agent.connect();
    for kind in
        (0..=u8::MAX).filter(|kind| !matches!(*kind, kind::HANDSHAKE_REQUEST | kind::REQUEST_HEADERS..=kind::CONFIGURE | kind::PING))
    {
        connection.send_raw(&frame(kind, b""));
        connection.send_raw(&frame(kind, b"\0\xff"));
        connection.send(kind, &common::request(&format!("k{kind}"), "/"));
    }
    connection.send_raw(&frame(kind::PING, b"\0echo\xff"));
    let mut refused = Vec::new();
    loop {
        match connection.receive_raw().unwrap() {
            (kind::PONG, payload) => {
                assert_eq!(payload, b"\0echo\xff");
                break;
            }
            (kind::AGENT_RESPONSE, payload) => refused.push(serde_json::from_slice::<Value>(&payload).unwrap()),
            _ => {}
        }
    }
    // What is in the range of events gets the module error, when it says whose it is.
    while refused.len() < 8 {
        refused.push(connection.answer());
    }
    for answer in &refused {
        assert_eq!(module_error(answer), Some("WASM_INVALID_EVENT"), "{answer}");
        assert_eq!(decision(answer), "block");
    }
    assert_serves(&mut connection);
    drop(connection);
    agent.end_unharmed();
}

/// Events that say whose they are and are wrong otherwise.
fn wrong_events(id: &str) -> Vec<(u8, Vec<u8>)> {
    let mut wrong = Vec::new();
    let replaced = |mut event: Value, pointer: &str, value: Value| {
        *event.pointer_mut(pointer).unwrap() = value;
        event
    };
    let without = |mut event: Value, field: &str| {
        event.as_object_mut().unwrap().remove(field).unwrap();
        event
    };
    let request = common::request(id, "/");
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
    let body = common::request_body(id, "body");
    for field in ["data", "is_last"] {
        wrong.push((kind::REQUEST_BODY, without(body.clone(), field)));
        wrong.push((kind::REQUEST_BODY, replaced(body.clone(), &format!("/{field}"), number.clone())));
    }
    for text in ["%", "a", "====", "YQ=\n", "\u{e4}"] {
        wrong.push((kind::REQUEST_BODY, replaced(body.clone(), "/data", json!(text))));
    }
    for index in [json!(-1), json!(4_294_967_296_u64), json!("0")] {
        wrong.push((kind::REQUEST_BODY, replaced(body.clone(), "/chunk_index", index)));
    }
    let response = common::response(id, 200);
    for status in [json!(-1), json!(65536), json!("200"), json!(null)] {
        wrong.push((kind::RESPONSE_HEADERS, replaced(response.clone(), "/status", status)));
    }
    wrong.push((kind::REQUEST_BODY, request.clone()));
    wrong.push((kind::RESPONSE_HEADERS, body));
    let mut wrong: Vec<_> = wrong.into_iter().map(|(kind, event)| (kind, event.to_string().into_bytes())).collect();
    let deep = format!(r#"{{"correlation_id":"{id}","is_last":true,"data":{}"x"{}}}"#, "[".repeat(100), "]".repeat(100));
    wrong.push((kind::REQUEST_BODY, deep.into_bytes()));
    wrong
}

#[test]
fn an_event_that_cannot_be_read_is_never_waved_through() {
    let (agent, _folder) = agent(&[]);
    let mut connection = agent.connect();
    for (at, (kind, payload)) in wrong_events("wrong").into_iter().enumerate() {
        println!("{at}: {kind:#04x} {}", String::from_utf8_lossy(&payload));
        connection.send_raw(&frame(kind, &payload));
        let answer = connection.answer();
        assert_eq!(id_of(&answer), "wrong");
        assert_eq!(module_error(&answer), Some("WASM_INVALID_EVENT"), "{answer}");
        assert_eq!(decision(&answer), "block");
    }
    assert_serves(&mut connection);
    drop(connection);
    agent.end_unharmed();
}

#[test]
fn an_event_that_says_not_whose_it_is_is_not_answered() {
    let (agent, _folder) = agent(&[]);
    let mut connection = agent.connect();
    let twice = format!("{{\"correlation_id\":\"a\",{}", &common::request_body("b", "x").to_string()[1..]);
    let deep = format!("{{\"metadata\":{}", "{\"a\":".repeat(1 << 20));
    for kind in kind::REQUEST_HEADERS..=kind::GUARDRAIL_INSPECT {
        for payload in
            [&b""[..], b"null", b"{}", b"\xff\xfe", b"{\"correlation_id\":7}", b"{\"metadata\":{}}", twice.as_bytes(), deep.as_bytes()]
        {
            connection.send_raw(&frame(kind, payload));
        }
    }
    // The next answer is that of the next good event.
    assert_serves(&mut connection);
    drop(connection);
    agent.end_unharmed();
}

#[test]
fn a_flood_of_what_cannot_be_read_does_not_flood_the_log() {
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
    // One that comes again and again is told of no more often for it.
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
fn the_wrong_encoding_is_a_wrong_event() {
    let (agent, _folder) = agent(&[]);
    // Agreed on MessagePack, and JSON comes.
    let mut connection = Connection::open_silent(&agent.socket);
    connection.send(
        kind::HANDSHAKE_REQUEST,
        &json!({"supported_versions": [2], "proxy_version": "0.6.54", "supported_encodings": ["cbor", "msgpack", "json"]}),
    );
    let (_, handshake) = connection.receive().unwrap();
    assert_eq!(handshake["encoding"], "msgpack");
    connection.send(kind::REQUEST_HEADERS, &common::request("json", "/"));
    let payload = loop {
        match connection.receive_raw().unwrap() {
            (kind::AGENT_RESPONSE, payload) => break payload,
            _ => continue,
        }
    };
    let text = String::from_utf8_lossy(&payload);
    assert!(text.contains("WASM_INVALID_EVENT") && text.contains("block"), "{text}");

    // Agreed on JSON, and MessagePack comes, which nobody can tell whose it is.
    let mut connection = agent.connect();
    connection.send_raw(&frame(kind::REQUEST_BODY, b"\x83\xaecorrelation_id\xa1a\xa4data\xc4\x01x\xa7is_last\xc3"));
    assert_serves(&mut connection);
    drop(connection);
    agent.end_unharmed();
}

#[test]
fn large_events_are_taken_as_they_are() {
    let (agent, _folder) = agent(&["--max-memory-mb", "128"]);
    let mut connection = agent.connect();
    let mut many = common::request("many", "/");
    many["headers"] = (0..100_000).map(|at| (format!("x-{at}"), json!(["v"]))).collect::<serde_json::Map<_, _>>().into();
    assert_good(&connection.ask(kind::REQUEST_HEADERS, &many));

    let mut long = common::request("long", "/");
    long["headers"]["x-long"] = json!(["x".repeat(1 << 20), "\"\\\u{1}".repeat(100_000)]);
    long["headers"]["n".repeat(1 << 20)] = json!(["x"]);
    assert_good(&connection.ask(kind::REQUEST_HEADERS, &long));
    let mut same = common::request("same", "/");
    same["headers"]["x-same"] = json!(vec![""; 500_000]);
    assert_good(&connection.ask(kind::REQUEST_HEADERS, &same));

    // More than the instance has memory for: its own failure, and nobody else's.
    let huge = common::request("huge", &format!("/{}", "x".repeat(15 << 20)));
    let answer = connection.ask(kind::REQUEST_HEADERS, &huge);
    assert_eq!(module_error(&answer), Some("WASM_ALLOC_FAILED"), "{}", answer["audit"]);
    assert_serves(&mut connection);
    drop(connection);
    agent.end_unharmed();
}

#[test]
fn an_id_that_no_answer_has_room_for_harms_nobody() {
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
fn a_blocked_request_never_comes_back_allowed_to_its_twin() {
    const TRIES: usize = 10_000;
    /// Pairs under way, so that calls that take long overlap with the twins of others.
    const WINDOW: usize = 40;

    let (agent, _folder) = agent(&[]);
    let mut connection = agent.connect();
    let mut writer = connection.writer();
    for start in (0..TRIES).step_by(WINDOW) {
        let mut expected = HashMap::new();
        for at in start..start + WINDOW {
            let id = format!("twin-{at}");
            // The proxy waits for the last one only, and would take any answer for its own. Both go out in one write: no newer event is ever under way
            // when the agent answers.
            let uris = module::twins(at);
            let mut bytes = Vec::new();
            for uri in uris {
                match *uri {
                    "cancel" => bytes.extend(frame(kind::CANCEL, json!({"correlation_id": id}).to_string().as_bytes())),
                    uri => bytes.extend(event(&common::request(&id, uri))),
                }
            }
            writer.write_all(&bytes).unwrap();
            expected.insert(id, if uris.last() == Some(&"/blocked") { "block" } else { "allow" });
        }
        while !expected.is_empty() {
            let answer = connection.answer();
            let wanted = expected.remove(id_of(&answer)).unwrap_or_else(|| panic!("a second answer: {answer}"));
            assert_eq!(decision(&answer), wanted, "{answer}");
        }
    }
    // Nothing is left that would be taken for somebody else's.
    assert_serves(&mut connection);
    drop((connection, writer));
    agent.end_unharmed();
}

#[test]
fn events_after_a_cancel_are_answered_for_themselves() {
    let (agent, _folder) = agent(&[]);
    let mut connection = agent.connect();
    let cancel = |id: &str| frame(kind::CANCEL, json!({"correlation_id": id}).to_string().as_bytes());
    for round in 0..100 {
        let id = format!("c{round}");
        connection.send_raw(&cancel("nobody"));
        connection.send_raw(&event(&common::request(&id, "/slow")));
        connection.send_raw(&cancel(&id));
        connection.send_raw(&cancel(&id));
        let answer = connection.ask(kind::REQUEST_HEADERS, &common::request(&id, "/blocked"));
        // The first may have been answered before its cancel came; then the second answer is the second event's.
        let answer = if decision(&answer) == "allow" { connection.answer() } else { answer };
        assert_eq!((id_of(&answer), decision(&answer)), (id.as_str(), "block"));
    }
    assert_serves(&mut connection);
    drop(connection);
    agent.end_unharmed();
}

/// Sends events until the agent takes no more, without reading an answer: how many, and what is left of the last.
fn flood(connection: &Connection) -> (usize, Vec<u8>) {
    let mut writer = connection.writer();
    writer.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    for sent in 0..1_000_000 {
        let mut rest = event(&common::request(&format!("r{sent}"), "/"));
        while !rest.is_empty()
            && let Ok(count) = writer.write(&rest)
        {
            rest.drain(..count);
        }
        if !rest.is_empty() {
            writer.set_write_timeout(Some(common::PATIENCE)).unwrap();
            return (sent + 1, rest);
        }
    }
    panic!("it takes events without end");
}

#[test]
fn a_reader_that_stops_reading_costs_bounded_memory_and_gets_its_answers_later() {
    let (agent, _folder) = agent(&[]);
    let mut other = agent.connect();
    assert_serves(&mut other);
    let mut connection = agent.connect();
    let before = agent.resident();
    let (sent, rest) = flood(&connection);
    println!("{sent} events sent, {} kB more", agent.resident().saturating_sub(before) >> 10);
    assert!(agent.resident() < before + (32 << 20), "{}", agent.resident() - before);
    assert_serves(&mut other);
    // Once it reads again, nothing is missing.
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

#[test]
fn a_client_that_has_said_all_gets_its_answers() {
    let (agent, _folder) = agent(&[]);
    let mut connection = agent.connect();
    for at in 0..150 {
        connection.send_raw(&event(&common::request(&format!("h{at}"), if at % 10 == 0 { "/slow" } else { "/" })));
    }
    // A frame that is never finished does not matter then.
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

#[test]
fn clients_that_never_pause_do_not_starve_the_others() {
    let (agent, _folder) = agent(&[]);
    let stop = AtomicBool::new(false);
    let flooding = std::thread::available_parallelism().map_or(4, usize::from) * 2;
    std::thread::scope(|scope| {
        for flooder in 0..flooding {
            let mut connection = agent.connect();
            let mut reader = connection.writer();
            let mut flood = Vec::new();
            for at in 0..200 {
                flood.extend(event(&common::request(&format!("f{flooder}-{at}"), "/")));
            }
            scope.spawn({
                let stop = &stop;
                move || {
                    while !stop.load(Relaxed) {
                        connection.send_raw(&flood);
                    }
                    // Ends the reader too, once all is answered.
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
fn a_slow_call_is_answered_while_its_connection_never_pauses() {
    let (agent, _folder) = agent(&[]);
    let mut connection = agent.connect();
    connection.send_raw(&event(&common::request("slow", "/slow")));
    let stop = AtomicBool::new(false);
    let mut flood = Vec::new();
    for at in 0..200 {
        flood.extend(event(&common::request(&format!("f-{at}"), "/")));
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
            assert!(others < 1_000_000, "it waits for ever");
        }
        drop(stop);
        while connection.answer_or_end().is_some() {}
    });
    agent.end_unharmed();
}

#[test]
fn connections_beyond_the_bound_are_turned_away_and_the_others_served() {
    // This process holds the other ends.
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
        let mut refused = UnixStream::connect(&agent.socket).unwrap();
        refused.set_read_timeout(Some(common::PATIENCE)).unwrap();
        assert!(refused.read(&mut [0]).map_or(true, |count| count == 0));
    }
    assert_serves(&mut good);
    drop(silent);
    admin.wait_for_metric("wasm_agent_connections", 1.0);
    assert_serves(&mut agent.connect());
    drop(good);
    agent.end_unharmed();
}

#[test]
fn what_a_client_says_makes_no_long_line_in_the_log() {
    let (agent, _folder) = agent(&[]);
    let long = "x".repeat(1 << 20);
    let mut connection = Connection::open_as(&agent.socket, &format!("0.6.45-{long}"));
    connection.configure(&json!({long.as_str(): 1})).unwrap_err();
    // A module error on a request with the longest id that is answered.
    connection.send(kind::REQUEST_HEADERS, &json!({"correlation_id": &long[..64 << 10], "uri": 1}));
    assert_eq!(module_error(&connection.answer()), Some("WASM_INVALID_EVENT"));
    connection.send(kind::REQUEST_HEADERS, &json!({"correlation_id": "c", "method": long.as_str(), &long[1..]: 1}));
    assert_eq!(module_error(&connection.answer()), Some("WASM_INVALID_EVENT"));
    let mut refused = Connection::open_silent(&agent.socket);
    refused.send(kind::HANDSHAKE_REQUEST, &json!({"supported_versions": vec![9; 100_000], "proxy_id": "x", "proxy_version": "x"}));
    assert_closed(&mut refused);
    for what in ["does not know challenges", "is rejected", "module error", "the handshake failed"] {
        agent.log.wait_for_line(what, |line| line.contains(what));
    }
    assert!(agent.log.lines().iter().all(|line| line.len() < 10_000), "{:?}", agent.log.lines().iter().map(String::len).max());
    agent.end_unharmed();
}

#[test]
fn half_a_frame_and_unread_answers_are_not_waited_for() {
    let (agent, _folder) = agent(&[]);
    let mut half = agent.connect();
    let whole = event(&common::request("half", "/"));
    half.send_raw(&whole[..whole.len() - 1]);
    let mut good = agent.connect();
    let deaf = agent.connect();
    flood(&deaf);
    assert_closed(&mut half);
    for reason in ["did not finish a frame", "took no answer"] {
        agent.log.wait_for_line(reason, |line| line.contains(reason));
    }
    assert_serves(&mut good);
    drop((deaf, good));
    agent.end_unharmed();
}

#[test]
fn a_connection_without_a_handshake_is_closed() {
    let (agent, _folder) = agent(&[]);
    let mut silent = Connection::open_silent(&agent.socket);
    let mut good = agent.connect();
    assert_closed(&mut silent);
    wait_for("the reason", || agent.log.lines().iter().any(|line| line.contains("said no handshake")).then_some(()));
    // One that has shaken hands may be silent for as long as it likes.
    assert_serves(&mut good);
    drop(good);
    agent.end_unharmed();
}
