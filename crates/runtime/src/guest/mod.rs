//! Kinds of guests, and how their modules are called.

pub(crate) mod adapter;
