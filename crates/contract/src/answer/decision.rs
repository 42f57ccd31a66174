//! What becomes of a request or response.

use crate::text::Text;

/// What becomes of a request or response.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Decision<'a> {
    /// It goes on.
    #[default]
    Allow,
    /// It is refused.
    Block {
        /// HTTP status, 200 to 599.
        status: u16,
        /// Body of the response; empty where the status allows none.
        body: Option<Text<'a>>,
        /// Headers of the response, several values of one name joined.
        headers: Vec<(Text<'a>, Text<'a>)>,
    },
    /// The client is sent elsewhere.
    Redirect {
        /// 301, 302, 303, 307 or 308.
        status: u16,
        /// Where to: a URI reference (RFC 3986).
        url: Text<'a>,
    },
    /// The client has to prove something first.
    Challenge {
        /// Kind of the challenge, such as `captcha`.
        challenge_type: Text<'a>,
        /// Parameters of the challenge, as strings.
        params: Vec<(Text<'a>, Text<'a>)>,
    },
}
