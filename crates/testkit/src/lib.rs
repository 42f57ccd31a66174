//! The built agent as a child process, and a proxy's side of its socket.
//!
//! Nothing here waits for a time to pass: every wait ends when what it waits for has happened, or fails after [`PATIENCE`].

pub mod module;

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Longer than anything takes that is not broken, on a machine that does other things too.
pub const PATIENCE: Duration = Duration::from_secs(60);

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

/// Waits until `condition` gives something.
#[track_caller]
pub fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = condition() {
            return found;
        }
        assert!(started.elapsed() < PATIENCE, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Ends what runs beside a check, also when the check fails.
pub struct Stop<'a>(pub &'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// What a process has written to standard error so far.
#[derive(Clone, Default)]
pub struct Log(Arc<(Mutex<LogState>, Condvar)>);

#[derive(Default)]
struct LogState {
    lines: Vec<String>,
    ended: bool,
}

impl Log {
    fn follow(source: impl Read + Send + 'static) -> Self {
        let log = Self::default();
        let writer = log.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(source).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).into_owned();
                writer.0.0.lock().unwrap().lines.push(line);
                writer.0.1.notify_all();
            }
            writer.0.0.lock().unwrap().ended = true;
            writer.0.1.notify_all();
        });
        log
    }

    /// Every line so far.
    pub fn lines(&self) -> Vec<String> {
        self.0.0.lock().unwrap().lines.clone()
    }

    /// Every line so far that is a JSON object.
    pub fn entries(&self) -> Vec<Value> {
        self.lines().iter().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Waits for a line that `wanted` takes.
    #[track_caller]
    pub fn wait_for_line(&self, what: &str, wanted: impl Fn(&str) -> bool) -> String {
        let deadline = Instant::now() + PATIENCE;
        let mut state = self.0.0.lock().unwrap();
        loop {
            if let Some(line) = state.lines.iter().find(|line| wanted(line)) {
                return line.clone();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero() && !state.ended, "no line that says {what} in:\n{}", state.lines.join("\n"));
            state = self.0.1.wait_timeout(state, left).unwrap().0;
        }
    }

    /// Waits for a JSON entry that `wanted` takes.
    #[track_caller]
    pub fn wait_for_entry(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let line = self.wait_for_line(what, |line| serde_json::from_str(line).is_ok_and(|entry| wanted(&entry)));
        serde_json::from_str(&line).unwrap()
    }

    /// Waits until the process has closed standard error, and gives all that it wrote there.
    #[track_caller]
    pub fn whole(&self) -> String {
        let deadline = Instant::now() + PATIENCE;
        let mut state = self.0.0.lock().unwrap();
        while !state.ended {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "the log does not end");
            state = self.0.1.wait_timeout(state, left).unwrap().0;
        }
        state.lines.join("\n")
    }
}

/// The agent's binary. Only integration tests of its package know where Cargo has put it.
#[derive(Clone, Copy)]
pub struct Program<P = &'static str>(pub P);

impl<P: AsRef<OsStr>> Program<P> {
    /// The program with a clean environment, whose home is `home`.
    pub fn command(&self, home: &Path) -> Command {
        let mut command = Command::new(&self.0);
        let kept = ["PATH", "LLVM_PROFILE_FILE"].map(|name| (name, std::env::var_os(name)));
        command.env_clear().env("HOME", home).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        for (name, value) in kept {
            if let Some(value) = value {
                command.env(name, value);
            }
        }
        command
    }

    /// Starts the agent with a module and further options, and waits until it serves.
    #[track_caller]
    pub fn start(&self, module: &Path, options: &[&str]) -> Agent {
        self.start_with(module, |command| {
            command.args(options);
        })
    }

    /// The same, with whatever `prepare` does to the command.
    #[track_caller]
    pub fn start_with(&self, module: &Path, prepare: impl FnOnce(&mut Command)) -> Agent {
        let agent = self.launch(module, prepare);
        agent.log.wait_for_line("that it serves", |line| line.contains("serving the socket"));
        agent
    }

    /// The same without waiting.
    pub fn launch(&self, module: &Path, prepare: impl FnOnce(&mut Command)) -> Agent {
        self.launch_in(tempfile::tempdir().unwrap(), "wasm.sock", module, prepare)
    }

    /// The same in a home that is there already; `socket` may be absolute.
    pub fn launch_in(&self, home: TempDir, socket: impl AsRef<Path>, module: &Path, prepare: impl FnOnce(&mut Command)) -> Agent {
        let socket = home.path().join(socket);
        let mut command = self.command(home.path());
        command.arg("--socket").arg(&socket).arg("--module").arg(module);
        prepare(&mut command);
        let mut child = command.spawn().unwrap();
        let log = Log::follow(child.stderr.take().unwrap());
        Agent { home, socket, log, child }
    }
}

/// A running agent. Dropping it kills it.
pub struct Agent {
    /// Its home, in which its socket lies too.
    pub home: TempDir,
    pub socket: PathBuf,
    pub log: Log,
    child: Child,
}

impl Agent {
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub fn signal(&self, signal: Signal) {
        rustix::process::kill_process(self.pid(), signal).unwrap();
    }

    /// Waits until it has ended.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        wait_for("the agent to end", || self.child.try_wait().unwrap())
    }

    /// Ends it in order and checks that it says so.
    #[track_caller]
    pub fn end(mut self) {
        self.signal(Signal::TERM);
        assert_eq!(self.wait().code(), Some(0), "{}", self.log.whole());
    }

    /// The same for an agent that was treated badly: nothing in it has panicked.
    #[track_caller]
    pub fn end_unharmed(self) {
        let log = self.log.clone();
        self.end();
        let log = log.whole();
        assert!(!log.contains("panicked"), "{log}");
    }

    /// Memory that it has in use, in bytes.
    pub fn resident(&self) -> u64 {
        let statm = std::fs::read_to_string(format!("/proc/{}/statm", self.pid().as_raw_nonzero())).unwrap();
        statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
    }

    /// The most memory that it ever had in use, in bytes.
    pub fn peak(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid().as_raw_nonzero())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    }

    #[track_caller]
    pub fn connect(&self) -> Connection {
        Connection::open(&self.socket)
    }

    /// Where `--admin-address 127.0.0.1:0` has ended up.
    #[track_caller]
    pub fn admin(&self) -> Admin {
        let line = self.log.wait_for_line("where the admin address is", |line| line.contains("serving /metrics"));
        let (_, rest) = line.split_once("http://").unwrap();
        let address: String = rest.chars().take_while(|c| c.is_ascii_digit() || ".:".contains(*c)).collect();
        Admin(address.parse().unwrap())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The agent's HTTP address.
#[derive(Clone, Copy)]
pub struct Admin(pub SocketAddr);

impl Admin {
    /// Status and body.
    #[track_caller]
    pub fn get(self, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(self.0).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n").unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).unwrap();
        let (head, body) = response.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, body.to_owned())
    }

    /// The value of one series, such as `wasm_agent_errors_total{kind="trap"}`.
    #[track_caller]
    pub fn metric(self, series: &str) -> f64 {
        let (status, text) = self.get("/metrics");
        assert_eq!(status, 200);
        let value = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        value.map_or(0.0, |value| value.parse().unwrap())
    }

    /// Waits until a series has the value.
    #[track_caller]
    pub fn wait_for_metric(self, series: &str, wanted: f64) {
        wait_for(&format!("{series} to be {wanted}"), || (self.metric(series) == wanted).then_some(()));
    }
}

/// One connection of a proxy.
pub struct Connection {
    stream: UnixStream,
    /// The agent's side of the handshake.
    pub handshake: Value,
    /// Reports that came while something else was awaited.
    reports: VecDeque<(u8, Value)>,
}

impl Connection {
    /// Connects and shakes hands as today's proxy does.
    #[track_caller]
    pub fn open(socket: &Path) -> Self {
        Self::open_as(socket, "0.6.54")
    }

    /// The same as a proxy of another version.
    #[track_caller]
    pub fn open_as(socket: &Path, proxy_version: &str) -> Self {
        let mut connection = Self::open_silent(socket);
        connection.send(
            kind::HANDSHAKE_REQUEST,
            &json!({"supported_versions": [2], "proxy_id": "test", "proxy_version": proxy_version, "config": null}),
        );
        let (got, handshake) = connection.receive().expect("the agent shakes hands");
        assert_eq!(got, kind::HANDSHAKE_RESPONSE);
        connection.handshake = handshake;
        connection
    }

    /// Connects and says nothing.
    #[track_caller]
    pub fn open_silent(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Self { stream, handshake: Value::Null, reports: VecDeque::new() }
    }

    /// A second handle of the same connection, for a thread that only writes.
    pub fn writer(&self) -> UnixStream {
        self.stream.try_clone().unwrap()
    }

    #[track_caller]
    pub fn send(&mut self, kind: u8, payload: &Value) {
        self.send_raw(&frame(kind, &serde_json::to_vec(payload).unwrap()));
    }

    #[track_caller]
    pub fn send_raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// The next frame, or None when the agent has closed the connection.
    #[track_caller]
    pub fn receive(&mut self) -> Option<(u8, Value)> {
        let (kind, payload) = self.receive_raw()?;
        let payload = if payload.is_empty() { Value::Null } else { serde_json::from_slice(&payload).unwrap() };
        Some((kind, payload))
    }

    /// The next frame with its bytes.
    #[track_caller]
    pub fn receive_raw(&mut self) -> Option<(u8, Vec<u8>)> {
        let mut length = [0; 4];
        match self.stream.read_exact(&mut length) {
            Ok(()) => {}
            Err(error) if matches!(error.kind(), std::io::ErrorKind::UnexpectedEof | std::io::ErrorKind::ConnectionReset) => return None,
            Err(error) => panic!("the agent says nothing: {error}"),
        }
        let mut frame = vec![0; u32::from_be_bytes(length) as usize];
        self.stream.read_exact(&mut frame).unwrap();
        let payload = frame.split_off(1);
        Some((frame[0], payload))
    }

    /// The next answer; reports that come before it are kept.
    #[track_caller]
    pub fn answer(&mut self) -> Value {
        self.answer_or_end().expect("the agent answers before it closes the connection")
    }

    /// The next answer, or None when the agent has closed the connection.
    #[track_caller]
    pub fn answer_or_end(&mut self) -> Option<Value> {
        // Reports come all the time.
        let deadline = Instant::now() + PATIENCE;
        loop {
            assert!(Instant::now() < deadline, "there is neither an answer nor an end");
            let (kind, payload) = self.receive()?;
            if kind == kind::AGENT_RESPONSE {
                return Some(payload);
            }
            self.reports.push_back((kind, payload));
        }
    }

    /// The next report of one type.
    #[track_caller]
    pub fn report(&mut self, wanted: u8) -> Value {
        if let Some(at) = self.reports.iter().position(|(kind, _)| *kind == wanted) {
            return self.reports.remove(at).unwrap().1;
        }
        loop {
            let (kind, payload) = self.receive().expect("the agent reports before it closes the connection");
            if kind == wanted {
                return payload;
            }
            self.reports.push_back((kind, payload));
        }
    }

    /// Sends an event and waits for the next answer.
    #[track_caller]
    pub fn ask(&mut self, kind: u8, event: &Value) -> Value {
        self.send(kind, event);
        self.answer()
    }

    /// Asks about a GET of `uri`.
    #[track_caller]
    pub fn get(&mut self, id: &str, uri: &str) -> Value {
        self.ask(kind::REQUEST_HEADERS, &request(id, uri))
    }

    /// Hands a configuration over. The error is the reason for which it is rejected.
    #[track_caller]
    pub fn configure(&mut self, config: &Value) -> Result<(), String> {
        let event = json!({"correlation_id": "configure", "config": config, "config_version": "1"});
        let answer = self.ask(kind::CONFIGURE, &event);
        assert_eq!(answer["audit"]["custom"]["correlation_id"], "configure");
        match &answer["decision"] {
            Value::String(decision) if decision == "allow" => Ok(()),
            decision => Err(decision["block"]["body"].as_str().unwrap_or_else(|| panic!("no reason in {answer}")).to_owned()),
        }
    }
}

/// A frame as it goes over the socket.
pub fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = (payload.len() as u32 + 1).to_be_bytes().to_vec();
    frame.push(kind);
    frame.extend_from_slice(payload);
    frame
}

/// The event of a GET, as today's proxy sends it.
pub fn request(id: &str, uri: &str) -> Value {
    json!({
        "metadata": {
            "correlation_id": id, "request_id": format!("r-{id}"), "client_ip": "192.0.2.7:50123", "client_port": 0, "server_name": "example.org",
            "protocol": "HTTP/1.1", "tls_version": null, "tls_cipher": null, "route_id": "all", "upstream_id": "backend",
            "timestamp": "2026-01-02T03:04:05Z", "traceparent": null,
        },
        "method": "GET",
        "uri": uri,
        "headers": {"host": ["example.org"], "user-agent": ["curl/8.0"]},
    })
}

/// The event of a request body that is one chunk.
pub fn request_body(id: &str, body: &str) -> Value {
    json!({
        "correlation_id": id, "data": base64(body.as_bytes()), "is_last": true, "total_size": body.len(), "chunk_index": 0,
        "bytes_received": body.len(),
    })
}

/// The event of a response's headers.
pub fn response(id: &str, status: u16) -> Value {
    json!({"correlation_id": id, "status": status, "headers": {"content-type": ["text/plain"], "set-cookie": ["a=1", "b=2"]}})
}

/// The event of a response body that is one chunk.
pub fn response_body(id: &str, body: &str) -> Value {
    json!({
        "correlation_id": id, "data": base64(body.as_bytes()), "is_last": true, "total_size": body.len(), "chunk_index": 0,
        "bytes_sent": body.len(),
    })
}

/// The id of the event that is answered.
#[track_caller]
pub fn id_of(answer: &Value) -> &str {
    answer["audit"]["custom"]["correlation_id"].as_str().unwrap_or_else(|| panic!("no id in {answer}"))
}

/// The name of the decision: `allow`, `block`, `redirect` or `challenge`.
#[track_caller]
pub fn decision(answer: &Value) -> &str {
    match &answer["decision"] {
        Value::String(name) => name,
        Value::Object(object) => object.keys().next().unwrap(),
        _ => panic!("no decision in {answer}"),
    }
}

/// The stable code of a module error, if the answer is one.
pub fn module_error(answer: &Value) -> Option<&str> {
    let tags = answer["audit"]["tags"].as_array()?;
    tags.contains(&json!("wasm-error")).then(|| answer["audit"]["reason_codes"][0].as_str().unwrap())
}

pub fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for chunk in bytes.chunks(3) {
        let group = chunk.iter().fold(0_u32, |group, byte| group << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for at in 0..4 {
            let digit = ALPHABET[(group >> (18 - 6 * at)) as usize & 63];
            out.push(if at <= chunk.len() { char::from(digit) } else { '=' });
        }
    }
    out
}

/// JSON that is no deeper than any reader takes, but holds a key that serde_json may take for more JSON in the text behind it, and so on: deeper than a
/// stack has room for, where that is followed.
pub fn nested_texts() -> String {
    let mut text = String::from("1");
    for _ in 0..60 {
        let quoted = text.replace('\\', "\\u005c").replace('"', "\\u0022");
        text = format!("{}{{\"$serde_json::private::RawValue\":\"{quoted}\"}}{}", "[".repeat(110), "]".repeat(110));
    }
    text
}
