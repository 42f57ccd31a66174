//! What systemd is told.

use sd_notify::NotifyState;

/// Tells systemd, where it is there.
pub(crate) fn notify(states: &[NotifyState<'_>]) {
    let _ = sd_notify::notify(false, states);
}
