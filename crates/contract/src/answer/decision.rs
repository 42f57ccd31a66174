//! What happens to a request or response.

use super::block::Block;
use super::challenge::{ChallengeParams, ChallengeType};
use super::redirect::{RedirectStatus, RedirectUrl};

/// What happens to a request or response.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Decision<'a> {
    /// It is forwarded.
    #[default]
    Allow,
    /// It is refused, with this response instead.
    Block(Block<'a>),
    /// The client is sent elsewhere.
    Redirect {
        /// Status of the response.
        status: RedirectStatus,
        /// Where to.
        url: RedirectUrl<'a>,
    },
    /// The client has to prove something first.
    Challenge {
        /// Kind of the challenge, such as `captcha`.
        challenge_type: ChallengeType<'a>,
        /// Parameters of the challenge.
        params: ChallengeParams<'a>,
    },
}

impl Decision<'_> {
    /// The same, with every borrowed text copied.
    pub fn into_owned(self) -> Decision<'static> {
        match self {
            Self::Allow => Decision::Allow,
            Self::Block(block) => Decision::Block(block.into_owned()),
            Self::Redirect { status, url } => Decision::Redirect { status, url: url.into_owned() },
            Self::Challenge { challenge_type, params } => {
                Decision::Challenge { challenge_type: challenge_type.into_owned(), params: params.into_owned() }
            }
        }
    }
}
