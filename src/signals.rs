//! The signals that end or reload the agent.

use anyhow::Context as _;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// All signals that the agent handles. They are caught before anything else is set up, so none of
/// them ends it halfway.
pub struct Signals {
    /// The signals that end the agent.
    pub termination: TerminationSignals,
    /// SIGHUP, which reloads the agent.
    pub(crate) hangup: Signal,
}

/// SIGTERM and SIGINT.
pub struct TerminationSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// Catches the signals from now on.
    ///
    /// # Errors
    ///
    /// The system does not deliver signals.
    pub fn catch() -> anyhow::Result<Self> {
        let catch = |kind| signal(kind).context("cannot catch signals");
        // Sent when the log or the cache reaches the limit on the size of files. Once it is caught,
        // it does not end the process; the write fails instead.
        drop(catch(SignalKind::from_raw(rustix::process::Signal::XFSZ.as_raw()))?);
        Ok(Self {
            termination: TerminationSignals { terminate: catch(SignalKind::terminate())?, interrupt: catch(SignalKind::interrupt())? },
            hangup: catch(SignalKind::hangup())?,
        })
    }
}

impl TerminationSignals {
    /// Waits for SIGTERM or SIGINT.
    pub async fn recv(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
