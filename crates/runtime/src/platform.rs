//! Differences between the supported systems: Linux, where the agent serves, and macOS, where
//! authors try their modules.
//!
//! Everything else is the same: sockets, signals and files are used as in POSIX, and wasmtime
//! handles memory and traps.

/// Nice value of the slow lane, so it yields to ordinary work when cores are scarce.
#[cfg(target_os = "linux")]
const SLOW_NICENESS: i32 = 10;

/// Lowers the priority of this thread below that of ordinary work.
///
/// On Linux each thread has its own nice value. Elsewhere, as POSIX specifies, the value belongs to
/// the process, so changing it would slow down all threads. There, the thread keeps its priority:
/// slow calls still take turns, but get as much CPU time as others.
pub(crate) fn lower_priority_of_this_thread() {
    #[cfg(target_os = "linux")]
    {
        // A failure only affects fairness.
        let _ = rustix::process::nice(SLOW_NICENESS);
    }
}
