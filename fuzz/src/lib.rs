//! What is fuzzed, target by target.

mod modules;
mod readers;

pub use modules::modules;
pub use readers::{answers, frames, headers, messages};
