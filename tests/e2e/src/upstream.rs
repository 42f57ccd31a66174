//! A small upstream that describes the requests it receives.
//!
//! It responds with JSON: `method`, `path`, `headers` (a list of pairs), `body` (text),
//! `body_bytes`. The query changes the response: `status=N` sets the status, `echo=1` echoes the
//! request's body, `bytes=N` sends N bytes of [`pattern`], `type=T` sets the content type, and
//! `chunked=1` sends the body in chunks. WebSocket messages are echoed.

use crate::http::{Message, in_chunks, read_message};
use crate::websocket;
use serde_json::json;
use std::io::{self, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A running upstream. Its threads end with the process.
#[derive(Debug)]
pub struct Upstream {
    port: u16,
    requests: Arc<AtomicUsize>,
}

impl Upstream {
    /// Listens on a free port of the loopback interface.
    pub fn start() -> io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let port = listener.local_addr()?.port();
        let requests = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&requests);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let counter = Arc::clone(&counter);
                // An error ends only this connection, and the proxy reports it to the client.
                std::thread::spawn(move || serve(stream, &counter).ok());
            }
        });
        Ok(Self { port, requests })
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// How many requests it has received.
    pub fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }
}

/// `len` bytes of all values, in an order that reveals lost, repeated and swapped bytes.
pub fn pattern(len: usize) -> Vec<u8> {
    // A linear congruential generator is cheap and has no short period.
    let mut state: u32 = 0x2545_f491;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}

fn serve(stream: TcpStream, requests: &AtomicUsize) -> io::Result<()> {
    let mut reader = BufReader::new(stream);
    while let Some(request) = read_message(&mut reader, |_| true)? {
        requests.fetch_add(1, Ordering::SeqCst);
        if request.header("upgrade").is_some() {
            return websocket::echo(&mut reader);
        }
        let response = respond(&request);
        reader.get_mut().write_all(&response)?;
    }
    Ok(())
}

fn respond(request: &Message) -> Vec<u8> {
    let mut words = request.start_line.split(' ');
    let method = words.next().unwrap_or_default();
    let path = words.next().unwrap_or_default();
    let query = path.split_once('?').map_or("", |(_, query)| query);
    let parameter =
        |name: &str| query.split('&').filter_map(|pair| pair.split_once('=')).find(|(key, _)| *key == name).map(|(_, value)| value);
    let body = if parameter("echo").is_some() {
        request.body.clone()
    } else if let Some(len) = parameter("bytes").and_then(|len| len.parse().ok()) {
        pattern(len)
    } else {
        let description = json!({
            "method": method,
            "path": path,
            "headers": request.headers,
            "body": request.text(),
            "body_bytes": request.body.len(),
        });
        description.to_string().into_bytes()
    };
    let status = parameter("status").unwrap_or("200");
    let reason = if status == "200" { "OK" } else { "As Requested" };
    let mut response = format!(
        "HTTP/1.1 {status} {reason}\r\nContent-Type: {}\r\nX-Powered-By: upstream\r\nX-Upstream: yes\r\n\
         Set-Cookie: a=1\r\nSet-Cookie: b=2\r\n",
        parameter("type").unwrap_or("application/json"),
    )
    .into_bytes();
    if parameter("chunked").is_some() {
        response.extend(b"Transfer-Encoding: chunked\r\n\r\n");
        response.extend(in_chunks(&body));
    } else {
        response.extend(format!("Content-Length: {}\r\n\r\n", body.len()).bytes());
        if method != "HEAD" {
            response.extend(body);
        }
    }
    response
}
