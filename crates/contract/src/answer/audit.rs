//! What goes to the audit log.

use crate::text::Text;

/// What goes to the audit log.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Audit<'a> {
    /// Freeform tags.
    pub tags: Vec<Text<'a>>,
    /// Rules that matched.
    pub rule_ids: Vec<Text<'a>>,
    /// From 0 to 1.
    pub confidence: Option<f64>,
    /// Structured reasons.
    pub reason_codes: Vec<Text<'a>>,
}
