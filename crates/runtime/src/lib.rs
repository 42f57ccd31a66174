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
#![deny(unsafe_code)]

mod adapter;
mod cache;
mod engine;
mod host;
mod instance;
mod log;
mod module;
mod pool;
mod proposals;
mod ticker;
mod wasi;

pub use cache::Cache;
pub use module::{LoadError, Module};
pub use pool::{Isolation, Lease, Pool, PoolStats, Request, Settings, StartError};

use std::pin::Pin;
use std::sync::Arc;

use ticker::Ticker;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Threads of the slow lane. As many as this machine class has cores: calls there are CPU-bound, and they take turns by yielding.
const SLOW_THREADS: usize = 2;

/// How much less than ordinary work the slow lane counts when cores are scarce (nice value).
const SLOW_NICENESS: i32 = 10;

/// What all pools of a process share.
#[derive(Clone)]
pub struct Runtime(Arc<Shared>);

struct Shared {
    ticker: Ticker,
    /// The right to compile: one module at a time.
    compiling: Arc<Semaphore>,
    slow: Option<tokio::runtime::Runtime>,
}

impl Runtime {
    /// Starts the threads.
    ///
    /// # Errors
    ///
    /// The system gives no threads.
    pub fn start() -> std::io::Result<Self> {
        let slow = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(SLOW_THREADS)
            .thread_name("wasm-slow")
            .enable_time()
            .on_thread_start(|| {
                // A system that refuses costs only fairness.
                let _ = rustix::process::nice(SLOW_NICENESS);
            })
            .build()?;
        Ok(Self(Arc::new(Shared { ticker: Ticker::start()?, compiling: Arc::new(Semaphore::new(1)), slow: Some(slow) })))
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
