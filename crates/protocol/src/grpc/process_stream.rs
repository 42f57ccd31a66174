//! `ProcessStream`: the events of a proxy.
//!
//! A stream has two halves on the connection's task. The driver reads events, runs them, and adds
//! their answers to the [`Exchange`]; the response body takes them when HTTP/2 has room for them. A
//! client that does not read answers therefore blocks only its own stream: pending calls are still
//! polled and finish.

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
use super::status::with_reason;
use super::{borrowed, message, proto};
use crate::config;
use crate::limits::{BATCH, FRAME_WORK, MAX_ID, MAX_IN_FLIGHT, MAX_WORK, SLOW_BATCH, TOO_LONG_ID, Timeouts};
use crate::phase::Phase;
use crate::proxy::Proxy;
use crate::session::{Call, Ticket};
use crate::stage::Stage;

/// Opens a stream. Returns its response body and the driver, both of which must be polled.
pub(super) fn open<H: Handler>(
    handler: Arc<H>,
    stage: watch::Receiver<Stage>,
    drained: watch::Receiver<bool>,
    timeouts: Timeouts,
    inbound: Streaming<Bytes>,
) -> (OutgoingMessages, impl Future<Output = ()> + Send + 'static) {
    let exchange = SharedExchange::new();
    let driver = Driver {
        handler,
        inbound,
        drained,
        exchange: exchange.clone(),
        timeouts,
        peer: Arc::default(),
        batch: VecDeque::new(),
        applying: None,
        ending: None,
        warned: false,
        has_worked: false,
    };
    (OutgoingMessages(exchange), driver.run(stage))
}

struct Driver<H> {
    handler: Arc<H>,
    inbound: Streaming<Bytes>,
    /// Whether the client asked for a drain on this connection.
    drained: watch::Receiver<bool>,
    exchange: SharedExchange,
    timeouts: Timeouts,
    peer: Arc<Peer>,
    /// Decoded events whose calls were not polled yet.
    batch: VecDeque<(Ticket, Call<proto::AgentToProxy>)>,
    /// A configuration that is being applied. Nothing is read meanwhile, because what follows is
    /// meant for the new configuration.
    applying: Option<Call<Result<(), String>>>,
    /// How the stream ends when all events are answered. Nothing more is read.
    ending: Option<Result<(), Status>>,
    /// An unanswerable message was logged: a client must not fill the log.
    warned: bool,
    /// So much was read at once that the other tasks on this thread get their turn.
    has_worked: bool,
}

impl<H: Handler> Driver<H> {
    async fn run(mut self, stage: watch::Receiver<Stage>) {
        let limit = self.timeouts.handshake;
        let request = tokio::time::timeout(limit, self.read_handshake()).await;
        let outcome = match request {
            Ok(Ok(Some(request))) => match self.answer_handshake(&request).await {
                Ok(()) => return self.serve(stage).await,
                Err(status) => Err(status),
            },
            Ok(Ok(None)) => Ok(()),
            Ok(Err(status)) => Err(status),
            Err(_) => Err(Status::deadline_exceeded(format!("no handshake within {limit:?}"))),
        };
        if let Err(status) = &outcome {
            log_limited!(warn, "rejected a stream: {}", status.message());
        }
        self.exchange.lock().finish(outcome);
    }

    /// Reads the request. Returns `None` if the client closes the stream without sending anything.
    async fn read_handshake(&mut self) -> Result<Option<proto::HandshakeRequest>, Status> {
        let Some(bytes) = self.inbound.message().await? else { return Ok(None) };
        match read(bytes) {
            Ok(Message::Handshake(request)) => Ok(Some(request)),
            _ => Err(Status::failed_precondition("the first message is not a handshake")),
        }
    }

    /// Applies the configuration in the request and answers it. This has no timeout here.
    async fn answer_handshake(&mut self, request: &proto::HandshakeRequest) -> Result<(), Status> {
        let agreed = agree(request, &self.handler).await;
        let mut exchange = self.exchange.lock();
        exchange.control(message::handshake(self.handler.capabilities(), agreed.clone().err()));
        agreed.map_err(|reason| with_reason(Code::FailedPrecondition, &reason))?;
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
        let mut watches_stage = true;
        let mut draining = false;
        let mut full = false;
        loop {
            let now_stage = *stage.borrow_and_update();
            if now_stage > Stage::Serving && !std::mem::replace(&mut draining, true) {
                quiet_since = Instant::now();
            }
            let idle = {
                let mut exchange = self.exchange.lock();
                if exchange.is_closed() {
                    return;
                }
                let awaits_empty = draining || self.ending.is_some() || exchange.is_full();
                exchange.await_empty(awaits_empty);
                exchange.session.pending() == 0 && exchange.is_empty() && self.applying.is_none()
            };
            let quiet = draining && quiet_since.elapsed() >= quiet_time;
            if idle && (quiet || self.ending.is_some() || now_stage == Stage::Closing) {
                self.exchange.lock().finish(self.ending.take().unwrap_or(Ok(())));
                return;
            }
            let may_drain = idle && draining;
            if may_drain {
                timer.as_mut().reset(quiet_since + quiet_time);
            }

            let reads = now_stage < Stage::Closing;
            tokio::select! {
                biased;
                () = std::future::poll_fn(|context| self.poll_next(context, reads)) => {}
                changed = stage.changed(), if watches_stage => watches_stage = changed.is_ok(),
                changed = reports.changed() => {
                    if changed.is_err() {
                        // The agent has shut down; the stage ends this stream.
                        std::future::pending::<()>().await;
                    }
                    self.report(&reports.borrow_and_update().clone());
                }
                // Never fails: the sender lives as long as the connection.
                Ok(()) = drained.changed() => self.report(&reports.borrow().clone()),
                () = &mut timer, if may_drain => {}
            }
            if std::mem::take(&mut full) || self.has_worked {
                // Sends the first answers before more events are run. It comes after the read
                // above, because those events may supersede them.
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

    /// Reads what has arrived and then takes the finished calls, in this order so a new event can
    /// supersede them. Ready if there was anything, or if the exchange wakes the driver.
    fn poll_next(&mut self, context: &mut Context<'_>, reads: bool) -> Poll<()> {
        let mut ready = !self.batch.is_empty();
        if let Some(applying) = &mut self.applying
            && let Poll::Ready(applied) = applying.as_mut().poll(context)
        {
            self.applying = None;
            if let Err(reason) = applied {
                self.ending = Some(Err(with_reason(Code::FailedPrecondition, &reason)));
            }
            ready = true;
        }
        let exchange = self.exchange.clone();
        let mut exchange = exchange.lock();
        exchange.set_driver(context.waker());
        let mut work = 0;
        while reads
            && work < MAX_WORK
            && self.ending.is_none()
            && self.applying.is_none()
            && self.batch.len() < BATCH
            && exchange.session.pending() + self.batch.len() < MAX_IN_FLIGHT
            && !exchange.is_full()
            && let Poll::Ready(arrived) = Pin::new(&mut self.inbound).poll_next(context)
        {
            ready = true;
            match arrived {
                Some(Ok(bytes)) => {
                    work += bytes.len() + FRAME_WORK;
                    run_blocking_if_large(bytes.len(), || self.receive(bytes, &mut exchange));
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
        while let Poll::Ready(finished) = exchange.session.poll_finished(context) {
            ready = true;
            if let Some((ticket, answer)) = finished {
                exchange.answer(ticket, answer);
            }
        }
        if ready || exchange.wakes_driver() { Poll::Ready(()) } else { Poll::Pending }
    }

    fn receive(&mut self, bytes: Bytes, exchange: &mut Exchange) {
        if let Some(event) = borrowed::headers(&bytes) {
            return self.receive_event(&event, exchange);
        }
        let message = match read(bytes) {
            Ok(message) => message,
            Err(unreadable) => return self.reject(unreadable, exchange),
        };
        match event(&message) {
            Some(Ok(event)) => self.receive_event(&event, exchange),
            Some(Err(unreadable)) => self.reject(unreadable, exchange),
            None => self.receive_control(message, exchange),
        }
    }

    fn receive_event(&mut self, event: &Event<'_>, exchange: &mut Exchange) {
        let id = event.correlation_id();
        if id.len() > MAX_ID {
            return self.warn_unanswerable(TOO_LONG_ID);
        }
        let ticket = exchange.session.arrived(id);
        let encoder = GrpcEncoder { peer: Arc::clone(&self.peer), phase: Phase::of(event), correlation_id: Arc::from(id) };
        self.batch.push_back((ticket, Box::pin(self.handler.handle(event, ticket.arrival, encoder))));
    }

    fn receive_control(&mut self, message: Message, exchange: &mut Exchange) {
        match message {
            Message::Ping(ping) => exchange.control(message::pong(ping)),
            Message::Cancel(cancel) => {
                exchange.session.cancel(&cancel.correlation_id);
                let session = &exchange.session;
                self.batch.retain(|(ticket, _)| session.is_newest(*ticket));
                debug!(correlation_id = cancel.correlation_id, "cancelled");
            }
            Message::Configure(configure) => match config::parse(&configure.config_json) {
                Ok(config) => self.applying = Some(Box::pin(self.handler.configure(config))),
                Err(reason) => self.reject_configuration(&reason),
            },
            _ => self.ending = Some(Err(Status::failed_precondition("second handshake on one stream"))),
        }
    }

    /// Answers an undecodable event, if its correlation id is known.
    fn reject(&mut self, unreadable: Unreadable, exchange: &mut Exchange) {
        let Unreadable { hook, correlation_id, reason } = unreadable;
        if hook == Hook::Configure {
            return self.reject_configuration(&reason);
        }
        let Some(id) = correlation_id.filter(|id| id.len() <= MAX_ID) else { return self.warn_unanswerable(&reason) };
        let ticket = exchange.session.arrived(&id);
        let encoder = GrpcEncoder { peer: Arc::clone(&self.peer), phase: Phase { hook, chunk_index: 0 }, correlation_id: Arc::from(id) };
        let answer = self.handler.reject(hook, invalid(hook, &reason), encoder);
        exchange.answer(ticket, answer);
    }

    /// Ends the stream. A configuration has no answer, so its sender takes it as applied while the
    /// stream is open.
    fn reject_configuration(&mut self, reason: &str) {
        log_limited!(warn, "cannot read a configuration: {reason}");
        self.ending = Some(Err(with_reason(Code::FailedPrecondition, reason)));
    }

    fn warn_unanswerable(&mut self, reason: &str) {
        if !std::mem::replace(&mut self.warned, true) {
            log_limited!(
                warn,
                "cannot answer a message without a usable correlation id (further ones on this stream are not logged): {reason}"
            );
        }
    }

    /// Polls each call of the batch once, or as many as the time allows. Answers those that finish;
    /// the others become pending.
    async fn run_batch(&mut self) {
        let began = Instant::now();
        std::future::poll_fn(|context| {
            let mut exchange = self.exchange.lock();
            while let Some((ticket, mut call)) = self.batch.pop_front() {
                // Superseded by an event of the same read, or cancelled.
                if !exchange.session.is_newest(ticket) {
                    continue;
                }
                match call.as_mut().poll(context) {
                    Poll::Ready(answer) => exchange.answer(ticket, answer),
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

    /// Appends the health and the metrics.
    fn report(&self, reports: &Reports) {
        let mut exchange = self.exchange.lock();
        // Reports must not pile up: a client that reads slowly gets the next one.
        if exchange.is_full() {
            return;
        }
        exchange.control(message::health(reports, *self.drained.borrow()));
        exchange.control(message::metrics(reports));
    }
}

/// Lets the rest of the connection run first.
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
