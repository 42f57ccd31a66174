//! Answers every event on the Unix socket with the same bytes and the event's correlation id.
//!
//! It decodes only the frame and the position of the id, serves each connection in one thread, and
//! writes all the answers to one read at once. What remains is the cost of the socket itself, which
//! is close to the lower bound for any agent.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::ExitCode;
use std::thread;

const LENGTH_BYTES: usize = 4;
/// The protocol's limit for one frame.
const MAX_FRAME: usize = 16 * 1024 * 1024;
/// Holds dozens of header events, so one read takes all that are available.
const READ_BYTES: usize = 64 * 1024;

const HANDSHAKE_REQUEST: u8 = 0x01;
const HANDSHAKE_RESPONSE: u8 = 0x02;
const AGENT_RESPONSE: u8 = 0x20;
const PING: u8 = 0x41;
const PONG: u8 = 0x42;

#[derive(Clone, Copy)]
enum Encoding {
    Json,
    MessagePack,
}

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let (Some("--socket"), Some(path), None) = (arguments.next().as_deref(), arguments.next(), arguments.next()) else {
        eprintln!("usage: echo --socket PATH");
        return ExitCode::from(2);
    };
    let listener = match UnixListener::bind(&path) {
        Ok(listener) => listener,
        Err(error) => {
            eprintln!("echo: cannot bind `{path}`: {error}");
            return ExitCode::FAILURE;
        }
    };
    for stream in listener.incoming().flatten() {
        thread::spawn(move || {
            if let Err(error) = serve(stream) {
                eprintln!("echo: connection ended: {error}");
            }
        });
    }
    ExitCode::SUCCESS
}

fn serve(mut stream: UnixStream) -> io::Result<()> {
    let mut input = vec![0; READ_BYTES];
    let mut filled = 0;
    let mut output = Vec::with_capacity(READ_BYTES);
    let mut encoding = Encoding::Json;
    loop {
        let read = stream.read(&mut input[filled..])?;
        if read == 0 {
            return Ok(());
        }
        filled += read;

        let mut start = 0;
        let mut missing = 0;
        while filled - start >= LENGTH_BYTES {
            let (length, frame) = input[start..filled].split_at(LENGTH_BYTES);
            let length = u32::from_be_bytes([length[0], length[1], length[2], length[3]]) as usize;
            if length == 0 || length > MAX_FRAME {
                return Err(io::Error::other(format!("received a frame of {length} bytes")));
            }
            if frame.len() < length {
                missing = LENGTH_BYTES + length;
                break;
            }
            answer(frame[0], &frame[1..length], &mut encoding, &mut output)?;
            start += LENGTH_BYTES + length;
        }
        input.copy_within(start..filled, 0);
        filled -= start;
        if missing > input.len() {
            input.resize(missing, 0);
        }
        stream.write_all(&output)?;
        output.clear();
    }
}

fn answer(kind: u8, payload: &[u8], encoding: &mut Encoding, output: &mut Vec<u8>) -> io::Result<()> {
    match kind {
        HANDSHAKE_REQUEST => {
            let asked_for = |name| memchr::memmem::find(payload, name).is_some();
            *encoding = if asked_for(b"msgpack") { Encoding::MessagePack } else { Encoding::Json };
            frame(
                output,
                HANDSHAKE_RESPONSE,
                &[
                    br#"{"protocol_version":2,"capabilities":{"agent_id":"echo","name":"echo","version":"0","supported_events":[1,2,3,4],"features":{"streaming_body":false,"websocket":false,"guardrails":false,"config_push":false,"metrics_export":false,"concurrent_requests":100,"cancellation":false,"flow_control":false,"health_reporting":false},"limits":{"max_body_size":16777216,"max_concurrency":100,"preferred_chunk_size":65536}},"success":true,"error":null,"encoding":""#,
                    match encoding {
                        Encoding::Json => b"json",
                        Encoding::MessagePack => b"msgpack",
                    },
                    br#""}"#,
                ],
            );
        }
        PING => frame(output, PONG, &[payload]),
        _ => {
            let id = correlation_id(payload, *encoding).ok_or_else(|| io::Error::other("received an event without a correlation id"))?;
            allow(output, id, *encoding);
        }
    }
    Ok(())
}

/// The bytes of the first correlation id in an event, in MessagePack with the string's header.
fn correlation_id(payload: &[u8], encoding: Encoding) -> Option<&[u8]> {
    match encoding {
        Encoding::Json => {
            const KEY: &[u8] = br#""correlation_id":""#;
            let id = &payload[memchr::memmem::find(payload, KEY)? + KEY.len()..];
            Some(&id[..memchr::memchr(b'"', id)?])
        }
        Encoding::MessagePack => {
            const KEY: &[u8] = b"\xaecorrelation_id";
            let id = &payload[memchr::memmem::find(payload, KEY)? + KEY.len()..];
            // A string of up to 31 bytes has its length in the first byte, one of up to 255 in the
            // second.
            let end = match *id.first()? {
                short @ 0xa0..=0xbf => 1 + usize::from(short & 0x1f),
                0xd9 => 2 + usize::from(*id.get(1)?),
                _ => return None,
            };
            id.get(..end)
        }
    }
}

/// What the published server sends for a default allow, with the event's id.
fn allow(output: &mut Vec<u8>, id: &[u8], encoding: Encoding) {
    match encoding {
        Encoding::Json => frame(
            output,
            AGENT_RESPONSE,
            &[
                br#"{"version":2,"decision":"allow","request_headers":[],"response_headers":[],"routing_metadata":{},"audit":{"tags":[],"rule_ids":[],"confidence":null,"reason_codes":[],"custom":{"correlation_id":""#,
                id,
                br#""}},"needs_more":false,"request_body_mutation":null,"response_body_mutation":null,"websocket_decision":null}"#,
            ],
        ),
        Encoding::MessagePack => frame(
            output,
            AGENT_RESPONSE,
            &[
                b"\x8a\xa7version\x02\xa8decision\xa5allow\xafrequest_headers\x90\xb0response_headers\x90\xb0routing_metadata\x80\xa5audit\x85\xa4tags\x90\xa8rule_ids\x90\xaaconfidence\xc0\xacreason_codes\x90\xa6custom\x81\xaecorrelation_id",
                id,
                b"\xaaneeds_more\xc2\xb5request_body_mutation\xc0\xb6response_body_mutation\xc0\xb2websocket_decision\xc0",
            ],
        ),
    }
}

fn frame(output: &mut Vec<u8>, kind: u8, parts: &[&[u8]]) {
    let length = 1 + parts.iter().map(|part| part.len()).sum::<usize>();
    // Far below 4 GiB: the parts are constants and an id from a frame of at most 16 MiB.
    output.extend_from_slice(&(length as u32).to_be_bytes());
    output.push(kind);
    for part in parts {
        output.extend_from_slice(part);
    }
}
