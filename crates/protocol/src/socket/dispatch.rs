//! Turns the events of a connection into calls of the handler.

use std::fmt;
use std::sync::Arc;

use zentinel_wasm_bounds::log_limited;
use zentinel_wasm_contract::{Answer, Block, BlockStatus, Decision, Encode, Failure, FailureKind, Handler, Hook, Text};

use super::decode::{self, Configure};
use super::encode::SocketEncoder;
use super::encoding::Encoding;
use super::frame::kind;
use crate::config::{MAX_CONFIGURE, TOO_LARGE};
use crate::limits::{MAX_ID, TOO_LONG_ID};
use crate::phase::Phase;
use crate::proxy::Proxy;
use crate::session::{Call, Session, Ticket};

/// Configurations of one connection that may be applied at once. A proxy sends one and waits.
const MAX_CONFIGURING: usize = 4;

/// The unanswered events of a connection. Answers are encoded frames.
pub(super) type SocketSession = Session<Vec<u8>>;

/// The call for an event, and the ticket of that event.
pub(super) type SocketCall = (Ticket, Call<Vec<u8>>);

/// What the calls of one connection share.
pub(super) struct Dispatcher<H> {
    pub(super) handler: Arc<H>,
    /// Number of the connection, unique in this process.
    pub(super) number: u64,
    pub(super) encoding: Encoding,
    proxy: Proxy,
    /// Cloned by each configuration that is being applied, to count them.
    configuring: Arc<()>,
    /// An unanswerable event was logged: a client must not fill the log.
    warned_of_event: bool,
    /// An unanswerable configuration was logged.
    warned_of_configuration: bool,
}

impl<H: Handler> Dispatcher<H> {
    pub(super) fn new(handler: Arc<H>, number: u64, encoding: Encoding, proxy: Proxy) -> Self {
        Self { handler, number, encoding, proxy, configuring: Arc::default(), warned_of_event: false, warned_of_configuration: false }
    }

    /// Decodes an event of type `kind`, registers it in `session`, and returns its call. Returns
    /// `None` for an event that cannot be answered.
    pub(super) fn event(&mut self, session: &mut SocketSession, kind: u8, payload: &[u8]) -> Option<SocketCall> {
        match decode::event(self.encoding, kind, payload) {
            Ok(event) if event.correlation_id().len() > MAX_ID => {
                self.warn_unanswerable(kind, format_args!("{TOO_LONG_ID}"));
                None
            }
            Ok(event) => {
                let id = event.correlation_id();
                let ticket = session.arrived(id);
                let encoder = self.encoder(Arc::from(id), Phase::of(&event));
                Some((ticket, Box::pin(self.handler.handle(&event, ticket.arrival, encoder))))
            }
            Err(error) => {
                let Some(id) = decode::correlation_id(self.encoding, kind, payload).filter(|id| id.len() <= MAX_ID) else {
                    self.warn_unanswerable(kind, format_args!("no usable correlation id: {error}"));
                    return None;
                };
                let failure = Failure::new(FailureKind::InvalidEvent, format!("invalid event of type {kind:#04x}: {error}"));
                let hook = hook_of(kind);
                let encoder = self.encoder(Arc::from(&*id), Phase { hook, chunk_index: 0 });
                let answer = self.handler.reject(hook, failure, encoder);
                Some((session.arrived(&id), Box::pin(std::future::ready(answer))))
            }
        }
    }

    fn warn_unanswerable(&mut self, kind: u8, why: fmt::Arguments<'_>) {
        if !std::mem::replace(&mut self.warned_of_event, true) {
            log_limited!(warn, "cannot answer an event of type {kind:#04x} (further ones on this connection are not logged): {why}");
        }
    }

    /// Decodes a configuration, registers it in `session`, and returns the call that applies it.
    /// Returns `None` for a configuration that cannot be answered.
    pub(super) fn configuration(&mut self, session: &mut SocketSession, payload: &[u8]) -> Option<SocketCall> {
        let configure = match decode_configure(self.encoding, payload) {
            Ok(configure) => configure,
            Err(error) => {
                if !std::mem::replace(&mut self.warned_of_configuration, true) {
                    log_limited!(warn, "cannot answer a configuration (further ones on this connection are not logged): {error}");
                }
                return None;
            }
        };
        let ticket = session.arrived(&configure.correlation_id);
        let encoder = self.encoder(Arc::from(&*configure.correlation_id), Phase { hook: Hook::Configure, chunk_index: 0 });
        let too_many = Arc::strong_count(&self.configuring) > MAX_CONFIGURING;
        let counted = Arc::clone(&self.configuring);
        let applying = self.handler.configure(configure.config.0);
        let call = async move {
            let _counted = counted;
            let applied = if too_many { Err("other configurations are still being applied".to_owned()) } else { applying.await };
            let answer = match applied {
                Ok(()) => Answer::default(),
                Err(reason) => Answer {
                    decision: Decision::Block(Block::new(BlockStatus::BAD_REQUEST, Some(Text::from(reason)))),
                    ..Answer::default()
                },
            };
            encoder.encode(&answer).unwrap_or_default()
        };
        Some((ticket, Box::pin(call)))
    }

    fn encoder(&self, correlation_id: Arc<str>, phase: Phase) -> SocketEncoder {
        SocketEncoder { encoding: self.encoding, proxy: self.proxy, phase, correlation_id, connection: self.number }
    }
}

/// Decodes a configuration event that can be answered.
fn decode_configure(encoding: Encoding, payload: &[u8]) -> Result<Configure<'_>, String> {
    if payload.len() > MAX_CONFIGURE {
        return Err(TOO_LARGE.to_owned());
    }
    let configure = decode::configure(encoding, payload).map_err(|error| error.to_string())?;
    if configure.correlation_id.len() > MAX_ID {
        return Err(TOO_LONG_ID.to_owned());
    }
    Ok(configure)
}

/// The hook of an event's type. An unknown type counts as request headers.
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
