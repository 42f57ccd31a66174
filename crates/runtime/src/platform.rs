//! What the systems that the agent runs on do differently: Linux, where it serves, and macOS, where authors try their modules.
//!
//! Everything else is common: sockets, signals and files are used as POSIX has them, and wasmtime takes care of memory and traps.

/// How much less than ordinary work the slow lane counts when cores are scarce (nice value).
#[cfg(target_os = "linux")]
const SLOW_NICENESS: i32 = 10;

/// Lets ordinary work go before this thread's.
///
/// On Linux each thread has a nice value of its own. Elsewhere, as POSIX wants it, the process has one, and lowering that would slow down
/// the other threads too, so the thread stays as it is: calls still take turns, but slow ones get as much of the cores as others.
pub(crate) fn lower_priority_of_this_thread() {
    #[cfg(target_os = "linux")]
    {
        // A system that refuses costs only fairness.
        let _ = rustix::process::nice(SLOW_NICENESS);
    }
}
