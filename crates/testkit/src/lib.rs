//! The built agent as a child process, and a proxy's side of its socket.
//!
//! Nothing here waits for a time to pass: every wait ends when what it waits for has happened, or fails after [`PATIENCE`].

mod agent;
mod answer;
mod client;
mod event;
mod frame;
mod log;
pub mod module;

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

pub use agent::{Admin, Agent, Program};
pub use answer::{decision, id_of, module_error};
pub use client::Connection;
pub use event::{base64, nested_texts, request, request_body, response, response_body};
pub use frame::{frame, kind};
pub use log::Log;

/// Longer than anything takes that is not broken, on a machine that does other things too.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `condition` gives something.
#[track_caller]
pub fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = condition() {
            return found;
        }
        assert!(started.elapsed() < PATIENCE, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Ends what runs beside a check, also when the check fails.
pub struct Stop<'a>(pub &'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}
