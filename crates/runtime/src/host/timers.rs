//! Timers of AssemblyScript's `console.time`.

use std::time::{Duration, Instant};

/// Most timers at the same time in a call. Each stores its label.
const MAX_TIMERS: usize = 16;

/// An action on a timer.
#[derive(Clone, Copy)]
pub(crate) enum TimerAction {
    Start,
    Show,
    End,
}

/// The timers of `console.time` in one call.
#[derive(Default)]
pub(crate) struct Timers(Vec<(String, Instant)>);

impl Timers {
    /// Removes the timers of the previous call.
    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }

    /// Performs `action`. Returns the time to log, if any, or why the action is impossible.
    pub(crate) fn act(&mut self, action: TimerAction, label: &str) -> Result<Option<Duration>, &'static str> {
        let at = self.0.iter().position(|(known, _)| known == label);
        match (action, at) {
            (TimerAction::Start, Some(_)) => Err("timer is already running"),
            (TimerAction::Start, None) if self.0.len() == MAX_TIMERS => Err("too many timers, ignoring this one"),
            (TimerAction::Start, None) => {
                self.0.push((label.into(), Instant::now()));
                Ok(None)
            }
            (TimerAction::Show | TimerAction::End, None) => Err("no such timer"),
            (TimerAction::Show, Some(at)) => Ok(Some(self.0[at].1.elapsed())),
            (TimerAction::End, Some(at)) => Ok(Some(self.0.swap_remove(at).1.elapsed())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn are_bounded_and_end_with_the_call() {
        let mut timers = Timers::default();
        for n in 0..10_000 {
            assert_eq!(timers.act(TimerAction::Start, &n.to_string()).is_ok(), n < MAX_TIMERS);
        }
        assert_eq!(timers.0.len(), MAX_TIMERS);
        assert!(timers.act(TimerAction::Start, "0").is_err());
        assert!(timers.act(TimerAction::Show, "0").unwrap().is_some());
        assert!(timers.act(TimerAction::End, "0").unwrap().is_some());
        assert!(timers.act(TimerAction::End, "0").is_err());
        assert!(timers.act(TimerAction::Start, "0").unwrap().is_none());
        timers.clear();
        assert!(timers.act(TimerAction::Show, "1").is_err());
    }
}
