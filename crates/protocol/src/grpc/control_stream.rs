//! `ControlStream`: configurations and drain requests of a proxy.
//!
//! The protocol declares the stream from agent to proxy, but here the agent is the server, so a
//! client would have to send the messages of an agent. A proxy sends its own messages (a
//! configuration, a request to drain or to shut down) instead. Their field numbers overlap with
//! those of an agent's messages, but the contents do not, which distinguishes them.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::{self, Stream};
use prost::Message as _;
use tokio::sync::watch;
use tonic::{Status, Streaming};
use tracing::debug;
use zentinel_wasm_bounds::{log_limited, run_blocking_if_large};
use zentinel_wasm_contract::Handler;

use super::fields::{FieldValue, Fields};
use super::proto::proxy_control::Message;
use super::{message, proto};
use crate::config;
use crate::stage::Stage;

/// Messages in a row after which the other tasks on this thread get their turn.
const MAX_MESSAGES: u64 = 32;

/// Decodes a message of a proxy. Returns `None` for one of an agent.
fn read(bytes: &Bytes) -> Option<Message> {
    let proto::ProxyControl { message } = proto::ProxyControl::decode(bytes.clone()).ok()?;
    let Some((_, FieldValue::Bytes(inner))) = Fields(bytes).last() else { return None };
    let fields = Fields(inner);
    // A message of an agent has fields that these do not have, or text where these have numbers, so
    // decoding has failed already.
    let only = |highest: u32| fields.clone().all(|(number, _)| number <= highest);
    let is_proxy_s = match message.as_ref()? {
        // In a health report, this field is the agent's id.
        Message::Configure(configure) => only(4) && configure.config_json.trim_start().starts_with('{'),
        Message::Shutdown(_) | Message::Drain(_) => only(3),
        Message::ConfigResponse(_) => false,
    };
    message.filter(|_| is_proxy_s)
}

/// Serves a control stream. Returns the responses to its configurations.
pub(super) fn open<H: Handler>(
    handler: Arc<H>,
    stage: watch::Receiver<Stage>,
    drained: Arc<watch::Sender<bool>>,
    inbound: Streaming<Bytes>,
) -> impl Stream<Item = Result<proto::ProxyControl, Status>> + Send + 'static {
    stream::unfold((handler, stage, drained, inbound), |(handler, mut stage, drained, mut inbound)| async move {
        for taken in 1_u64.. {
            if taken % MAX_MESSAGES == 0 {
                tokio::task::yield_now().await;
            }
            let bytes = tokio::select! {
                biased;
                arrived = inbound.message() => arrived,
                _ = stage.wait_for(|stage| *stage > Stage::Serving) => return None,
            };
            let bytes = match bytes {
                Ok(Some(bytes)) => bytes,
                Ok(None) => return None,
                Err(status) => return Some((Err(status), (handler, stage, drained, inbound))),
            };
            match run_blocking_if_large(bytes.len(), || read(&bytes)) {
                Some(Message::Shutdown(_) | Message::Drain(_)) => {
                    // Only for this connection: a client must not stop the traffic of another
                    // proxy, or its own after a restart.
                    if !drained.send_replace(true) {
                        log_limited!(info, "a proxy asked the agent to drain: its connection reports `draining` until it ends");
                    }
                }
                Some(Message::Configure(configure)) => {
                    let applied = match config::parse(&configure.config_json) {
                        Ok(config) => handler.configure(config).await,
                        Err(reason) => Err(reason),
                    };
                    let response = proto::ConfigUpdateResponse {
                        request_id: configure.config_version.unwrap_or_default(),
                        accepted: applied.is_ok(),
                        error: applied.err(),
                        timestamp_ms: message::now_ms(),
                    };
                    let answer = proto::ProxyControl { message: Some(Message::ConfigResponse(response)) };
                    return Some((Ok(answer), (handler, stage, drained, inbound)));
                }
                _ => debug!("ignored a message on the control stream"),
            }
        }
        None
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn as_agent(message: proto::agent_control::Message) -> Option<Message> {
        read(&proto::AgentControl { message: Some(message) }.encode_to_vec().into())
    }

    fn as_proxy(message: Message) -> Option<Message> {
        read(&proto::ProxyControl { message: Some(message) }.encode_to_vec().into())
    }

    #[test]
    fn decodes_the_messages_of_a_proxy() {
        for message in [
            Message::Drain(proto::DrainRequest::default()),
            Message::Drain(proto::DrainRequest { duration_ms: 1, reason: 2, timestamp_ms: 3 }),
            Message::Shutdown(proto::ShutdownRequest::default()),
            Message::Shutdown(proto::ShutdownRequest { reason: 1, grace_period_ms: 2, timestamp_ms: 3 }),
            Message::Configure(proto::ConfigureEvent { config_json: "{}".into(), ..Default::default() }),
            Message::Configure(proto::ConfigureEvent {
                config_json: r#"{"fail-open":true}"#.into(),
                config_version: Some("1".into()),
                is_initial: true,
                timestamp_ms: 1,
            }),
        ] {
            assert_eq!(as_proxy(message.clone()), Some(message));
        }
    }

    #[test]
    fn ignores_the_messages_of_an_agent() {
        use proto::agent_control::Message as Agent;

        let health = proto::HealthStatus { agent_id: "waf".into(), state: 1, timestamp_ms: 1, ..Default::default() };
        assert_eq!(as_agent(Agent::Health(health)), None);
        assert_eq!(as_agent(Agent::Health(proto::HealthStatus { agent_id: "waf".into(), ..Default::default() })), None);
        let counter = proto::CounterMetric { name: "n".into(), ..Default::default() };
        let metrics = proto::MetricsReport { timestamp_ms: 1, counters: vec![counter], ..Default::default() };
        assert_eq!(as_agent(Agent::Metrics(metrics.clone())), None);
        assert_eq!(as_agent(Agent::Metrics(proto::MetricsReport { agent_id: "waf".into(), ..Default::default() })), None);
        // A configuration request with an id and a reload flag (10), and a log line (4) of level 2.
        assert_eq!(read(&Bytes::from_static(&[0x1a, 5, 0x0a, 1, b'r', 0x52, 0])), None);
        assert_eq!(read(&Bytes::from_static(&[0x22, 2, 0x08, 2])), None);
        assert_eq!(read(&Bytes::from_static(b"nonsense")), None);
    }
}
