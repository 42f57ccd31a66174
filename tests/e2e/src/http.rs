//! A subset of HTTP/1.1 for the tests, for both sides. It reads messages byte by byte, and tells a
//! truncated body from a complete one.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// After this long without a byte, the peer counts as hung.
const READ_TIMEOUT: Duration = Duration::from_secs(30);

/// More than any head that the tests send.
const MAX_HEAD_BYTES: u64 = 1 << 20;

/// A request or a response.
#[derive(Debug, Clone)]
pub struct Message {
    /// `GET / HTTP/1.1` or `HTTP/1.1 200 OK`.
    pub start_line: String,
    /// The header fields, unchanged and in order.
    pub headers: Vec<(String, String)>,
    /// The body, without its framing.
    pub body: Vec<u8>,
    /// Whether the body has the length that its framing announced.
    pub complete: bool,
}

impl Message {
    /// The value of a header field; several values are joined with `, `.
    pub fn header(&self, name: &str) -> Option<String> {
        let values: Vec<&str> =
            self.headers.iter().filter(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str()).collect();
        (!values.is_empty()).then(|| values.join(", "))
    }

    /// The status of a response.
    ///
    /// # Panics
    ///
    /// If this is not a response.
    pub fn status(&self) -> u16 {
        let status = self.start_line.split(' ').nth(1);
        status.and_then(|status| status.parse().ok()).unwrap_or_else(|| panic!("no status in {:?}", self.start_line))
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON.
    ///
    /// # Panics
    ///
    /// If it is not valid JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error} in {:?}: {:?}", self.start_line, self.text()))
    }
}

/// Reads the next message of a connection; `None` if the peer closed it between messages.
/// `has_body` decides from the start line whether the message can have a body.
pub fn read_message(reader: &mut BufReader<TcpStream>, has_body: impl Fn(&str) -> bool) -> io::Result<Option<Message>> {
    let mut head = reader.by_ref().take(MAX_HEAD_BYTES);
    let mut line = String::new();
    if head.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let start_line = line.trim_end().to_owned();
    let mut headers = Vec::new();
    loop {
        line.clear();
        if head.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let field = line.trim_end();
        if field.is_empty() {
            break;
        }
        let (name, value) = field.split_once(':').ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, field))?;
        headers.push((name.to_owned(), value.trim().to_owned()));
    }
    let mut message = Message { start_line, headers, body: Vec::new(), complete: true };
    if has_body(&message.start_line) {
        message.complete = read_body(reader, &mut message)?;
    }
    Ok(Some(message))
}

/// Reads the body into `message`; returns whether it is complete.
fn read_body(reader: &mut BufReader<TcpStream>, message: &mut Message) -> io::Result<bool> {
    let chunked = message.header("transfer-encoding").is_some_and(|coding| coding.eq_ignore_ascii_case("chunked"));
    if chunked {
        return read_chunks(reader, &mut message.body);
    }
    if let Some(len) = message.header("content-length") {
        let len: u64 = len.parse().map_err(|_| io::Error::new(io::ErrorKind::InvalidData, len))?;
        return read_up_to(reader, len, &mut message.body);
    }
    // Without either, a request has no body and a response ends with the connection.
    if message.start_line.starts_with("HTTP/") {
        reader.read_to_end(&mut message.body)?;
    }
    Ok(true)
}

fn read_chunks(reader: &mut BufReader<TcpStream>, body: &mut Vec<u8>) -> io::Result<bool> {
    loop {
        let mut line = String::new();
        if end_at_reset(reader.by_ref().take(MAX_HEAD_BYTES).read_line(&mut line))? == 0 {
            return Ok(false);
        }
        let size = line.trim_end().split(';').next().unwrap_or_default();
        let size = u64::from_str_radix(size, 16).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, line.clone()))?;
        if !read_up_to(reader, size, body)? {
            return Ok(false);
        }
        line.clear();
        if end_at_reset(reader.by_ref().take(MAX_HEAD_BYTES).read_line(&mut line))? == 0 {
            return Ok(false);
        }
        if size == 0 {
            return Ok(true);
        }
    }
}

fn read_up_to(reader: &mut impl Read, len: u64, body: &mut Vec<u8>) -> io::Result<bool> {
    let before = body.len();
    end_at_reset(reader.take(len).read_to_end(body))?;
    Ok((body.len() - before) as u64 == len)
}

/// Treats a reset connection as the end of the body: a truncated body is not a test failure.
fn end_at_reset(read: io::Result<usize>) -> io::Result<usize> {
    match read {
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(0),
        other => other,
    }
}

/// Sends one request on a connection of its own and reads the response. The body is sent in chunks
/// if the headers contain `Transfer-Encoding`.
pub fn exchange(port: u16, method: &str, target: &str, headers: &[(String, String)], body: Option<&[u8]>) -> io::Result<Message> {
    let stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(READ_TIMEOUT))?;
    let mut head = format!("{method} {target} HTTP/1.1\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    let chunked = headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("transfer-encoding"));
    let body = match body {
        Some(body) if chunked => Some(in_chunks(body)),
        Some(body) => {
            head.push_str(&format!("Content-Length: {}\r\n", body.len()));
            Some(body.to_vec())
        }
        None => None,
    };
    head.push_str("Connection: close\r\n\r\n");
    let mut reader = BufReader::new(stream);
    reader.get_mut().write_all(head.as_bytes())?;
    if let Some(body) = body {
        // The proxy may reject a request and close the connection before it has read the whole
        // body.
        match reader.get_mut().write_all(&body) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
            other => other?,
        }
    }
    let response_has_body = |line: &str| {
        let status = line.split(' ').nth(1).unwrap_or_default();
        method != "HEAD" && !matches!(status, "204" | "304")
    };
    read_message(&mut reader, response_has_body)?.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

/// The body in chunked framing.
pub(crate) fn in_chunks(body: &[u8]) -> Vec<u8> {
    /// Small enough to split a large body into many chunks.
    const CHUNK: usize = 4096;
    let mut framed = Vec::new();
    for chunk in body.chunks(CHUNK) {
        framed.extend(format!("{:x}\r\n", chunk.len()).bytes());
        framed.extend(chunk);
        framed.extend(b"\r\n");
    }
    framed.extend(b"0\r\n\r\n");
    framed
}
