//! Transports and encodings, and their framing.

use clap::ValueEnum;
use prost::Message as _;
use zentinel_agent_protocol::grpc_v2::{ProxyToAgent, proxy_to_agent};

/// Bytes before a payload: length and type on the socket, compression flag and length over gRPC.
pub(crate) const PREFIX: usize = 5;

/// How events reach the agent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Wire {
    /// Unix socket, JSON
    Json,
    /// Unix socket, MessagePack
    Msgpack,
    /// gRPC
    Grpc,
}

pub(crate) fn socket_frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(PREFIX + payload.len());
    frame.extend_from_slice(&(1 + payload.len() as u32).to_be_bytes());
    frame.push(kind);
    frame.extend_from_slice(payload);
    frame
}

pub(crate) fn grpc_message(message: proxy_to_agent::Message) -> Vec<u8> {
    let payload = ProxyToAgent { message: Some(message) }.encode_to_vec();
    let mut frame = Vec::with_capacity(PREFIX + payload.len());
    frame.push(0);
    frame.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    frame.extend_from_slice(&payload);
    frame
}
