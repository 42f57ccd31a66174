//! Reloads the agent, on SIGHUP and when its files change.

use std::sync::Arc;

use sd_notify::NotifyState;
use tokio::signal::unix::Signal;
use tracing::{info, warn};
use zentinel_wasm_engine::Agent;

use crate::source::Source;
use crate::systemd::notify;
use crate::watch::{FileWatcher, ReloadCause};

/// Reloads one at a time, so signals that arrive during a reload cause one more.
pub(crate) async fn reload_when_due(agent: Arc<Agent>, source: Source, mut hangup: Signal, mut watcher: Option<FileWatcher>) {
    loop {
        tokio::select! {
            _ = hangup.recv() => info!("reloading because of SIGHUP"),
            cause = due(watcher.as_mut()) => match cause {
                ReloadCause::Change => info!("reloading because a watched file has changed"),
                ReloadCause::Retry => info!("retrying the failed reload"),
            },
        }
        if let Some(watcher) = &mut watcher {
            watcher.reload_begins().await;
        }
        let succeeded = reload(&agent, &source).await;
        if let Some(watcher) = &mut watcher {
            watcher.reload_ended(succeeded);
        }
    }
}

async fn due(watcher: Option<&mut FileWatcher>) -> ReloadCause {
    match watcher {
        Some(watcher) => watcher.due().await,
        None => std::future::pending().await,
    }
}

/// Returns whether the reload succeeded.
async fn reload(agent: &Agent, source: &Source) -> bool {
    notify(&[NotifyState::Reloading, NotifyState::monotonic_usec_now().unwrap_or(NotifyState::MonotonicUsec(0))]);
    let result = source.reload(agent).await;
    if let Err(error) = &result {
        warn!("reload failed, keeping the current module, configuration and certificates: {error:#}");
    }
    notify(&[NotifyState::Ready]);
    result.is_ok()
}
