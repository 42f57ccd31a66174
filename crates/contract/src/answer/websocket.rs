//! What happens to a WebSocket frame.

use super::error::AnswerError;
use super::printable::Printable;
use crate::limits::MAX_CLOSE_REASON;
use crate::text::{Text, checked_text};

/// What happens to a WebSocket frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WebsocketDecision<'a> {
    /// The frame is forwarded.
    Allow,
    /// The frame is left out.
    Drop,
    /// The connection is closed.
    Close {
        /// Close code.
        code: CloseCode,
        /// Reason, for people.
        reason: CloseReason<'a>,
    },
}

impl WebsocketDecision<'_> {
    /// The first decision that refuses the frame, else the later one.
    pub(super) fn merge(first: Option<Self>, later: Option<Self>) -> Option<Self> {
        match (first, later) {
            (Some(first), Some(_)) if first != Self::Allow => Some(first),
            (first, later) => later.or(first),
        }
    }

    /// The same, with a borrowed reason copied.
    pub fn into_owned(self) -> WebsocketDecision<'static> {
        match self {
            Self::Allow => WebsocketDecision::Allow,
            Self::Drop => WebsocketDecision::Drop,
            Self::Close { code, reason } => WebsocketDecision::Close { code, reason: reason.into_owned() },
        }
    }
}

/// A close code that an endpoint may send (RFC 6455, 7.4): 1000 to 4999, without 1004 to 1006 and
/// 1015.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CloseCode(u16);

impl CloseCode {
    /// The message violates the policy of the receiver.
    pub const POLICY_VIOLATION: Self = Self(1008);
    /// The server met a condition that prevented it from fulfilling the request.
    pub const INTERNAL_ERROR: Self = Self(1011);

    /// Checks `code`.
    ///
    /// # Errors
    ///
    /// The code is out of range, or one that is never sent.
    pub fn new(code: u16) -> Result<Self, AnswerError> {
        // These codes only report how a connection ended (RFC 6455, 7.4.1).
        if (1000..=4999).contains(&code) && !matches!(code, 1004..=1006 | 1015) {
            Ok(Self(code))
        } else {
            AnswerError::new(format!("a close code must be one that may be sent, 1000 to 4999, not {code}"))
        }
    }

    /// The number.
    pub const fn get(self) -> u16 {
        self.0
    }
}

/// Why a connection is closed, for people: at most [`MAX_CLOSE_REASON`] bytes without control
/// characters. Empty by default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CloseReason<'a>(Text<'a>);

checked_text!(CloseReason);

impl<'a> CloseReason<'a> {
    /// Checks `reason`.
    ///
    /// # Errors
    ///
    /// The reason is too long or contains control characters.
    pub fn new(reason: Text<'a>) -> Result<Self, AnswerError> {
        let reason = Printable::new(reason)?;
        if reason.len() > MAX_CLOSE_REASON {
            return AnswerError::new(format!("a close reason has at most {MAX_CLOSE_REASON} bytes, not {}", reason.len()));
        }
        Ok(Self(reason.into_text()))
    }
}

impl CloseReason<'static> {
    /// A reason that is part of the program.
    ///
    /// # Panics
    ///
    /// The reason is too long or contains control characters. In a constant, that is a compile
    /// error.
    pub const fn from_static(reason: &'static str) -> Self {
        assert!(reason.len() <= MAX_CLOSE_REASON, "the reason is too long");
        assert!(crate::header::is_static_value(reason), "the reason contains control characters");
        Self(Text::borrowed(reason))
    }
}
