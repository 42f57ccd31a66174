//! What tests and chores share: the agent as a process ([`Program`], [`Agent`]), a proxy's side of
//! its socket ([`Connection`]), a service manager ([`ServiceManager`]), a [`Collector`] of
//! OpenTelemetry, events ([`request`] and its siblings) and small guest modules ([`module`]).
//!
//! Most functions panic on failure, as tests do. Those whose names begin with `try_` return the
//! error, for programs that report it.
//!
//! Nothing here sleeps for a fixed time: every wait ends when its condition holds, or fails after
//! [`PATIENCE`].
//!
//! ```no_run
//! use testkit::{Program, decision, module};
//!
//! let directory = tempfile::tempdir().unwrap();
//! let wasm = module::write(directory.path(), "module.wasm", &module::tagging("good"));
//! // In an integration test: `Program(env!("CARGO_BIN_EXE_zentinel-wasm-agent"))`.
//! let agent = Program("/usr/bin/zentinel-wasm-agent").start(&wasm, &[]);
//! let answer = agent.connect().get("id-1", "/index.html");
//! assert_eq!(decision(&answer), "allow");
//! ```
#![forbid(unsafe_code)]

mod agent;
mod answer;
mod client;
mod collector;
mod event;
mod frame;
mod log;
pub mod module;
mod service;

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

pub use agent::{Admin, Agent, Program};
pub use answer::{decision, id_of, module_error};
pub use client::Connection;
pub use collector::{Collector, CollectorReply, Post};
pub use event::{base64, nested_texts, request, request_body, response, response_body};
pub use frame::{frame, kind, read_frame};
pub use log::Log;
pub use rustix::process::Signal;
pub use service::ServiceManager;

/// How long to wait for a condition: longer than it takes on a busy machine, unless something is
/// broken.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Calls `condition` until it returns something.
#[track_caller]
pub fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = condition() {
            return found;
        }
        assert!(started.elapsed() < PATIENCE, "timed out waiting for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Sets a flag when dropped. What runs beside a check then ends even if the check fails.
pub struct Stop<'a>(pub &'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}
