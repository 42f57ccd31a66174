//! What the process has: its threads and file descriptors.

use std::io;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use zentinel_wasm_runtime::threads;

/// Files that the agent may have open: those of all connections at their bounds, and room for the rest.
const FILES: u64 = 4096;

/// Threads for files, beside one a core for large messages, which are read and written there.
const FILE_THREADS: usize = 4;

/// No agent runs longer.
const FOREVER: Duration = Duration::from_secs(u32::MAX as u64);

/// What to do when the system gives no more threads.
pub const NO_THREADS: &str = "cannot start the agent's threads: raise the limit on processes and threads (`ulimit -u`, `TasksMax=` of the unit, `pids.max` of the cgroup)";

/// The runtime of the agent, with all threads that it will ever have: one that is refused later, when work should move to another thread, is a panic.
pub fn runtime() -> io::Result<tokio::runtime::Runtime> {
    let workers = threads::parallelism();
    let blocking = workers + FILE_THREADS;
    threads::check(workers + blocking)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .max_blocking_threads(blocking)
        .thread_keep_alive(FOREVER)
        .thread_name("agent")
        .enable_all()
        .build()?;
    // As long as the gate is closed each needs a thread of its own.
    let gate = Arc::new(RwLock::new(()));
    let closed = gate.write();
    for _ in 0..blocking {
        let gate = Arc::clone(&gate);
        runtime.spawn_blocking(move || drop(gate.read()));
    }
    drop(closed);
    Ok(runtime)
}

/// Shells and service managers start processes with a limit of 1024 files, and let them raise it.
pub fn raise_file_limit() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let wanted = maximum.map_or(FILES, |maximum| maximum.min(FILES));
    if current.is_some_and(|current| current < wanted) {
        // Where that is refused, connections beyond the limit are turned away later than they would be otherwise: the listener waits and tries again.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum });
    }
}
