//! Reads an agent's answers: each by searching its bytes, and one in [`PARSE_EVERY`] with the
//! published types as well, so a bug in the search cannot hide a bug in the agent.

use memchr::memmem::Finder;
use prost::Message as _;
use zentinel_agent_protocol::grpc_v2::{self, agent_response, agent_to_proxy};
use zentinel_agent_protocol::{AgentResponse, Decision};

use crate::decision::Decided;
use crate::wire::{PREFIX, Wire};

const AGENT_RESPONSE: u8 = 0x20;
const MAX_FRAME: usize = 16 * 1024 * 1024;
const PARSE_EVERY: u64 = 64;

/// One complete frame.
pub(crate) struct Frame<'a> {
    /// In bytes, including the prefix.
    pub(crate) length: usize,
    /// `None` for frames that cannot hold an answer.
    pub(crate) payload: Option<&'a [u8]>,
}

/// Splits received bytes into frames, and reads answers from them.
pub(crate) struct Answers {
    wire: Wire,
    seen: u64,
    json_id: Finder<'static>,
    json_decision: Finder<'static>,
    pack_id: Finder<'static>,
    pack_decision: Finder<'static>,
    pack_status: Finder<'static>,
}

impl Answers {
    pub(crate) fn new(wire: Wire) -> Self {
        Self {
            wire,
            seen: 0,
            json_id: Finder::new(br#""correlation_id":""#),
            json_decision: Finder::new(br#""decision":"#),
            pack_id: Finder::new(b"\xaecorrelation_id"),
            pack_decision: Finder::new(b"\xa8decision"),
            pack_status: Finder::new(b"\xa6status"),
        }
    }

    /// The first frame of `input`, if it is complete.
    pub(crate) fn next_frame<'a>(&self, input: &'a [u8]) -> Result<Option<Frame<'a>>, String> {
        let Some(prefix) = input.first_chunk::<PREFIX>() else {
            return Ok(None);
        };
        let (length, is_answer) = match self.wire {
            Wire::Grpc => {
                if prefix[0] != 0 {
                    return Err("the agent sent a compressed gRPC message".to_owned());
                }
                let length = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]);
                (PREFIX + length as usize, true)
            }
            Wire::Json | Wire::Msgpack => {
                let length = u32::from_be_bytes([prefix[0], prefix[1], prefix[2], prefix[3]]);
                (PREFIX - 1 + length as usize, prefix[4] == AGENT_RESPONSE)
            }
        };
        if !(PREFIX..=MAX_FRAME).contains(&length) {
            return Err(format!("the agent sent a frame of {length} bytes"));
        }
        Ok(input.get(PREFIX..length).map(|payload| Frame { length, payload: is_answer.then_some(payload) }))
    }

    /// The correlation id and decision of one answer; `None` for a gRPC message of another kind.
    pub(crate) fn read<'a>(&mut self, payload: &'a [u8]) -> Result<Option<(&'a [u8], Decided)>, String> {
        self.seen += 1;
        let quick = match self.wire {
            Wire::Json => self.quick_json(payload),
            Wire::Msgpack => self.quick_message_pack(payload),
            Wire::Grpc => match quick_grpc(payload) {
                Some(GrpcMessage::Other) => return Ok(None),
                Some(GrpcMessage::Answer(id, decided)) => Some((id, decided)),
                None => None,
            },
        };
        let (id, decided) =
            quick.ok_or_else(|| format!("cannot read the answer {}", String::from_utf8_lossy(&payload[..payload.len().min(400)])))?;
        if self.seen % PARSE_EVERY == 1 {
            let (parsed_id, parsed) = parse(self.wire, payload)?;
            if parsed_id.as_bytes() != id || parsed != decided {
                return Err(format!(
                    "the two readers of answers disagree: {decided:?} for `{}`, {parsed:?} for `{parsed_id}`",
                    String::from_utf8_lossy(id)
                ));
            }
        }
        Ok(Some((id, decided)))
    }

    fn quick_json<'a>(&self, payload: &'a [u8]) -> Option<(&'a [u8], Decided)> {
        let id = after(&self.json_id, payload)?;
        let id = &id[..memchr::memchr(b'"', id)?];
        let decision = after(&self.json_decision, payload)?;
        let decided = if decision.starts_with(br#""allow""#) {
            Decided::Allow
        } else if let Some(status) = decision.strip_prefix(br#"{"block":{"status":"#) {
            let digits = std::str::from_utf8(status.get(..3)?).ok()?;
            Decided::Block(digits.parse().ok()?)
        } else if decision.starts_with(br#"{"block""#) {
            return None;
        } else {
            Decided::Other
        };
        Some((id, decided))
    }

    fn quick_message_pack<'a>(&self, payload: &'a [u8]) -> Option<(&'a [u8], Decided)> {
        let id = after(&self.pack_id, payload)?;
        let id = match *id.first()? {
            short @ 0xa0..=0xbf => id.get(1..1 + usize::from(short & 0x1f))?,
            0xd9 => id.get(2..2 + usize::from(*id.get(1)?))?,
            _ => return None,
        };
        let decision = after(&self.pack_decision, payload)?;
        let decided = if decision.starts_with(b"\xa5allow") {
            Decided::Allow
        } else if let Some(block) = decision.strip_prefix(b"\x81\xa5block") {
            let status = after(&self.pack_status, block)?;
            Decided::Block(match *status.first()? {
                0xcd => u16::from_be_bytes([*status.get(1)?, *status.get(2)?]),
                0xcc => u16::from(*status.get(1)?),
                small @ 0..=0x7f => u16::from(small),
                _ => return None,
            })
        } else {
            Decided::Other
        };
        Some((id, decided))
    }
}

fn after<'a>(finder: &Finder<'_>, bytes: &'a [u8]) -> Option<&'a [u8]> {
    finder.find(bytes).map(|at| &bytes[at + finder.needle().len()..])
}

enum GrpcMessage<'a> {
    Answer(&'a [u8], Decided),
    Other,
}

/// `AgentToProxy.response` is field 2. Inside it, the id is field 1, allow 2, block 3, redirect 4
/// and challenge 5. The status of a block is its field 1.
fn quick_grpc(payload: &[u8]) -> Option<GrpcMessage<'_>> {
    let mut fields = Fields(payload);
    let Some(Field::Bytes(2, response)) = fields.next() else {
        return Some(GrpcMessage::Other);
    };
    let mut id = None;
    let mut decided = Decided::Other;
    for field in Fields(response) {
        match field {
            Field::Bytes(1, bytes) => id = Some(bytes),
            Field::Bytes(2, _) => decided = Decided::Allow,
            Field::Bytes(3, block) => {
                let status = Fields(block).find_map(|field| match field {
                    Field::Number(1, status) => Some(status),
                    _ => None,
                });
                decided = Decided::Block(u16::try_from(status?).ok()?);
            }
            _ => {}
        }
    }
    Some(GrpcMessage::Answer(id?, decided))
}

enum Field<'a> {
    Number(u64, u64),
    Bytes(u64, &'a [u8]),
    Other,
}

/// The fields of a protobuf message, in order; ends early at an invalid one.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.0.split_first()?;
            self.0 = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Field<'a>;

    fn next(&mut self) -> Option<Field<'a>> {
        let key = self.varint()?;
        match key & 7 {
            0 => Some(Field::Number(key >> 3, self.varint()?)),
            2 => {
                let length = usize::try_from(self.varint()?).ok()?;
                let (bytes, rest) = self.0.split_at_checked(length)?;
                self.0 = rest;
                Some(Field::Bytes(key >> 3, bytes))
            }
            kind @ (1 | 5) => {
                self.0 = self.0.get(if kind == 1 { 8 } else { 4 }..)?;
                Some(Field::Other)
            }
            _ => None,
        }
    }
}

fn parse(wire: Wire, payload: &[u8]) -> Result<(String, Decided), String> {
    let response: AgentResponse = match wire {
        Wire::Json => serde_json::from_slice(payload).map_err(|error| error.to_string())?,
        Wire::Msgpack => rmp_serde::from_slice(payload).map_err(|error| error.to_string())?,
        Wire::Grpc => return parse_grpc(payload),
    };
    let id = response.audit.custom.get("correlation_id").and_then(|id| id.as_str()).ok_or("the answer has no correlation id")?;
    let decided = match response.decision {
        Decision::Allow => Decided::Allow,
        Decision::Block { status, .. } => Decided::Block(status),
        Decision::Redirect { .. } | Decision::Challenge { .. } => Decided::Other,
    };
    Ok((id.to_owned(), decided))
}

fn parse_grpc(payload: &[u8]) -> Result<(String, Decided), String> {
    let message = grpc_v2::AgentToProxy::decode(payload).map_err(|error| error.to_string())?;
    let Some(agent_to_proxy::Message::Response(response)) = message.message else {
        return Err("the message is not an answer".to_owned());
    };
    let decided = match response.decision {
        Some(agent_response::Decision::Allow(_)) => Decided::Allow,
        Some(agent_response::Decision::Block(block)) => {
            Decided::Block(u16::try_from(block.status).map_err(|_| format!("status code {} out of range", block.status))?)
        }
        _ => Decided::Other,
    };
    Ok((response.correlation_id, decided))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block() -> AgentResponse {
        let mut response = AgentResponse::block(403, Some("\"decision\":\"allow\"".to_owned()));
        response.audit.custom.insert("correlation_id".to_owned(), "id-1".into());
        response
    }

    #[test]
    fn both_readers_agree_on_a_block() {
        let json = serde_json::to_vec(&block()).unwrap();
        let pack = rmp_serde::to_vec_named(&block()).unwrap();
        let grpc = grpc_v2::AgentToProxy {
            message: Some(agent_to_proxy::Message::Response(grpc_v2::AgentResponse {
                correlation_id: "id-1".to_owned(),
                decision: Some(agent_response::Decision::Block(grpc_v2::BlockDecision {
                    status: 403,
                    body: Some("no".to_owned()),
                    headers: Vec::new(),
                })),
                ..Default::default()
            })),
        }
        .encode_to_vec();
        for (wire, payload) in [(Wire::Json, json), (Wire::Msgpack, pack), (Wire::Grpc, grpc)] {
            let mut answers = Answers::new(wire);
            let (id, decided) = answers.read(&payload).unwrap().unwrap();
            assert_eq!((id, decided), (&b"id-1"[..], Decided::Block(403)), "{wire:?}");
        }
    }

    #[test]
    fn waits_for_the_rest_of_a_frame() {
        let answers = Answers::new(Wire::Json);
        let frame = crate::wire::socket_frame(AGENT_RESPONSE, b"{}");
        assert!(answers.next_frame(&frame[..6]).unwrap().is_none());
        let whole = answers.next_frame(&frame).unwrap().unwrap();
        assert_eq!((whole.length, whole.payload), (7, Some(&b"{}"[..])));
    }

    #[test]
    fn rejects_a_frame_without_a_type() {
        let answers = Answers::new(Wire::Json);
        assert!(answers.next_frame(&[0; 5]).is_err());
    }
}
