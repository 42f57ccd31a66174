//! Resources of the process: threads and file descriptors.

use std::io;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use zentinel_wasm_runtime::threads;

/// File descriptors that the agent may need: those of the most connections, and room for the rest.
const MAX_FILES: u64 = 4096;

/// Blocking threads for files, besides one per core for large messages.
const FILE_THREADS: usize = 4;

/// 136 years: longer than any agent runs.
const FOREVER: Duration = Duration::from_secs(u32::MAX as u64);

/// What to do if the system cannot start a thread.
pub const NO_THREADS: &str = "cannot start the agent's threads: raise the limit on processes and threads (`ulimit -u`, \
                              `TasksMax=` of the unit, `pids.max` of the cgroup)";

/// Builds the async runtime and starts all threads that it will ever have. If a thread could not be
/// started later, when work has to move to another one, tokio would panic.
///
/// # Errors
///
/// The system cannot start that many threads.
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
    // While the gate is closed, each closure needs a thread of its own.
    let gate = Arc::new(RwLock::new(()));
    let closed = gate.write();
    for _ in 0..blocking {
        let gate = Arc::clone(&gate);
        runtime.spawn_blocking(move || drop(gate.read()));
    }
    drop(closed);
    Ok(runtime)
}

/// Raises the limit on open files, which shells and service managers set to 1024 for each process
/// while allowing it to raise it.
pub fn raise_file_limit() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let wanted = maximum.map_or(MAX_FILES, |maximum| maximum.min(MAX_FILES));
    if current.is_some_and(|current| current < wanted) {
        // A failure is no reason not to start: without a free descriptor, accepting a connection
        // fails and is retried.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum });
    }
}
