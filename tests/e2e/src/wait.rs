//! Waiting for a condition rather than for a time.

use std::io;
use std::time::{Duration, Instant};

/// Longer than anything takes on a loaded machine; a condition that has not come true by then never
/// will.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Short against what is waited for, long against the work of a check.
const PAUSE: Duration = Duration::from_millis(20);

/// Calls `check` until it returns something, or panics with `what` after [`PATIENCE`].
#[track_caller]
pub fn until<T>(what: &str, mut check: impl FnMut() -> Option<T>) -> T {
    match until_ok(what, || Ok(check())) {
        Ok(found) => found,
        Err(error) => panic!("{error}"),
    }
}

/// Calls `check` until it returns something or fails; an error with `what` after [`PATIENCE`].
pub fn until_ok<T>(what: &str, mut check: impl FnMut() -> io::Result<Option<T>>) -> io::Result<T> {
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        if let Some(found) = check()? {
            return Ok(found);
        }
        std::thread::sleep(PAUSE);
    }
    Err(io::Error::new(io::ErrorKind::TimedOut, format!("waited in vain: {what}")))
}
