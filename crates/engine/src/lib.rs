//! Decides about a proxy's events by a Wasm module.
//!
//! An [`Agent`](agent::Agent) remembers requests in `context`, guards the module by `breaker`, checks by `bodies` that the proxy does to a body
//! what the module wants, puts streamed bodies together in `collect`, calls the module through the runtime crate and counts in [`metrics`].

#![forbid(unsafe_code)]
#![deny(missing_docs)]
// They panic when standard error or output cannot be written.
#![deny(clippy::print_stderr, clippy::print_stdout)]

pub mod agent;
mod bodies;
mod breaker;
mod collect;
mod context;
mod inputs;
pub mod metrics;
pub mod settings;
