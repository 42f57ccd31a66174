//! Load over the Unix socket: one thread with one epoll set. It reads everything available in one
//! call and, by default, writes everything due in one call.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use crate::load::{DRAIN, Plan, Requests, Writes};
use crate::wire::{PREFIX, Wire, socket_frame};

const HANDSHAKE_REQUEST: u8 = 0x01;
const HANDSHAKE_RESPONSE: u8 = 0x02;
/// After this long without a handshake response, the agent counts as unreachable.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
const READ_BYTES: usize = 256 * 1024;
const TIMER: u64 = u64::MAX;

/// Connects and performs the handshake; fails if the agent does not accept the encoding.
pub(crate) fn connect(path: &Path, wire: Wire) -> Result<UnixStream, String> {
    let name = match wire {
        Wire::Msgpack => "msgpack",
        _ => "json",
    };
    let shake_hands = || -> io::Result<(UnixStream, Vec<u8>)> {
        let mut stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(HANDSHAKE_TIMEOUT))?;
        let request = format!(
            r#"{{"supported_versions":[2],"proxy_id":"loadgen","proxy_version":"0.6.54","config":null,"supported_encodings":["{name}"]}}"#
        );
        stream.write_all(&socket_frame(HANDSHAKE_REQUEST, request.as_bytes()))?;
        let mut prefix = [0; PREFIX];
        stream.read_exact(&mut prefix)?;
        let length = u32::from_be_bytes([prefix[0], prefix[1], prefix[2], prefix[3]]) as usize;
        if prefix[4] != HANDSHAKE_RESPONSE || !(1..READ_BYTES).contains(&length) {
            return Err(io::Error::other("invalid handshake response"));
        }
        let mut response = vec![0; length - 1];
        stream.read_exact(&mut response)?;
        Ok((stream, response))
    };
    let (stream, response) = shake_hands().map_err(|error| format!("cannot reach an agent at `{}`: {error}", path.display()))?;
    let response: serde_json::Value =
        serde_json::from_slice(&response).map_err(|error| format!("the handshake response is not JSON: {error}"))?;
    if response["success"] != true || response["encoding"].as_str().unwrap_or("json") != name {
        return Err(format!("the agent does not accept the encoding {name}: {response}"));
    }
    Ok(stream)
}

struct Connection {
    stream: UnixStream,
    requests: Requests,
    input: Vec<u8>,
    filled: usize,
    output: Vec<u8>,
    written: usize,
    waits_to_write: bool,
}

impl Connection {
    /// Reads once: level-triggered epoll reports the connection again if there is more.
    fn read(&mut self, now: Instant) -> Result<(), String> {
        if self.filled == self.input.len() {
            self.input.resize(2 * self.input.len(), 0);
        }
        match self.stream.read(&mut self.input[self.filled..]) {
            Ok(0) => Err("the agent closed a connection".to_owned()),
            Ok(read) => {
                self.filled += read;
                let taken = self.requests.take_answers(&self.input[..self.filled], now, &mut self.output)?;
                self.input.copy_within(taken..self.filled, 0);
                self.filled -= taken;
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(format!("cannot read from the agent: {error}")),
        }
    }

    /// Writes as much as possible; returns whether nothing is left.
    fn write(&mut self, writes: Writes) -> Result<bool, String> {
        while self.written < self.output.len() {
            let rest = &self.output[self.written..];
            let end = match writes {
                Writes::Together => rest.len(),
                Writes::Each => frame_end(rest),
            };
            match self.stream.write(&rest[..end]) {
                Ok(written) => self.written += written,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(format!("cannot write to the agent: {error}")),
            }
        }
        self.output.clear();
        self.written = 0;
        Ok(true)
    }
}

/// The end of the first frame, or the end of `bytes` if they begin inside a frame. That happens
/// because a large frame fills the socket's buffer and is written in pieces in either mode.
fn frame_end(bytes: &[u8]) -> usize {
    bytes.first_chunk::<4>().map(|length| 4 + u32::from_be_bytes(*length) as usize).filter(|&end| end <= bytes.len()).unwrap_or(bytes.len())
}

/// Runs the connections until the end of the plan.
pub(crate) fn run(path: &Path, wire: Wire, requests: Vec<Requests>, plan: &Plan, writes: Writes) -> Result<Vec<Requests>, String> {
    let system = |error: nix::Error| format!("cannot wait for sockets: {error}");
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(system)?;
    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK).map_err(system)?;
    epoll.add(&timer, EpollEvent::new(EpollFlags::EPOLLIN, TIMER)).map_err(system)?;
    let mut connections = Vec::with_capacity(requests.len());
    for (index, requests) in requests.into_iter().enumerate() {
        let stream = connect(path, wire)?;
        stream.set_nonblocking(true).map_err(|error| format!("cannot set up a socket: {error}"))?;
        epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, index as u64)).map_err(system)?;
        connections.push(Connection {
            stream,
            requests,
            input: vec![0; READ_BYTES],
            filled: 0,
            output: Vec::with_capacity(READ_BYTES),
            written: 0,
            waits_to_write: false,
        });
    }

    let mut events = vec![EpollEvent::empty(); connections.len() + 1];
    let mut first_round = true;
    loop {
        let ready = if first_round {
            0
        } else {
            match epoll.wait(&mut events, EpollTimeout::from(100_u8)) {
                Ok(ready) => ready,
                Err(nix::Error::EINTR) => 0,
                Err(error) => return Err(system(error)),
            }
        };
        let now = Instant::now();
        let mut due = first_round;
        first_round = false;
        for event in &events[..ready] {
            if event.data() == TIMER {
                due = true;
                continue;
            }
            let connection = &mut connections[event.data() as usize];
            if event.events().intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLHUP) {
                connection.read(now)?;
            }
            flush(&epoll, connection, event.data(), writes).map_err(|error| error.to_string())?;
        }
        if due {
            let mut next: Option<Instant> = None;
            for (index, connection) in connections.iter_mut().enumerate() {
                let own = connection.requests.start_due(now, &mut connection.output);
                next = match (next, own) {
                    (Some(a), Some(b)) => Some(a.min(b)),
                    (a, b) => a.or(b),
                };
                flush(&epoll, connection, index as u64, writes)?;
            }
            if let Some(next) = next {
                // A timer of zero would be disarmed.
                let wait = next.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
                timer.set(Expiration::OneShot(TimeSpec::from_duration(wait)), TimerSetTimeFlags::empty()).map_err(system)?;
            } else {
                timer.unset().map_err(system)?;
            }
        }
        if now >= plan.measure_until {
            let done = connections.iter().all(|one| one.requests.idle());
            if done || now >= plan.measure_until + DRAIN {
                break;
            }
        }
    }
    Ok(connections
        .into_iter()
        .map(|mut connection| {
            connection.requests.give_up();
            connection.requests
        })
        .collect())
}

fn flush(epoll: &Epoll, connection: &mut Connection, index: u64, writes: Writes) -> Result<(), String> {
    let waits = !connection.write(writes)?;
    if waits != connection.waits_to_write {
        connection.waits_to_write = waits;
        let mut flags = EpollFlags::EPOLLIN;
        flags.set(EpollFlags::EPOLLOUT, waits);
        epoll
            .modify(&connection.stream, &mut EpollEvent::new(flags, index))
            .map_err(|error| format!("cannot wait for sockets: {error}"))?;
    }
    Ok(())
}
