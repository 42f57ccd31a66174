//! The `AgentResponse` of the protocol, as it is serialized on the socket.

use std::borrow::Cow;

use serde::Serialize;
use serde::ser::{SerializeMap, SerializeStruct, Serializer};
use zentinel_wasm_contract::answer::{HeaderName, HeaderValue, Printable};
use zentinel_wasm_contract::{Answer, Decision, HeaderOp, Text, WebsocketDecision};

use crate::handshake::PROTOCOL_VERSION;

/// The whole response. Empty fields are left out, because the proxy's defaults are the same.
pub(super) struct AgentResponse<'a> {
    pub(super) answer: &'a Answer<'a>,
    pub(super) correlation_id: &'a str,
    pub(super) request_body_mutation: Option<MutationField<'a>>,
    pub(super) response_body_mutation: Option<MutationField<'a>>,
    pub(super) websocket_decision: Option<Cow<'a, WebsocketDecision<'a>>>,
    pub(super) guardrail: Option<Cow<'a, str>>,
}

impl Serialize for AgentResponse<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let answer = self.answer;
        let routing = !answer.routing_metadata.is_empty() || self.guardrail.is_some();
        let present = [
            !answer.request_headers.is_empty(),
            !answer.response_headers.is_empty(),
            routing,
            answer.needs_more,
            self.request_body_mutation.is_some(),
            self.response_body_mutation.is_some(),
            self.websocket_decision.is_some(),
        ];
        let fields = 3 + present.into_iter().filter(|present| *present).count();
        let mut out = serializer.serialize_struct("AgentResponse", fields)?;
        out.serialize_field("version", &PROTOCOL_VERSION)?;
        out.serialize_field("decision", &DecisionField(&answer.decision))?;
        if !answer.request_headers.is_empty() {
            out.serialize_field("request_headers", &HeaderOpsField(&answer.request_headers))?;
        }
        if !answer.response_headers.is_empty() {
            out.serialize_field("response_headers", &HeaderOpsField(&answer.response_headers))?;
        }
        if routing {
            out.serialize_field("routing_metadata", &RoutingField(&answer.routing_metadata, self.guardrail.as_deref()))?;
        }
        out.serialize_field("audit", &AuditField(answer, self.correlation_id))?;
        if answer.needs_more {
            out.serialize_field("needs_more", &true)?;
        }
        if let Some(mutation) = &self.request_body_mutation {
            out.serialize_field("request_body_mutation", mutation)?;
        }
        if let Some(mutation) = &self.response_body_mutation {
            out.serialize_field("response_body_mutation", mutation)?;
        }
        if let Some(decision) = &self.websocket_decision {
            out.serialize_field("websocket_decision", &WebsocketField(decision))?;
        }
        out.end()
    }
}

struct DecisionField<'a>(&'a Decision<'a>);

impl Serialize for DecisionField<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        #[serde(rename_all = "snake_case")]
        enum Tagged<'a> {
            Allow,
            Block { status: u16, body: Option<&'a str>, headers: Option<PairsField<'a, HeaderName<'a>, HeaderValue<'a>>> },
            Redirect { url: &'a str, status: u16 },
            Challenge { challenge_type: &'a str, params: PairsField<'a, Text<'a>, Text<'a>> },
        }

        match self.0 {
            Decision::Allow => Tagged::Allow,
            Decision::Block(block) => Tagged::Block {
                status: block.status().get(),
                body: block.body(),
                headers: if block.headers().is_empty() { None } else { Some(PairsField(block.headers())) },
            },
            Decision::Redirect { status, url } => Tagged::Redirect { url, status: status.get() },
            Decision::Challenge { challenge_type, params } => Tagged::Challenge { challenge_type, params: PairsField(params) },
        }
        .serialize(serializer)
    }
}

struct PairsField<'a, N, V>(&'a [(N, V)]);

impl<N: Serialize, V: Serialize> Serialize for PairsField<'_, N, V> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, value)| (name, value)))
    }
}

struct RoutingField<'a>(&'a [(Printable<'a>, Printable<'a>)], Option<&'a str>);

impl Serialize for RoutingField<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        const GUARDRAIL: &str = "guardrail_response";

        let Self(pairs, guardrail) = self;
        let mut map = serializer.serialize_map(Some(pairs.len() + usize::from(guardrail.is_some())))?;
        for (name, value) in *pairs {
            map.serialize_entry(name, value)?;
        }
        if let Some(guardrail) = guardrail {
            map.serialize_entry(GUARDRAIL, guardrail)?;
        }
        map.end()
    }
}

struct HeaderOpsField<'a>(&'a [HeaderOp<'a>]);

impl Serialize for HeaderOpsField<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        #[serde(rename_all = "snake_case")]
        enum Tagged<'a> {
            Set { name: &'a str, value: &'a str },
            Add { name: &'a str, value: &'a str },
            Remove { name: &'a str },
        }

        serializer.collect_seq(self.0.iter().map(|op| match op {
            HeaderOp::Set(name, value) => Tagged::Set { name, value },
            HeaderOp::Add(name, value) => Tagged::Add { name, value },
            HeaderOp::Remove(name) => Tagged::Remove { name },
        }))
    }
}

struct AuditField<'a>(&'a Answer<'a>, &'a str);

impl Serialize for AuditField<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Custom<'a> {
            correlation_id: &'a str,
        }

        let Self(answer, correlation_id) = self;
        let audit = &answer.audit;
        let lists = [("tags", &audit.tags), ("rule_ids", &audit.rule_ids), ("reason_codes", &audit.reason_codes)];
        let fields = 1 + usize::from(audit.confidence.is_some()) + lists.iter().filter(|(_, list)| !list.is_empty()).count();
        let mut out = serializer.serialize_struct("AuditMetadata", fields)?;
        for (name, list) in lists {
            if !list.is_empty() {
                out.serialize_field(name, list)?;
            }
        }
        if let Some(confidence) = audit.confidence {
            out.serialize_field("confidence", &confidence.get())?;
        }
        out.serialize_field("custom", &Custom { correlation_id })?;
        out.end()
    }
}

struct WebsocketField<'a>(&'a WebsocketDecision<'a>);

impl Serialize for WebsocketField<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        #[serde(rename_all = "snake_case")]
        enum Tagged<'a> {
            Allow,
            Drop,
            Close { code: u16, reason: &'a str },
        }

        match self.0 {
            WebsocketDecision::Allow => Tagged::Allow,
            WebsocketDecision::Drop => Tagged::Drop,
            WebsocketDecision::Close { code, reason } => Tagged::Close { code: code.get(), reason },
        }
        .serialize(serializer)
    }
}

/// A body mutation: the new data of the chunk, or `None` to leave it as it is.
#[derive(Serialize)]
pub(super) struct MutationField<'a> {
    pub(super) data: Option<Cow<'a, str>>,
    pub(super) chunk_index: u32,
}
