//! Frames on the Unix socket: `u32` big-endian length of type and payload, `u8` type, payload.

use crate::limits::MAX_FRAME;

/// Bytes before the payload.
pub const HEADER: usize = 5;

/// Types of frames.
pub mod kind {
    #![allow(missing_docs)]
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

    /// Whether frames of this type want an answer.
    pub const fn is_event(kind: u8) -> bool {
        kind & 0xf0 == 0x10
    }
}

/// A frame within a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// One of [`kind`], or something newer.
    pub kind: u8,
    /// What the type says.
    pub payload: &'a [u8],
}

/// Why bytes are not frames. The connection cannot go on after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// A frame without a type.
    #[error("length 0")]
    Empty,
    /// A frame above the protocol's limit.
    #[error("{0} bytes, more than the protocol's limit of {MAX_FRAME}")]
    TooLarge(usize),
}

/// The first frame in `bytes` and the number of bytes that it takes, or None while it is incomplete.
///
/// # Errors
///
/// The bytes are no frame.
pub fn next(bytes: &[u8]) -> Result<Option<(Frame<'_>, usize)>, FrameError> {
    let Some((header, rest)) = bytes.split_first_chunk::<4>() else { return Ok(None) };
    let len = u32::from_be_bytes(*header) as usize;
    if len == 0 {
        return Err(FrameError::Empty);
    }
    if len > MAX_FRAME {
        return Err(FrameError::TooLarge(len));
    }
    Ok(rest.get(..len).and_then(<[u8]>::split_first).map(|(&kind, payload)| (Frame { kind, payload }, 4 + len)))
}

/// Appends a frame whose payload `write` appends.
pub fn append(out: &mut Vec<u8>, kind: u8, write: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend_from_slice(&[0, 0, 0, 0, kind]);
    write(out);
    let len = (out.len() - start - 4) as u32;
    out[start..start + 4].copy_from_slice(&len.to_be_bytes());
}

/// A frame, for tests.
#[cfg(test)]
pub(crate) fn framed(kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    append(&mut out, kind, |out| out.extend_from_slice(payload));
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn frames_are_whole_or_awaited() {
        let mut bytes = Vec::new();
        append(&mut bytes, kind::PING, |out| out.extend_from_slice(b"abc"));
        for cut in 0..bytes.len() {
            assert_eq!(next(&bytes[..cut]), Ok(None), "{cut}");
        }
        assert_eq!(next(&bytes), Ok(Some((Frame { kind: kind::PING, payload: b"abc" }, 8))));
    }

    #[test]
    fn bad_lengths_are_refused_before_anything_is_awaited() {
        assert_eq!(next(&[0, 0, 0, 0]), Err(FrameError::Empty));
        assert_eq!(next(&u32::MAX.to_be_bytes()), Err(FrameError::TooLarge(u32::MAX as usize)));
    }

    proptest! {
        #[test]
        fn what_is_appended_is_cut_again(frames in proptest::collection::vec((any::<u8>(), proptest::collection::vec(any::<u8>(), 0..50)), 0..5)) {
            let mut bytes = Vec::new();
            for (kind, payload) in &frames {
                append(&mut bytes, *kind, |out| out.extend_from_slice(payload));
            }
            let mut rest = bytes.as_slice();
            for (kind, payload) in &frames {
                let (frame, len) = next(rest).unwrap().unwrap();
                prop_assert_eq!((frame.kind, frame.payload), (*kind, payload.as_slice()));
                rest = &rest[len..];
            }
            prop_assert_eq!(next(rest), Ok(None));
        }

        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = next(&bytes);
        }
    }
}
