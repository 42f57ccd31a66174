//! Hints for the choice of an upstream.

use std::collections::HashSet;
use std::ops::Deref;

use super::error::AnswerError;
use super::names::{Sameness, check_unique};
use super::printable::Printable;
use crate::text::Text;

/// Hints for the choice of an upstream: keys and values without control characters, no key twice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RoutingMetadata<'a>(Vec<(Printable<'a>, Printable<'a>)>);

impl<'a> RoutingMetadata<'a> {
    /// Checks `pairs`, which are not copied.
    ///
    /// # Errors
    ///
    /// A key is repeated, or a key or value contains control characters.
    pub fn new(pairs: Vec<(Text<'a>, Text<'a>)>) -> Result<Self, AnswerError> {
        check_unique(pairs.iter().map(|(key, _)| key.as_str()), Sameness::Exact)?;
        let checked = |(key, value)| Ok((Printable::new(key)?, Printable::new(value)?));
        pairs.into_iter().map(checked).collect::<Result<_, _>>().map(Self)
    }

    /// The pairs of both; where both have a key, the value of `later`.
    pub(super) fn merge(mut self, later: Self) -> Self {
        let replaced: HashSet<&str> = later.0.iter().map(|(key, _)| key.as_str()).collect();
        self.0.retain(|(key, _)| !replaced.contains(key.as_str()));
        self.0.extend(later.0);
        self
    }

    /// The same, with every borrowed text copied.
    pub fn into_owned(self) -> RoutingMetadata<'static> {
        RoutingMetadata(self.0.into_iter().map(|(key, value)| (key.into_owned(), value.into_owned())).collect())
    }
}

impl<'a> Deref for RoutingMetadata<'a> {
    type Target = [(Printable<'a>, Printable<'a>)];

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}
