//! The tasks of a connection, all of which the connection's own task polls.

use std::sync::{Arc, Mutex, PoisonError};

use futures_util::future::BoxFuture;
use hyper::rt::Executor;

type Task = BoxFuture<'static, ()>;

/// Tasks that were started and are not polled yet. Clones share them.
#[derive(Clone, Default)]
pub(super) struct Tasks(Arc<Mutex<Vec<Task>>>);

impl Tasks {
    /// Adds a task.
    pub(super) fn start(&self, task: Task) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(task);
    }

    /// Takes the tasks that were started since the last time.
    pub(super) fn take(&self) -> Vec<Task> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for Tasks {
    fn execute(&self, task: F) {
        self.start(Box::pin(task));
    }
}
