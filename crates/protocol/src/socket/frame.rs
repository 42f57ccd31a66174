//! Frames on the Unix socket: `u32` big-endian length of type and payload, `u8` type, payload.

use crate::limits::MAX_FRAME;

/// Length of the header before the payload, in bytes: the frame's length and its type.
pub const HEADER: usize = 5;

/// Frame types.
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

    /// Whether frames of this type are events, which are answered.
    pub const fn is_event(kind: u8) -> bool {
        kind & 0xf0 == 0x10
    }
}

/// A frame within a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Frame type: one of [`kind`], or an unknown one.
    pub kind: u8,
    /// An event, a response and so on, by the frame type.
    pub payload: &'a [u8],
}

/// Invalid frame length. The next frame cannot be found after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The frame has no type.
    #[error("length 0")]
    Empty,
    /// The frame is larger than [`MAX_FRAME`].
    #[error("{0} bytes, more than the protocol's limit of {MAX_FRAME}")]
    TooLarge(usize),
}

/// Returns the first frame in `bytes` and its whole length in bytes, or `None` if it is incomplete.
///
/// # Errors
///
/// The length of the frame is invalid.
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

/// Appends a frame of type `kind` to `out`. `write` appends its payload.
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
    fn an_incomplete_frame_is_none() {
        let mut bytes = Vec::new();
        append(&mut bytes, kind::PING, |out| out.extend_from_slice(b"abc"));
        for cut in 0..bytes.len() {
            assert_eq!(next(&bytes[..cut]), Ok(None), "{cut}");
        }
        assert_eq!(next(&bytes), Ok(Some((Frame { kind: kind::PING, payload: b"abc" }, 8))));
    }

    #[test]
    fn an_invalid_length_is_rejected_at_once() {
        assert_eq!(next(&[0, 0, 0, 0]), Err(FrameError::Empty));
        assert_eq!(next(&u32::MAX.to_be_bytes()), Err(FrameError::TooLarge(u32::MAX as usize)));
    }

    proptest! {
        #[test]
        fn appended_frames_are_found_again(frames in proptest::collection::vec((any::<u8>(), proptest::collection::vec(any::<u8>(), 0..50)), 0..5)) {
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
        fn any_bytes_are_accepted_or_rejected(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = next(&bytes);
        }
    }
}
