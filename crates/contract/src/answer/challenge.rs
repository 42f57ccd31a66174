//! What a client has to prove.

use std::ops::Deref;

use super::error::AnswerError;
use super::names::{Sameness, check_unique};
use super::printable::Printable;
use crate::text::{Text, checked_text};

/// Kind of a challenge, such as `captcha`: not empty, without control characters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChallengeType<'a>(Text<'a>);

checked_text!(ChallengeType);

impl<'a> ChallengeType<'a> {
    /// Checks `text`.
    ///
    /// # Errors
    ///
    /// The text is empty or contains control characters.
    pub fn new(text: Text<'a>) -> Result<Self, AnswerError> {
        if text.is_empty() {
            return AnswerError::new("the type of a challenge is empty");
        }
        Ok(Self(Printable::new(text)?.into_text()))
    }
}

/// Parameters of a challenge: unique names regardless of case, because the proxy also reads `Body`
/// for `body`. Names and values have no control characters; only the value of `body`, the page that
/// the client is shown, may contain any text. Every other value may end up in a header.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChallengeParams<'a>(Vec<(Text<'a>, Text<'a>)>);

impl<'a> ChallengeParams<'a> {
    /// Checks `params`, which are not copied.
    ///
    /// # Errors
    ///
    /// A name is repeated, or a name or value contains control characters that it must not have.
    pub fn new(params: Vec<(Text<'a>, Text<'a>)>) -> Result<Self, AnswerError> {
        check_unique(params.iter().map(|(name, _)| name.as_str()), Sameness::AnyCase)?;
        for (name, value) in &params {
            Printable::check(name)?;
            if !is_body(name) {
                Printable::check(value)?;
            }
        }
        Ok(Self(params))
    }

    /// The page that the client is shown.
    pub fn body(&self) -> Option<&Text<'a>> {
        self.0.iter().find(|(name, _)| is_body(name)).map(|(_, body)| body)
    }

    /// The same, with every borrowed text copied.
    pub fn into_owned(self) -> ChallengeParams<'static> {
        ChallengeParams(self.0.into_iter().map(|(name, value)| (name.into_owned(), value.into_owned())).collect())
    }
}

impl<'a> Deref for ChallengeParams<'a> {
    type Target = [(Text<'a>, Text<'a>)];

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

fn is_body(name: &str) -> bool {
    name.eq_ignore_ascii_case("body")
}
