//! Where a client is sent, and how.

use super::error::{AnswerError, quoted};
use crate::text::{Text, checked_text};
use crate::url;

/// Status of a redirect: 301, 302, 303, 307 or 308.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RedirectStatus(u16);

impl RedirectStatus {
    /// Found: the target is temporary.
    pub const FOUND: Self = Self(302);

    /// Checks `status`.
    ///
    /// # Errors
    ///
    /// The status does not redirect.
    pub fn new(status: u16) -> Result<Self, AnswerError> {
        if matches!(status, 301 | 302 | 303 | 307 | 308) {
            Ok(Self(status))
        } else {
            AnswerError::new(format!("the status of a redirect must be 301, 302, 303, 307 or 308, not {status}"))
        }
    }

    /// The number.
    pub const fn get(self) -> u16 {
        self.0
    }
}

/// Where a client is sent: a URI reference (RFC 3986) that runs no code in the browser.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RedirectUrl<'a>(Text<'a>);

checked_text!(RedirectUrl);

impl<'a> RedirectUrl<'a> {
    /// Checks `url` and percent-encodes what a URI reference must not contain. A URL that is
    /// encoded already is not copied.
    ///
    /// # Errors
    ///
    /// The URL is blank, contains control characters, has an invalid host or port, or a scheme that
    /// runs code in the browser.
    pub fn new(url: Text<'a>) -> Result<Self, AnswerError> {
        const WHAT: &str = "the URL of a redirect";

        if url.trim().is_empty() {
            return AnswerError::new(format!("{WHAT} is empty"));
        }
        encoded(WHAT, url).map(Self)
    }
}

/// A URL as RFC 3986 requires it in a `Location`. `what` names it in errors.
pub(super) fn encoded<'a>(what: &str, url: Text<'a>) -> Result<Text<'a>, AnswerError> {
    // Browsers skip white space before a scheme.
    let scheme = url.trim_start().split(':').next().unwrap_or_default().trim_end();
    if ["javascript", "data", "vbscript"].iter().any(|banned| banned.eq_ignore_ascii_case(scheme)) {
        return AnswerError::new(format!("{what} has the scheme {}, which runs code in the browser", quoted(scheme)));
    }
    url::encoded(url).or_else(|error| AnswerError::new(format!("{what} {}", error.reason())))
}
