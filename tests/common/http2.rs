//! An HTTP/2 client that writes each frame itself, so it can write invalid ones.

// Every test binary has its own copy and uses only a part of it.
#![allow(dead_code, unreachable_pub)]

use std::collections::{HashMap, HashSet};
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use testkit::PATIENCE;

/// What every client sends first.
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The initial window of a connection, and that of a stream unless the server's settings differ.
const WINDOW: i64 = 65_535;

/// The largest frame, unless the server's settings differ.
const MAX_FRAME: usize = 16 << 10;

/// A server that reads nothing for this long has stopped reading. It ends a flood, and no assertion
/// depends on it.
const GIVE_UP: Duration = Duration::from_millis(500);

/// Types of frames.
pub mod kind {
    pub const DATA: u8 = 0;
    pub const HEADERS: u8 = 1;
    pub const RST_STREAM: u8 = 3;
    pub const SETTINGS: u8 = 4;
    pub const PUSH_PROMISE: u8 = 5;
    pub const PING: u8 = 6;
    pub const GOAWAY: u8 = 7;
    pub const WINDOW_UPDATE: u8 = 8;
    pub const CONTINUATION: u8 = 9;
}

/// Flags of frames.
pub mod flag {
    pub const ACK: u8 = 1;
    pub const END_STREAM: u8 = 1;
    pub const END_HEADERS: u8 = 4;
    pub const PADDED: u8 = 8;
}

/// Encodes a frame.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}

/// Encodes a message of gRPC.
pub fn framed(message: &[u8]) -> Vec<u8> {
    let mut framed = vec![0];
    framed.extend((message.len() as u32).to_be_bytes());
    framed.extend_from_slice(message);
    framed
}

/// Encodes one header literally, not to be added to the dynamic table.
pub fn header(name: &str, value: &str) -> Vec<u8> {
    let mut bytes = vec![0];
    for text in [name, value] {
        let mut rest = text.len();
        if rest < 0x7f {
            bytes.push(rest as u8);
        } else {
            bytes.push(0x7f);
            rest -= 0x7f;
            while rest >= 0x80 {
                bytes.push(rest as u8 | 0x80);
                rest >>= 7;
            }
            bytes.push(rest as u8);
        }
        bytes.extend_from_slice(text.as_bytes());
    }
    bytes
}

/// The headers of a call.
pub fn headers(path: &str, more: &[(&str, &str)]) -> Vec<u8> {
    let call = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "agent"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ];
    call.iter().chain(more).flat_map(|(name, value)| header(name, value)).collect()
}

/// A received frame.
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

/// A connection.
pub struct Wire {
    socket: TcpStream,
    last_stream: u32,
    opens_windows: bool,
    /// Bytes received since windows are no longer opened, by stream.
    unopened: HashMap<u32, u32>,
    /// Bytes that may be sent, by stream; 0 is the connection.
    windows: HashMap<u32, i64>,
    first_window: i64,
    /// Bytes of messages that were received and not consumed yet.
    arrived: HashMap<u32, Vec<u8>>,
    ended: HashSet<u32>,
    closed: bool,
    pongs: usize,
}

impl Wire {
    /// Connects, and exchanges settings.
    pub fn connect(address: SocketAddr) -> Self {
        let socket = TcpStream::connect(address).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.set_write_timeout(Some(PATIENCE)).unwrap();
        socket.set_nodelay(true).unwrap();
        let mut wire = Self {
            socket,
            last_stream: 0,
            opens_windows: true,
            unopened: HashMap::new(),
            windows: HashMap::from([(0, WINDOW)]),
            first_window: WINDOW,
            arrived: HashMap::new(),
            ended: HashSet::new(),
            closed: false,
            pongs: 0,
        };
        assert!(wire.raw(&[PREFACE, &frame(kind::SETTINGS, 0, 0, b"")].concat()));
        // The server sends its settings first. They have the initial window of streams.
        assert!(wire.settle());
        wire
    }

    /// Writes bytes as they are. False when the server has closed the connection.
    pub fn raw(&mut self, bytes: &[u8]) -> bool {
        match self.socket.write_all(bytes) {
            Ok(()) => true,
            Err(error) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => false,
            Err(error) => panic!("the agent reads nothing: {error}"),
        }
    }

    /// Writes bytes as they are, without reading anything. False when the server has closed the
    /// connection or stopped reading.
    pub fn raw_until_full(&mut self, bytes: &[u8]) -> bool {
        self.socket.set_write_timeout(Some(GIVE_UP)).unwrap();
        let written = self.socket.write_all(bytes).is_ok();
        self.socket.set_write_timeout(Some(PATIENCE)).unwrap();
        written
    }

    /// Closes one direction, or both.
    pub fn shutdown(&self, how: Shutdown) {
        self.socket.shutdown(how).unwrap();
    }

    /// Whether windows are opened again for received data. Turning it on opens those for earlier
    /// data as well.
    pub fn opens_windows(&mut self, opens: bool) {
        self.opens_windows = opens;
        if opens {
            for (stream, size) in std::mem::take(&mut self.unopened) {
                self.open_window(stream, size);
            }
        }
    }

    fn open_window(&mut self, stream: u32, size: u32) {
        if size > 0 && !self.ended.contains(&stream) {
            self.raw(&frame(kind::WINDOW_UPDATE, 0, stream, &size.to_be_bytes()));
        }
    }

    /// The number of the next stream of the client.
    pub fn next_stream(&mut self) -> u32 {
        self.last_stream = if self.last_stream == 0 { 1 } else { self.last_stream + 2 };
        self.last_stream
    }

    /// Opens a stream.
    pub fn open(&mut self, path: &str) -> u32 {
        self.open_with(path, &[])
    }

    /// Opens a stream with further headers.
    pub fn open_with(&mut self, path: &str, more: &[(&str, &str)]) -> u32 {
        let stream = self.next_stream();
        self.raw(&frame(kind::HEADERS, flag::END_HEADERS, stream, &headers(path, more)));
        self.windows.insert(stream, self.first_window);
        stream
    }

    /// Bytes that may be sent on a stream now.
    fn room(&self, stream: u32) -> usize {
        let room = |stream: u32| self.windows.get(&stream).copied().unwrap_or_default();
        room(0).min(room(stream)).max(0) as usize
    }

    /// Sends data, as fast as the windows allow.
    #[track_caller]
    pub fn data(&mut self, stream: u32, mut bytes: &[u8], last: bool) {
        loop {
            let part = bytes.len().min(self.room(stream)).min(MAX_FRAME);
            if part == 0 && !bytes.is_empty() {
                if self.closed || self.ended.contains(&stream) || self.receive().is_none() {
                    return;
                }
                continue;
            }
            self.send_part(stream, &bytes[..part], last && part == bytes.len());
            bytes = &bytes[part..];
            if bytes.is_empty() {
                return;
            }
        }
    }

    /// Sends data until the server opens no more windows, and returns the rest.
    pub fn data_until_full(&mut self, stream: u32, mut bytes: &[u8]) -> Vec<u8> {
        while !bytes.is_empty() {
            let part = bytes.len().min(self.room(stream)).min(MAX_FRAME);
            if part == 0 {
                self.socket.set_read_timeout(Some(GIVE_UP)).unwrap();
                let more = self.socket.peek(&mut [0]).is_ok_and(|count| count > 0);
                self.socket.set_read_timeout(Some(PATIENCE)).unwrap();
                if !more {
                    break;
                }
                self.receive();
                continue;
            }
            self.send_part(stream, &bytes[..part], false);
            bytes = &bytes[part..];
        }
        bytes.to_vec()
    }

    fn send_part(&mut self, stream: u32, part: &[u8], last: bool) {
        self.raw(&frame(kind::DATA, if last { flag::END_STREAM } else { 0 }, stream, part));
        for stream in [0, stream] {
            *self.windows.entry(stream).or_default() -= part.len() as i64;
        }
    }

    /// Waits until the server has read all that was sent. False when it closes the connection.
    #[track_caller]
    #[must_use]
    pub fn settle(&mut self) -> bool {
        let wanted = self.pongs + 1;
        self.raw(&frame(kind::PING, 0, 0, &[1; 8]));
        while self.pongs < wanted {
            if self.receive().is_none() {
                return false;
            }
        }
        true
    }

    /// The next message of gRPC on a stream, or None at the end of the stream.
    #[track_caller]
    pub fn message(&mut self, stream: u32) -> Option<Vec<u8>> {
        loop {
            let arrived = self.arrived.entry(stream).or_default();
            if let Some(length) = arrived.get(1..5) {
                let end = 5 + u32::from_be_bytes(length.try_into().unwrap()) as usize;
                if arrived.len() >= end {
                    let message = arrived[5..end].to_vec();
                    arrived.drain(..end);
                    return Some(message);
                }
            }
            if self.ended.contains(&stream) || self.receive().is_none() {
                return None;
            }
        }
    }

    /// Whether the end of a stream has been received.
    pub fn has_ended(&self, stream: u32) -> bool {
        self.ended.contains(&stream)
    }

    /// Receives the next frame and acts on it. None when the server has closed the connection.
    #[track_caller]
    pub fn receive(&mut self) -> Option<Frame> {
        let mut head = [0; 9];
        let read = |socket: &mut TcpStream, bytes: &mut [u8]| match socket.read_exact(bytes) {
            Ok(()) => true,
            Err(error) if matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset) => false,
            Err(error) => panic!("the agent sends nothing: {error}"),
        };
        if !read(&mut self.socket, &mut head) {
            self.closed = true;
            return None;
        }
        let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
        if !read(&mut self.socket, &mut payload) {
            self.closed = true;
            return None;
        }
        let (kind, flags) = (head[3], head[4]);
        let stream = u32::from_be_bytes(head[5..].try_into().unwrap());
        let number = |at: usize| payload.get(at..at + 4).map_or(0, |bytes| u32::from_be_bytes(bytes.try_into().unwrap()));
        match kind {
            kind::DATA => {
                self.arrived.entry(stream).or_default().extend_from_slice(&payload);
                for stream in [0, stream] {
                    if self.opens_windows {
                        self.open_window(stream, payload.len() as u32);
                    } else {
                        *self.unopened.entry(stream).or_default() += payload.len() as u32;
                    }
                }
            }
            kind::RST_STREAM => {
                self.ended.insert(stream);
            }
            kind::SETTINGS if flags & flag::ACK == 0 => {
                for setting in payload.chunks_exact(6).filter(|setting| setting[..2] == [0, 4]) {
                    let window = i64::from(u32::from_be_bytes(setting[2..].try_into().unwrap()));
                    self.first_window = window;
                }
                self.raw(&frame(kind::SETTINGS, flag::ACK, 0, b""));
            }
            kind::PING if flags & flag::ACK == 0 => {
                self.raw(&frame(kind::PING, flag::ACK, 0, &payload));
            }
            kind::PING => self.pongs += 1,
            kind::WINDOW_UPDATE => *self.windows.entry(stream).or_default() += i64::from(number(0)),
            _ => {}
        }
        if matches!(kind, kind::DATA | kind::HEADERS) && flags & flag::END_STREAM != 0 {
            self.ended.insert(stream);
        }
        Some(Frame { kind, flags, stream, payload })
    }
}
