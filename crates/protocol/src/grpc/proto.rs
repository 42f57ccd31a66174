//! The messages of `proto/agent_v2.proto`.

#![allow(missing_docs, unreachable_pub, clippy::all)]

include!(concat!(env!("OUT_DIR"), "/zentinel.agent.v2.rs"));

/// Name of the agent's service.
pub const SERVICE: &str = "zentinel.agent.v2.AgentServiceV2";
