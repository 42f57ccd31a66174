//! The clocks that guests may read.

use std::sync::OnceLock;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// WASI's id of the wall clock.
pub(crate) const REALTIME: i32 = 0;

/// WASI's id of the monotonic clock.
pub(crate) const MONOTONIC: i32 = 1;

/// The time of the clock with this id, in nanoseconds, if the clock exists.
pub(crate) fn now(clock: i32) -> Option<u64> {
    static START: OnceLock<Instant> = OnceLock::new();
    let passed = match clock {
        REALTIME => SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
        MONOTONIC => START.get_or_init(Instant::now).elapsed(),
        _ => return None,
    };
    Some(u64::try_from(passed.as_nanos()).unwrap_or(u64::MAX))
}
