//! What a guardrail inspection finds.

use crate::Text;
use crate::json::{write_key, write_number, write_score, write_separator, write_string};

/// The verdict of a guardrail inspection. [`Default`] is that nothing was found.
#[derive(Clone, Debug, Default, PartialEq)]
#[must_use = "a verdict has an effect only when the hook returns it"]
pub struct Inspection {
    detections: Vec<Detection>,
    redacted: Option<Text>,
}

/// One finding.
#[derive(Clone, Debug, PartialEq)]
pub struct Detection {
    category: Text,
    description: Text,
    severity: Severity,
    confidence: Option<f64>,
    span: Option<(usize, usize)>,
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Severity {
    /// Worth knowing.
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
    /// Nothing was found.
    pub fn clean() -> Self {
        Self::default()
    }

    /// Adds a finding.
    pub fn detection(mut self, detection: Detection) -> Self {
        self.detections.push(detection);
        self
    }

    /// Offers the text without what was found.
    pub fn redacted(mut self, content: impl Into<Text>) -> Self {
        self.redacted = Some(content.into());
        self
    }

    /// The JSON that the agent is answered.
    pub fn to_json(&self) -> String {
        let mut out = Vec::with_capacity(128);
        self.write(&mut out);
        // What is written are whole strings and ASCII: nothing is lost.
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
    /// A finding of a category, such as `email`, and what it is in words.
    pub fn new(category: impl Into<Text>, description: impl Into<Text>) -> Self {
        Self { category: category.into(), description: description.into(), severity: Severity::default(), confidence: None, span: None }
    }

    /// Says how bad it is.
    #[must_use]
    pub fn severity(mut self, severity: Severity) -> Self {
        self.severity = severity;
        self
    }

    /// Says how sure it is, from 0 to 1. A score beyond counts as the nearer of the two, NaN as 0.
    #[must_use]
    pub fn confidence(mut self, confidence: f64) -> Self {
        self.confidence = Some(if confidence.is_nan() { 0.0 } else { confidence.clamp(0.0, 1.0) });
        self
    }

    /// Says where in the content it is, in bytes.
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
