//! From a module's answer to what the transport sends.

use std::sync::Arc;

use zentinel_wasm_contract::answer::{CloseCode, CloseReason, Printable};
use zentinel_wasm_contract::{Answer, BlockStatus, Decision, Encode, Failure, FailureKind, Hook, WebsocketDecision};
use zentinel_wasm_runtime::Lease;

use crate::bodies::{self, EventBody};
use crate::metrics::RuleHits;
use crate::outcome::{AnswerSummary, DecisionKind};

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
    pub(crate) decision: DecisionKind,
    /// The answer certainly ends the request.
    pub(crate) refuses: bool,
    pub(crate) loses_routing_metadata: bool,
    /// For those who observe the event.
    pub(crate) summary: Option<Box<AnswerSummary>>,
}

impl<T> Reply<T> {
    /// Reads the module's answer, checks it against its subject, encodes it, and counts its rules.
    /// If `is_observed`, the reply has a summary.
    ///
    /// # Errors
    ///
    /// The answer breaks a rule, the proxy would not apply it, or the transport cannot carry it.
    pub(crate) fn new<E: Encode<Encoded = T>>(
        lease: &Lease,
        subject: &Subject,
        encode: &E,
        rule_hits: &RuleHits,
        is_observed: bool,
    ) -> Result<Self, Failure> {
        let mut answer = lease.answer()?;
        bodies::settle(&mut answer, subject.hook, subject.body)?;
        if let Some(whole) = &subject.whole {
            bodies::put_back(&mut answer, whole);
        }
        let decision = DecisionKind::of(&answer, subject.hook);
        // Not a challenge: Zentinel 0.6.45 lets such a request through.
        let refuses = matches!(decision, DecisionKind::Block | DecisionKind::Redirect) && !answer.needs_more;
        let loses_routing_metadata = encode.loses_routing_metadata(&answer);
        let encoded = encode.encode(&answer)?;
        rule_hits.count(&answer.audit.rule_ids);
        let summary = is_observed.then(|| Box::new(AnswerSummary::of(&answer, subject.hook)));
        Ok(Self { encoded, decision, refuses, loses_routing_metadata, summary })
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
