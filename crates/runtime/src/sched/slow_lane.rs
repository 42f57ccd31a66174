//! The slow lane: threads of lower priority for calls that outlive their first slice.

use std::pin::Pin;

use tokio::runtime::{Builder, Handle, Runtime};
use tokio::task::JoinHandle;

use crate::{platform, threads};

/// Fewest threads. An instruction that cannot be interrupted, such as a `memory.fill` of the whole
/// memory, must not delay every slow call.
const MIN_THREADS: usize = 2;

/// Most threads. This many calls make progress at the same time, and the others take turns. A
/// systemd unit that limits the number of tasks must allow as many threads again, which serve
/// connections.
const MAX_THREADS: usize = 64;

/// Threads for a machine with `cores`: one per core, because slow calls are CPU-bound. Their lower
/// priority leaves the cores to ordinary work.
fn threads_for(cores: usize) -> usize {
    cores.clamp(MIN_THREADS, MAX_THREADS)
}

/// The threads, and the tasks on them.
pub(crate) struct SlowLane {
    /// Taken only in `drop`.
    runtime: Option<Runtime>,
    threads: usize,
}

impl SlowLane {
    /// Starts the threads.
    ///
    /// # Errors
    ///
    /// The system refuses them.
    pub(crate) fn start() -> std::io::Result<Self> {
        let threads = threads_for(threads::parallelism());
        threads::check(threads)?;
        let runtime = Builder::new_multi_thread()
            .worker_threads(threads)
            .thread_name("wasm-slow")
            .enable_time()
            .on_thread_start(platform::lower_priority_of_this_thread)
            .build()?;
        Ok(Self { runtime: Some(runtime), threads })
    }

    /// Calls that make progress at the same time.
    pub(crate) fn threads(&self) -> usize {
        self.threads
    }

    /// Runs `future`. Dropping the result aborts it.
    pub(crate) fn spawn<F>(&self, mut future: Pin<Box<F>>) -> AbortOnDrop<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        AbortOnDrop(self.handle().spawn(std::future::poll_fn(move |context| {
            let polled = future.as_mut().poll(context);
            if polled.is_pending() {
                // Lets ordinary work on this core run now rather than after the kernel's time
                // slice.
                std::thread::yield_now();
            }
            polled
        })))
    }

    fn handle(&self) -> &Handle {
        self.runtime.as_ref().map(Runtime::handle).expect("the runtime lives as long as the slow lane")
    }
}

impl Drop for SlowLane {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Dropping a runtime within another one would block, and so panic.
            runtime.shutdown_background();
        }
    }
}

/// A task that is aborted on drop.
pub(crate) struct AbortOnDrop<T>(pub(crate) JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn has_a_thread_per_core_within_bounds() {
        assert_eq!([1, 2, 8, 200].map(threads_for), [2, 2, 8, 64]);
        let cores = std::thread::available_parallelism().unwrap().get();
        let lane = SlowLane::start().unwrap();
        assert_eq!((lane.threads(), lane.handle().metrics().num_workers()), (threads_for(cores), threads_for(cores)));
    }
}
