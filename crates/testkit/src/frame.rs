//! Frames as they go over the socket.

/// Types of frames.
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

/// A frame as it goes over the socket.
pub fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = (payload.len() as u32 + 1).to_be_bytes().to_vec();
    frame.push(kind);
    frame.extend_from_slice(payload);
    frame
}
