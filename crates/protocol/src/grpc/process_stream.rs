//! `ProcessStream`: the events of a proxy's connection, and `ProcessEvent` for one alone.
//!
//! A stream has two halves on the connection's task. The driver reads what has arrived, runs it, and puts the answers into the [`Exchange`]; the
//! response body takes them out when the client has room for them. A client that takes no answers thereby holds up its own stream and nothing else:
//! calls under way are still polled, and end.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use futures_util::Stream;
use prost::Message as _;
use serde_json::Value;
use tokio::sync::watch;
use tokio::time::Instant;
use tonic::{Code, Status, Streaming};
use tracing::debug;
use zentinel_wasm_bounds::{log_limited, run_blocking_if_large};
use zentinel_wasm_contract::report::Reports;
use zentinel_wasm_contract::{Arrival, Event, Failure, FailureKind, Handler, Hook};

use super::encode::{Peer, Wire};
use super::event::{Unreadable, event, read};
use super::proto::agent_to_proxy::Message as Outgoing;
use super::proto::proxy_to_agent::Message;
use super::server::ConnectionError;
use super::{borrowed, message, proto};
use crate::session::{Call, Session, Ticket};
use crate::socket::connection::{
    BATCH, FRAME_WORK, HANDSHAKE_TIMEOUT, MAX_CONFIGURE, MAX_ID, MAX_UNSENT, MAX_WORK, QUIET, SLOW_BATCH, Stage, TOO_LONG_ID,
};
use crate::socket::decode::Config;
use crate::socket::encode::{Phase, Proxy};
use crate::socket::handshake::{MAX_IN_FLIGHT, check_versions};

/// Longest reason in a status, in bytes: it travels in a header, and clients take few of these.
const MAX_REASON: usize = 1024;

/// A status that tells why a stream is ended.
pub(super) fn refusal(code: Code, reason: &str) -> Status {
    let mut end = reason.len().min(MAX_REASON);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    Status::new(code, &reason[..end])
}

/// Reads a configuration. No text at all stands for none.
pub(super) fn config(json: &str) -> Result<Value, String> {
    if json.is_empty() {
        return Ok(Value::Null);
    }
    if json.len() > MAX_CONFIGURE {
        return Err("the configuration has more than 4 MiB".into());
    }
    run_blocking_if_large(json.len(), || serde_json::from_str(json))
        .map(|config: Config| config.0)
        .map_err(|error| format!("the configuration is not JSON: {error}"))
}

/// What both halves of a stream share. They run on one task, so that neither ever waits for the lock.
struct Exchange {
    session: Session<proto::AgentToProxy>,
    /// Messages that wait to be taken.
    output: VecDeque<Waiting>,
    /// Memory in bytes that they take, roughly.
    unsent: usize,
    /// How the stream ends, once the output is empty.
    end: Option<Result<(), Status>>,
    /// The response body has gone: nobody will take anything.
    gone: bool,
    body: Option<Waker>,
    driver: Option<Waker>,
    /// Something waits, and the driver wants to go on when nothing does any more.
    awaits_empty: bool,
}

struct Waiting {
    /// The ticket of the event that is answered, if any.
    ticket: Option<Ticket>,
    message: proto::AgentToProxy,
    size: usize,
}

#[derive(Clone)]
struct Shared(Arc<Mutex<Exchange>>);

impl Shared {
    fn new() -> Self {
        Self(Arc::new(Mutex::new(Exchange {
            session: Session::new(),
            output: VecDeque::new(),
            unsent: 0,
            end: None,
            gone: false,
            body: None,
            driver: None,
            awaits_empty: false,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, Exchange> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Exchange {
    fn push(&mut self, ticket: Option<Ticket>, message: proto::AgentToProxy) {
        // A short answer takes far more as a message than it has bytes.
        let size = message.encoded_len() + size_of::<Waiting>();
        self.unsent += size;
        self.output.push_back(Waiting { ticket, message, size });
        self.wake_body();
    }

    fn say(&mut self, message: Outgoing) {
        self.push(None, proto::AgentToProxy { message: Some(message) });
    }

    fn finish(&mut self, end: Result<(), Status>) {
        self.end = Some(end);
        self.wake_body();
    }

    fn wake_body(&mut self) {
        if let Some(body) = self.body.take() {
            body.wake();
        }
    }

    /// The next message that may still go out: answers to events that a newer one has superseded may not.
    fn pop(&mut self) -> Option<proto::AgentToProxy> {
        while let Some(Waiting { ticket, message, size }) = self.output.pop_front() {
            self.unsent -= size;
            match ticket {
                Some(ticket) if !self.session.is_newest(ticket) => {}
                Some(ticket) => {
                    self.session.answered(ticket);
                    return Some(message);
                }
                None => return Some(message),
            }
        }
        None
    }
}

/// The response body of a stream.
pub(super) struct Answers(Shared);

impl Stream for Answers {
    type Item = Result<proto::AgentToProxy, Status>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut exchange = self.0.lock();
        let message = exchange.pop();
        if exchange.output.is_empty()
            && exchange.awaits_empty
            && let Some(driver) = exchange.driver.take()
        {
            driver.wake();
        }
        if let Some(message) = message {
            return Poll::Ready(Some(Ok(message)));
        }
        match exchange.end.take() {
            Some(Ok(())) => Poll::Ready(None),
            Some(Err(status)) => Poll::Ready(Some(Err(status))),
            None => {
                exchange.body = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl Drop for Answers {
    fn drop(&mut self) {
        let mut exchange = self.0.lock();
        exchange.gone = true;
        if let Some(driver) = exchange.driver.take() {
            driver.wake();
        }
    }
}

/// Opens a stream: its response body, and the driver that must be polled beside it.
pub(super) fn open<H: Handler>(
    handler: Arc<H>,
    stage: watch::Receiver<Stage>,
    drained: watch::Receiver<bool>,
    inbound: Streaming<Bytes>,
) -> (Answers, impl Future<Output = Result<(), ConnectionError>> + Send + 'static) {
    let shared = Shared::new();
    let driver = Driver {
        handler,
        inbound,
        drained,
        shared: shared.clone(),
        peer: Arc::default(),
        batch: VecDeque::new(),
        applying: None,
        ending: None,
        warned: false,
        has_worked: false,
    };
    (Answers(shared), driver.run(stage))
}

struct Driver<H> {
    handler: Arc<H>,
    inbound: Streaming<Bytes>,
    /// Whether the client has asked for a drain on this connection.
    drained: watch::Receiver<bool>,
    shared: Shared,
    peer: Arc<Peer>,
    /// Events that have arrived and were not run yet.
    batch: VecDeque<(Ticket, Call<proto::AgentToProxy>)>,
    /// A configuration that is being applied. Until it is, nothing more is read: what comes after it is meant for it.
    applying: Option<Call<Result<(), String>>>,
    /// How the stream will end when all events are answered; nothing more is read.
    ending: Option<Result<(), Status>>,
    warned: bool,
    /// So much was read at once that others are to have their turn.
    has_worked: bool,
}

impl<H: Handler> Driver<H> {
    async fn run(mut self, stage: watch::Receiver<Stage>) -> Result<(), ConnectionError> {
        let greeting = tokio::time::timeout(HANDSHAKE_TIMEOUT, self.read_handshake()).await;
        let refused = match greeting {
            Ok(Ok(Some(request))) => match self.answer_handshake(&request).await {
                Ok(()) => return self.serve(stage).await,
                Err(status) => Err(status),
            },
            Ok(Ok(None)) => Ok(()),
            Ok(Err(status)) => Err(status),
            Err(_) => Err(Status::deadline_exceeded(format!("no handshake came within {HANDSHAKE_TIMEOUT:?}"))),
        };
        if let Err(status) = &refused {
            log_limited!(warn, "a stream is refused: {}", status.message());
        }
        self.shared.lock().finish(refused);
        Ok(())
    }

    /// Reads the handshake. None when the client has closed the stream without a word.
    async fn read_handshake(&mut self) -> Result<Option<proto::HandshakeRequest>, Status> {
        let Some(bytes) = self.inbound.message().await? else { return Ok(None) };
        match read(bytes) {
            Ok(Message::Handshake(request)) => Ok(Some(request)),
            _ => Err(Status::failed_precondition("the first message is not a handshake")),
        }
    }

    /// Applies what comes with the handshake, however long that takes, and answers it.
    async fn answer_handshake(&mut self, request: &proto::HandshakeRequest) -> Result<(), Status> {
        let agreed = agree(request, &self.handler).await;
        let mut exchange = self.shared.lock();
        exchange.say(message::handshake(self.handler.capabilities(), agreed.clone().err()));
        agreed.map_err(|reason| refusal(Code::FailedPrecondition, &reason))?;
        self.peer = Arc::new(Peer::new(Proxy::greet(&request.proxy_version)));
        Ok(())
    }

    async fn serve(mut self, mut stage: watch::Receiver<Stage>) -> Result<(), ConnectionError> {
        let mut reports = self.handler.reports();
        let mut drained = self.drained.clone();
        drained.mark_unchanged();
        self.report(&reports.borrow_and_update().clone());
        let timer = tokio::time::sleep(QUIET);
        tokio::pin!(timer);
        let mut quiet_since = Instant::now();
        let mut stage_known = true;
        let mut draining = false;
        let mut full = false;
        loop {
            let now_stage = *stage.borrow_and_update();
            if now_stage > Stage::Serving && !std::mem::replace(&mut draining, true) {
                quiet_since = Instant::now();
            }
            let idle = {
                let mut exchange = self.shared.lock();
                if exchange.gone {
                    return Ok(());
                }
                let awaits_empty = draining || self.ending.is_some() || exchange.unsent >= MAX_UNSENT;
                exchange.awaits_empty = awaits_empty && !exchange.output.is_empty();
                exchange.session.pending() == 0 && exchange.output.is_empty() && self.applying.is_none()
            };
            let quiet = draining && quiet_since.elapsed() >= QUIET;
            if idle && (quiet || self.ending.is_some() || now_stage == Stage::Closing) {
                self.shared.lock().finish(self.ending.take().unwrap_or(Ok(())));
                return Ok(());
            }
            let ends_quietly = idle && draining;
            if ends_quietly {
                timer.as_mut().reset(quiet_since + QUIET);
            }

            let reads = now_stage < Stage::Closing;
            tokio::select! {
                biased;
                () = std::future::poll_fn(|context| self.poll_next(context, reads)) => {}
                changed = stage.changed(), if stage_known => stage_known = changed.is_ok(),
                changed = reports.changed() => {
                    if changed.is_err() {
                        // Nobody reports any more: the agent is at its end, and its stage will tell.
                        std::future::pending::<()>().await;
                    }
                    self.report(&reports.borrow_and_update().clone());
                }
                // The sender lives as long as the connection.
                Ok(()) = drained.changed() => self.report(&reports.borrow().clone()),
                () = &mut timer, if ends_quietly => {}
            }
            if std::mem::take(&mut full) || self.has_worked {
                // The first answers are not to wait for the last event that has arrived; but what has arrived after theirs is known first,
                // for it may have superseded them.
                yield_now().await;
            }
            if !self.batch.is_empty() {
                quiet_since = Instant::now();
                let whole = self.batch.len();
                self.run_batch().await;
                full = whole == BATCH || !self.batch.is_empty();
            }
        }
    }

    /// Takes what has arrived, then what has ended: an answer that ended before is not sent when its event was superseded meanwhile. Ready as soon as
    /// there was anything, or the output is empty as awaited.
    fn poll_next(&mut self, context: &mut Context<'_>, reads: bool) -> Poll<()> {
        let mut ready = !self.batch.is_empty();
        if let Some(applying) = &mut self.applying
            && let Poll::Ready(applied) = applying.as_mut().poll(context)
        {
            self.applying = None;
            if let Err(reason) = applied {
                self.ending = Some(Err(refusal(Code::FailedPrecondition, &reason)));
            }
            ready = true;
        }
        let shared = self.shared.clone();
        let mut exchange = shared.lock();
        exchange.driver = Some(context.waker().clone());
        let mut work = 0;
        while reads
            && work < MAX_WORK
            && self.ending.is_none()
            && self.applying.is_none()
            && self.batch.len() < BATCH
            && exchange.session.pending() + self.batch.len() < MAX_IN_FLIGHT
            && exchange.unsent < MAX_UNSENT
            && let Poll::Ready(arrived) = Pin::new(&mut self.inbound).poll_next(context)
        {
            ready = true;
            match arrived {
                Some(Ok(bytes)) => {
                    work += bytes.len() + FRAME_WORK;
                    run_blocking_if_large(bytes.len(), || self.take(bytes, &mut exchange));
                }
                Some(Err(status)) => {
                    if status.code() != Code::Cancelled {
                        log_limited!(warn, "a stream has failed: {}", status.message());
                    }
                    self.ending = Some(Err(status));
                }
                None => self.ending = Some(Ok(())),
            }
        }
        self.has_worked = work >= MAX_WORK;
        while let Poll::Ready(ended) = exchange.session.poll_ended(context) {
            ready = true;
            if let Some((ticket, answer)) = ended {
                exchange.push(Some(ticket), answer);
            }
        }
        let emptied = exchange.awaits_empty && exchange.output.is_empty();
        if ready || emptied || exchange.gone { Poll::Ready(()) } else { Poll::Pending }
    }

    fn take(&mut self, bytes: Bytes, exchange: &mut Exchange) {
        if let Some(event) = borrowed::headers(&bytes) {
            return self.event(&event, exchange);
        }
        let message = match read(bytes) {
            Ok(message) => message,
            Err(unreadable) => return self.reject(unreadable, exchange),
        };
        match event(&message) {
            Some(Ok(event)) => self.event(&event, exchange),
            Some(Err(unreadable)) => self.reject(unreadable, exchange),
            None => self.control(message, exchange),
        }
    }

    fn event(&mut self, event: &Event<'_>, exchange: &mut Exchange) {
        let id = event.correlation_id();
        if id.len() > MAX_ID {
            return self.unanswerable(TOO_LONG_ID);
        }
        let ticket = exchange.session.arrived(id);
        let wire = Wire { peer: Arc::clone(&self.peer), phase: Phase::of(event), correlation_id: Arc::from(id) };
        self.batch.push_back((ticket, Box::pin(self.handler.handle(event, ticket.arrival, wire))));
    }

    fn control(&mut self, message: Message, exchange: &mut Exchange) {
        match message {
            Message::Ping(ping) => exchange.say(message::pong(ping)),
            Message::Cancel(cancel) => {
                exchange.session.cancel(&cancel.correlation_id);
                let session = &exchange.session;
                self.batch.retain(|(ticket, _)| session.is_newest(*ticket));
                debug!(correlation_id = cancel.correlation_id, "cancelled");
            }
            Message::Configure(configure) => match config(&configure.config_json) {
                Ok(config) => self.applying = Some(Box::pin(self.handler.configure(config))),
                Err(reason) => self.unconfigurable(&reason),
            },
            _ => self.ending = Some(Err(Status::failed_precondition("there was a second handshake"))),
        }
    }

    /// Answers an event that cannot be read, if it says whose it is.
    fn reject(&mut self, unreadable: Unreadable, exchange: &mut Exchange) {
        let Unreadable { hook, correlation_id, reason } = unreadable;
        if hook == Hook::Configure {
            return self.unconfigurable(&reason);
        }
        let Some(id) = correlation_id.filter(|id| id.len() <= MAX_ID) else { return self.unanswerable(&reason) };
        let ticket = exchange.session.arrived(&id);
        let wire = Wire { peer: Arc::clone(&self.peer), phase: Phase { hook, chunk_index: 0 }, correlation_id: Arc::from(id) };
        let answer = self.handler.reject(hook, invalid(hook, &reason), wire);
        exchange.push(Some(ticket), answer);
    }

    /// Ends the stream, for who sends a configuration takes it for applied as long as the stream lives.
    fn unconfigurable(&mut self, reason: &str) {
        log_limited!(warn, "a configuration cannot be read: {reason}");
        self.ending = Some(Err(refusal(Code::FailedPrecondition, reason)));
    }

    fn unanswerable(&mut self, reason: &str) {
        if !std::mem::replace(&mut self.warned, true) {
            log_limited!(warn, "a message cannot be answered, for it has no usable correlation id (said once a stream): {reason}");
        }
    }

    /// Runs every event of the batch for one slice, or as many as the time is for. Those that end are answered, the others kept going.
    async fn run_batch(&mut self) {
        let began = Instant::now();
        std::future::poll_fn(|context| {
            let mut exchange = self.shared.lock();
            while let Some((ticket, mut call)) = self.batch.pop_front() {
                // A newer event of the id came with it.
                if !exchange.session.is_newest(ticket) {
                    continue;
                }
                match call.as_mut().poll(context) {
                    Poll::Ready(answer) => exchange.push(Some(ticket), answer),
                    Poll::Pending => exchange.session.keep(ticket, call),
                }
                if began.elapsed() > SLOW_BATCH {
                    break;
                }
            }
            Poll::Ready(())
        })
        .await;
    }

    fn report(&self, reports: &Reports) {
        let mut exchange = self.shared.lock();
        // A client that reads slowly gets the next one; they must not pile up.
        if exchange.unsent >= MAX_UNSENT {
            return;
        }
        exchange.say(message::health(reports, *self.drained.borrow()));
        exchange.say(message::metrics(reports));
    }
}

/// Whether the agent can work with this proxy, and under the configuration that it brings.
async fn agree<H: Handler>(request: &proto::HandshakeRequest, handler: &Arc<H>) -> Result<(), String> {
    check_versions(&request.supported_versions)?;
    match config(&request.config_json)? {
        Value::Null => Ok(()),
        // What a proxy without a configuration says.
        Value::Object(object) if object.is_empty() => Ok(()),
        config => handler.configure(config).await,
    }
}

fn invalid(hook: Hook, reason: &str) -> Failure {
    Failure::new(FailureKind::InvalidEvent, format!("the event for `{hook}` cannot be read: {reason}"))
}

/// Lets the rest of the connection go first.
async fn yield_now() {
    let mut yielded = false;
    std::future::poll_fn(|context| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// Answers one message that came alone.
pub(super) async fn answer_one<H: Handler>(handler: Arc<H>, bytes: Bytes) -> Result<proto::AgentToProxy, Status> {
    let wire = |phase, id: &str| Wire { peer: Arc::default(), phase, correlation_id: Arc::from(id) };
    let reject = |unreadable: Unreadable| {
        let Unreadable { hook, correlation_id, reason } = unreadable;
        let id = correlation_id
            .filter(|id| id.len() <= MAX_ID && hook != Hook::Configure)
            .ok_or_else(|| refusal(Code::InvalidArgument, &format!("the message cannot be read: {reason}")))?;
        Ok(handler.reject(hook, invalid(hook, &reason), wire(Phase { hook, chunk_index: 0 }, &id)))
    };
    let len = bytes.len();
    let message = match run_blocking_if_large(len, || read(bytes)) {
        Ok(message) => message,
        Err(unreadable) => return reject(unreadable),
    };
    let call = match run_blocking_if_large(len, || event(&message)) {
        Some(Ok(event)) if event.correlation_id().len() > MAX_ID => return Err(Status::invalid_argument(TOO_LONG_ID)),
        Some(Ok(event)) => {
            run_blocking_if_large(len, || handler.handle(&event, Arrival::Alone, wire(Phase::of(&event), event.correlation_id())))
        }
        Some(Err(unreadable)) => return reject(unreadable),
        None => {
            let said = match message {
                Message::Handshake(request) => message::handshake(handler.capabilities(), agree(&request, &handler).await.err()),
                Message::Ping(ping) => message::pong(ping),
                _ => return Err(Status::unimplemented("this needs a stream: only events, handshakes and pings may come alone")),
            };
            return Ok(proto::AgentToProxy { message: Some(said) });
        }
    };
    drop(message);
    Ok(call.await)
}
