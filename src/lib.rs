//! The Zentinel WebAssembly agent.
//!
//! `main.rs` reads top to bottom: options, log, module, sockets, until a signal ends it. [`listener`] and [`grpc`] accept connections, the
//! protocol crate hands their events to the engine crate. [`lifecycle`] ends, reloads from the files of [`source`] and reports; [`admin`]
//! shows it over HTTP.

#![forbid(unsafe_code)]
#![deny(missing_docs)]
// They panic when standard error or output cannot be written.
#![deny(clippy::print_stderr, clippy::print_stdout)]

pub mod admin;
pub mod cli;
pub mod grpc;
pub mod lifecycle;
pub mod listener;
pub mod logging;
pub mod source;
mod tasks;
mod watch;
