//! What both transports announce and check in the handshake.

use serde::Serialize;
use zentinel_wasm_contract::{Capabilities, Hook};

use crate::limits::MAX_IN_FLIGHT;

/// The agent's id in the protocol.
pub(crate) const AGENT_ID: &str = "zentinel-wasm-agent";

/// Supported version of the protocol.
pub(crate) const PROTOCOL_VERSION: u32 = 2;

/// Human-readable name of the agent.
const NAME: &str = "Zentinel WebAssembly agent";

/// Size of a body chunk with the lowest cost per byte, in bytes.
const PREFERRED_CHUNK: u64 = 64 << 10;

/// How many of a proxy's versions an error lists at most.
const MAX_NAMED: usize = 10;

/// Checks that the agent supports one of a proxy's protocol versions.
pub(crate) fn check_versions(supported: &[u32]) -> Result<(), String> {
    if supported.contains(&PROTOCOL_VERSION) {
        return Ok(());
    }
    let named = &supported[..supported.len().min(MAX_NAMED)];
    Err(format!("unsupported protocol version: the agent supports {PROTOCOL_VERSION}, the proxy {named:?}"))
}

/// Number of a hook's event. gRPC numbers configurations differently.
pub(crate) const fn event_number(hook: Hook) -> i32 {
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

/// The capabilities in the fields of the protocol.
#[derive(Debug, Serialize)]
pub(crate) struct AgentCapabilities {
    pub(crate) agent_id: &'static str,
    pub(crate) name: &'static str,
    pub(crate) version: &'static str,
    pub(crate) supported_events: Vec<i32>,
    pub(crate) features: AgentFeatures,
    pub(crate) limits: AgentLimits,
}

#[derive(Debug, Serialize)]
pub(crate) struct AgentFeatures {
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
pub(crate) struct AgentLimits {
    pub(crate) max_body_size: u64,
    pub(crate) max_concurrency: u32,
    pub(crate) preferred_chunk_size: u64,
}

impl AgentCapabilities {
    pub(crate) fn new(capabilities: Capabilities) -> Self {
        let hooks = capabilities.hooks;
        Self {
            agent_id: AGENT_ID,
            name: NAME,
            version: env!("CARGO_PKG_VERSION"),
            supported_events: hooks.iter().map(event_number).collect(),
            features: AgentFeatures {
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
            limits: AgentLimits {
                max_body_size: capabilities.max_body as u64,
                max_concurrency: MAX_IN_FLIGHT as u32,
                preferred_chunk_size: PREFERRED_CHUNK,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unsupported_version_is_rejected_with_a_reason() {
        assert!(check_versions(&[1, 3]).unwrap_err().contains("[1, 3]"));
    }
}
