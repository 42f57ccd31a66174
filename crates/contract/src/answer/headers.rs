//! Changes to headers.

use std::collections::HashSet;
use std::ops::Deref;

use super::error::{AnswerError, quoted};
use super::names::{Sameness, check_unique, check_unique_beside};
use super::redirect;
use crate::header;
use crate::limits::{MAX_ADDED, MAX_REPEATED_NAMES};
use crate::text::{Text, checked_text};

/// Name of a header: a token (RFC 9110, 5.6.2).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeaderName<'a>(Text<'a>);

checked_text!(HeaderName);

impl<'a> HeaderName<'a> {
    /// Checks `name`.
    ///
    /// # Errors
    ///
    /// The name is not a token.
    pub fn new(name: Text<'a>) -> Result<Self, AnswerError> {
        if header::is_token(&name) { Ok(Self(name)) } else { AnswerError::new(format!("{} is not a valid header name", quoted(&name))) }
    }

    /// Whether this is `name`, regardless of case.
    pub fn is(&self, name: &str) -> bool {
        self.eq_ignore_ascii_case(name)
    }

    /// Checks the name of a header that is set or appended.
    pub(super) fn writable(name: Text<'a>) -> Result<Self, AnswerError> {
        let name = Self::new(name)?;
        if header::is_framing(&name) {
            return AnswerError::new(format!("{} frames the message, so only the proxy may set it", quoted(&name)));
        }
        Ok(name)
    }
}

/// Value of a header: no control characters except tab.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeaderValue<'a>(Text<'a>);

checked_text!(HeaderValue);

impl<'a> HeaderValue<'a> {
    /// Checks `value`.
    ///
    /// # Errors
    ///
    /// The value contains control characters.
    pub fn new(value: Text<'a>) -> Result<Self, AnswerError> {
        if header::is_value(&value) {
            Ok(Self(value))
        } else {
            AnswerError::new(format!("the value {} contains control characters", quoted(&value)))
        }
    }

    /// Checks a value of the header `name`, by which errors name it.
    pub(super) fn of(name: &HeaderName<'_>, value: Text<'a>) -> Result<Self, AnswerError> {
        if header::is_value(&value) {
            Ok(Self(value))
        } else {
            AnswerError::new(format!("the value of {} contains control characters", quoted(name)))
        }
    }

    /// Checks the values of a `Location`, which keeps the rules of a redirect's URL.
    pub(super) fn location(values: Vec<Text<'a>>) -> Result<Self, AnswerError> {
        redirect::encoded("the URL in `Location`", only("Location", values)?).map(Self)
    }

    /// Appends another value of the same header.
    pub(super) fn append(&mut self, separator: &str, value: &HeaderValue<'_>) {
        let joined = self.0.0.to_mut();
        joined.push_str(separator);
        joined.push_str(value);
    }
}

/// A change to one header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HeaderOp<'a> {
    /// Replaces all values.
    Set(HeaderName<'a>, HeaderValue<'a>),
    /// Adds a value.
    Add(HeaderName<'a>, HeaderValue<'a>),
    /// Removes all values.
    Remove(HeaderName<'a>),
}

impl<'a> HeaderOp<'a> {
    /// The header that is changed.
    pub const fn name(&self) -> &HeaderName<'a> {
        match self {
            Self::Set(name, _) | Self::Add(name, _) | Self::Remove(name) => name,
        }
    }

    /// The same, with every borrowed text copied.
    pub fn into_owned(self) -> HeaderOp<'static> {
        match self {
            Self::Set(name, value) => HeaderOp::Set(name.into_owned(), value.into_owned()),
            Self::Add(name, value) => HeaderOp::Add(name.into_owned(), value.into_owned()),
            Self::Remove(name) => HeaderOp::Remove(name.into_owned()),
        }
    }
}

/// Changes to the headers of a request, in the order in which they apply.
///
/// No change touches a header that frames the message. `Host` keeps exactly one valid value. No
/// header is set twice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RequestChanges<'a>(Vec<HeaderOp<'a>>);

/// Changes to the headers of a response, in the order in which they apply.
///
/// No header that frames the message is set or appended. `Location` has one value, which keeps the
/// rules of [`RedirectUrl`](super::RedirectUrl). No header is set twice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ResponseChanges<'a>(Vec<HeaderOp<'a>>);

impl<'a> RequestChanges<'a> {
    /// Removes every header in `names`.
    ///
    /// # Errors
    ///
    /// A name is not a token, frames the message, or is `Host`. The names before it are removed.
    pub fn remove(&mut self, names: Vec<Text<'a>>) -> Result<(), AnswerError> {
        for name in names {
            let name = HeaderName::new(name)?;
            if header::is_framing(&name) {
                return AnswerError::new(format!("{} frames the message, so only the proxy may remove it", quoted(&name)));
            }
            if name.is("host") {
                return AnswerError::new(format!("{} cannot be removed, because a request needs one: set another instead", quoted(&name)));
            }
            self.0.push(HeaderOp::Remove(name));
        }
        Ok(())
    }

    /// Sets each header to its values; one without values stays as it is.
    ///
    /// # Errors
    ///
    /// A header is set twice or frames the message, a name or value is invalid, `Host` has not
    /// exactly one valid value, or there are too many values. The headers before it are set.
    pub fn set(&mut self, headers: Vec<(Text<'a>, Vec<Text<'a>>)>) -> Result<(), AnswerError> {
        set(&mut self.0, headers, |ops, name, values| {
            if !name.is("host") {
                return set_values(ops, name, values);
            }
            let host = only("Host", values)?;
            if !header::is_host(&host) {
                return AnswerError::new(format!("`Host` is set to {}, which is not a valid host", quoted(&host)));
            }
            ops.push(HeaderOp::Set(name, HeaderValue(host)));
            Ok(())
        })
    }

    /// Adds values to each header, behind those that it has.
    ///
    /// # Errors
    ///
    /// A name is repeated, frames the message, or is `Host`, a name or value is invalid, or there
    /// are too many values. The values before it are added.
    pub fn append(&mut self, headers: Vec<(Text<'a>, Vec<Text<'a>>)>) -> Result<(), AnswerError> {
        if let Some((name, _)) = headers.iter().find(|(name, _)| name.eq_ignore_ascii_case("host")) {
            return AnswerError::new(format!("{} cannot be appended, because a request has one: set it instead", quoted(name)));
        }
        append(&mut self.0, headers)
    }

    /// These changes followed by `later`. What `later` sets or removes is not changed before.
    pub(super) fn merge(self, later: Self) -> Self {
        Self(merge(self.0, later.0))
    }

    /// The same, with every borrowed text copied.
    pub fn into_owned(self) -> RequestChanges<'static> {
        RequestChanges(self.0.into_iter().map(HeaderOp::into_owned).collect())
    }
}

impl<'a> ResponseChanges<'a> {
    /// Removes every header in `names`.
    ///
    /// # Errors
    ///
    /// A name is not a token. The names before it are removed.
    pub fn remove(&mut self, names: Vec<Text<'a>>) -> Result<(), AnswerError> {
        for name in names {
            self.0.push(HeaderOp::Remove(HeaderName::new(name)?));
        }
        Ok(())
    }

    /// Sets each header to its values; one without values stays as it is.
    ///
    /// # Errors
    ///
    /// A header is set twice or frames the message, a name or value is invalid, `Location` has not
    /// exactly one valid URL, or there are too many values. The headers before it are set.
    pub fn set(&mut self, headers: Vec<(Text<'a>, Vec<Text<'a>>)>) -> Result<(), AnswerError> {
        set(&mut self.0, headers, |ops, name, values| {
            if !name.is("location") {
                return set_values(ops, name, values);
            }
            let url = HeaderValue::location(values)?;
            ops.push(HeaderOp::Set(name, url));
            Ok(())
        })
    }

    /// Adds values to each header, behind those that it has.
    ///
    /// # Errors
    ///
    /// A name is repeated, frames the message, or is `Location`, a name or value is invalid, or
    /// there are too many values. The values before it are added.
    pub fn append(&mut self, headers: Vec<(Text<'a>, Vec<Text<'a>>)>) -> Result<(), AnswerError> {
        check_no_location(&headers)?;
        append(&mut self.0, headers)
    }

    /// These changes followed by `later`. What `later` sets or removes is not changed before.
    pub(super) fn merge(self, later: Self) -> Self {
        Self(merge(self.0, later.0))
    }

    /// The same, with every borrowed text copied.
    pub fn into_owned(self) -> ResponseChanges<'static> {
        ResponseChanges(self.0.into_iter().map(HeaderOp::into_owned).collect())
    }
}

impl<'a> Deref for RequestChanges<'a> {
    type Target = [HeaderOp<'a>];

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl<'a> Deref for ResponseChanges<'a> {
    type Target = [HeaderOp<'a>];

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

/// The one value that the header `name` must have.
fn only<'a>(name: &str, values: Vec<Text<'a>>) -> Result<Text<'a>, AnswerError> {
    match <[Text<'a>; 1]>::try_from(values) {
        Ok([value]) => Ok(value),
        Err(values) => AnswerError::new(format!("`{name}` must have one value, not {}", values.len())),
    }
}

/// Checks that no `Location` is appended: a response has one.
pub(super) fn check_no_location(headers: &[(Text<'_>, Vec<Text<'_>>)]) -> Result<(), AnswerError> {
    match headers.iter().find(|(name, _)| name.eq_ignore_ascii_case("location")) {
        Some((name, _)) => AnswerError::new(format!("{} cannot be appended, because a response has one: set it instead", quoted(name))),
        None => Ok(()),
    }
}

/// Sets headers, each by `set`, which is given its name and values.
fn set<'a>(
    ops: &mut Vec<HeaderOp<'a>>,
    headers: Vec<(Text<'a>, Vec<Text<'a>>)>,
    mut set: impl FnMut(&mut Vec<HeaderOp<'a>>, HeaderName<'a>, Vec<Text<'a>>) -> Result<(), AnswerError>,
) -> Result<(), AnswerError> {
    let known = ops.iter().filter_map(|op| if let HeaderOp::Set(name, _) = op { Some(name.as_str()) } else { None });
    check_unique_beside(known, headers.iter().map(|(name, _)| name.as_str()))?;
    let mut amount = Amount::default();
    for (name, values) in headers {
        let name = HeaderName::writable(name)?;
        amount.add(&name, values.len())?;
        set(ops, name, values)?;
    }
    Ok(())
}

/// Sets a header to its first value and adds the others.
fn set_values<'a>(ops: &mut Vec<HeaderOp<'a>>, name: HeaderName<'a>, values: Vec<Text<'a>>) -> Result<(), AnswerError> {
    let mut values = values.into_iter();
    let Some(first) = values.next() else { return Ok(()) };
    let first = HeaderValue::of(&name, first)?;
    if values.len() == 0 {
        ops.push(HeaderOp::Set(name, first));
        return Ok(());
    }
    ops.push(HeaderOp::Set(name.clone(), first));
    add_values(ops, &name, values)
}

/// Adds values to headers.
fn append<'a>(ops: &mut Vec<HeaderOp<'a>>, headers: Vec<(Text<'a>, Vec<Text<'a>>)>) -> Result<(), AnswerError> {
    check_unique(headers.iter().map(|(name, _)| name.as_str()), Sameness::AnyCase)?;
    let mut amount = Amount::default();
    for (name, values) in headers {
        let name = HeaderName::writable(name)?;
        amount.add(&name, values.len())?;
        add_values(ops, &name, values.into_iter())?;
    }
    Ok(())
}

fn add_values<'a>(
    ops: &mut Vec<HeaderOp<'a>>,
    name: &HeaderName<'a>,
    values: impl ExactSizeIterator<Item = Text<'a>>,
) -> Result<(), AnswerError> {
    ops.reserve(values.len());
    for value in values {
        ops.push(HeaderOp::Add(name.clone(), HeaderValue::of(name, value)?));
    }
    Ok(())
}

/// What one call adds to a list of changes.
#[derive(Default)]
struct Amount {
    values: usize,
    repeated_names: usize,
}

impl Amount {
    /// Counts a header with so many values.
    fn add(&mut self, name: &str, values: usize) -> Result<(), AnswerError> {
        self.values = self.values.saturating_add(values);
        self.repeated_names = self.repeated_names.saturating_add(name.len().saturating_mul(values.saturating_sub(1)));
        if self.values > MAX_ADDED || self.repeated_names > MAX_REPEATED_NAMES {
            return AnswerError::new(format!("too many values, at {}", quoted(name)));
        }
        Ok(())
    }
}

/// Changes followed by others. An earlier change to a header that a later one sets or removes has
/// no effect and is left out, so that no header is set twice.
fn merge<'a>(mut first: Vec<HeaderOp<'a>>, later: Vec<HeaderOp<'a>>) -> Vec<HeaderOp<'a>> {
    let overridden: HashSet<String> =
        later.iter().filter(|op| !matches!(op, HeaderOp::Add(..))).map(|op| op.name().to_ascii_lowercase()).collect();
    first.retain(|op| !overridden.contains(&op.name().to_ascii_lowercase()));
    first.extend(later);
    first
}
