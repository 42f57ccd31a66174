//! Work on many bytes runs where it delays no other task.

/// Bytes from which work is large. Fewer are processed within a few milliseconds, whatever their
/// content.
pub const LARGE: usize = 256 << 10;

/// Runs `work` on `len` bytes. If they are [`LARGE`] or more, the other tasks of this worker thread
/// move to another one meanwhile: an attacker can make the work slow, for example with a string
/// where a number is expected, because the error message quotes the string.
///
/// # Panics
///
/// Large work panics on a current-thread runtime, which has no other worker.
pub fn run_blocking_if_large<T>(len: usize, work: impl FnOnce() -> T) -> T {
    if len < LARGE { work() } else { tokio::task::block_in_place(work) }
}
