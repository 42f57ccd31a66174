//! The Zentinel WebAssembly agent: everything of the binary except its `main`.
//!
//! * [`cli`] reads the options;
//! * [`source`] reads the files that they name, and starts an agent from them;
//! * [`listen`] accepts connections on the Unix socket, the gRPC address and the HTTP address for
//!   operators. The protocol crate hands their events to the engine crate;
//! * [`lifecycle`] serves until a signal ends the agent, and reloads the files when they change;
//! * [`logging`] writes what happens to standard error.

#![forbid(unsafe_code)]
#![deny(missing_docs)]
// The macros panic when standard error or output cannot be written.
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
