//! Changes to the chunks of a body.

use std::borrow::Cow;

/// What becomes of one chunk of a body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BodyMutation<'a> {
    /// The change.
    pub action: BodyAction<'a>,
    /// The chunk meant. None means the one at hand.
    pub chunk_index: Option<u32>,
}

/// A change to one chunk of a body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BodyAction<'a> {
    /// The chunk stays as it is.
    PassThrough,
    /// The chunk becomes these bytes.
    Replace(Cow<'a, [u8]>),
    /// The chunk is left out.
    Drop,
}

impl<'a> From<BodyAction<'a>> for BodyMutation<'a> {
    /// The change to the chunk at hand.
    fn from(action: BodyAction<'a>) -> Self {
        Self { action, chunk_index: None }
    }
}
