//! Why something cannot be part of an answer.

use std::borrow::Cow;
use std::fmt;

use crate::limits::MAX_QUOTE;
use crate::text::shortened;

/// Why something cannot be part of an answer: one line that names the value and the rule it breaks.
///
/// The field of the value is unknown here. The reader of the answer adds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AnswerError(Cow<'static, str>);

impl AnswerError {
    pub(super) fn new<T>(reason: impl Into<Cow<'static, str>>) -> Result<T, Self> {
        Err(Self(reason.into()))
    }
}

impl fmt::Display for AnswerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for AnswerError {}

/// A guest's text as it is quoted in messages.
pub(super) fn quoted(text: &str) -> String {
    format!("`{}`", shortened(text, MAX_QUOTE))
}
