//! Waits for conditions instead of sleeping for a fixed time.

use std::io;
use std::time::{Duration, Instant};

/// Longer than anything takes on a loaded machine.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// Short compared with the awaited events, and long compared with the cost of a check.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Calls `check` until it returns `Some`, or panics with `what` after [`TIMEOUT`].
#[track_caller]
pub fn until<T>(what: &str, mut check: impl FnMut() -> Option<T>) -> T {
    match until_ok(what, || Ok(check())) {
        Ok(found) => found,
        Err(error) => panic!("{error}"),
    }
}

/// Calls `check` until it returns `Some` or an error.
///
/// # Errors
///
/// The error of `check`, or one with `what` after [`TIMEOUT`].
pub fn until_ok<T>(what: &str, mut check: impl FnMut() -> io::Result<Option<T>>) -> io::Result<T> {
    let start = Instant::now();
    while start.elapsed() < TIMEOUT {
        if let Some(found) = check()? {
            return Ok(found);
        }
        std::thread::sleep(POLL_INTERVAL);
    }
    Err(io::Error::new(io::ErrorKind::TimedOut, format!("timed out after {} s: {what}", TIMEOUT.as_secs())))
}
