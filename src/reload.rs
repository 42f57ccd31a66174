//! When the agent reloads, and what becomes of it.

use std::sync::Arc;

use sd_notify::NotifyState;
use tokio::signal::unix::Signal;
use tracing::{info, warn};
use zentinel_wasm_engine::agent::Agent;

use crate::source::Source;
use crate::systemd::notify;
use crate::watch::{Cause, Watched};

/// Reloads one at a time, so that signals that arrive during a reload become one more.
pub(crate) async fn reload_when_due(agent: Arc<Agent>, source: Source, mut hangup: Signal, mut watched: Option<Watched>) {
    loop {
        tokio::select! {
            _ = hangup.recv() => info!("reloading because of SIGHUP"),
            cause = due(watched.as_mut()) => match cause {
                Cause::Change => info!("reloading because a watched file has changed"),
                Cause::Retry => info!("trying the failed reload again"),
            },
        }
        if let Some(watched) = &mut watched {
            watched.reloading().await;
        }
        let succeeded = reload(&agent, &source).await;
        if let Some(watched) = &mut watched {
            watched.reloaded(succeeded);
        }
    }
}

async fn due(watched: Option<&mut Watched>) -> Cause {
    match watched {
        Some(watched) => watched.due().await,
        None => std::future::pending().await,
    }
}

/// Whether it has succeeded.
async fn reload(agent: &Agent, source: &Source) -> bool {
    notify(&[NotifyState::Reloading, NotifyState::monotonic_usec_now().unwrap_or(NotifyState::MonotonicUsec(0))]);
    let result = source.reload(agent).await;
    if let Err(error) = &result {
        warn!("reload failed, keeping the current module, configuration and certificates: {error:#}");
    }
    notify(&[NotifyState::Ready]);
    result.is_ok()
}
