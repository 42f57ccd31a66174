//! Runs Wasm modules fast and within limits. Knows no protocol and no decisions.
//!
//! * [`Module`]: a module that was read and checked;
//! * [`Pool`]: its warm instances, which takes a [`Call`] with one deadline;
//! * [`Lease`]: an instance after its call. It has the answer, and returns to the pool only if the
//!   answer is accepted;
//! * [`Trial`]: what a pool of a module would be like;
//! * [`Runtime`]: the threads behind all pools of a process, for deadlines, slow calls and
//!   compiling.
//!
//! ```
//! use std::sync::Arc;
//! use std::time::{Duration, Instant};
//!
//! use zentinel_wasm_contract::{Decision, Hook};
//! use zentinel_wasm_runtime::{Call, Isolation, Module, Pool, PoolSettings, Runtime};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // A module that blocks every request.
//! let wat = r#"(module
//!     (memory (export "memory") 1)
//!     (data (i32.const 64) "{\"decision\":\"block\"}")
//!     (func (export "alloc") (param i32) (result i32) i32.const 1024)
//!     (func (export "dealloc") (param i32 i32))
//!     (func (export "on_request_headers") (param i32 i32) (result i64) i64.const 0x40_00000014))"#;
//! let module = Arc::new(Module::from_bytes("block.wasm", wat::parse_str(wat)?, None)?);
//! let settings = PoolSettings {
//!     size: 1,
//!     max_memory: 1 << 20,
//!     max_output: 4096,
//!     isolation: Isolation::Pooled,
//!     config: None,
//!     start_timeout: Duration::from_secs(5),
//! };
//! let pool = Pool::start(&Runtime::start()?, &module, settings, None).await?;
//!
//! let call = Call::json(Hook::RequestHeaders, br#"{"method":"GET","uri":"/"}"#.to_vec());
//! let lease = pool.call(call, Arc::from("id"), Instant::now() + Duration::from_secs(5)).await?;
//! assert!(matches!(lease.answer()?.decision, Decision::Block(_)));
//! lease.accept();
//! # Ok(())
//! # }
//! ```
//!
//! A call first runs on its caller's task. If it does not end in its first slice, it moves to the
//! *slow lane*, threads of a lower priority, so a looping module does not delay other calls.

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
mod trace;

pub use cache::Cache;
pub use guest::{Call, RequestContext, ResponseContext, View};
pub use inspect::{Export, Import};
pub use module::{LoadError, Module};
pub use runtime::Runtime;
pub use sched::instances::{Isolation, PoolSettings, StartError};
pub use sched::pool::{CallTimes, Pool, PoolStats};
pub use sched::slot::Lease;
pub use sched::trial::{Compiled, Started, Trial};
