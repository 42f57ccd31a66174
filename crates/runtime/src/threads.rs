//! Threads that are started before they are needed, so a limit on threads is an error at start, not
//! a failure later.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, RwLock};
use std::thread;
use std::time::Duration;

use tokio::sync::oneshot;
use zentinel_wasm_contract::shortened;

/// Most characters of a panic's message in an error.
const MAX_MESSAGE: usize = 1000;

/// Interval at which to check whether threads have ended, because the kernel counts a thread for
/// some microseconds after it was joined.
const END_INTERVAL: Duration = Duration::from_millis(1);

/// Most checks at [`END_INTERVAL`].
const END_CHECKS: usize = 1000;

/// The number of threads that this process can run at the same time.
pub fn parallelism() -> usize {
    thread::available_parallelism().map_or(1, Into::into)
}

/// Checks that the system allows `count` more threads, by starting and ending them.
///
/// `tokio` panics if it cannot start a thread, and waits forever for work that it has queued for
/// one. So callers check before they start a `tokio` runtime.
///
/// # Errors
///
/// The system refuses to start one of them.
pub fn check(count: usize) -> io::Result<()> {
    let before = running();
    let gate = Arc::new(RwLock::new(()));
    let closed = gate.write();
    let mut threads = Vec::with_capacity(count);
    let mut checked = Ok(());
    for _ in 0..count {
        let gate = Arc::clone(&gate);
        match thread::Builder::new().name("thread-check".into()).spawn(move || drop(gate.read())) {
            Ok(thread) => threads.push(thread),
            Err(error) => {
                checked = Err(error);
                break;
            }
        }
    }
    drop(closed);
    for thread in threads {
        let _ = thread.join();
    }
    for _ in 0..END_CHECKS {
        if running() <= before {
            break;
        }
        thread::sleep(END_INTERVAL);
    }
    checked
}

/// The number of threads that the kernel counts, or 0 if it is not available.
fn running() -> usize {
    std::fs::read_dir("/proc/self/task").map_or(0, Iterator::count)
}

/// The work panicked. The panic itself is in the log.
#[derive(Debug, thiserror::Error)]
#[error("panicked: {0}")]
pub struct Panicked(String);

impl Panicked {
    fn new(payload: &(dyn std::any::Any + Send)) -> Self {
        let message = payload.downcast_ref::<&str>().copied().or_else(|| payload.downcast_ref::<String>().map(String::as_str));
        Self(shortened(message.unwrap_or("no message"), MAX_MESSAGE))
    }
}

/// Threads for work that blocks or computes for long: reading files and compiling modules. The
/// functions of a module are distributed among them.
pub(crate) struct Loaders(rayon_core::ThreadPool);

impl Loaders {
    /// Starts one thread per core.
    pub(crate) fn start() -> io::Result<Self> {
        let pool = rayon_core::ThreadPoolBuilder::new()
            .num_threads(parallelism())
            .thread_name(|number| format!("wasm-loader-{number}"))
            // The default handler aborts. A panic gets here only if dropping a result that nobody
            // waits for panics.
            .panic_handler(|_| ())
            .build()
            .map_err(io::Error::other)?;
        Ok(Self(pool))
    }

    /// Runs `work` to its end, even if the returned future is dropped.
    pub(crate) async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, Panicked> {
        let (done, result) = oneshot::channel();
        self.0.spawn(move || {
            let _ = done.send(catch_unwind(AssertUnwindSafe(work)).map_err(|payload| Panicked::new(&*payload)));
        });
        result.await.unwrap_or_else(|_| Err(Panicked("its thread has ended".into())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn check_starts_and_ends_threads() {
        check(0).unwrap();
        check(20).unwrap();
    }

    #[tokio::test]
    async fn panics_are_errors_and_threads_survive() {
        let loaders = Loaders::start().unwrap();
        for _ in 0..=parallelism() {
            let panicked = loaders.run(|| panic!("no {}", "luck")).await.unwrap_err();
            assert_eq!(panicked.to_string(), "panicked: no luck");
        }
        assert_eq!(loaders.run(|| thread::current().name().map(|name| name.starts_with("wasm-loader"))).await.unwrap(), Some(true));
    }
}
