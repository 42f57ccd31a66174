//! Verdicts of guardrail inspections.

use crate::Text;
use crate::json::{write_key, write_number, write_score, write_separator, write_string};

/// The verdict of a guardrail inspection. By default, it has no findings.
#[derive(Clone, Debug, Default, PartialEq)]
#[must_use = "a verdict has an effect only when the hook returns it"]
pub struct Inspection {
    detections: Vec<Detection>,
    redacted: Option<Text>,
}

/// A finding.
#[derive(Clone, Debug, PartialEq)]
pub struct Detection {
    category: Text,
    description: Text,
    severity: Severity,
    confidence: Option<f64>,
    span: Option<(usize, usize)>,
}

/// The severity of a finding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Severity {
    /// Informational.
    Low,
    /// The default.
    #[default]
    Medium,
    /// Should be blocked.
    High,
    /// Must be blocked.
    Critical,
}

impl Inspection {
    /// Returns a verdict without findings.
    pub fn clean() -> Self {
        Self::default()
    }

    /// Adds a finding.
    pub fn detection(mut self, detection: Detection) -> Self {
        self.detections.push(detection);
        self
    }

    /// Sets the content with the findings removed or masked.
    pub fn redacted(mut self, content: impl Into<Text>) -> Self {
        self.redacted = Some(content.into());
        self
    }

    /// Returns the answer as JSON.
    pub fn to_json(&self) -> String {
        let mut out = Vec::with_capacity(128);
        self.write(&mut out);
        // Never fails: only whole strings and ASCII are written.
        String::from_utf8(out).unwrap_or_default()
    }

    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        let detected = !self.detections.is_empty();
        let confidence = self.detections.iter().map(|detection| detection.confidence.unwrap_or(1.0)).fold(0.0, f64::max);
        out.extend_from_slice(b"{\"guardrail_response\":{\"detected\":");
        out.extend_from_slice(if detected { b"true".as_slice() } else { b"false" });
        write_key(out, "confidence");
        write_score(out, confidence);
        write_key(out, "detections");
        out.push(b'[');
        for detection in &self.detections {
            write_separator(out);
            detection.write(out);
        }
        out.push(b']');
        if let Some(redacted) = &self.redacted {
            write_key(out, "redacted_content");
            write_string(out, redacted);
        }
        out.extend_from_slice(b"}}");
    }
}

impl Detection {
    /// Creates a finding with a category, such as `email`, and a description.
    pub fn new(category: impl Into<Text>, description: impl Into<Text>) -> Self {
        Self { category: category.into(), description: description.into(), severity: Severity::default(), confidence: None, span: None }
    }

    /// Sets the severity.
    #[must_use]
    pub fn severity(mut self, severity: Severity) -> Self {
        self.severity = severity;
        self
    }

    /// Sets the confidence, 0 to 1. Other values are clamped to this range; NaN becomes 0.
    #[must_use]
    pub fn confidence(mut self, confidence: f64) -> Self {
        self.confidence = Some(if confidence.is_nan() { 0.0 } else { confidence.clamp(0.0, 1.0) });
        self
    }

    /// Sets the position in the content, in bytes.
    #[must_use]
    pub fn span(mut self, span: std::ops::Range<usize>) -> Self {
        self.span = Some((span.start, span.end));
        self
    }

    fn write(&self, out: &mut Vec<u8>) {
        out.push(b'{');
        write_key(out, "category");
        write_string(out, &self.category);
        write_key(out, "description");
        write_string(out, &self.description);
        write_key(out, "severity");
        out.extend_from_slice(match self.severity {
            Severity::Low => b"\"low\"".as_slice(),
            Severity::Medium => b"\"medium\"",
            Severity::High => b"\"high\"",
            Severity::Critical => b"\"critical\"",
        });
        if let Some(confidence) = self.confidence {
            write_key(out, "confidence");
            write_score(out, confidence);
        }
        if let Some((start, end)) = self.span {
            write_key(out, "span");
            out.extend_from_slice(b"{\"start\":");
            write_number(out, start as u64);
            write_key(out, "end");
            write_number(out, end as u64);
            out.push(b'}');
        }
        out.push(b'}');
    }
}
