//! Notifies systemd.

use sd_notify::NotifyState;

/// Notifies systemd. Does nothing without it.
pub(crate) fn notify(states: &[NotifyState<'_>]) {
    let _ = sd_notify::notify(false, states);
}
