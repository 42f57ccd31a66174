//! Names that must not be repeated.

use std::borrow::Cow;
use std::collections::HashSet;

use super::error::{AnswerError, quoted};

/// Up to this many names, comparing each with each costs less than hashing them. Nearly every
/// answer has fewer.
pub(super) const FEW: usize = 16;

/// When two names are the same.
#[derive(Clone, Copy)]
pub(super) enum Sameness {
    /// Byte by byte.
    Exact,
    /// Regardless of case, like header names.
    AnyCase,
}

/// Checks that no name is repeated: which of its values counts would be chance.
pub(super) fn check_unique<'n>(names: impl Iterator<Item = &'n str> + Clone, sameness: Sameness) -> Result<(), AnswerError> {
    let count = names.clone().count();
    let repeated = if count <= FEW {
        let same = |a: &str, b: &str| match sameness {
            Sameness::Exact => a == b,
            Sameness::AnyCase => a.eq_ignore_ascii_case(b),
        };
        names.clone().enumerate().find(|(at, name)| names.clone().take(*at).any(|other| same(name, other))).map(|(_, name)| name)
    } else {
        let mut known = HashSet::with_capacity(count);
        names.clone().find(|name| {
            !known.insert(match sameness {
                Sameness::Exact => Cow::Borrowed(*name),
                Sameness::AnyCase => Cow::Owned(name.to_ascii_lowercase()),
            })
        })
    };
    match repeated {
        Some(name) => AnswerError::new(format!("{} is given twice", quoted(name))),
        None => Ok(()),
    }
}

/// Checks that none of the header names in `added` is repeated or among those in `known`, which are
/// unique already.
pub(super) fn check_unique_beside<'n>(
    mut known: impl Iterator<Item = &'n str> + Clone,
    added: impl Iterator<Item = &'n str> + Clone,
) -> Result<(), AnswerError> {
    // Nearly every list is made by one call, and a plain iterator is faster than a chain of them.
    match known.next() {
        None => check_unique(added, Sameness::AnyCase),
        Some(first) => check_unique(std::iter::once(first).chain(known).chain(added), Sameness::AnyCase),
    }
}
