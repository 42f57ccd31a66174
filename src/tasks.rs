//! Logs how tasks have ended.

use tokio::task::JoinError;
use zentinel_wasm_bounds::log_limited;
use zentinel_wasm_contract::shortened;

/// Longest failure of a task in the log, in characters.
const MAX_FAILURE: usize = 1000;

/// Logs that `what` ended because its task panicked. The panic itself has been logged and counted
/// by the panic hook; the task's result does not have its location.
pub(crate) fn log_if_panicked(what: &str, ended: Result<(), JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        log_limited!(error, "{what} ended because its task panicked: {}", shortened(&error.to_string(), MAX_FAILURE));
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
    async fn logs_a_panic_and_leaves_other_tasks_running() {
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).finish();
        let _logging = tracing::subscriber::set_default(subscriber);
        let mut tasks = JoinSet::new();
        let (go_on, wait) = tokio::sync::oneshot::channel::<()>();
        tasks.spawn(async move { wait.await.unwrap() });
        tasks.spawn(async { panic!("no luck") });
        log_if_panicked("a connection", tasks.join_next().await.unwrap());
        let logged = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        assert!(logged.contains("a connection ended because its task panicked") && logged.contains("no luck"), "{logged}");
        go_on.send(()).unwrap();
        log_if_panicked("a connection", tasks.join_next().await.unwrap());
        assert_eq!(lines.0.lock().unwrap().len(), logged.len());
    }
}
