//! The verdict of a guardrail inspection.

use std::fmt;
use std::ops::Deref;

use serde_json::Value;

use super::error::AnswerError;

/// The verdict of a guardrail inspection: a JSON object that the proxy can read.
///
/// The proxy treats a verdict that it cannot read as no verdict at all. So what it reads is
/// checked, field by field as in `GuardrailResponse` of zentinel-agent-protocol 0.6.54; other
/// fields are kept as they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuardrailVerdict {
    json: String,
    detected: bool,
}

impl GuardrailVerdict {
    /// Checks `verdict`.
    ///
    /// # Errors
    ///
    /// The verdict is not an object, lacks `detected`, or has a field that the proxy cannot read.
    pub fn new(verdict: &Value) -> Result<Self, AnswerError> {
        let Value::Object(fields) = verdict else { return AnswerError::new("a verdict must be an object") };
        let Some(detected) = fields.get("detected").and_then(Value::as_bool) else { return invalid("detected", "true or false") };
        if !fields.get("confidence").is_none_or(is_score) {
            return invalid("confidence", "0 to 1");
        }
        if !fields.get("redacted_content").is_none_or(|value| value.is_string() || value.is_null()) {
            return invalid("redacted_content", "a string");
        }
        match fields.get("detections") {
            None => {}
            Some(Value::Array(detections)) => detections.iter().try_for_each(check_detection)?,
            Some(_) => return invalid("detections", "a list of objects"),
        }
        Ok(Self { json: verdict.to_string(), detected })
    }

    /// The verdict as JSON.
    pub fn as_str(&self) -> &str {
        &self.json
    }

    /// Whether the verdict goes against the text.
    pub const fn detected(&self) -> bool {
        self.detected
    }

    /// The first verdict that goes against the text, else the later one.
    pub(super) fn merge(first: Option<Self>, later: Option<Self>) -> Option<Self> {
        match (first, later) {
            (Some(first), Some(_)) if first.detected => Some(first),
            (first, later) => later.or(first),
        }
    }
}

impl Deref for GuardrailVerdict {
    type Target = str;

    fn deref(&self) -> &str {
        &self.json
    }
}

impl fmt::Display for GuardrailVerdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.json)
    }
}

fn check_detection(detection: &Value) -> Result<(), AnswerError> {
    let Value::Object(fields) = detection else { return invalid("detections", "a list of objects") };
    for field in ["category", "description"] {
        if !fields.get(field).is_some_and(Value::is_string) {
            return invalid(&format!("detections.{field}"), "a string");
        }
    }
    if !fields.get("severity").is_none_or(is_severity) {
        return invalid("detections.severity", "`low`, `medium`, `high` or `critical`");
    }
    if !fields.get("confidence").is_none_or(|value| value.is_null() || is_score(value)) {
        return invalid("detections.confidence", "0 to 1");
    }
    if !fields.get("span").is_none_or(|value| value.is_null() || is_span(value)) {
        return invalid("detections.span", "an object of `start` and `end`, in bytes");
    }
    Ok(())
}

fn invalid<T>(field: &str, expected: &str) -> Result<T, AnswerError> {
    AnswerError::new(format!("`{field}` must be {expected}"))
}

fn is_score(value: &Value) -> bool {
    value.as_f64().is_some_and(|score| (0.0..=1.0).contains(&score))
}

fn is_severity(value: &Value) -> bool {
    value.as_str().is_some_and(|value| ["low", "medium", "high", "critical"].contains(&value))
}

fn is_span(value: &Value) -> bool {
    value.is_object() && ["start", "end"].iter().all(|end| value.get(end).is_some_and(Value::is_u64))
}
