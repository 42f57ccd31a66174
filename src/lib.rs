//! The Zentinel WebAssembly agent.
//!
//! `main.rs` reads top to bottom: options, log, module, sockets, until a signal ends it. The parts, in the order of a request's way:
//! [`listener`] and [`grpc`] accept connections, the protocol crate hands their events to [`agent`], which remembers requests in `context`, guards the module by
//! `breaker`, checks by `bodies` that the proxy does to a body what the module wants, puts streamed bodies together in `collect`, calls
//! the module through the runtime crate and counts in [`metrics`]. [`lifecycle`] ends, reloads from the files of [`source`] and reports;
//! [`admin`] shows it over HTTP.

#![forbid(unsafe_code)]
#![deny(missing_docs)]
// They panic when standard error or output cannot be written.
#![deny(clippy::print_stderr, clippy::print_stdout)]

pub mod admin;
pub mod agent;
mod bodies;
mod breaker;
pub mod cli;
mod collect;
mod context;
pub mod grpc;
mod inputs;
pub mod lifecycle;
pub mod listener;
pub mod logging;
pub mod metrics;
pub mod settings;
pub mod source;
mod tasks;
mod watch;
