//! Frames on the socket: the length of what follows, four bytes big-endian; one byte for the kind;
//! the payload.

use std::io::{Error, ErrorKind, Read, Result};

/// The protocol's limit for a frame, kind included.
const MAX_FRAME: usize = 16 << 20;

/// Kinds of frames.
pub mod kind {
    pub const HANDSHAKE_REQUEST: u8 = 0x01;
    pub const HANDSHAKE_RESPONSE: u8 = 0x02;
    pub const REQUEST_HEADERS: u8 = 0x10;
    pub const REQUEST_BODY: u8 = 0x11;
    pub const RESPONSE_HEADERS: u8 = 0x12;
    pub const RESPONSE_BODY: u8 = 0x13;
    pub const REQUEST_COMPLETE: u8 = 0x14;
    pub const WEBSOCKET_FRAME: u8 = 0x15;
    pub const GUARDRAIL_INSPECT: u8 = 0x16;
    pub const CONFIGURE: u8 = 0x17;
    pub const AGENT_RESPONSE: u8 = 0x20;
    pub const HEALTH_STATUS: u8 = 0x30;
    pub const METRICS_REPORT: u8 = 0x31;
    pub const CANCEL: u8 = 0x40;
    pub const PING: u8 = 0x41;
    pub const PONG: u8 = 0x42;
}

/// Encodes a frame.
pub fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(5 + payload.len());
    frame.extend_from_slice(&(payload.len() as u32 + 1).to_be_bytes());
    frame.push(kind);
    frame.extend_from_slice(payload);
    frame
}

/// Reads one frame: its kind and its payload. None when the peer closed the connection before it.
///
/// # Errors
///
/// When reading fails, the connection is closed within the payload, or the length is out of range.
pub fn read_frame(stream: &mut impl Read) -> Result<Option<(u8, Vec<u8>)>> {
    let mut head = [0; 5];
    match stream.read_exact(&mut head) {
        Ok(()) => {}
        Err(error) if matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset) => return Ok(None),
        Err(error) => return Err(error),
    }
    let [a, b, c, d, kind] = head;
    let length = u32::from_be_bytes([a, b, c, d]) as usize;
    if length == 0 || length > MAX_FRAME {
        return Err(Error::new(ErrorKind::InvalidData, format!("invalid frame length: {length} bytes")));
    }
    let mut payload = vec![0; length - 1];
    stream.read_exact(&mut payload)?;
    Ok(Some((kind, payload)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_was_encoded() {
        let mut bytes = &[frame(kind::PING, b""), frame(kind::CONFIGURE, b"{}")].concat()[..];
        assert_eq!(read_frame(&mut bytes).unwrap(), Some((kind::PING, Vec::new())));
        assert_eq!(read_frame(&mut bytes).unwrap(), Some((kind::CONFIGURE, b"{}".to_vec())));
        assert_eq!(read_frame(&mut bytes).unwrap(), None);
    }

    #[test]
    fn rejects_truncated_frames_and_invalid_lengths() {
        for bytes in [&[0, 0, 0, 2, kind::PING][..], &[0, 0, 0, 0, 0], &[1, 0, 0, 1, 0]] {
            assert!(read_frame(&mut &*bytes).is_err(), "{bytes:?}");
        }
    }
}
