//! Runs Wasm modules fast and within limits.
//!
//! Three types matter first:
//!
//! * a [`Module`] is a file that was read, checked and compiled;
//! * a [`Pool`] holds its warm instances and calls hooks on them, each call with one deadline;
//! * a [`Lease`] is an instance after its call: its output can be read, and it goes back to the pool only when told that the output was good.
//!
//! The [`Runtime`] stands behind all pools of a process: it keeps the clock of the deadlines and the threads for calls that take long.
//!
//! A call runs first on the task that asked for it. When it does not end in its first slice, it moves to the *slow lane*, threads of a lower
//! priority, so that a module that loops delays nobody else.

#![deny(missing_docs)]
#![deny(clippy::print_stderr, clippy::print_stdout)]
#![deny(unsafe_code)]

mod cache;
mod engine;
mod guest;
mod host;
mod instance;
mod module;
mod platform;
mod proposals;
mod sched;
pub mod threads;

pub use cache::Cache;
pub use module::{LoadError, Module};
pub use sched::pool::{Isolation, Lease, Pool, PoolStats, Request, Settings, StartError};

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use sched::ticker::Ticker;
use threads::{Loaders, Panicked};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Fewest threads of the slow lane. One instruction that cannot be interrupted, such as a `memory.fill` of the
/// whole memory, must not hold up every slow call.
const MIN_SLOW_THREADS: usize = 2;

/// Most threads of the slow lane. As many calls make progress at once, the others take turns; and a unit that
/// bounds the number of tasks has to have room for as many threads again that serve connections.
const MAX_SLOW_THREADS: usize = 64;

/// What all pools of a process share.
#[derive(Clone)]
pub struct Runtime(Arc<Shared>);

struct Shared {
    ticker: Ticker,
    /// The right to compile: one module at a time.
    compiling: Arc<Semaphore>,
    failed_starts: AtomicU64,
    slow_threads: usize,
    loaders: Loaders,
    slow: Option<tokio::runtime::Runtime>,
}

/// Threads of the slow lane where `cores` can be used: one for each, for calls there are bound by the CPU. They have
/// a lower priority, so ordinary work does not lose its cores to them.
fn slow_threads(cores: usize) -> usize {
    cores.clamp(MIN_SLOW_THREADS, MAX_SLOW_THREADS)
}

impl Runtime {
    /// Starts the threads.
    ///
    /// # Errors
    ///
    /// The system gives no threads.
    pub fn start() -> std::io::Result<Self> {
        let slow_threads = slow_threads(threads::parallelism());
        let (ticker, loaders) = (Ticker::start()?, Loaders::start()?);
        // Last, because a tokio runtime must not be dropped here, within another.
        threads::check(slow_threads)?;
        let slow = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(slow_threads)
            .thread_name("wasm-slow")
            .enable_time()
            .on_thread_start(platform::lower_priority_of_this_thread)
            .build()?;
        let compiling = Arc::new(Semaphore::new(1));
        Ok(Self(Arc::new(Shared { ticker, compiling, loaders, failed_starts: AtomicU64::new(0), slow_threads, slow: Some(slow) })))
    }

    /// Instances that could not be made although their module serves, over all pools.
    pub fn failed_starts(&self) -> u64 {
        self.0.failed_starts.load(Relaxed)
    }

    /// Runs `work`, which blocks on files or computes for long, on threads that were started with the runtime. It runs to its end even when nobody
    /// waits for it any more. No new thread is needed, which the system may refuse.
    ///
    /// # Errors
    ///
    /// The work has panicked.
    async fn run_blocking<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, Panicked> {
        self.0.loaders.run(work).await
    }

    fn ticker(&self) -> &Ticker {
        &self.0.ticker
    }

    /// Waits for the right to compile. Compiling cannot be stopped, so that it is held by the work and not by who waits for it.
    async fn compiling(&self) -> OwnedSemaphorePermit {
        Arc::clone(&self.0.compiling).acquire_owned().await.expect("nobody closes it")
    }

    /// Runs `future` on the slow lane. Dropping the handle's guard ends it.
    fn spawn_slow<F>(&self, mut future: Pin<Box<F>>) -> AbortOnDrop<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        AbortOnDrop(self.slow_handle().spawn(std::future::poll_fn(move |context| {
            let polled = future.as_mut().poll(context);
            if polled.is_pending() {
                // Ordinary work that has been woken on this core gets it now, and not when the kernel's time slice ends.
                std::thread::yield_now();
            }
            polled
        })))
    }

    fn slow_handle(&self) -> &tokio::runtime::Handle {
        // Taken only in `drop`.
        self.0.slow.as_ref().map(tokio::runtime::Runtime::handle).expect("the slow lane lives as long as the runtime")
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if let Some(slow) = self.slow.take() {
            slow.shutdown_background();
        }
    }
}

struct AbortOnDrop<T>(tokio::task::JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slow_lane_has_a_thread_for_each_core_within_bounds() {
        assert_eq!([1, 2, 8, 200].map(slow_threads), [2, 2, 8, 64]);
        let cores = std::thread::available_parallelism().unwrap().get();
        let runtime = Runtime::start().unwrap();
        assert_eq!((runtime.0.slow_threads, runtime.slow_handle().metrics().num_workers()), (slow_threads(cores), slow_threads(cores)));
    }
}
