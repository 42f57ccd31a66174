//! A refusal and its response.

use std::collections::HashMap;
use std::ops::Deref;

use super::error::AnswerError;
use super::headers::{HeaderName, HeaderValue, check_no_location};
use super::names::{FEW, Sameness, check_unique, check_unique_beside};
use crate::header;
use crate::text::Text;

/// A refusal: the response that the client gets instead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block<'a> {
    status: BlockStatus,
    body: Option<Text<'a>>,
    headers: BlockHeaders<'a>,
}

impl<'a> Block<'a> {
    /// A response without headers. Without a body the proxy sends a text of its own.
    ///
    /// A status that allows no content gets an empty body, whatever `body` is, because the proxy
    /// would otherwise send its own text or the length of one.
    pub fn new(status: BlockStatus, body: Option<Text<'a>>) -> Self {
        let body = if status.has_no_content() { Some(Text::borrowed("")) } else { body };
        Self { status, body, headers: BlockHeaders::default() }
    }

    /// Status of the response.
    pub const fn status(&self) -> BlockStatus {
        self.status
    }

    /// Body of the response. None leaves it to the proxy.
    pub fn body(&self) -> Option<&str> {
        self.body.as_deref()
    }

    /// Headers of the response.
    pub const fn headers(&self) -> &BlockHeaders<'a> {
        &self.headers
    }

    /// Headers of the response, to be changed.
    pub const fn headers_mut(&mut self) -> &mut BlockHeaders<'a> {
        &mut self.headers
    }

    /// The same, with every borrowed text copied.
    pub fn into_owned(self) -> Block<'static> {
        Block { status: self.status, body: self.body.map(Text::into_owned), headers: self.headers.into_owned() }
    }
}

impl From<BlockStatus> for Block<'_> {
    /// A response without headers, whose body the proxy writes.
    fn from(status: BlockStatus) -> Self {
        Self::new(status, None)
    }
}

/// Status of a block, 200 to 599: after 1xx, a client would keep waiting for the final response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockStatus(u16);

impl BlockStatus {
    /// 400.
    pub const BAD_REQUEST: Self = Self(400);
    /// 403, the status of a block that names none.
    pub const FORBIDDEN: Self = Self(403);
    /// 500.
    pub const INTERNAL_SERVER_ERROR: Self = Self(500);

    /// Checks `status`.
    ///
    /// # Errors
    ///
    /// The status is out of range.
    pub fn new(status: u16) -> Result<Self, AnswerError> {
        if (200..=599).contains(&status) {
            Ok(Self(status))
        } else {
            AnswerError::new(format!("the status of a block must be 200 to 599, not {status}"))
        }
    }

    /// The number.
    pub const fn get(self) -> u16 {
        self.0
    }

    /// Whether a response of this status has no content (RFC 9110, 15.3.5, 15.3.6 and 15.4.5).
    const fn has_no_content(self) -> bool {
        matches!(self.0, 204 | 205 | 304)
    }
}

/// Headers of a block's response: one value for each name, because the protocol carries no more.
///
/// Several values of a header are joined. `Set-Cookie`, whose values cannot be joined (RFC 9110,
/// 5.3), has one. No header frames the message. `Location` keeps the rules of
/// [`RedirectUrl`](super::RedirectUrl).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockHeaders<'a>(Vec<(HeaderName<'a>, HeaderValue<'a>)>);

impl<'a> BlockHeaders<'a> {
    /// Sets each header to its values; one without values is left out.
    ///
    /// # Errors
    ///
    /// A header is set twice or frames the message, a name or value is invalid, `Location` has not
    /// exactly one valid URL, or `Set-Cookie` has several values. The headers before it are set.
    pub fn set(&mut self, headers: Vec<(Text<'a>, Vec<Text<'a>>)>) -> Result<(), AnswerError> {
        let known = self.0.iter().map(|(name, _)| name.as_str());
        check_unique_beside(known, headers.iter().map(|(name, _)| name.as_str()))?;
        self.0.reserve(headers.len());
        for (name, values) in headers {
            let name = HeaderName::writable(name)?;
            check_cookies(&name, values.len())?;
            let value = if name.is("location") { Some(HeaderValue::location(values)?) } else { joined(&name, values)? };
            self.0.extend(value.map(|value| (name, value)));
        }
        Ok(())
    }

    /// Adds values to each header, behind those that it has.
    ///
    /// # Errors
    ///
    /// A name is repeated, frames the message, or is `Location`, a name or value is invalid, or
    /// `Set-Cookie` has several values. The values before it are added.
    pub fn append(&mut self, headers: Vec<(Text<'a>, Vec<Text<'a>>)>) -> Result<(), AnswerError> {
        check_no_location(&headers)?;
        check_unique(headers.iter().map(|(name, _)| name.as_str()), Sameness::AnyCase)?;
        let places = Places::of(&self.0, headers.len());
        self.0.reserve(headers.len());
        for (name, values) in headers {
            let name = HeaderName::writable(name)?;
            let known = places.find(&self.0, &name);
            check_cookies(&name, values.len() + usize::from(known.is_some()))?;
            let Some(value) = joined(&name, values)? else { continue };
            match known.and_then(|at| self.0.get_mut(at)) {
                Some((_, before)) => before.append(header::separator(&name), &value),
                None => self.0.push((name, value)),
            }
        }
        Ok(())
    }

    /// The same, with every borrowed text copied.
    pub fn into_owned(self) -> BlockHeaders<'static> {
        BlockHeaders(self.0.into_iter().map(|(name, value)| (name.into_owned(), value.into_owned())).collect())
    }
}

impl<'a> Deref for BlockHeaders<'a> {
    type Target = [(HeaderName<'a>, HeaderValue<'a>)];

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

/// The values of a header as one. None if there are none.
fn joined<'a>(name: &HeaderName<'_>, values: Vec<Text<'a>>) -> Result<Option<HeaderValue<'a>>, AnswerError> {
    let separator = header::separator(name);
    let mut values = values.into_iter();
    let Some(first) = values.next() else { return Ok(None) };
    let mut all = HeaderValue::of(name, first)?;
    for value in values {
        all.append(separator, &HeaderValue::of(name, value)?);
    }
    Ok(Some(all))
}

fn check_cookies(name: &HeaderName<'_>, values: usize) -> Result<(), AnswerError> {
    if values > 1 && name.is("set-cookie") {
        return AnswerError::new(format!("a block carries one value of each header, but `Set-Cookie` has {values}"));
    }
    Ok(())
}

/// Where the headers of a block are that were there before others are added.
enum Places {
    /// So many, which are compared one by one.
    Few(usize),
    /// By lower-case name.
    Hashed(HashMap<String, usize>),
}

impl Places {
    fn of(headers: &[(HeaderName<'_>, HeaderValue<'_>)], added: usize) -> Self {
        if headers.len().min(added) <= FEW {
            return Self::Few(headers.len());
        }
        Self::Hashed(headers.iter().enumerate().map(|(at, (name, _))| (name.to_ascii_lowercase(), at)).collect())
    }

    fn find(&self, headers: &[(HeaderName<'_>, HeaderValue<'_>)], name: &str) -> Option<usize> {
        match self {
            Self::Few(len) => headers.iter().take(*len).position(|(known, _)| known.is(name)),
            Self::Hashed(places) => places.get(&name.to_ascii_lowercase()).copied(),
        }
    }
}
