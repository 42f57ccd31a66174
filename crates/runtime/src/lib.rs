//! Runs Wasm modules fast and within limits.
//!
//! Three types matter first:
//!
//! * a [`Module`] is a file that was read, checked and compiled;
//! * a [`Pool`] holds its warm instances and calls hooks on them, each call with one deadline;
//! * a [`Lease`] is an instance after its call: its output can be read, and it goes back to the pool only when told that the output was good.
//!
//! The [`Runtime`] stands behind all pools of a process: it keeps the clock of the deadlines and the threads for calls that take long.
//!
//! A call runs first on the task that asked for it. When it does not end in its first slice, it moves to the *slow lane*, threads of a lower
//! priority, so that a module that loops delays nobody else.

#![deny(missing_docs)]
#![deny(clippy::print_stderr, clippy::print_stdout)]
#![deny(unsafe_code)]

mod artifact;
mod budget;
mod cache;
mod engine;
mod guest;
mod host;
mod inspect;
mod instance;
mod memory;
mod module;
mod platform;
mod proposals;
mod runtime;
mod sched;
pub mod threads;

pub use cache::Cache;
pub use guest::{Call, RequestContext, ResponseContext, View};
pub use module::{LoadError, Module};
pub use runtime::Runtime;
pub use sched::instances::{Isolation, PoolSettings, StartError};
pub use sched::pool::{Pool, PoolStats};
pub use sched::slot::Lease;
