//! The commands beside serving.

pub mod check;
pub mod health;
