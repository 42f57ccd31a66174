//! The Zentinel WebAssembly agent.
//!
//! `main.rs` reads top to bottom: options, log, module, sockets, until a signal ends it. [`listen`] accepts connections, the
//! protocol crate hands their events to the engine crate. [`lifecycle`] ends, reloads from the files of [`source`] and reports; [`listen::admin`]
//! shows it over HTTP.

#![forbid(unsafe_code)]
#![deny(missing_docs)]
// They panic when standard error or output cannot be written.
#![deny(clippy::print_stderr, clippy::print_stdout)]

pub mod cache;
pub mod cli;
mod files;
pub mod lifecycle;
pub mod listen;
pub mod logging;
pub mod process;
mod reload;
pub mod signals;
pub mod source;
mod systemd;
mod tasks;
pub mod watch;
