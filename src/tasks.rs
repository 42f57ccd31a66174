//! What becomes of the tasks that serve connections.

use tokio::task::JoinError;
use zentinel_wasm_bounds::log_limited;
use zentinel_wasm_contract::shortened;

/// Most characters of how a task has failed.
const MAX_FAILURE: usize = 1000;

/// Logs that a task has panicked; `what` was closed by that. The panic was logged and counted where it happened, for a task knows no more of it.
pub(crate) fn note_end(what: &str, ended: Result<(), JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        log_limited!(error, "closed {what} because its task panicked: {}", shortened(&error.to_string(), MAX_FAILURE));
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    use tokio::task::JoinSet;

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn a_task_that_panics_is_logged_and_the_others_go_on() {
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).finish();
        let _logging = tracing::subscriber::set_default(subscriber);
        let mut tasks = JoinSet::new();
        let (go_on, wait) = tokio::sync::oneshot::channel::<()>();
        tasks.spawn(async move { wait.await.unwrap() });
        tasks.spawn(async { panic!("no luck") });
        note_end("a connection", tasks.join_next().await.unwrap());
        let logged = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        assert!(logged.contains("closed a connection because its task panicked") && logged.contains("no luck"), "{logged}");
        go_on.send(()).unwrap();
        note_end("a connection", tasks.join_next().await.unwrap());
        assert_eq!(lines.0.lock().unwrap().len(), logged.len());
    }
}
