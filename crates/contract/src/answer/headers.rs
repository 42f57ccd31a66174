//! Changes to headers.

use crate::text::Text;

/// A change to one header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HeaderOp<'a> {
    /// Replaces all values.
    Set(Text<'a>, Text<'a>),
    /// Adds a value.
    Add(Text<'a>, Text<'a>),
    /// Removes all values.
    Remove(Text<'a>),
}
