//! Threads that are there before they are needed, so that a limit on threads is an error at start and no failure later.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, RwLock};
use std::thread;
use std::time::Duration;

use tokio::sync::oneshot;
use zentinel_wasm_contract::shortened;

/// Most characters of a panic's message that an error repeats.
const MAX_MESSAGE: usize = 1000;

/// How often to look whether threads have ended, and how often at most: the kernel counts a thread for some microseconds after it was joined.
const END_INTERVAL: Duration = Duration::from_millis(1);

/// See [`END_INTERVAL`].
const END_CHECKS: usize = 1000;

/// Threads that the CPU time of this process keeps busy.
pub fn parallelism() -> usize {
    thread::available_parallelism().map_or(1, Into::into)
}

/// Checks that the system gives `count` more threads, by starting and ending them.
///
/// `tokio` panics when it gets no thread, and waits for ever for work that it has queued for one; hence the check before it asks.
///
/// # Errors
///
/// The system refuses one of them.
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

/// Threads that the kernel counts, or 0 where it does not say.
fn running() -> usize {
    std::fs::read_dir("/proc/self/task").map_or(0, Iterator::count)
}

/// Work has panicked. The panic itself is in the log.
#[derive(Debug, thiserror::Error)]
#[error("panicked: {0}")]
pub struct Panicked(String);

impl Panicked {
    fn new(payload: &(dyn std::any::Any + Send)) -> Self {
        let message = payload.downcast_ref::<&str>().copied().or_else(|| payload.downcast_ref::<String>().map(String::as_str));
        Self(shortened(message.unwrap_or("no message"), MAX_MESSAGE))
    }
}

/// Threads for what blocks or computes for long: reading files and compiling modules, whose functions are shared out among them.
pub(crate) struct Loaders(rayon_core::ThreadPool);

impl Loaders {
    /// Starts one thread for each core.
    pub(crate) fn start() -> io::Result<Self> {
        let pool = rayon_core::ThreadPoolBuilder::new()
            .num_threads(parallelism())
            .thread_name(|number| format!("wasm-loader-{number}"))
            // The default aborts. No panic gets here, unless a value panics that is dropped because nobody waits for it.
            .panic_handler(|_| ())
            .build()
            .map_err(io::Error::other)?;
        Ok(Self(pool))
    }

    /// Runs `work` to its end, even when nobody waits for it any more.
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
    fn what_the_system_gives_is_checked_and_given_back() {
        check(0).unwrap();
        check(20).unwrap();
    }

    #[tokio::test]
    async fn a_panic_is_an_error_and_the_threads_go_on() {
        let loaders = Loaders::start().unwrap();
        for _ in 0..=parallelism() {
            let panicked = loaders.run(|| panic!("no {}", "luck")).await.unwrap_err();
            assert_eq!(panicked.to_string(), "panicked: no luck");
        }
        assert_eq!(loaders.run(|| thread::current().name().map(|name| name.starts_with("wasm-loader"))).await.unwrap(), Some(true));
    }
}
