//! Changes to the chunks of a body.

use std::borrow::Cow;

/// A change to one chunk of a body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BodyMutation<'a> {
    /// The change.
    pub action: BodyAction<'a>,
    /// The chunk that is changed, from 0. None is the chunk of the event.
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
    /// A change to the chunk of the event.
    fn from(action: BodyAction<'a>) -> Self {
        Self { action, chunk_index: None }
    }
}

impl<'a> BodyMutation<'a> {
    /// The effect of two changes made one after the other.
    pub(super) fn merge(first: Option<Self>, later: Option<Self>) -> Option<Self> {
        match (first, later) {
            (Some(first), None | Some(Self { action: BodyAction::PassThrough, .. })) => Some(first),
            (_, later) => later,
        }
    }

    /// The same, with borrowed bytes copied.
    pub fn into_owned(self) -> BodyMutation<'static> {
        BodyMutation { action: self.action.into_owned(), chunk_index: self.chunk_index }
    }
}

impl BodyAction<'_> {
    /// The same, with borrowed bytes copied.
    pub fn into_owned(self) -> BodyAction<'static> {
        match self {
            Self::PassThrough => BodyAction::PassThrough,
            Self::Replace(bytes) => BodyAction::Replace(Cow::Owned(bytes.into_owned())),
            Self::Drop => BodyAction::Drop,
        }
    }
}
