//! Reloads the agent, on SIGHUP and when its files change.

use std::sync::Arc;

use sd_notify::NotifyState;
use tokio::signal::unix::Signal;
use tracing::{debug, info, warn};
use zentinel_wasm_engine::Agent;

use crate::source::Source;
use crate::systemd::notify;
use crate::watch::{FileWatcher, ReloadCause};

/// Reloads one at a time, so signals that arrive during a reload cause one more.
pub(crate) async fn reload_when_due(agent: Arc<Agent>, source: Source, mut hangup: Signal, mut watcher: Option<FileWatcher>) {
    // Why the last reload failed, if it did. A retry that fails for the same reason is no news.
    let mut failure = None;
    loop {
        let known = tokio::select! {
            _ = hangup.recv() => {
                info!("reloading because of SIGHUP");
                None
            }
            cause = due(watcher.as_mut()) => match cause {
                ReloadCause::Change => {
                    info!("reloading because a watched file has changed");
                    None
                }
                ReloadCause::Missing => {
                    info!("reloading because a watched file is missing");
                    None
                }
                ReloadCause::Retry => {
                    debug!("retrying the failed reload");
                    failure
                }
            },
        };
        if let Some(watcher) = &mut watcher {
            watcher.reload_begins().await;
        }
        failure = reload(&agent, &source, known).await.err();
        if let Some(watcher) = &mut watcher {
            watcher.reload_ended(failure.is_none());
        }
    }
}

async fn due(watcher: Option<&mut FileWatcher>) -> ReloadCause {
    match watcher {
        Some(watcher) => watcher.due().await,
        None => std::future::pending().await,
    }
}

/// Reloads, and logs the result, unless it is the failure that is `known`. The error is why nothing
/// has changed.
async fn reload(agent: &Agent, source: &Source, known: Option<String>) -> Result<(), String> {
    notify(&[NotifyState::Reloading, NotifyState::monotonic_usec_now().unwrap_or(NotifyState::MonotonicUsec(0))]);
    let result = source.reload(agent).await.map_err(|error| format!("{error:#}"));
    match &result {
        Ok(()) => info!("reload complete"),
        Err(reason) if known.as_ref() == Some(reason) => debug!("reload failed again: {reason}"),
        Err(reason) => warn!("reload failed, keeping the current module, configuration and certificates: {reason}"),
    }
    notify(&[NotifyState::Ready]);
    result
}
