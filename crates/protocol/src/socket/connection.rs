//! One connection on the Unix socket.
//!
//! A round reads what has arrived, decodes all of it, writes the answers of the round before, and runs the new events. Answers are written *after*
//! the next reading, so that every event that has arrived is known when it is decided whether an older one of its id may still be answered; and
//! many answers go out in one write. An event whose call does not end in its first slice is kept aside, and the round goes on.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, IoSlice};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::task::Poll;
use std::time::Duration;

use rustix::buffer::spare_capacity;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::debug;
use zentinel_wasm_bounds::{LARGE, log_limited, run_blocking_if_large};
use zentinel_wasm_contract::report::Reports;
use zentinel_wasm_contract::{Answer, Decision, Encode, Failure, FailureKind, Handler, Hook, Text};

use crate::session::{Call, Session, Ticket};
use crate::socket::decode;
use crate::socket::encode::{Encoding, Phase, Proxy, Wire};
use crate::socket::frame::{self, Frame, FrameError, MAX_FRAME, kind};
use crate::socket::handshake::{self, MAX_IN_FLIGHT};
use crate::socket::report::{health_json, metrics_json};

/// Time that a client has to send its handshake, and then to take the answer to it. The proxy does both at once. What the agent does in between
/// has limits of its own.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Time from a frame's first byte to its last, and time that a client may take no answer while one is waiting for it. An idle connection is never
/// closed.
pub const STALL_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a connection of a draining agent must be quiet before it is closed: events that were on their way have arrived then.
pub(crate) const QUIET: Duration = Duration::from_millis(100);

/// Room that is made in the buffer before a read, in bytes. A busy connection's events are read by the dozen.
const READ_ROOM: usize = 64 << 10;

/// What a connection keeps of its buffer between frames, in bytes: bodies that come in pieces of usual sizes need no new memory for each.
const MAX_KEPT: usize = 256 << 10;

/// Events that are run before their answers are written. More save system calls, fewer let the first answers out sooner.
pub(crate) const BATCH: usize = 32;

/// Rounds in a row after which others on this thread get their turn: a client that never pauses would keep the thread for itself.
const MAX_BUSY_ROUNDS: u32 = 8;

/// Longest correlation id that is answered, in bytes. A proxy takes it from a header, and those are shorter; an answer with a longer one may not fit
/// into a frame.
pub(crate) const MAX_ID: usize = 64 << 10;

/// Why an event with a longer one is not answered.
pub(crate) const TOO_LONG_ID: &str = "its correlation id has more than 64 KiB";

/// Largest configuration event, in bytes: what a module's configuration may have, as text within JSON, and room for the rest.
pub(crate) const MAX_CONFIGURE: usize = 4 << 20;

/// Why a larger one is not read.
const TOO_LARGE: &str = "it has more than 4 MiB";

/// Configurations of one connection that may be under way. A proxy sends one and waits.
const MAX_CONFIGURING: usize = 4;

/// Work after which others on this thread get their turn, in bytes of frames: they are read within a few milliseconds, whatever they are.
pub(crate) const MAX_WORK: usize = LARGE;

/// What a frame adds to the work besides its bytes. A thousand short ones take about as long.
pub(crate) const FRAME_WORK: usize = 256;

/// What a frame that waits takes besides its bytes, roughly: short ones must not be many for nothing.
const FRAME_OVERHEAD: usize = 64;

/// After this long the rest of a batch waits until the others on this thread had their turn.
pub(crate) const SLOW_BATCH: Duration = Duration::from_millis(1);

/// Frames that one system call writes at most.
const WRITE_SLICES: usize = 64;

/// Time of a batch after which the socket is looked at again before its answers go out. Events that have superseded them are likely then, and the
/// system call costs little beside it.
const LONG_BATCH: Duration = Duration::from_micros(50);

/// Answers that wait for a client to read before no more events are read from it or run, in bytes.
pub(crate) const MAX_UNSENT: usize = 1 << 20;

/// Why a connection has ended before the client closed it.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The socket failed.
    #[error("the socket failed: {0}")]
    Io(#[from] io::Error),
    /// The client sent what are no frames.
    #[error("the client sent {0}")]
    Frame(#[from] FrameError),
    /// The first frame was not a handshake, or not one that can be agreed to.
    #[error("the handshake failed: {0}")]
    Handshake(String),
    /// The client was too slow.
    #[error("the client {0} for {1:?}")]
    Stalled(&'static str, Duration),
    /// A part of an answer was out when a newer event of the same id arrived.
    #[error("an answer was superseded while it was being sent")]
    Superseded,
}

/// How far the agent has come with ending.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// It serves.
    #[default]
    Serving,
    /// Connections end as soon as they are quiet.
    Draining,
    /// Connections take no more events and end when those under way are answered.
    Closing,
}

/// Serves one connection until its client closes it, or the agent has come to its end.
///
/// # Errors
///
/// The client breaks the protocol or stalls, or the socket fails.
pub async fn serve<H: Handler>(stream: UnixStream, handler: Arc<H>, stage: watch::Receiver<Stage>) -> Result<(), ConnectionError> {
    let mut input = Input::default();
    let Some((encoding, proxy)) = shake_hands(&stream, &mut input, &handler, HANDSHAKE_TIMEOUT).await? else { return Ok(()) };
    let reports = handler.reports();
    let number = CONNECTIONS.fetch_add(1, Relaxed);
    let _ended = Ended { handler: Arc::clone(&handler), number };
    let mut connection = Connection::new(stream, handler, number, encoding, proxy, input);
    connection.report(&reports);
    connection.run(stage, reports).await
}

/// Reads the handshake and answers it, with `limit` for each of the client's two parts. None when the client has closed the connection without
/// a word.
async fn shake_hands<H: Handler>(
    stream: &UnixStream,
    input: &mut Input,
    handler: &Arc<H>,
    limit: Duration,
) -> Result<Option<(Encoding, Proxy)>, ConnectionError> {
    let stalled = |what| move |_| ConnectionError::Stalled(what, limit);
    let request = tokio::time::timeout(limit, read_handshake(stream, input)).await.map_err(stalled("said no handshake"))??;
    let Some(request) = request else { return Ok(None) };
    let (response, agreed) = answer_handshake(&request, handler).await;
    drop(request);
    tokio::time::timeout(limit, write_handshake(stream, &response)).await.map_err(stalled("took no answer to its handshake"))??;
    agreed.map(Some).map_err(ConnectionError::Handshake)
}

/// Reads the handshake. None when the client has closed the connection without a word.
async fn read_handshake(stream: &UnixStream, input: &mut Input) -> Result<Option<Vec<u8>>, ConnectionError> {
    loop {
        if let Some((frame, len)) = frame::next(input.bytes())? {
            if frame.kind != kind::HANDSHAKE_REQUEST {
                return Err(ConnectionError::Handshake(format!("the first frame has type {:#04x}", frame.kind)));
            }
            let payload = frame.payload.to_vec();
            input.consume(len);
            return Ok(Some(payload));
        }
        stream.readable().await?;
        match input.read(stream)? {
            Read::Some => {}
            Read::Nothing => {}
            Read::End if input.bytes().is_empty() => return Ok(None),
            Read::End => return Err(ConnectionError::Handshake("the connection ended within it".into())),
        }
    }
}

/// The answer to a handshake, as a frame, and what is agreed on. Includes applying the configuration that came with it.
async fn answer_handshake<H: Handler>(payload: &[u8], handler: &Arc<H>) -> (Vec<u8>, Result<(Encoding, Proxy), String>) {
    let request = if payload.len() > MAX_CONFIGURE {
        Err(TOO_LARGE.to_owned())
    } else {
        run_blocking_if_large(payload.len(), || {
            serde_json::from_slice::<handshake::Request<'_>>(payload).map_err(|error| error.to_string())
        })
    };
    let agreed = match request {
        Ok(request) => agree(&request, handler).await.map(|()| (request.encoding(), Proxy::greet(&request.proxy_version))),
        Err(error) => Err(format!("the request cannot be read: {error}")),
    };
    let encoding = agreed.as_ref().map_or(Encoding::Json, |(encoding, _)| *encoding);
    let response = handshake::Response::new(handler.capabilities(), encoding, agreed.as_ref().err().cloned());
    let mut out = Vec::new();
    frame::append(&mut out, kind::HANDSHAKE_RESPONSE, |out| {
        // Writing to a vector does not fail.
        let _ = serde_json::to_writer(out, &response);
    });
    (out, agreed)
}

async fn write_handshake(stream: &UnixStream, mut rest: &[u8]) -> io::Result<()> {
    while !rest.is_empty() {
        stream.writable().await?;
        match stream.try_write(rest) {
            Ok(written) => rest = &rest[written..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Whether the agent can work with this proxy, and under the configuration that it brings.
async fn agree<H: Handler>(request: &handshake::Request<'_>, handler: &Arc<H>) -> Result<(), String> {
    request.check()?;
    if request.config.0.is_null() { Ok(()) } else { handler.configure(request.config.0.clone()).await }
}

/// How many connections there have been.
static CONNECTIONS: AtomicU64 = AtomicU64::new(0);

/// Tells the handler that a connection has ended, in whichever way.
struct Ended<H: Handler> {
    handler: Arc<H>,
    number: u64,
}

impl<H: Handler> Drop for Ended<H> {
    fn drop(&mut self) {
        self.handler.disconnected(self.number);
    }
}

struct Connection<H> {
    stream: UnixStream,
    handler: Arc<H>,
    /// Tells it from all others.
    number: u64,
    encoding: Encoding,
    proxy: Proxy,
    input: Input,
    session: Session<Vec<u8>>,
    /// Events that have arrived and were not run yet.
    batch: VecDeque<(Ticket, Call<Vec<u8>>)>,
    output: Output,
    /// Held by each configuration that is under way.
    configuring: Arc<()>,
    /// Work since others on this thread had their turn: see [`MAX_WORK`].
    work: usize,
    /// The client will send no more.
    ended: bool,
    warned: Warned,
}

/// What was logged already: a client must not fill the log.
#[derive(Default)]
struct Warned {
    of_type: bool,
    of_event: bool,
    of_configuration: bool,
}

impl<H: Handler> Connection<H> {
    fn new(stream: UnixStream, handler: Arc<H>, number: u64, encoding: Encoding, proxy: Proxy, input: Input) -> Self {
        Self {
            stream,
            handler,
            number,
            encoding,
            proxy,
            input,
            session: Session::new(),
            batch: VecDeque::new(),
            output: Output::default(),
            configuring: Arc::default(),
            work: 0,
            ended: false,
            warned: Warned::default(),
        }
    }

    async fn run(&mut self, mut stage: watch::Receiver<Stage>, mut reports: watch::Receiver<Arc<Reports>>) -> Result<(), ConnectionError> {
        let timer = tokio::time::sleep(Duration::ZERO);
        tokio::pin!(timer);
        let mut quiet_since = Instant::now();
        let mut stage_known = true;
        let mut busy_rounds = 0;
        loop {
            let now_stage = *stage.borrow();
            if now_stage < Stage::Closing {
                self.read()?;
                self.decode()?;
            }
            let was_full = self.output.is_full();
            self.output.write(&self.stream, &mut self.session)?;
            let has_worked = self.work >= MAX_WORK;
            if has_worked {
                self.work = 0;
                tokio::task::yield_now().await;
            }
            let has_room = !self.output.is_full();
            if self.batch.is_empty() && (has_worked || was_full && has_room) {
                // There may be more of what has arrived already.
                continue;
            }
            if !self.batch.is_empty() && has_room {
                let began = Instant::now();
                self.run_batch(began).await;
                quiet_since = Instant::now();
                let took = quiet_since - began;
                if took > LONG_BATCH && self.takes_events() {
                    self.input.look_again(&self.stream);
                }
                busy_rounds += 1;
                if busy_rounds == MAX_BUSY_ROUNDS || took > SLOW_BATCH {
                    busy_rounds = 0;
                    self.work = 0;
                    tokio::task::yield_now().await;
                }
                continue;
            }
            busy_rounds = 0;
            let idle = self.session.pending() == 0 && self.output.is_empty();
            if idle && (self.ended || now_stage == Stage::Closing) {
                return Ok(());
            }
            let drains = idle && now_stage == Stage::Draining && !self.handler.awaits_more(self.number);
            if drains && quiet_since.elapsed() >= QUIET {
                return Ok(());
            }

            let wants_read = now_stage < Stage::Closing && self.takes_events();
            let wants_write = !self.output.is_empty();
            let quiet_end = drains.then(|| quiet_since + QUIET);
            let deadline = [self.input.stalled_at(wants_read), self.output.stalled_at(), quiet_end].into_iter().flatten().min();
            if let Some(deadline) = deadline
                && timer.deadline() != deadline
            {
                timer.as_mut().reset(deadline);
            }
            tokio::select! {
                biased;
                ended = self.next(wants_read, wants_write) => {
                    if let Some((ticket, answer)) = ended? {
                        self.output.answer(ticket, answer);
                    }
                }
                changed = stage.changed(), if stage_known => stage_known = changed.is_ok(),
                changed = reports.changed() => {
                    if changed.is_err() {
                        // Nobody reports any more: the agent is at its end, and its stage will tell.
                        std::future::pending::<()>().await;
                    }
                    self.report(&reports);
                }
                () = &mut timer, if deadline.is_some() => {
                    let now = Instant::now();
                    if self.input.stalled_at(wants_read).is_some_and(|at| at <= now) {
                        return Err(ConnectionError::Stalled("did not finish a frame", STALL_TIMEOUT));
                    }
                    if self.output.stalled_at().is_some_and(|at| at <= now) {
                        return Err(ConnectionError::Stalled("took no answer", STALL_TIMEOUT));
                    }
                }
            }
        }
    }

    fn takes_events(&self) -> bool {
        !self.ended && self.session.pending() + self.batch.len() < MAX_IN_FLIGHT && !self.output.is_full()
    }

    /// Waits until a call has ended or the socket can go on.
    async fn next(&mut self, wants_read: bool, wants_write: bool) -> io::Result<Option<(Ticket, Vec<u8>)>> {
        std::future::poll_fn(|context| {
            if let Poll::Ready(ended) = self.session.poll_ended(context) {
                return Poll::Ready(Ok(ended));
            }
            if wants_read && let Poll::Ready(ready) = self.stream.poll_read_ready(context) {
                return Poll::Ready(ready.map(|()| None));
            }
            if wants_write && let Poll::Ready(ready) = self.stream.poll_write_ready(context) {
                return Poll::Ready(ready.map(|()| None));
            }
            Poll::Pending
        })
        .await
    }

    fn read(&mut self) -> Result<(), ConnectionError> {
        while self.takes_events() && self.input.len() < READ_ROOM {
            match self.input.read(&self.stream)? {
                Read::Some => {}
                Read::Nothing => return Ok(()),
                Read::End => self.ended = true,
            }
        }
        // A frame that is larger than the room is read on as long as there is no whole one.
        while self.takes_events() && frame::next(self.input.bytes())?.is_none() {
            match self.input.read(&self.stream)? {
                Read::Some => {}
                Read::Nothing => return Ok(()),
                Read::End => self.ended = true,
            }
        }
        Ok(())
    }

    /// Turns the frames that have arrived into calls, without running them.
    fn decode(&mut self) -> Result<(), ConnectionError> {
        let mut input = std::mem::take(&mut self.input);
        let result = self.decode_from(&mut input);
        self.input = input;
        result
    }

    fn decode_from(&mut self, input: &mut Input) -> Result<(), ConnectionError> {
        while self.session.pending() + self.batch.len() < MAX_IN_FLIGHT && self.batch.len() < BATCH && self.work < MAX_WORK {
            let Some((frame, len)) = frame::next(input.bytes())? else { break };
            // While the client reads no answers, nothing more is answered. Events are taken nevertheless and wait to be run, because they
            // may supersede an answer that was not sent yet.
            if self.output.is_full() && !kind::is_event(frame.kind) {
                break;
            }
            self.work += frame.payload.len() + FRAME_WORK;
            self.take(frame)?;
            input.consume(len);
        }
        Ok(())
    }

    fn take(&mut self, frame: Frame<'_>) -> Result<(), ConnectionError> {
        match frame.kind {
            kind::CONFIGURE => run_blocking_if_large(frame.payload.len(), || self.configure(frame.payload)),
            kind if kind::is_event(kind) => run_blocking_if_large(frame.payload.len(), || self.event(kind, frame.payload)),
            kind::CANCEL => {
                let encoding = self.encoding;
                if let Some(id) = run_blocking_if_large(frame.payload.len(), || decode::correlation_id(encoding, frame.kind, frame.payload))
                {
                    self.cancel(&id);
                }
            }
            kind::PING => self.output.control(kind::PONG, frame.payload),
            kind::PONG => {}
            kind::HANDSHAKE_REQUEST => return Err(ConnectionError::Handshake("there was a second one".into())),
            kind => {
                if !std::mem::replace(&mut self.warned.of_type, true) {
                    log_limited!(warn, "frames of type {kind:#04x} are not known and passed over");
                }
            }
        }
        Ok(())
    }

    fn event(&mut self, kind: u8, payload: &[u8]) {
        let (ticket, call) = match decode::event(self.encoding, kind, payload) {
            Ok(event) if event.correlation_id().len() > MAX_ID => {
                self.unanswerable(kind, format_args!("{TOO_LONG_ID}"));
                return;
            }
            Ok(event) => {
                let id = event.correlation_id();
                let ticket = self.session.arrived(id);
                let wire = self.wire(Arc::from(id), Phase::of(&event));
                (ticket, Box::pin(self.handler.handle(&event, ticket.arrival, wire)) as Call<_>)
            }
            Err(error) => {
                let Some(id) = decode::correlation_id(self.encoding, kind, payload).filter(|id| id.len() <= MAX_ID) else {
                    self.unanswerable(kind, format_args!("it has no usable correlation id: {error}"));
                    return;
                };
                let failure = Failure::new(FailureKind::InvalidEvent, format!("the event of type {kind:#04x} cannot be read: {error}"));
                let hook = hook_of(kind);
                let wire = self.wire(Arc::from(&*id), Phase { hook, chunk_index: 0 });
                let answer = self.handler.reject(hook, failure, wire);
                (self.session.arrived(&id), Box::pin(std::future::ready(answer)) as Call<_>)
            }
        };
        self.batch.push_back((ticket, call));
    }

    fn unanswerable(&mut self, kind: u8, why: fmt::Arguments<'_>) {
        if !std::mem::replace(&mut self.warned.of_event, true) {
            log_limited!(
                warn,
                "an event of type {kind:#04x} is not answered, and others like it on this connection are not told of: {why}"
            );
        }
    }

    fn configure(&mut self, payload: &[u8]) {
        let configure = if payload.len() > MAX_CONFIGURE {
            Err(TOO_LARGE.to_owned())
        } else {
            decode::configure(self.encoding, payload).map_err(|error| error.to_string())
        };
        let configure = match configure {
            Ok(configure) if configure.correlation_id.len() <= MAX_ID => Ok(configure),
            Ok(_) => Err(TOO_LONG_ID.into()),
            Err(error) => Err(error),
        };
        let configure = match configure {
            Ok(configure) => configure,
            Err(error) => {
                if !std::mem::replace(&mut self.warned.of_configuration, true) {
                    log_limited!(warn, "a configuration is not answered, and others like it on this connection are not told of: {error}");
                }
                return;
            }
        };
        let ticket = self.session.arrived(&configure.correlation_id);
        let wire = self.wire(Arc::from(&*configure.correlation_id), Phase { hook: Hook::Configure, chunk_index: 0 });
        let too_many = Arc::strong_count(&self.configuring) > MAX_CONFIGURING;
        let under_way = Arc::clone(&self.configuring);
        let applying = self.handler.configure(configure.config.0);
        let call = async move {
            // Counted for as long as it lasts.
            let _under_way = under_way;
            let applied = if too_many { Err("other configurations are still being applied".to_owned()) } else { applying.await };
            let answer = match applied {
                Ok(()) => Answer::default(),
                Err(reason) => Answer {
                    decision: Decision::Block { status: 400, body: Some(Text::from(reason)), headers: Vec::new() },
                    ..Answer::default()
                },
            };
            wire.encode(&answer).unwrap_or_default()
        };
        self.batch.push_back((ticket, Box::pin(call)));
    }

    fn cancel(&mut self, correlation_id: &str) {
        self.session.cancel(correlation_id);
        self.handler.cancelled(self.number, correlation_id);
        let session = &self.session;
        self.batch.retain(|(ticket, _)| session.is_newest(*ticket));
        debug!(correlation_id, "cancelled");
    }

    fn wire(&self, correlation_id: Arc<str>, phase: Phase) -> Wire {
        Wire { encoding: self.encoding, proxy: self.proxy, phase, correlation_id, connection: self.number }
    }

    /// Runs every event of the batch for one slice, or as many as the time is for. Those that end are answered, the others kept going.
    async fn run_batch(&mut self, began: Instant) {
        std::future::poll_fn(|context| {
            while let Some((ticket, mut call)) = self.batch.pop_front() {
                // A newer event of the id came with the same read.
                if !self.session.is_newest(ticket) {
                    continue;
                }
                match call.as_mut().poll(context) {
                    Poll::Ready(answer) => self.output.answer(ticket, answer),
                    Poll::Pending => self.session.keep(ticket, call),
                }
                if began.elapsed() > SLOW_BATCH || self.output.is_full() {
                    break;
                }
            }
            // As long as events keep coming, nobody else looks at the calls that took longer.
            while let Poll::Ready(ended) = self.session.poll_ended(context) {
                if let Some((ticket, answer)) = ended {
                    self.output.answer(ticket, answer);
                }
            }
            Poll::Ready(())
        })
        .await;
    }

    fn report(&mut self, reports: &watch::Receiver<Arc<Reports>>) {
        // A client that reads slowly gets the next one; they must not pile up.
        if self.output.is_full() {
            return;
        }
        let reports = Arc::clone(&reports.borrow());
        for (kind, report) in [(kind::HEALTH_STATUS, health_json(&reports)), (kind::METRICS_REPORT, metrics_json(&reports))] {
            let payload = match self.encoding {
                Encoding::Json => serde_json::to_vec(&report).ok(),
                Encoding::MessagePack => rmp_serde::to_vec_named(&report).ok(),
            };
            if let Some(payload) = payload {
                self.output.control(kind, &payload);
            }
        }
    }
}

/// The hook of an event's type; types that are not known count as the first.
fn hook_of(kind: u8) -> Hook {
    match kind {
        kind::REQUEST_BODY => Hook::RequestBody,
        kind::RESPONSE_HEADERS => Hook::ResponseHeaders,
        kind::RESPONSE_BODY => Hook::ResponseBody,
        kind::REQUEST_COMPLETE => Hook::RequestComplete,
        kind::WEBSOCKET_FRAME => Hook::WebsocketFrame,
        kind::GUARDRAIL_INSPECT => Hook::GuardrailInspect,
        _ => Hook::RequestHeaders,
    }
}

/// Bytes that have arrived and were not taken yet.
#[derive(Default)]
struct Input {
    buffer: Vec<u8>,
    taken: usize,
    /// When the first byte of what is there arrived.
    since: Option<Instant>,
}

enum Read {
    Some,
    Nothing,
    End,
}

impl Input {
    fn bytes(&self) -> &[u8] {
        &self.buffer[self.taken..]
    }

    fn len(&self) -> usize {
        self.buffer.len() - self.taken
    }

    fn consume(&mut self, len: usize) {
        self.taken += len;
        self.since = None;
        if self.taken == self.buffer.len() {
            self.taken = 0;
            if self.buffer.capacity() > MAX_KEPT {
                self.buffer = Vec::new();
            } else {
                self.buffer.clear();
            }
        }
    }

    fn read(&mut self, stream: &UnixStream) -> io::Result<Read> {
        if self.buffer.capacity() - self.buffer.len() < READ_ROOM / 4 {
            self.buffer.drain(..self.taken);
            self.taken = 0;
            // Grown by what has arrived, not by what a frame claims to be.
            let room = self.buffer.len().clamp(READ_ROOM, MAX_FRAME);
            self.buffer.reserve(room);
        }
        let before = self.buffer.len();
        let read = stream.try_io(Interest::READABLE, || {
            let read = rustix::io::retry_on_intr(|| rustix::io::read(stream, spare_capacity(&mut self.buffer)))?;
            // A short read has emptied the socket: saying so spares the call that would only find out.
            if read > 0 && self.buffer.len() < self.buffer.capacity() { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(read) }
        });
        match read {
            Ok(0) => Ok(Read::End),
            Ok(_) => Ok(Read::Some),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && self.buffer.len() > before => Ok(Read::Some),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if self.len() > 0 && self.since.is_none() {
                    self.since = Some(Instant::now());
                }
                Ok(Read::Nothing)
            }
            Err(error) => Err(error),
        }
    }

    /// Takes what has arrived since the last read, whatever the runtime knows of it. An end or a failure it will know soon enough.
    fn look_again(&mut self, stream: &UnixStream) {
        if self.buffer.len() < self.buffer.capacity() {
            let _ = rustix::io::read(stream, spare_capacity(&mut self.buffer));
        }
    }

    /// When an incomplete frame has taken too long, if one is awaited.
    fn stalled_at(&self, reading: bool) -> Option<Instant> {
        self.since.filter(|_| reading && self.len() > 0).map(|since| since + STALL_TIMEOUT)
    }
}

/// Frames that wait to be written.
#[derive(Default)]
struct Output {
    /// Each with its event's ticket, unless it answers none.
    frames: VecDeque<(Option<Ticket>, Vec<u8>)>,
    /// Bytes of the first frame that are out.
    written: usize,
    /// Memory in bytes that they take, roughly.
    unsent: usize,
    blocked_since: Option<Instant>,
}

impl Output {
    fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Whether so much waits that nothing is to be added as long as that can be helped.
    fn is_full(&self) -> bool {
        self.unsent >= MAX_UNSENT
    }

    /// Appends the answer to an event.
    fn answer(&mut self, ticket: Ticket, answer: Vec<u8>) {
        self.push(Some(ticket), answer);
    }

    /// Appends a frame that answers no event.
    fn control(&mut self, kind: u8, payload: &[u8]) {
        let mut out = Vec::new();
        frame::append(&mut out, kind, |out| out.extend_from_slice(payload));
        self.push(None, out);
    }

    fn push(&mut self, ticket: Option<Ticket>, frame: Vec<u8>) {
        self.unsent += frame.len() + FRAME_OVERHEAD;
        self.frames.push_back((ticket, frame));
    }

    /// Leaves out the answers to events that a newer one has superseded, or that were cancelled.
    fn retain_newest(&mut self, session: &Session<Vec<u8>>) -> Result<(), ConnectionError> {
        let stale = |ticket: &Option<Ticket>| ticket.is_some_and(|ticket| !session.is_newest(ticket));
        if self.written > 0 && self.frames.front().is_some_and(|(ticket, _)| stale(ticket)) {
            return Err(ConnectionError::Superseded);
        }
        let unsent = &mut self.unsent;
        self.frames.retain(|(ticket, frame)| {
            let stale = stale(ticket);
            if stale {
                *unsent -= frame.len() + FRAME_OVERHEAD;
            }
            !stale
        });
        Ok(())
    }

    /// Writes as much as the socket takes.
    fn write(&mut self, stream: &UnixStream, session: &mut Session<Vec<u8>>) -> Result<(), ConnectionError> {
        if self.frames.is_empty() {
            return Ok(());
        }
        self.retain_newest(session)?;
        if self.frames.is_empty() {
            self.blocked_since = None;
        }
        while let Some((_, first)) = self.frames.front() {
            let mut slices = [IoSlice::new(&[]); WRITE_SLICES];
            slices[0] = IoSlice::new(&first[self.written..]);
            let count = self.frames.len().min(WRITE_SLICES);
            for (slice, (_, frame)) in slices[1..count].iter_mut().zip(self.frames.iter().skip(1)) {
                *slice = IoSlice::new(frame);
            }
            match stream.try_write_vectored(&slices[..count]) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
                Ok(written) => self.advance(written, session),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.blocked_since.get_or_insert_with(Instant::now);
                    return Ok(());
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn advance(&mut self, written: usize, session: &mut Session<Vec<u8>>) {
        self.blocked_since = None;
        self.unsent -= written;
        self.written += written;
        while let Some((ticket, frame)) = self.frames.front()
            && frame.len() <= self.written
        {
            if let Some(ticket) = ticket {
                session.answered(*ticket);
            }
            self.written -= frame.len();
            self.unsent -= FRAME_OVERHEAD;
            self.frames.pop_front();
        }
    }

    fn stalled_at(&self) -> Option<Instant> {
        self.blocked_since.map(|since| since + STALL_TIMEOUT)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use zentinel_wasm_contract::{Arrival, Capabilities, Event};

    use super::*;

    /// Allows everything, and takes its time with configurations.
    struct Slow {
        configuring: Duration,
        reports: watch::Sender<Arc<Reports>>,
    }

    impl Slow {
        fn new(configuring: Duration) -> Arc<Self> {
            Arc::new(Self { configuring, reports: watch::Sender::new(Arc::default()) })
        }
    }

    impl Handler for Slow {
        fn capabilities(&self) -> Capabilities {
            Capabilities { hooks: std::iter::empty().collect(), max_body: 0 }
        }

        #[expect(clippy::manual_async_fn, reason = "the trait's future is 'static")]
        fn handle<E: Encode>(self: &Arc<Self>, _: &Event<'_>, _: Arrival, encode: E) -> impl Future<Output = E::Encoded> + Send + 'static {
            async move { encode.encode(&Answer::default()).unwrap() }
        }

        fn reject<E: Encode>(self: &Arc<Self>, _: Hook, _: Failure, encode: E) -> E::Encoded {
            encode.encode(&Answer::default()).unwrap()
        }

        fn configure(self: &Arc<Self>, _: serde_json::Value) -> impl Future<Output = Result<(), String>> + Send + 'static {
            let configuring = self.configuring;
            async move {
                tokio::time::sleep(configuring).await;
                Ok(())
            }
        }

        fn reports(&self) -> watch::Receiver<Arc<Reports>> {
            self.reports.subscribe()
        }
    }

    fn framed(kind: u8, payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        frame::append(&mut out, kind, |out| out.extend_from_slice(payload));
        out
    }

    #[tokio::test]
    async fn the_time_for_the_handshake_is_the_client_s_alone() {
        const LIMIT: Duration = Duration::from_secs(1);
        let hello = framed(
            kind::HANDSHAKE_REQUEST,
            br#"{"supported_versions":[2],"proxy_id":"p","proxy_version":"0.6.54","config":{"pool-size":1}}"#,
        );
        let (mut client, server) = UnixStream::pair().unwrap();
        client.write_all(&hello).await.unwrap();
        let agreed = shake_hands(&server, &mut Input::default(), &Slow::new(2 * LIMIT), LIMIT).await;
        assert!(matches!(agreed, Ok(Some((Encoding::Json, _)))), "{agreed:?}");
        let mut head = [0; 5];
        client.read_exact(&mut head).await.unwrap();
        assert_eq!(head[4], kind::HANDSHAKE_RESPONSE);
        // Without a handshake, and with half of one.
        for sent in [0, 10] {
            let (mut client, server) = UnixStream::pair().unwrap();
            client.write_all(&hello[..sent]).await.unwrap();
            let ended = shake_hands(&server, &mut Input::default(), &Slow::new(Duration::ZERO), Duration::from_millis(10)).await;
            assert!(matches!(ended, Err(ConnectionError::Stalled("said no handshake", _))), "{ended:?}");
        }
    }

    /// A connection on which `frames` have arrived.
    fn connection(frames: impl Iterator<Item = Vec<u8>>) -> (Connection<Slow>, UnixStream) {
        let (client, server) = UnixStream::pair().unwrap();
        let input = Input { buffer: frames.flatten().collect(), ..Input::default() };
        (Connection::new(server, Slow::new(Duration::ZERO), 0, Encoding::Json, Proxy::default(), input), client)
    }

    #[tokio::test]
    async fn a_round_takes_frames_by_their_bytes() {
        const FRAMES: usize = 100;
        let padding = "x".repeat(LARGE / 10);
        let body = format!(r#"{{"correlation_id":"a","data":"{}","is_last":true,"chunk_index":0}}"#, "AAAA".repeat(LARGE / 40));
        for (kind, payload) in [
            (kind::CANCEL, format!(r#"{{"correlation_id":"a","x":"{padding}"}}"#)),
            (kind::PONG, padding.clone()),
            (0x70, padding.clone()),
            (kind::PING, padding.clone()),
            (kind::REQUEST_BODY, body),
        ] {
            let (mut connection, _client) = connection((0..FRAMES).map(|_| framed(kind, payload.as_bytes())));
            let before = connection.input.len();
            connection.decode().unwrap();
            let taken = before - connection.input.len();
            assert!((LARGE..2 * LARGE).contains(&taken), "{taken} bytes of {before} for {kind:#04x}");
        }
        // Short ones are work too.
        let (mut connection, _client) = connection((0..2000).map(|_| framed(kind::PONG, b"")));
        let before = connection.input.len();
        connection.decode().unwrap();
        let taken = (before - connection.input.len()) / 5;
        assert_eq!(taken, MAX_WORK / FRAME_WORK);
    }

    #[tokio::test]
    async fn nothing_more_is_answered_while_answers_are_unread_but_events_are_known() {
        let event = |id: &str| format!(r#"{{"correlation_id":"{id}","status":200,"headers":{{}}}}"#).into_bytes();
        let frames = [framed(kind::RESPONSE_HEADERS, &event("a")), framed(kind::PING, b""), framed(kind::RESPONSE_HEADERS, &event("b"))];
        let (mut connection, _client) = connection(frames.into_iter());
        let superseded = connection.session.arrived("a");
        connection.output.answer(superseded, vec![0; MAX_UNSENT]);
        connection.decode().unwrap();
        assert_eq!((connection.batch.len(), connection.output.frames.len()), (1, 1));
        assert!(!connection.session.is_newest(superseded));
        connection.run_batch(Instant::now()).await;
        assert_eq!(connection.output.frames.len(), 1 + 1, "one is run before it is looked whether there is room");
    }
}
