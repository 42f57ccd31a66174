//! A subset of RFC 6455 for the tests: short frames without fragmentation.

use crate::http::read_message;
use std::io::{self, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// After this long without a byte, the peer counts as hung.
const READ_TIMEOUT: Duration = Duration::from_secs(30);

const FIN: u8 = 0x80;
const TEXT: u8 = 0x1;
const CLOSE: u8 = 0x8;
const MASKED: u8 = 0x80;

/// This length and 127 mean that the length follows, in two bytes or in eight.
const TWO_BYTE_LENGTH: u8 = 126;

/// The client's masking key. It protects proxies from scripts in browsers, so here any value works.
const MASK: [u8; 4] = [0x37, 0xfa, 0x21, 0x3d];

/// The response to every upgrade. The client here does not check the accept key.
const SWITCHING: &[u8] = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";

/// A client's connection.
#[derive(Debug)]
pub struct WebSocket {
    reader: BufReader<TcpStream>,
}

impl WebSocket {
    /// Upgrades a connection to `port`.
    pub fn connect(port: u16, path: &str) -> io::Result<Self> {
        let stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(READ_TIMEOUT))?;
        let mut reader = BufReader::new(stream);
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: shop.example\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        );
        reader.get_mut().write_all(request.as_bytes())?;
        match read_message(&mut reader, |_| false)? {
            Some(response) if response.status() == 101 => Ok(Self { reader }),
            other => Err(io::Error::other(format!("the upgrade was rejected: {other:?}"))),
        }
    }

    /// Sends a text message.
    pub fn send(&mut self, text: &str) -> io::Result<()> {
        let masked: Vec<u8> = text.bytes().zip(MASK.iter().cycle()).map(|(byte, key)| byte ^ key).collect();
        let mut frame = head(TEXT, MASKED, masked.len())?;
        frame.extend(MASK);
        frame.extend(masked);
        self.reader.get_mut().write_all(&frame)
    }

    /// Receives the next text message; `None` if the connection is closed.
    pub fn receive(&mut self) -> io::Result<Option<String>> {
        match read_frame(&mut self.reader) {
            Ok((TEXT, data)) => Ok(Some(String::from_utf8_lossy(&data).into_owned())),
            Ok((CLOSE, _)) => Ok(None),
            Ok((opcode, _)) => Err(io::Error::other(format!("received a frame with opcode {opcode}"))),
            Err(error) if matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// The upstream's side: accepts the upgrade and echoes every message.
pub(crate) fn echo(reader: &mut BufReader<TcpStream>) -> io::Result<()> {
    reader.get_mut().write_all(SWITCHING)?;
    loop {
        let (opcode, data) = read_frame(reader)?;
        let mut frame = head(opcode, 0, data.len())?;
        frame.extend(data);
        reader.get_mut().write_all(&frame)?;
        if opcode == CLOSE {
            return Ok(());
        }
    }
}

fn head(opcode: u8, masked: u8, len: usize) -> io::Result<Vec<u8>> {
    let mut head = vec![FIN | opcode];
    match u8::try_from(len) {
        Ok(len) if len < TWO_BYTE_LENGTH => head.push(masked | len),
        _ => {
            head.push(masked | TWO_BYTE_LENGTH);
            head.extend(u16::try_from(len).map_err(io::Error::other)?.to_be_bytes());
        }
    }
    Ok(head)
}

/// The opcode and the payload, unmasked.
fn read_frame(reader: &mut impl Read) -> io::Result<(u8, Vec<u8>)> {
    let [first, second] = read_array(reader)?;
    let len = match second & !MASKED {
        TWO_BYTE_LENGTH => usize::from(u16::from_be_bytes(read_array(reader)?)),
        len if len < TWO_BYTE_LENGTH => usize::from(len),
        _ => return Err(io::Error::other("received a frame of more than 65535 bytes")),
    };
    let mask = if second & MASKED == 0 { [0; 4] } else { read_array(reader)? };
    let mut data = vec![0; len];
    reader.read_exact(&mut data)?;
    for (byte, key) in data.iter_mut().zip(mask.iter().cycle()) {
        *byte ^= key;
    }
    Ok((first & 0x0f, data))
}

fn read_array<const N: usize>(reader: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    reader.read_exact(&mut bytes)?;
    Ok(bytes)
}
