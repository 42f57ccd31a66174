//! From an event to the call that decides about it, or to an answer that needs no call.

use std::sync::Arc;
use std::time::{Duration, Instant};

use prometheus::IntCounter;
use zentinel_wasm_bounds::run_blocking_if_large;
use zentinel_wasm_contract::event::{BodyChunk, Data, RequestHeaders};
use zentinel_wasm_contract::{Answer, Arrival, BodyAction, BodyMutation, Encode, Event, Failure, FailureKind, Hook, Text};
use zentinel_wasm_runtime::Call;

use crate::bodies::{self, EventBody, Length};
use crate::collect::{self, BodyCollector, Collected, Rescue};
use crate::context::{Contexts, Remembered};
use crate::policy::Policy;
use crate::reply::{FAIL_OPEN, Subject};

/// A refusal within this time surely ends its request. Later, the proxy may have given up the call and
/// let the request through: its timeout is not known here, but is hardly ever shorter than this.
const PROMPT: Duration = Duration::from_millis(10);

/// What is remembered of requests between their events.
pub(crate) struct Requests {
    contexts: Contexts,
    bodies: BodyCollector,
    id_collisions: IntCounter,
}

/// What an event comes to.
#[expect(
    clippy::large_enum_variant,
    reason = "it is moved once, and a box would cost every event that is not for the module an allocation"
)]
pub(crate) enum Prepared {
    /// The module is called.
    Call(PreparedCall),
    /// The answer needs no call.
    Known(Answer<'static>),
}

impl From<Option<PreparedCall>> for Prepared {
    fn from(call: Option<PreparedCall>) -> Self {
        call.map_or_else(|| Self::Known(Answer::default()), Self::Call)
    }
}

/// A call, and what its answer needs.
pub(crate) struct PreparedCall {
    pub(crate) call: Call,
    pub(crate) subject: Subject,
    pub(crate) traceparent: Option<Arc<str>>,
    /// The request's, as long as it may be refused.
    pub(crate) number: Option<u64>,
}

/// A module error, and what can still be done for its event.
pub(crate) struct Failed {
    pub(crate) failure: Failure,
    pub(crate) rescue: Rescue,
    /// The proxy is to send more of the body.
    pub(crate) needs_more: bool,
    pub(crate) traceparent: Option<Arc<str>>,
    /// The request's, as long as it may be refused.
    pub(crate) number: Option<u64>,
}

impl From<Failure> for Failed {
    fn from(failure: Failure) -> Self {
        Self { failure, rescue: Rescue::Pass, needs_more: false, traceparent: None, number: None }
    }
}

/// One event on its way to the module.
pub(crate) struct IncomingEvent<'a, E> {
    pub(crate) policy: &'a Policy,
    pub(crate) event: &'a Event<'a>,
    pub(crate) at: Instant,
    pub(crate) arrival: Arrival,
    pub(crate) encode: &'a E,
}

impl Requests {
    /// Nothing yet. Events whose id belongs to another live request are counted in `id_collisions`.
    pub(crate) fn new(id_collisions: IntCounter) -> Self {
        Self { contexts: Contexts::new(), bodies: BodyCollector::new(), id_collisions }
    }

    /// Prepares an event.
    ///
    /// # Errors
    ///
    /// The event cannot be handed to the module.
    pub(crate) fn prepare<E: Encode>(&self, arrived: &IncomingEvent<'_, E>) -> Result<Prepared, Failed> {
        match arrived.event {
            Event::RequestBody(chunk) if self.is_collected(arrived, chunk) => self.collect(arrived, chunk),
            _ => Ok(self.call(arrived)?.into()),
        }
    }

    /// Prepares the call for an event. None: the module does not export its hook.
    fn call<E: Encode>(&self, arrived: &IncomingEvent<'_, E>) -> Result<Option<PreparedCall>, Failure> {
        let IncomingEvent { policy, event, at, arrival, encode } = *arrived;
        let id = encode.correlation_id();
        let wanted = policy.takes(event.hook());
        let has_later_hooks = policy.has_later_hooks();
        let known = match event {
            Event::RequestBody(chunk) if wanted => self.contexts.get_for_body(id, chunk.is_last, at),
            Event::RequestBody(_) | Event::ResponseHeaders(_) if has_later_hooks => self.contexts.get(id, at),
            Event::ResponseBody(chunk) if wanted => {
                let known = self.contexts.get(id, at);
                if chunk.is_last {
                    self.contexts.end(id, at);
                }
                known
            }
            // An event that the module does not take ends no request: another one of its id may have begun since
            // the last event that the module takes.
            _ => None,
        };
        let length = known.as_ref().map_or(Length::Unknown, |known| known.length);
        let body = match event {
            Event::RequestBody(chunk) if wanted => EventBody::request(chunk, length),
            Event::ResponseBody(chunk) if wanted => EventBody::response(chunk),
            _ => EventBody::None,
        };
        let is_remembered = matches!(event, Event::RequestHeaders(_)) && has_later_hooks;
        let call = if wanted || is_remembered { Some(policy.prepare(event, known.as_ref().map(|known| &known.context))?) } else { None };
        let mut number = None;
        if let Event::RequestBody(_) = event {
            number = known.as_ref().map(|known| known.number());
        }
        // Given back here, because the response can only be added to a context that no event holds.
        let mut traceparent = known.and_then(|known| known.traceparent.clone());
        match event {
            Event::RequestHeaders(event) => {
                traceparent = event.metadata.traceparent.as_deref().map(Arc::from);
                if let Some(call) = call.as_ref().filter(|_| has_later_hooks) {
                    let takes_body = policy.takes(Hook::RequestBody);
                    let length = if takes_body { Length::of(event) } else { Length::Unknown };
                    let context = policy.pool.request_context(event, call);
                    let remembered = Remembered::new(Arc::clone(id), context, traceparent.clone(), length);
                    let begun = self.contexts.begin(remembered, takes_body && may_have_body(event), at);
                    number = Some(begun.number);
                    // A collision is counted once, wherever it shows.
                    if begun.collides && arrival == Arrival::Alone {
                        self.id_collisions.inc();
                    }
                }
            }
            Event::ResponseHeaders(event) => {
                if is_interim(event.status) {
                    // The response is still to come.
                } else if policy.takes(Hook::ResponseBody) {
                    self.contexts.respond(id, policy.pool.response_context(event, policy.settings.header_case));
                } else if has_later_hooks {
                    self.contexts.end(id, at);
                }
            }
            _ => {}
        }
        if !wanted {
            if let Some(call) = call {
                call.recycle();
            }
            return Ok(None);
        }
        Ok(call.map(|call| PreparedCall { call, subject: Subject { hook: event.hook(), body, whole: None }, traceparent, number }))
    }

    /// Whether a chunk of a request's body goes to [`collect`](Self::collect): the module takes whole bodies, or a part of this one
    /// is held already.
    fn is_collected<E: Encode>(&self, arrived: &IncomingEvent<'_, E>, chunk: &BodyChunk<'_>) -> bool {
        let wanted = arrived.policy.settings.collect_request_body && arrived.policy.takes(Hook::RequestBody);
        wanted || arrived.encode.connection().is_some_and(|connection| self.bodies.knows(connection, &chunk.correlation_id))
    }

    /// Collects a chunk of a request's body.
    fn collect<E: Encode>(&self, arrived: &IncomingEvent<'_, E>, chunk: &BodyChunk<'_>) -> Result<Prepared, Failed> {
        let IncomingEvent { policy, at, encode, .. } = *arrived;
        let id = &*chunk.correlation_id;
        let Some(connection) = encode.connection() else {
            if chunk.is_last && chunk.chunk_index == 0 {
                return Ok(self.call(arrived)?.into());
            }
            let detail = "`--collect-request-body` needs the Unix socket, because gRPC has no field for the body that is put back";
            return Err(Failure::new(FailureKind::BodyNotCollected, detail).into());
        };
        let known = self.contexts.get_for_body(id, chunk.is_last, at);
        let number = known.as_ref().map(|known| known.number());
        let length = known.as_ref().map_or(Length::Unknown, |known| known.length);
        let traceparent = known.as_ref().and_then(|known| known.traceparent.clone());
        let needs_more = !chunk.is_last;
        let failed = |failure, rescue| Failed { failure, rescue, needs_more, traceparent: traceparent.clone(), number };
        let bytes = match chunk.data.bytes(usize::MAX) {
            Ok(bytes) => bytes.into_owned(),
            Err(error) => {
                self.bodies.cancelled(connection, id);
                return Err(failed(error.into(), Rescue::Refuse));
            }
        };
        let collected = self.bodies.take(collect::RequestChunk {
            connection,
            id,
            number,
            length,
            bytes,
            index: chunk.chunk_index,
            is_last: chunk.is_last,
            received: chunk.bytes_received,
            buffered: bodies::is_buffered(chunk),
            limit: policy.settings.max_body,
            fail_open: policy.settings.fail_open,
        });
        let whole = match collected.map_err(|lost| failed(lost.failure, lost.rescue))? {
            Collected::Whole(whole) => whole,
            Collected::Alone => return Ok(self.call(arrived)?.into()),
            Collected::Held => return Ok(Prepared::Known(changed(Some(BodyAction::Drop), needs_more))),
            Collected::Pass => return Ok(Prepared::Known(failed_open(changed(None, needs_more)))),
            Collected::Forward(text) => {
                return Ok(Prepared::Known(failed_open(changed(Some(BodyAction::Replace(text.into())), needs_more))));
            }
        };
        if !policy.takes(Hook::RequestBody) {
            // Another module serves since the body began.
            return Ok(Prepared::Known(changed(Some(BodyAction::Replace(whole.into())), needs_more)));
        }
        let size = whole.len() as u64;
        let event = Event::RequestBody(BodyChunk {
            correlation_id: Text::borrowed(id),
            data: Data::Raw(&whole),
            is_last: true,
            total_size: Some(size),
            chunk_index: 0,
            bytes_received: Some(size),
            bytes_sent: None,
        });
        let context = known.as_ref().map(|known| &known.context);
        let call = run_blocking_if_large(whole.len(), || policy.prepare(&event, context));
        let whole = Arc::new(whole);
        let call = call.map_err(|failure| failed(failure, Rescue::Replace(Arc::clone(&whole))))?;
        let body = EventBody::Request { size, is_last: true, applied: true, length };
        let subject = Subject { hook: Hook::RequestBody, body, whole: Some(whole) };
        Ok(Prepared::Call(PreparedCall { call, subject, traceparent, number }))
    }

    /// An event will not be answered, because a newer one of its id has arrived.
    pub(crate) fn superseded<E: Encode>(&self, policy: &Policy, now: Instant, encode: &E) {
        self.id_collisions.inc();
        if policy.has_later_hooks() {
            // The answer that is not sent may be the refusal of another request, which the proxy may let through without it.
            self.contexts.unanswered(encode.correlation_id(), now);
        }
        if let Some(connection) = encode.connection() {
            // The answer that is not sent may be the one that holds a chunk.
            self.bodies.cancelled(connection, encode.correlation_id());
        }
    }

    /// An event for `hook` could not be decoded. Returns what can still be done for it.
    pub(crate) fn undecodable<E: Encode>(&self, policy: &Policy, hook: Hook, now: Instant, encode: &E) -> Rescue {
        if hook == Hook::RequestHeaders && policy.has_later_hooks() {
            // The request goes on if module errors allow.
            self.contexts.begin_unknown(encode.correlation_id(), now);
        }
        if let Some(connection) = encode.connection()
            && self.bodies.knows(connection, encode.correlation_id())
        {
            // It may have been a part of the body.
            self.bodies.cancelled(connection, encode.correlation_id());
            return Rescue::Refuse;
        }
        Rescue::Pass
    }

    /// A request was refused: nothing more of it will come, if the refusal was prompt.
    pub(crate) fn refused(&self, id: &str, number: Option<u64>, arrived: Instant) {
        if let Some(number) = number
            && arrived.elapsed() < PROMPT
        {
            self.contexts.refused(id, number);
        }
    }

    /// The proxy wants no more answers to the events of this id on this connection.
    pub(crate) fn cancelled(&self, connection: u64, id: &str) {
        self.bodies.cancelled(connection, id);
    }

    /// A connection has ended.
    pub(crate) fn disconnected(&self, connection: u64) {
        self.bodies.disconnected(connection);
    }

    /// Whether a part of a body on this connection is held.
    pub(crate) fn holds(&self, connection: u64) -> bool {
        self.bodies.holds(connection)
    }

    /// Drops the bodies that are too old.
    pub(crate) fn sweep(&self) {
        self.bodies.sweep();
    }
}

/// Allows a chunk of a request's body, changed or as it is.
fn changed(action: Option<BodyAction<'static>>, needs_more: bool) -> Answer<'static> {
    Answer { request_body_mutation: action.map(BodyMutation::from), needs_more, ..Answer::default() }
}

/// The same for what the module does not see, because an error was allowed.
fn failed_open(mut answer: Answer<'static>) -> Answer<'static> {
    answer.audit.tags.push(FAIL_OPEN);
    answer
}

/// Whether a body may follow. HTTP/1.1 announces each (RFC 9112, 6.3), but HTTP/2 need not, and the
/// event does not show which of them it was. Without an announcement, methods that rarely have a body
/// count as having none.
fn may_have_body(event: &RequestHeaders<'_>) -> bool {
    if event.headers.get("transfer-encoding").is_some() {
        return true;
    }
    match event.headers.get("content-length") {
        Some(lengths) => lengths.iter().any(|length| length.trim() != "0"),
        None => !matches!(&*event.method, "GET" | "HEAD" | "OPTIONS" | "DELETE" | "TRACE" | "CONNECT"),
    }
}

/// Whether another response will follow (RFC 9110, 15.2).
const fn is_interim(status: u16) -> bool {
    /// Switching Protocols: only the new protocol follows.
    const SWITCHING: u16 = 101;

    status / 100 == 1 && status != SWITCHING
}
