//! The handshake on a Unix socket.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;
use tokio::sync::watch;
use zentinel_wasm_bounds::run_blocking_if_large;
use zentinel_wasm_contract::{Capabilities, Handler, Text};

use super::encoding::Encoding;
use super::error::SocketError;
use super::frame::{self, kind};
use super::inbox::{Inbox, ReadOutcome};
use crate::config::{Config, MAX_CONFIGURE, TOO_LARGE};
use crate::handshake::{AgentCapabilities, PROTOCOL_VERSION, check_versions};
use crate::proxy::Proxy;
use crate::stage::Stage;

/// The fields that the agent reads of a proxy's request.
#[derive(Debug, Deserialize)]
struct HandshakeRequest<'a> {
    supported_versions: Vec<u32>,
    #[serde(default, borrow)]
    proxy_version: Text<'a>,
    #[serde(default, borrow)]
    supported_encodings: Vec<Text<'a>>,
    /// The agent's `config { }` block. Current proxies send it as an event instead.
    #[serde(default)]
    config: Config,
}

impl HandshakeRequest<'_> {
    /// The first encoding in the proxy's order of preference that the agent supports, or JSON.
    fn encoding(&self) -> Encoding {
        let supported = [Encoding::Json, Encoding::MessagePack];
        self.supported_encodings
            .iter()
            .find_map(|name| supported.into_iter().find(|encoding| encoding.name() == &**name))
            .unwrap_or_default()
    }
}

/// The agent's response.
#[derive(Debug, Serialize)]
struct HandshakeResponse {
    protocol_version: u32,
    capabilities: AgentCapabilities,
    success: bool,
    error: Option<String>,
    encoding: &'static str,
}

impl HandshakeResponse {
    fn new(capabilities: Capabilities, encoding: Encoding, error: Option<String>) -> Self {
        Self {
            protocol_version: PROTOCOL_VERSION,
            success: error.is_none(),
            error,
            encoding: encoding.name(),
            capabilities: AgentCapabilities::new(capabilities),
        }
    }
}

/// How the handshake ended.
#[derive(Debug)]
pub(super) enum Shaken {
    /// Both sides agree.
    Agreed(Encoding, Proxy),
    /// The client closed the connection without sending anything.
    Closed,
    /// The agent pauses, and the request is not complete.
    Paused,
}

/// Reads the handshake request and answers it, with a timeout of `limit` for each of the client's
/// two parts.
pub(super) async fn shake_hands<H: Handler>(
    stream: &UnixStream,
    inbox: &mut Inbox,
    handler: &Arc<H>,
    stage: &mut watch::Receiver<Stage>,
    limit: Duration,
) -> Result<Shaken, SocketError> {
    let timed_out = |what| move |_| SocketError::Timeout(what, limit);
    let request = tokio::select! {
        biased;
        request = tokio::time::timeout(limit, read_handshake(stream, inbox)) => request.map_err(timed_out("no handshake"))??,
        Ok(_) = stage.wait_for(|stage| *stage == Stage::Pausing) => return Ok(Shaken::Paused),
    };
    let Some(request) = request else { return Ok(Shaken::Closed) };
    let (response, agreed) = answer_handshake(&request, handler).await;
    drop(request);
    tokio::time::timeout(limit, write_handshake(stream, &response)).await.map_err(timed_out("handshake response not read"))??;
    agreed.map(|(encoding, proxy)| Shaken::Agreed(encoding, proxy)).map_err(SocketError::Handshake)
}

/// Reads the request. Returns `None` if the client closes the connection without sending anything.
async fn read_handshake(stream: &UnixStream, inbox: &mut Inbox) -> Result<Option<Vec<u8>>, SocketError> {
    loop {
        if let Some((frame, len)) = frame::next(inbox.bytes())? {
            if frame.kind != kind::HANDSHAKE_REQUEST {
                return Err(SocketError::Handshake(format!("expected a handshake request, got a frame of type {:#04x}", frame.kind)));
            }
            let payload = frame.payload.to_vec();
            inbox.consume(len);
            return Ok(Some(payload));
        }
        stream.readable().await?;
        match inbox.read(stream)? {
            ReadOutcome::Data | ReadOutcome::Empty => {}
            ReadOutcome::Closed if inbox.bytes().is_empty() => return Ok(None),
            ReadOutcome::Closed => return Err(SocketError::Handshake("connection closed within the request".into())),
        }
    }
}

/// Returns the response, as a frame, and the outcome. Applies the configuration in the request.
async fn answer_handshake<H: Handler>(payload: &[u8], handler: &Arc<H>) -> (Vec<u8>, Result<(Encoding, Proxy), String>) {
    let request = if payload.len() > MAX_CONFIGURE {
        Err(TOO_LARGE.to_owned())
    } else {
        run_blocking_if_large(payload.len(), || serde_json::from_slice::<HandshakeRequest<'_>>(payload).map_err(|error| error.to_string()))
    };
    let agreed = match request {
        Ok(request) => agree(&request, handler).await.map(|()| (request.encoding(), Proxy::connected(&request.proxy_version))),
        Err(error) => Err(format!("invalid request: {error}")),
    };
    let encoding = agreed.as_ref().map_or(Encoding::Json, |(encoding, _)| *encoding);
    let response = HandshakeResponse::new(handler.capabilities(), encoding, agreed.as_ref().err().cloned());
    let mut out = Vec::new();
    frame::append(&mut out, kind::HANDSHAKE_RESPONSE, |out| {
        // Writing to a vector cannot fail.
        let _ = serde_json::to_writer(out, &response);
    });
    (out, agreed)
}

async fn write_handshake(stream: &UnixStream, mut rest: &[u8]) -> io::Result<()> {
    while !rest.is_empty() {
        stream.writable().await?;
        match stream.try_write(rest) {
            Ok(written) => rest = &rest[written..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Checks that the agent can work with this proxy, and applies its configuration.
async fn agree<H: Handler>(request: &HandshakeRequest<'_>, handler: &Arc<H>) -> Result<(), String> {
    check_versions(&request.supported_versions)?;
    if request.config.0.is_null() { Ok(()) } else { handler.configure(request.config.0.clone()).await }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;
    use crate::allow_all::AllowAll;
    use crate::socket::frame::framed;

    #[test]
    fn the_proxy_s_first_supported_encoding_is_chosen() {
        let encoding = |json: &str| serde_json::from_str::<HandshakeRequest<'_>>(json).unwrap().encoding();
        assert_eq!(encoding(r#"{"supported_versions":[2]}"#), Encoding::Json);
        assert_eq!(encoding(r#"{"supported_versions":[2],"supported_encodings":["cbor","msgpack","json"]}"#), Encoding::MessagePack);
        assert_eq!(encoding(r#"{"supported_versions":[2],"supported_encodings":["json","msgpack"]}"#), Encoding::Json);
    }

    #[tokio::test]
    async fn the_timeout_does_not_count_the_agent_s_own_work() {
        const LIMIT: Duration = Duration::from_secs(1);
        let request = framed(
            kind::HANDSHAKE_REQUEST,
            br#"{"supported_versions":[2],"proxy_id":"p","proxy_version":"0.6.54","config":{"pool-size":1}}"#,
        );
        let (mut client, server) = UnixStream::pair().unwrap();
        client.write_all(&request).await.unwrap();
        let stage = watch::Sender::new(Stage::Serving);
        let agreed = shake_hands(&server, &mut Inbox::default(), &AllowAll::new(2 * LIMIT), &mut stage.subscribe(), LIMIT).await;
        assert!(matches!(agreed, Ok(Shaken::Agreed(Encoding::Json, _))), "{agreed:?}");
        let mut head = [0; 5];
        client.read_exact(&mut head).await.unwrap();
        assert_eq!(head[4], kind::HANDSHAKE_RESPONSE);
        // Without a request, and with a part of one.
        for sent in [0, 10] {
            let (mut client, server) = UnixStream::pair().unwrap();
            client.write_all(&request[..sent]).await.unwrap();
            let handler = AllowAll::new(Duration::ZERO);
            let ended = shake_hands(&server, &mut Inbox::default(), &handler, &mut stage.subscribe(), Duration::from_millis(10)).await;
            assert!(matches!(ended, Err(SocketError::Timeout("no handshake", _))), "{ended:?}");
        }
    }
}
