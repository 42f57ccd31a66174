//! The JSON interface of modules, without a Wasm engine.
//!
//! * [`input`] writes the object that a hook is handed, straight from the event;
//! * [`answer`] reads the object that it returns, and checks it.
//!
//! The files in `golden/` are the JSON examples of the product page, and the tests of this crate read them.

#![forbid(unsafe_code)]
#![deny(missing_docs)]
#![deny(clippy::print_stderr, clippy::print_stdout)]

pub mod answer;
mod fields;
pub mod input;
