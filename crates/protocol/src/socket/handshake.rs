//! The first exchange on a Unix socket.

use serde::{Deserialize, Serialize};
use zentinel_wasm_contract::{Capabilities, Hook, Hooks, Text};

use crate::socket::decode::Config;
use crate::socket::encode::Encoding;
use crate::{AGENT_ID, PROTOCOL_VERSION};

/// The events that are worth sending, as the socket numbers them.
pub(crate) fn event_numbers(hooks: Hooks) -> Vec<i32> {
    hooks.iter().map(event_number).collect()
}

/// The number of a hook's event on the Unix socket.
pub const fn event_number(hook: Hook) -> i32 {
    match hook {
        Hook::Configure => 0,
        Hook::RequestHeaders => 1,
        Hook::RequestBody => 2,
        Hook::ResponseHeaders => 3,
        Hook::ResponseBody => 4,
        Hook::RequestComplete => 5,
        Hook::WebsocketFrame => 6,
        Hook::GuardrailInspect => 7,
    }
}

/// What the agent reads of a proxy's handshake.
#[derive(Debug, Deserialize)]
pub(crate) struct Request<'a> {
    supported_versions: Vec<u32>,
    #[serde(default, borrow)]
    pub(crate) proxy_version: Text<'a>,
    #[serde(default, borrow)]
    supported_encodings: Vec<Text<'a>>,
    /// The agent's `config { }` block. Today's proxies send it as an event of its own.
    #[serde(default)]
    pub(crate) config: Config,
}

impl Request<'_> {
    /// The proxy's favourite among the encodings that the agent knows. JSON is always spoken.
    pub(crate) fn encoding(&self) -> Encoding {
        let known = [Encoding::Json, Encoding::MessagePack];
        self.supported_encodings.iter().find_map(|name| known.into_iter().find(|known| known.name() == &**name)).unwrap_or_default()
    }

    pub(crate) fn check(&self) -> Result<(), String> {
        check_versions(&self.supported_versions)
    }
}

/// Versions of a proxy that are named when none of them will do.
const MAX_NAMED: usize = 10;

/// Whether one of a proxy's versions of the protocol is spoken here.
pub(crate) fn check_versions(supported: &[u32]) -> Result<(), String> {
    if supported.contains(&PROTOCOL_VERSION) {
        return Ok(());
    }
    let named = &supported[..supported.len().min(MAX_NAMED)];
    Err(format!("this agent speaks version {PROTOCOL_VERSION} of the protocol, the proxy only {named:?}"))
}

/// The agent's side of the handshake.
#[derive(Debug, Serialize)]
pub(crate) struct Response {
    pub(crate) protocol_version: u32,
    pub(crate) capabilities: CapabilitiesWire,
    pub(crate) success: bool,
    pub(crate) error: Option<String>,
    pub(crate) encoding: &'static str,
}

#[derive(Debug, Serialize)]
pub(crate) struct CapabilitiesWire {
    pub(crate) agent_id: &'static str,
    pub(crate) name: &'static str,
    pub(crate) version: &'static str,
    pub(crate) supported_events: Vec<i32>,
    pub(crate) features: Features,
    pub(crate) limits: Limits,
}

#[derive(Debug, Serialize)]
pub(crate) struct Features {
    pub(crate) streaming_body: bool,
    pub(crate) websocket: bool,
    pub(crate) guardrails: bool,
    pub(crate) config_push: bool,
    pub(crate) metrics_export: bool,
    pub(crate) concurrent_requests: u32,
    pub(crate) cancellation: bool,
    pub(crate) flow_control: bool,
    pub(crate) health_reporting: bool,
}

#[derive(Debug, Serialize)]
pub(crate) struct Limits {
    pub(crate) max_body_size: u64,
    pub(crate) max_concurrency: u32,
    pub(crate) preferred_chunk_size: u64,
}

/// Events that one connection may have under way: what the proxy allows itself, and as much again.
pub(crate) const MAX_IN_FLIGHT: usize = 200;

/// Size of a body chunk that costs least per byte, in bytes.
const PREFERRED_CHUNK: u64 = 64 << 10;

/// Human-readable name of the agent.
pub(crate) const NAME: &str = "Zentinel WebAssembly agent";

impl Response {
    pub(crate) fn new(capabilities: Capabilities, encoding: Encoding, error: Option<String>) -> Self {
        let hooks = capabilities.hooks;
        Self {
            protocol_version: PROTOCOL_VERSION,
            success: error.is_none(),
            error,
            encoding: encoding.name(),
            capabilities: CapabilitiesWire {
                agent_id: AGENT_ID,
                name: NAME,
                version: env!("CARGO_PKG_VERSION"),
                supported_events: event_numbers(capabilities.hooks),
                features: Features {
                    streaming_body: hooks.contains_any(&[Hook::RequestBody, Hook::ResponseBody]),
                    websocket: hooks.contains(Hook::WebsocketFrame),
                    guardrails: hooks.contains(Hook::GuardrailInspect),
                    config_push: true,
                    metrics_export: true,
                    concurrent_requests: MAX_IN_FLIGHT as u32,
                    cancellation: true,
                    flow_control: false,
                    health_reporting: true,
                },
                limits: Limits {
                    max_body_size: capabilities.max_body as u64,
                    max_concurrency: MAX_IN_FLIGHT as u32,
                    preferred_chunk_size: PREFERRED_CHUNK,
                },
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_proxy_s_favourite_encoding_is_taken() {
        let encoding = |json: &str| serde_json::from_str::<Request<'_>>(json).unwrap().encoding();
        assert_eq!(encoding(r#"{"supported_versions":[2]}"#), Encoding::Json);
        assert_eq!(encoding(r#"{"supported_versions":[2],"supported_encodings":["cbor","msgpack","json"]}"#), Encoding::MessagePack);
        assert_eq!(encoding(r#"{"supported_versions":[2],"supported_encodings":["json","msgpack"]}"#), Encoding::Json);
    }

    #[test]
    fn another_version_of_the_protocol_is_refused_with_a_reason() {
        let request: Request<'_> = serde_json::from_str(r#"{"supported_versions":[1,3]}"#).unwrap();
        assert!(request.check().unwrap_err().contains("[1, 3]"));
    }
}
