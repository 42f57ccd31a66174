//! A proxy's side of the socket.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use serde_json::{Value, json};

use crate::{PATIENCE, frame, kind, request};

/// One connection of a proxy.
pub struct Connection {
    stream: UnixStream,
    /// The agent's side of the handshake.
    pub handshake: Value,
    /// Reports that came while something else was awaited.
    reports: VecDeque<(u8, Value)>,
}

impl Connection {
    /// Connects and shakes hands as today's proxy does.
    #[track_caller]
    pub fn open(socket: &Path) -> Self {
        Self::open_as(socket, "0.6.54")
    }

    /// The same as a proxy of another version.
    #[track_caller]
    pub fn open_as(socket: &Path, proxy_version: &str) -> Self {
        let mut connection = Self::open_silent(socket);
        connection.send(
            kind::HANDSHAKE_REQUEST,
            &json!({"supported_versions": [2], "proxy_id": "test", "proxy_version": proxy_version, "config": null}),
        );
        let (got, handshake) = connection.receive().expect("the agent shakes hands");
        assert_eq!(got, kind::HANDSHAKE_RESPONSE);
        connection.handshake = handshake;
        connection
    }

    /// Connects and says nothing.
    #[track_caller]
    pub fn open_silent(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Self { stream, handshake: Value::Null, reports: VecDeque::new() }
    }

    /// A second handle of the same connection, for a thread that only writes.
    pub fn writer(&self) -> UnixStream {
        self.stream.try_clone().unwrap()
    }

    #[track_caller]
    pub fn send(&mut self, kind: u8, payload: &Value) {
        self.send_raw(&frame(kind, &serde_json::to_vec(payload).unwrap()));
    }

    #[track_caller]
    pub fn send_raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// The next frame, or None when the agent has closed the connection.
    #[track_caller]
    pub fn receive(&mut self) -> Option<(u8, Value)> {
        let (kind, payload) = self.receive_raw()?;
        let payload = if payload.is_empty() { Value::Null } else { serde_json::from_slice(&payload).unwrap() };
        Some((kind, payload))
    }

    /// The next frame with its bytes.
    #[track_caller]
    pub fn receive_raw(&mut self) -> Option<(u8, Vec<u8>)> {
        let mut length = [0; 4];
        match self.stream.read_exact(&mut length) {
            Ok(()) => {}
            Err(error) if matches!(error.kind(), std::io::ErrorKind::UnexpectedEof | std::io::ErrorKind::ConnectionReset) => return None,
            Err(error) => panic!("the agent says nothing: {error}"),
        }
        let mut frame = vec![0; u32::from_be_bytes(length) as usize];
        self.stream.read_exact(&mut frame).unwrap();
        let payload = frame.split_off(1);
        Some((frame[0], payload))
    }

    /// The next answer; reports that come before it are kept.
    #[track_caller]
    pub fn answer(&mut self) -> Value {
        self.answer_or_end().expect("the agent answers before it closes the connection")
    }

    /// The next answer, or None when the agent has closed the connection.
    #[track_caller]
    pub fn answer_or_end(&mut self) -> Option<Value> {
        // Reports come all the time.
        let deadline = Instant::now() + PATIENCE;
        loop {
            assert!(Instant::now() < deadline, "there is neither an answer nor an end");
            let (kind, payload) = self.receive()?;
            if kind == kind::AGENT_RESPONSE {
                return Some(payload);
            }
            self.reports.push_back((kind, payload));
        }
    }

    /// The next report of one type.
    #[track_caller]
    pub fn report(&mut self, wanted: u8) -> Value {
        if let Some(at) = self.reports.iter().position(|(kind, _)| *kind == wanted) {
            return self.reports.remove(at).unwrap().1;
        }
        loop {
            let (kind, payload) = self.receive().expect("the agent reports before it closes the connection");
            if kind == wanted {
                return payload;
            }
            self.reports.push_back((kind, payload));
        }
    }

    /// Sends an event and waits for the next answer.
    #[track_caller]
    pub fn ask(&mut self, kind: u8, event: &Value) -> Value {
        self.send(kind, event);
        self.answer()
    }

    /// Asks about a GET of `uri`.
    #[track_caller]
    pub fn get(&mut self, id: &str, uri: &str) -> Value {
        self.ask(kind::REQUEST_HEADERS, &request(id, uri))
    }

    /// Hands a configuration over. The error is the reason for which it is rejected.
    #[track_caller]
    pub fn configure(&mut self, config: &Value) -> Result<(), String> {
        let event = json!({"correlation_id": "configure", "config": config, "config_version": "1"});
        let answer = self.ask(kind::CONFIGURE, &event);
        assert_eq!(answer["audit"]["custom"]["correlation_id"], "configure");
        match &answer["decision"] {
            Value::String(decision) if decision == "allow" => Ok(()),
            decision => Err(decision["block"]["body"].as_str().unwrap_or_else(|| panic!("no reason in {answer}")).to_owned()),
        }
    }
}
