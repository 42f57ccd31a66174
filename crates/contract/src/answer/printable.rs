//! Text without control characters.

use super::error::{AnswerError, quoted};
use crate::failure::FailureKind;
use crate::header;
use crate::text::{Text, checked_text};

/// Text without control characters except tab, so that it can be part of a header or of a log line.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Printable<'a>(Text<'a>);

checked_text!(Printable);

impl<'a> Printable<'a> {
    /// Checks `text`.
    ///
    /// # Errors
    ///
    /// The text contains control characters.
    pub fn new(text: Text<'a>) -> Result<Self, AnswerError> {
        Self::check(&text)?;
        Ok(Self(text))
    }

    /// Checks a text that stays where it is.
    pub(super) fn check(text: &str) -> Result<(), AnswerError> {
        if header::is_value(text) { Ok(()) } else { AnswerError::new(format!("{} contains control characters", quoted(text))) }
    }

    /// Checks every text of `list`, which is not copied.
    ///
    /// # Errors
    ///
    /// One of the texts contains control characters.
    pub fn list(list: Vec<Text<'a>>) -> Result<Vec<Self>, AnswerError> {
        list.into_iter().map(Self::new).collect()
    }
}

impl Printable<'static> {
    /// A text that is part of the program.
    ///
    /// # Panics
    ///
    /// The text contains control characters. In a constant, that is a compile error.
    pub const fn from_static(text: &'static str) -> Self {
        assert!(header::is_static_value(text), "the text contains control characters");
        Self(Text::borrowed(text))
    }
}

impl From<FailureKind> for Printable<'static> {
    /// The reason code of a module error.
    fn from(kind: FailureKind) -> Self {
        Self::from_static(kind.code())
    }
}
