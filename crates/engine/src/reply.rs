//! From a module's answer to what the transport sends.

use std::sync::Arc;

use zentinel_wasm_contract::answer::{CloseCode, CloseReason, Printable};
use zentinel_wasm_contract::{Answer, BlockStatus, Decision, Encode, Failure, FailureKind, Hook, WebsocketDecision};
use zentinel_wasm_runtime::Lease;

use crate::bodies::{self, EventBody};

/// Tag of an event that a module error let through.
pub(crate) const FAIL_OPEN: Printable<'_> = Printable::from_static("fail-open");

/// What an answer refers to.
#[derive(Clone, Debug)]
pub(crate) struct Subject {
    pub(crate) hook: Hook,
    pub(crate) body: EventBody,
    /// The collected body, which the answer puts back.
    pub(crate) whole: Option<Arc<Vec<u8>>>,
}

/// An encoded answer, and what the agent needs to know about it.
pub(crate) struct Reply<T> {
    pub(crate) encoded: T,
    pub(crate) blocks: bool,
    /// The answer certainly ends the request.
    pub(crate) refuses: bool,
    pub(crate) loses_routing_metadata: bool,
}

impl<T> Reply<T> {
    /// Reads the module's answer, checks it against its subject, and encodes it.
    ///
    /// # Errors
    ///
    /// The answer breaks a rule, the proxy would not apply it, or the transport cannot carry it.
    pub(crate) fn new<E: Encode<Encoded = T>>(lease: &Lease, subject: &Subject, encode: &E) -> Result<Self, Failure> {
        let mut answer = lease.answer()?;
        bodies::settle(&mut answer, subject.hook, subject.body)?;
        if let Some(whole) = &subject.whole {
            bodies::put_back(&mut answer, whole);
        }
        let blocks = matches!(answer.decision, Decision::Block(_));
        // Not a challenge: Zentinel 0.6.45 lets such a request through.
        let refuses = (blocks || matches!(answer.decision, Decision::Redirect { .. })) && !answer.needs_more;
        let loses_routing_metadata = encode.loses_routing_metadata(&answer);
        Ok(Self { encoded: encode.encode(&answer)?, blocks, refuses, loses_routing_metadata })
    }
}

/// The answer to an event for which the module gave none.
pub(crate) fn module_error(kind: FailureKind, fail_open: bool, hook: Hook) -> Answer<'static> {
    const WASM_ERROR: Printable<'_> = Printable::from_static("wasm-error");
    const CLOSE: WebsocketDecision<'_> =
        WebsocketDecision::Close { code: CloseCode::INTERNAL_ERROR, reason: CloseReason::from_static("wasm-error") };

    let mut answer = Answer::default();
    answer.audit.tags.push(WASM_ERROR);
    answer.audit.reason_codes.push(kind.into());
    if fail_open {
        answer.audit.tags.push(FAIL_OPEN);
        return answer;
    }
    answer.decision = Decision::Block(BlockStatus::INTERNAL_SERVER_ERROR.into());
    if hook == Hook::WebsocketFrame {
        answer.websocket_decision = Some(CLOSE);
    }
    answer
}
