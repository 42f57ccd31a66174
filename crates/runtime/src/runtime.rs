//! Threads shared by all pools of a process.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::sched::slow_lane::SlowLane;
use crate::sched::ticker::Ticker;
use crate::threads::{Loaders, Panicked};

/// The threads behind all pools of a process: the clock of the deadlines, the slow lane, and those
/// that compile. Clones share them.
#[derive(Clone)]
pub struct Runtime(Arc<Threads>);

struct Threads {
    ticker: Ticker,
    loaders: Loaders,
    slow_lane: SlowLane,
    /// One module is compiled at a time.
    compile_permit: Arc<Semaphore>,
    failed_starts: AtomicU64,
}

impl Runtime {
    /// Starts the threads.
    ///
    /// # Errors
    ///
    /// The system refuses threads.
    pub fn start() -> std::io::Result<Self> {
        Ok(Self(Arc::new(Threads {
            ticker: Ticker::start()?,
            loaders: Loaders::start()?,
            slow_lane: SlowLane::start()?,
            compile_permit: Arc::new(Semaphore::new(1)),
            failed_starts: AtomicU64::new(0),
        })))
    }

    /// Failed attempts to create an instance of a serving module, in all pools.
    pub fn failed_starts(&self) -> u64 {
        self.0.failed_starts.load(Relaxed)
    }

    pub(crate) fn count_failed_start(&self) {
        self.0.failed_starts.fetch_add(1, Relaxed);
    }

    /// Runs `work`, which blocks on files or computes for long, on threads that already exist. It
    /// runs to its end even if the returned future is dropped.
    ///
    /// # Errors
    ///
    /// The work has panicked.
    pub(crate) async fn run_blocking<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, Panicked> {
        self.0.loaders.run(work).await
    }

    pub(crate) fn ticker(&self) -> &Ticker {
        &self.0.ticker
    }

    pub(crate) fn slow_lane(&self) -> &SlowLane {
        &self.0.slow_lane
    }

    /// Waits for the permit to compile. The compile task owns it, because compiling cannot be
    /// cancelled.
    pub(crate) async fn compile_permit(&self) -> OwnedSemaphorePermit {
        Arc::clone(&self.0.compile_permit).acquire_owned().await.expect("the semaphore is never closed")
    }

    #[cfg(test)]
    pub(crate) fn is_compiling(&self) -> bool {
        self.0.compile_permit.available_permits() == 0
    }
}
