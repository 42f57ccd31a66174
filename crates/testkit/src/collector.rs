//! A collector of OpenTelemetry, which takes messages over HTTP and keeps them as they are.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use crate::wait_for;

/// One request to a collector.
#[derive(Clone, Debug)]
pub struct Post {
    /// Such as `/v1/traces`.
    pub path: String,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Post {
    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }
}

/// What a collector does with requests.
#[derive(Clone, Debug)]
pub enum CollectorReply {
    /// It responds with this status and body.
    Status(u16, Vec<u8>),
    /// It responds with 200, and closes the connection without having announced it.
    CloseAfter,
    /// It reads and does not respond.
    Silence,
    /// It responds with 200 and forgets the request.
    Forget,
}

/// A running collector. Its threads end with the process.
pub struct Collector {
    address: SocketAddr,
    shared: Arc<Mutex<Shared>>,
}

struct Shared {
    reply: CollectorReply,
    posts: Vec<Post>,
    connections: usize,
}

impl Collector {
    /// Starts a collector that takes everything.
    pub fn start() -> Self {
        Self::start_with(CollectorReply::Status(200, Vec::new()), |stream| stream)
    }

    /// Starts a collector whose connections `wrap` may encrypt.
    pub fn start_with<S: Read + Write>(reply: CollectorReply, wrap: impl Fn(TcpStream) -> S + Clone + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Mutex::new(Shared { reply, posts: Vec::new(), connections: 0 }));
        let collector = Self { address, shared: Arc::clone(&shared) };
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (shared, wrap) = (Arc::clone(&shared), wrap.clone());
                shared.lock().unwrap().connections += 1;
                thread::spawn(move || serve(wrap(stream), &shared));
            }
        });
        collector
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The value of `--otlp-endpoint`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn reply_with(&self, reply: CollectorReply) {
        self.shared.lock().unwrap().reply = reply;
    }

    /// The requests so far.
    pub fn posts(&self) -> Vec<Post> {
        self.shared.lock().unwrap().posts.clone()
    }

    /// The number of connections so far.
    pub fn connections(&self) -> usize {
        self.shared.lock().unwrap().connections
    }

    /// Waits until there is a request with this path.
    #[track_caller]
    pub fn wait_for_post(&self, path: &str) -> Post {
        wait_for(&format!("a request with {path}"), || self.posts().into_iter().find(|post| post.path == path))
    }
}

/// Serves a connection until the client closes it.
fn serve(stream: impl Read + Write, shared: &Mutex<Shared>) {
    let mut stream = BufReader::new(stream);
    while let Some(post) = read(&mut stream) {
        let reply = {
            let mut shared = shared.lock().unwrap();
            if !matches!(shared.reply, CollectorReply::Forget) {
                shared.posts.push(post);
            }
            shared.reply.clone()
        };
        let (status, body) = match &reply {
            CollectorReply::Status(status, body) => (*status, body.as_slice()),
            CollectorReply::CloseAfter | CollectorReply::Forget => (200, &[][..]),
            CollectorReply::Silence => continue,
        };
        let head = format!("HTTP/1.1 {status} x\r\nContent-Type: application/x-protobuf\r\nContent-Length: {}\r\n\r\n", body.len());
        let out = stream.get_mut();
        if out.write_all(&[head.as_bytes(), body].concat()).and_then(|()| out.flush()).is_err() {
            return;
        }
        if matches!(reply, CollectorReply::CloseAfter) {
            return;
        }
    }
}

/// Reads a request, or returns `None` at the end of the connection.
fn read(stream: &mut impl BufRead) -> Option<Post> {
    let mut line = String::new();
    stream.read_line(&mut line).ok()?;
    let path = line.split(' ').nth(1)?.to_owned();
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    let mut post = Post { path, headers, body: Vec::new() };
    let length: usize = post.header("content-length").and_then(|length| length.parse().ok())?;
    post.body.resize(length, 0);
    stream.read_exact(&mut post.body).ok()?;
    Some(post)
}
