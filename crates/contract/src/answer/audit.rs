//! What goes to the audit log.

use super::error::AnswerError;
use super::printable::Printable;

/// What goes to the audit log.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Audit<'a> {
    /// Freeform tags.
    pub tags: Vec<Printable<'a>>,
    /// Rules that matched.
    pub rule_ids: Vec<Printable<'a>>,
    /// How sure the module is.
    pub confidence: Option<Confidence>,
    /// Structured reasons.
    pub reason_codes: Vec<Printable<'a>>,
}

impl<'a> Audit<'a> {
    /// The entries of both, those of `later` behind, and the higher confidence.
    pub(super) fn merge(mut self, later: Self) -> Self {
        self.tags.extend(later.tags);
        self.rule_ids.extend(later.rule_ids);
        self.reason_codes.extend(later.reason_codes);
        self.confidence = match (self.confidence, later.confidence) {
            (Some(first), Some(later)) => Some(if later > first { later } else { first }),
            (first, later) => first.or(later),
        };
        self
    }

    /// The same, with every borrowed text copied.
    pub fn into_owned(self) -> Audit<'static> {
        let owned = |list: Vec<Printable<'a>>| list.into_iter().map(Printable::into_owned).collect();
        Audit {
            tags: owned(self.tags),
            rule_ids: owned(self.rule_ids),
            confidence: self.confidence,
            reason_codes: owned(self.reason_codes),
        }
    }
}

/// How sure a module is of its decision, from 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Confidence(f64);

impl Confidence {
    /// Checks `confidence`.
    ///
    /// # Errors
    ///
    /// The confidence is below 0, above 1, or not a number.
    pub fn new(confidence: f64) -> Result<Self, AnswerError> {
        if (0.0..=1.0).contains(&confidence) {
            Ok(Self(confidence))
        } else {
            AnswerError::new(format!("a confidence must be 0 to 1, not {confidence}"))
        }
    }

    /// The number.
    pub const fn get(self) -> f64 {
        self.0
    }
}
