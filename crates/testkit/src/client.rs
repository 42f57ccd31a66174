//! A proxy's side of the socket.

use std::collections::VecDeque;
use std::io::{Error, Result, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use serde_json::{Value, json};

use crate::{PATIENCE, frame, kind, read_frame, request};

/// What a proxy of today sends as its version.
const PROXY_VERSION: &str = "0.6.54";

/// One connection of a proxy.
pub struct Connection {
    stream: UnixStream,
    /// The agent's answer to the handshake.
    pub handshake: Value,
    /// Reports that arrived while something else was awaited.
    reports: VecDeque<(u8, Value)>,
}

impl Connection {
    /// Connects and completes the handshake as today's proxy does.
    #[track_caller]
    pub fn open(socket: &Path) -> Self {
        Self::open_as(socket, PROXY_VERSION)
    }

    /// Connects and completes the handshake as a proxy of another version.
    #[track_caller]
    pub fn open_as(socket: &Path, proxy_version: &str) -> Self {
        let mut connection = Self::open_silent(socket);
        connection.shake_hands(proxy_version).unwrap();
        connection
    }

    /// Connects without a handshake.
    #[track_caller]
    pub fn open_silent(socket: &Path) -> Self {
        Self::connect(socket).unwrap()
    }

    /// Like [`open`](Self::open).
    ///
    /// # Errors
    ///
    /// When the connection fails, or the agent rejects the handshake.
    pub fn try_open(socket: &Path) -> Result<Self> {
        let mut connection = Self::connect(socket)?;
        connection.shake_hands(PROXY_VERSION)?;
        if connection.handshake["success"] != true {
            return Err(Error::other(format!("the agent rejected the handshake: {}", connection.handshake["error"])));
        }
        Ok(connection)
    }

    fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket)
            .map_err(|error| Error::new(error.kind(), format!("cannot connect to `{}`: {error}", socket.display())))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self { stream, handshake: Value::Null, reports: VecDeque::new() })
    }

    fn shake_hands(&mut self, proxy_version: &str) -> Result<()> {
        self.try_send(
            kind::HANDSHAKE_REQUEST,
            &json!({"supported_versions": [2], "proxy_id": "test", "proxy_version": proxy_version, "config": null}),
        )?;
        match self.try_receive()? {
            Some((kind::HANDSHAKE_RESPONSE, handshake)) => {
                self.handshake = handshake;
                Ok(())
            }
            other => Err(Error::other(format!("no answer to the handshake but {other:?}"))),
        }
    }

    /// A second handle of the same connection, for a thread that only writes.
    pub fn writer(&self) -> UnixStream {
        self.stream.try_clone().unwrap()
    }

    /// The connection itself, for a client that reads frames its own way.
    pub fn into_stream(self) -> UnixStream {
        self.stream
    }

    #[track_caller]
    pub fn send(&mut self, kind: u8, payload: &Value) {
        self.try_send(kind, payload).unwrap();
    }

    fn try_send(&mut self, kind: u8, payload: &Value) -> Result<()> {
        self.stream.write_all(&frame(kind, &serde_json::to_vec(payload)?))
    }

    #[track_caller]
    pub fn send_raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// The next frame, or None when the agent has closed the connection.
    #[track_caller]
    pub fn receive(&mut self) -> Option<(u8, Value)> {
        self.try_receive().unwrap()
    }

    fn try_receive(&mut self) -> Result<Option<(u8, Value)>> {
        let Some((kind, payload)) = read_frame(&mut self.stream)? else { return Ok(None) };
        let payload = if payload.is_empty() { Value::Null } else { serde_json::from_slice(&payload)? };
        Ok(Some((kind, payload)))
    }

    /// The next frame with its bytes.
    #[track_caller]
    pub fn receive_raw(&mut self) -> Option<(u8, Vec<u8>)> {
        read_frame(&mut self.stream).unwrap()
    }

    /// The next answer; reports that arrive before it are kept.
    #[track_caller]
    pub fn answer(&mut self) -> Value {
        self.answer_or_end().expect("the agent closed the connection before it answered")
    }

    /// The next answer, or None when the agent has closed the connection.
    #[track_caller]
    pub fn answer_or_end(&mut self) -> Option<Value> {
        self.try_answer_or_end().unwrap()
    }

    fn try_answer_or_end(&mut self) -> Result<Option<Value>> {
        // Reports arrive all the time, so the stream's read timeout never expires.
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            match self.try_receive()? {
                None => return Ok(None),
                Some((kind::AGENT_RESPONSE, answer)) => return Ok(Some(answer)),
                Some(report) => self.reports.push_back(report),
            }
        }
        Err(Error::other(format!("no answer within {PATIENCE:?}")))
    }

    /// The next report of one kind.
    #[track_caller]
    pub fn report(&mut self, wanted: u8) -> Value {
        if let Some(at) = self.reports.iter().position(|(kind, _)| *kind == wanted) {
            return self.reports.remove(at).unwrap().1;
        }
        loop {
            let (kind, payload) = self.receive().expect("the agent closed the connection before it reported");
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

    /// Like [`ask`](Self::ask).
    ///
    /// # Errors
    ///
    /// When the connection fails or is closed, or no answer arrives in time.
    pub fn try_ask(&mut self, kind: u8, event: &Value) -> Result<Value> {
        self.try_send(kind, event)?;
        self.try_answer_or_end()?.ok_or_else(|| Error::other("the agent closed the connection before it answered"))
    }

    /// Sends the event of a GET of `uri` and waits for the next answer.
    #[track_caller]
    pub fn get(&mut self, id: &str, uri: &str) -> Value {
        self.ask(kind::REQUEST_HEADERS, &request(id, uri))
    }

    /// Sends a configuration. The error is the reason with which the agent rejects it.
    #[track_caller]
    pub fn configure(&mut self, config: &Value) -> std::result::Result<(), String> {
        let event = json!({"correlation_id": "configure", "config": config, "config_version": "1"});
        let answer = self.ask(kind::CONFIGURE, &event);
        assert_eq!(answer["audit"]["custom"]["correlation_id"], "configure");
        match &answer["decision"] {
            Value::String(decision) if decision == "allow" => Ok(()),
            decision => Err(decision["block"]["body"].as_str().unwrap_or_else(|| panic!("no reason in {answer}")).to_owned()),
        }
    }
}
