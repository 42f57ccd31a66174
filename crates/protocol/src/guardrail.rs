//! Verdicts of guardrail inspections.

use std::borrow::Cow;

use zentinel_wasm_contract::answer::{Confidence, Printable};
use zentinel_wasm_contract::{Answer, Decision, Hook};

/// The verdict to send with `answer`.
///
/// The proxy reads only the verdict of an inspection and ignores the decision, so a block without a
/// verdict, or with one that contradicts it, becomes a verdict.
pub(crate) fn verdict<'a>(answer: &'a Answer<'_>, hook: Hook) -> Option<Cow<'a, str>> {
    if let Some(response) = &answer.guardrail_response
        && (answer.decision == Decision::Allow || response.detected())
    {
        return Some(Cow::Borrowed(response));
    }
    if hook != Hook::GuardrailInspect {
        return None;
    }
    if answer.decision == Decision::Allow {
        return Some(Cow::Borrowed(r#"{"detected":false,"confidence":0.0,"detections":[]}"#));
    }
    let confidence = answer.audit.confidence.map_or(1.0, Confidence::get);
    let category = answer.audit.reason_codes.first().map_or("blocked", Printable::as_str);
    let description = match &answer.decision {
        Decision::Block(block) => block.body(),
        _ => None,
    }
    .unwrap_or("refused by the module");
    let verdict = serde_json::json!({
        "detected": true,
        "confidence": confidence,
        "detections": [{"category": category, "description": description, "severity": "high", "confidence": confidence}],
    });
    Some(Cow::Owned(verdict.to_string()))
}
