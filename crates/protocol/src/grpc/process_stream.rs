//! `ProcessStream`: the events of a proxy's connection.
//!
//! A stream has two halves on the connection's task. The driver reads what has arrived, runs it, and puts the answers into the [`Exchange`]; the
//! response body takes them out when the client has room for them. A client that takes no answers thereby holds up its own stream and nothing else:
//! calls under way are still polled, and end.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::Stream as _;
use tokio::sync::watch;
use tokio::time::Instant;
use tonic::{Code, Status, Streaming};
use tracing::debug;
use zentinel_wasm_bounds::{log_limited, run_blocking_if_large};
use zentinel_wasm_contract::report::Reports;
use zentinel_wasm_contract::{Event, Handler, Hook};

use super::encode::{GrpcEncoder, Peer};
use super::event::{Unreadable, event, invalid, read};
use super::exchange::{Exchange, OutgoingMessages, SharedExchange};
use super::handshake::agree;
use super::proto::proxy_to_agent::Message;
use super::status::refusal;
use super::{borrowed, message, proto};
use crate::config;
use crate::limits::{BATCH, FRAME_WORK, MAX_ID, MAX_IN_FLIGHT, MAX_UNSENT, MAX_WORK, SLOW_BATCH, TOO_LONG_ID, Timeouts};
use crate::phase::Phase;
use crate::proxy::Proxy;
use crate::session::{Call, Ticket};
use crate::stage::Stage;

/// Opens a stream: its response body, and the driver that must be polled beside it.
pub(super) fn open<H: Handler>(
    handler: Arc<H>,
    stage: watch::Receiver<Stage>,
    drained: watch::Receiver<bool>,
    timeouts: Timeouts,
    inbound: Streaming<Bytes>,
) -> (OutgoingMessages, impl Future<Output = ()> + Send + 'static) {
    let shared = SharedExchange::new();
    let driver = Driver {
        handler,
        inbound,
        drained,
        shared: shared.clone(),
        timeouts,
        peer: Arc::default(),
        batch: VecDeque::new(),
        applying: None,
        ending: None,
        warned: false,
        has_worked: false,
    };
    (OutgoingMessages(shared), driver.run(stage))
}

struct Driver<H> {
    handler: Arc<H>,
    inbound: Streaming<Bytes>,
    /// Whether the client has asked for a drain on this connection.
    drained: watch::Receiver<bool>,
    shared: SharedExchange,
    timeouts: Timeouts,
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
    async fn run(mut self, stage: watch::Receiver<Stage>) {
        let limit = self.timeouts.handshake;
        let greeting = tokio::time::timeout(limit, self.read_handshake()).await;
        let refused = match greeting {
            Ok(Ok(Some(request))) => match self.answer_handshake(&request).await {
                Ok(()) => return self.serve(stage).await,
                Err(status) => Err(status),
            },
            Ok(Ok(None)) => Ok(()),
            Ok(Err(status)) => Err(status),
            Err(_) => Err(Status::deadline_exceeded(format!("no handshake within {limit:?}"))),
        };
        if let Err(status) = &refused {
            log_limited!(warn, "rejected a stream: {}", status.message());
        }
        self.shared.lock().finish(refused);
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
        self.peer = Arc::new(Peer::new(Proxy::connected(&request.proxy_version)));
        Ok(())
    }

    async fn serve(mut self, mut stage: watch::Receiver<Stage>) {
        let mut reports = self.handler.reports();
        let mut drained = self.drained.clone();
        drained.mark_unchanged();
        self.report(&reports.borrow_and_update().clone());
        let quiet_time = self.timeouts.quiet;
        let timer = tokio::time::sleep(quiet_time);
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
                    return;
                }
                let awaits_empty = draining || self.ending.is_some() || exchange.unsent >= MAX_UNSENT;
                exchange.awaits_empty = awaits_empty && !exchange.output.is_empty();
                exchange.session.pending() == 0 && exchange.output.is_empty() && self.applying.is_none()
            };
            let quiet = draining && quiet_since.elapsed() >= quiet_time;
            if idle && (quiet || self.ending.is_some() || now_stage == Stage::Closing) {
                self.shared.lock().finish(self.ending.take().unwrap_or(Ok(())));
                return;
            }
            let ends_quietly = idle && draining;
            if ends_quietly {
                timer.as_mut().reset(quiet_since + quiet_time);
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
                        log_limited!(warn, "a stream failed: {}", status.message());
                    }
                    self.ending = Some(Err(status));
                }
                None => self.ending = Some(Ok(())),
            }
        }
        self.has_worked = work >= MAX_WORK;
        while let Poll::Ready(ended) = exchange.session.poll_finished(context) {
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
        let encoder = GrpcEncoder { peer: Arc::clone(&self.peer), phase: Phase::of(event), correlation_id: Arc::from(id) };
        self.batch.push_back((ticket, Box::pin(self.handler.handle(event, ticket.arrival, encoder))));
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
            Message::Configure(configure) => match config::parse(&configure.config_json) {
                Ok(config) => self.applying = Some(Box::pin(self.handler.configure(config))),
                Err(reason) => self.unconfigurable(&reason),
            },
            _ => self.ending = Some(Err(Status::failed_precondition("second handshake on one stream"))),
        }
    }

    /// OutgoingMessages an event that cannot be read, if it says whose it is.
    fn reject(&mut self, unreadable: Unreadable, exchange: &mut Exchange) {
        let Unreadable { hook, correlation_id, reason } = unreadable;
        if hook == Hook::Configure {
            return self.unconfigurable(&reason);
        }
        let Some(id) = correlation_id.filter(|id| id.len() <= MAX_ID) else { return self.unanswerable(&reason) };
        let ticket = exchange.session.arrived(&id);
        let encoder = GrpcEncoder { peer: Arc::clone(&self.peer), phase: Phase { hook, chunk_index: 0 }, correlation_id: Arc::from(id) };
        let answer = self.handler.reject(hook, invalid(hook, &reason), encoder);
        exchange.push(Some(ticket), answer);
    }

    /// Ends the stream, for who sends a configuration takes it for applied as long as the stream lives.
    fn unconfigurable(&mut self, reason: &str) {
        log_limited!(warn, "cannot read a configuration: {reason}");
        self.ending = Some(Err(refusal(Code::FailedPrecondition, reason)));
    }

    fn unanswerable(&mut self, reason: &str) {
        if !std::mem::replace(&mut self.warned, true) {
            log_limited!(
                warn,
                "cannot answer a message without a usable correlation id (further ones on this stream are not logged): {reason}"
            );
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
                    Poll::Pending => exchange.session.push(ticket, call),
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
