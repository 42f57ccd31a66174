//! From an event to the call that decides about it, or to an answer that needs no call.

use std::sync::Arc;
use std::time::{Duration, Instant};

use prometheus::IntCounter;
use zentinel_wasm_bounds::run_blocking_if_large;
use zentinel_wasm_contract::event::{BodyChunk, Data, RequestHeaders};
use zentinel_wasm_contract::{Answer, Arrival, BodyAction, BodyMutation, Encode, Event, Failure, FailureKind, Hook, Text};
use zentinel_wasm_runtime::Call;

use crate::bodies::{self, EventBody, Length};
use crate::carried::{LiveRequests, OtherHash};
use crate::collect::{self, BodyCollector, Collected, Rescue};
use crate::context::{Contexts, Remembered};
use crate::ids::IdHasher;
use crate::policy::Policy;
use crate::reply::{FAIL_OPEN, Subject};

/// A refusal within this time certainly ends its request. Later, the proxy may have timed out and
/// let the request through: its timeout is not known here, but is hardly ever shorter than this.
const PROMPT_REFUSAL: Duration = Duration::from_millis(10);

/// Longest `traceparent` of a client, in bytes. Today's have 55; later versions may append to them.
const MAX_TRACEPARENT: usize = 256;

/// What the agent remembers of requests between their events.
pub(crate) struct Requests {
    contexts: Contexts,
    bodies: BodyCollector,
    id_collisions: IntCounter,
}

/// What to do with an event.
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

/// A call, and what is needed to answer its event.
pub(crate) struct PreparedCall {
    pub(crate) call: Call,
    pub(crate) subject: Subject,
}

/// A module error, and how its event can still be answered.
pub(crate) struct Failed {
    pub(crate) failure: Failure,
    pub(crate) rescue: Rescue,
    /// The proxy should send more of the body.
    pub(crate) needs_more: bool,
}

impl From<Failure> for Failed {
    fn from(failure: Failure) -> Self {
        Self { failure, rescue: Rescue::Pass, needs_more: false }
    }
}

/// The request of an event, as far as that is certain.
#[derive(Debug, Default)]
pub(crate) struct Origin {
    pub(crate) traceparent: Option<Arc<str>>,
    /// The request's number.
    pub(crate) number: Option<u64>,
    /// Another live request has the same id, so later events could be those of either.
    pub(crate) collides: bool,
}

/// An event from a transport, and how to answer it.
pub(crate) struct IncomingEvent<'a, E> {
    pub(crate) policy: &'a Policy,
    pub(crate) event: &'a Event<'a>,
    pub(crate) at: Instant,
    pub(crate) arrival: Arrival,
    pub(crate) encode: &'a E,
    /// Its outcome is given to somebody.
    pub(crate) is_observed: bool,
}

impl Requests {
    /// Remembers nothing yet. `id_collisions` counts events whose id belongs to another live
    /// request.
    pub(crate) fn new(id_collisions: IntCounter) -> Self {
        Self { contexts: Contexts::new(), bodies: BodyCollector::new(), id_collisions }
    }

    /// Prepares an event, and finds its `origin`.
    ///
    /// # Errors
    ///
    /// The event cannot be passed to the module.
    pub(crate) fn prepare<E: Encode>(&self, arrived: &IncomingEvent<'_, E>, origin: &mut Origin) -> Result<Prepared, Failed> {
        match arrived.event {
            Event::RequestBody(chunk) if self.is_collected(arrived, chunk) => self.collect(arrived, chunk, origin),
            _ => Ok(self.call(arrived, origin)?.into()),
        }
    }

    /// Prepares the call for an event, or `None` if the module does not export its hook.
    fn call<E: Encode>(&self, arrived: &IncomingEvent<'_, E>, origin: &mut Origin) -> Result<Option<PreparedCall>, Failure> {
        let IncomingEvent { policy, event, at, arrival, encode, is_observed } = *arrived;
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
            // An event for which the module has no hook does not end a request, because another
            // request with its id may have begun since the last event for which it has one.
            _ => None,
        };
        origin.found(known.as_deref());
        if let Event::RequestHeaders(event) = event {
            let sent = event.metadata.traceparent.as_deref();
            let traceparent = if is_observed { sent.or_else(|| own_traceparent(event)) } else { sent };
            origin.traceparent = traceparent.map(Arc::from);
        }
        let length = known.as_ref().map_or(Length::Unknown, |known| known.length);
        let body = match event {
            Event::RequestBody(chunk) if wanted => EventBody::request(chunk, length),
            Event::ResponseBody(chunk) if wanted => EventBody::response(chunk),
            _ => EventBody::None,
        };
        let is_remembered = matches!(event, Event::RequestHeaders(_)) && has_later_hooks;
        let call = if wanted || is_remembered { Some(policy.prepare(event, known.as_ref().map(|known| &known.context))?) } else { None };
        // The response can only be added to a context that no event holds.
        drop(known);
        match event {
            Event::RequestHeaders(event) => {
                if let Some(call) = call.as_ref().filter(|_| has_later_hooks) {
                    let takes_body = policy.takes(Hook::RequestBody);
                    let length = if takes_body { Length::of(event) } else { Length::Unknown };
                    let context = policy.pool.request_context(event, call);
                    let remembered = Remembered::new(Arc::clone(id), context, origin.traceparent.clone(), length);
                    let begun = self.contexts.begin(remembered, takes_body && may_have_body(event), at);
                    (origin.number, origin.collides) = (Some(begun.number), begun.collides);
                    // A collision is counted only once.
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
        Ok(call.map(|call| PreparedCall { call, subject: Subject { hook: event.hook(), body, whole: None } }))
    }

    /// Whether to [collect](Self::collect) a chunk of a request's body, because the module takes
    /// whole bodies, or a part of this body is already held.
    fn is_collected<E: Encode>(&self, arrived: &IncomingEvent<'_, E>, chunk: &BodyChunk<'_>) -> bool {
        let wanted = arrived.policy.settings.collect_request_body && arrived.policy.takes(Hook::RequestBody);
        wanted || arrived.encode.connection().is_some_and(|connection| self.bodies.knows(connection, &chunk.correlation_id))
    }

    /// Collects a chunk of a request's body.
    fn collect<E: Encode>(&self, arrived: &IncomingEvent<'_, E>, chunk: &BodyChunk<'_>, origin: &mut Origin) -> Result<Prepared, Failed> {
        let IncomingEvent { policy, at, encode, .. } = *arrived;
        let id = &*chunk.correlation_id;
        let Some(connection) = encode.connection() else {
            if chunk.is_last && chunk.chunk_index == 0 {
                return Ok(self.call(arrived, origin)?.into());
            }
            origin.found(self.contexts.get(id, at).as_deref());
            let detail = "`--collect-request-body` needs the Unix socket, because gRPC has no field for the body that is put back";
            return Err(Failure::new(FailureKind::BodyNotCollected, detail).into());
        };
        let known = self.contexts.get_for_body(id, chunk.is_last, at);
        origin.found(known.as_deref());
        let length = known.as_ref().map_or(Length::Unknown, |known| known.length);
        let needs_more = !chunk.is_last;
        let failed = |failure, rescue| Failed { failure, rescue, needs_more };
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
            number: origin.number,
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
            Collected::Alone => return Ok(self.call(arrived, origin)?.into()),
            Collected::Held => return Ok(Prepared::Known(changed(Some(BodyAction::Drop), needs_more))),
            Collected::Pass => return Ok(Prepared::Known(failed_open(changed(None, needs_more)))),
            Collected::Forward(text) => {
                return Ok(Prepared::Known(failed_open(changed(Some(BodyAction::Replace(text.into())), needs_more))));
            }
        };
        if !policy.takes(Hook::RequestBody) {
            // The module was replaced since the body began.
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
        Ok(Prepared::Call(PreparedCall { call, subject }))
    }

    /// Records that an event will not be answered, because a newer one with its id has arrived.
    pub(crate) fn superseded<E: Encode>(&self, policy: &Policy, now: Instant, encode: &E) {
        self.id_collisions.inc();
        if policy.has_later_hooks() {
            // The discarded answer may be the refusal of another request, which the proxy may let
            // through without it.
            self.contexts.unanswered(encode.correlation_id(), now);
        }
        if let Some(connection) = encode.connection() {
            // The discarded answer may be the one that holds a chunk.
            self.bodies.cancelled(connection, encode.correlation_id());
        }
    }

    /// Records that an event for `hook` could not be decoded. Returns how it can still be answered.
    pub(crate) fn undecodable<E: Encode>(&self, policy: &Policy, hook: Hook, now: Instant, encode: &E) -> Rescue {
        if hook == Hook::RequestHeaders && policy.has_later_hooks() {
            // The request continues with `--fail-open`.
            self.contexts.begin_unknown(encode.correlation_id(), now);
        }
        if let Some(connection) = encode.connection()
            && self.bodies.knows(connection, encode.correlation_id())
        {
            // The event may have carried a part of the body.
            self.bodies.cancelled(connection, encode.correlation_id());
            return Rescue::Refuse;
        }
        Rescue::Pass
    }

    /// Records that an event for `hook` was answered with a refusal. If that was prompt, the
    /// request has no more events.
    pub(crate) fn refused(&self, hook: Hook, id: &str, number: Option<u64>, arrived: Instant) {
        // The proxy may ignore a refusal of a response.
        if let Some(number) = number
            && matches!(hook, Hook::RequestHeaders | Hook::RequestBody)
            && arrived.elapsed() < PROMPT_REFUSAL
        {
            self.contexts.refused(id, number);
        }
    }

    /// Records that the proxy has cancelled the events with this id on this connection.
    pub(crate) fn cancelled(&self, connection: u64, id: &str) {
        self.bodies.cancelled(connection, id);
    }

    /// What another process needs to go on with these connections, and, if asked for, with
    /// requests whose events come on any connection.
    pub(crate) fn carry(&self, connections: &[u64], with_contexts: bool) -> LiveRequests {
        LiveRequests {
            hash_check: hash_check(),
            contexts: with_contexts.then(|| self.contexts.carry(Instant::now())),
            bodies: self.bodies.carry(connections),
        }
    }

    /// Goes on where another process was.
    pub(crate) fn adopt(&self, carried: LiveRequests, connections: &[u64]) -> Result<(), OtherHash> {
        let LiveRequests { hash_check: check, contexts, bodies } = carried;
        let same = check == hash_check() && contexts.is_none_or(|contexts| self.contexts.adopt(contexts));
        if same && self.bodies.adopt(bodies, connections) { Ok(()) } else { Err(OtherHash) }
    }

    /// Records that a connection has ended.
    pub(crate) fn disconnected(&self, connection: u64) {
        self.bodies.disconnected(connection);
    }

    /// Whether a body on this connection is incomplete.
    pub(crate) fn holds(&self, connection: u64) -> bool {
        self.bodies.holds(connection)
    }

    /// Drops bodies that have been idle for too long.
    pub(crate) fn sweep(&self) {
        self.bodies.sweep();
    }
}

/// The key of a fixed id under a fixed secret.
fn hash_check() -> u64 {
    let hasher = IdHasher::default();
    hasher.adopt([1, 2]);
    hasher.key("check")
}

/// Allows a chunk of a request's body, with `action` applied, if any.
fn changed(action: Option<BodyAction<'static>>, needs_more: bool) -> Answer<'static> {
    Answer { request_body_mutation: action.map(BodyMutation::from), needs_more, ..Answer::default() }
}

/// Marks the answer to a chunk that the module does not see, because an error was allowed.
fn failed_open(mut answer: Answer<'static>) -> Answer<'static> {
    answer.audit.tags.push(FAIL_OPEN);
    answer
}

impl Origin {
    /// The event belongs to `known`.
    fn found(&mut self, known: Option<&Remembered>) {
        self.number = known.map(Remembered::number);
        self.traceparent = known.and_then(|known| known.traceparent.clone());
    }
}

/// The trace context in the headers of a request, which a proxy without traces of its own passes on
/// unchanged. It must be there once.
fn own_traceparent<'e>(event: &'e RequestHeaders<'_>) -> Option<&'e str> {
    match event.headers.get("traceparent")? {
        [traceparent] if traceparent.len() <= MAX_TRACEPARENT => Some(traceparent),
        _ => None,
    }
}

/// Whether another event of the request is expected, for which the module has a hook. None may come
/// nevertheless: the proxy sends only the events that its configuration names.
pub(crate) fn is_followed(policy: &Policy, event: &Event<'_>) -> bool {
    let takes_response = policy.takes(Hook::ResponseHeaders) || policy.takes(Hook::ResponseBody);
    match event {
        Event::RequestHeaders(event) => takes_response || policy.takes(Hook::RequestBody) && may_have_body(event),
        Event::RequestBody(chunk) => takes_response || !chunk.is_last,
        // Without content (RFC 9110, 15.3.5 and 15.4.5), the proxy sends no body event.
        Event::ResponseHeaders(event) => is_interim(event.status) || policy.takes(Hook::ResponseBody) && !matches!(event.status, 204 | 304),
        Event::ResponseBody(chunk) => !chunk.is_last,
        Event::WebsocketFrame(_) | Event::GuardrailInspect(_) | Event::RequestComplete(_) => false,
    }
}

/// Whether a body may follow. HTTP/1.1 announces each body (RFC 9112, 6.3), but HTTP/2 need not,
/// and the event does not contain the version. Without an announcement, methods that rarely have a
/// body count as having none.
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
