//! The proxy's side of the agent protocol on a Unix socket, as far as a demonstration needs it:
//! frames of JSON, one event at a time.

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Message types of the protocol that are used here.
pub(crate) mod kind {
    pub(crate) const HANDSHAKE_REQUEST: u8 = 0x01;
    pub(crate) const HANDSHAKE_RESPONSE: u8 = 0x02;
    pub(crate) const REQUEST_HEADERS: u8 = 0x10;
    pub(crate) const REQUEST_BODY: u8 = 0x11;
    pub(crate) const RESPONSE_BODY_CHUNK: u8 = 0x13;
    pub(crate) const AGENT_RESPONSE: u8 = 0x20;
}

/// The protocol's own bound on a frame.
const MAX_FRAME: usize = 16 << 20;

/// Longer than any call may take; an agent that says nothing for this long has hung.
const PATIENCE: Duration = Duration::from_secs(10);

/// A connection on which the handshake succeeded.
pub(crate) struct Connection {
    stream: UnixStream,
    /// What the agent said about itself.
    pub(crate) capabilities: Value,
}

impl Connection {
    /// Connects and shakes hands.
    pub(crate) fn open(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).with_context(|| format!("connecting to {}", socket.display()))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut connection = Self { stream, capabilities: Value::Null };
        let hello = json!({
            "supported_versions": [2],
            "proxy_id": "xtask-demo",
            "proxy_version": "0.6.54",
            "config": null,
        });
        connection.send(kind::HANDSHAKE_REQUEST, &hello)?;
        let reply = connection.receive(kind::HANDSHAKE_RESPONSE)?;
        ensure!(reply["success"] == true, "the agent refused the handshake: {}", reply["error"]);
        connection.capabilities = reply["capabilities"].clone();
        Ok(connection)
    }

    /// Sends one event and waits for its answer.
    pub(crate) fn ask(&mut self, kind: u8, event: &Value) -> Result<Value> {
        self.send(kind, event)?;
        self.receive(kind::AGENT_RESPONSE)
    }

    fn send(&mut self, kind: u8, message: &Value) -> Result<()> {
        let payload = serde_json::to_vec(message)?;
        let len = u32::try_from(payload.len() + 1).context("a frame this long does not exist")?;
        let mut frame = len.to_be_bytes().to_vec();
        frame.push(kind);
        frame.extend(payload);
        self.stream.write_all(&frame).context("the agent closed the connection")
    }

    /// The next message of this kind; reports that an agent may push in between are passed over.
    fn receive(&mut self, wanted: u8) -> Result<Value> {
        loop {
            let mut head = [0; 5];
            self.stream.read_exact(&mut head).context("the agent gave no answer")?;
            let [a, b, c, d, kind] = head;
            let len = u32::from_be_bytes([a, b, c, d]) as usize;
            if len == 0 || len > MAX_FRAME {
                bail!("the agent sent a frame of {len} bytes");
            }
            let mut payload = vec![0; len - 1];
            self.stream.read_exact(&mut payload)?;
            if kind == wanted {
                return serde_json::from_slice(&payload).context("the agent's answer is not JSON");
            }
        }
    }
}
