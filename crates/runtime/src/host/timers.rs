//! Timers of AssemblyScript's `console.time`.

use std::time::{Duration, Instant};

/// Most timers that run at once in a call. A label is kept for each.
const MAX_TIMERS: usize = 16;

/// What is done with a timer.
#[derive(Clone, Copy)]
pub(crate) enum Action {
    Start,
    Show,
    End,
}

/// The timers of `console.time`, which do not outlive the call.
#[derive(Default)]
pub(crate) struct Timers(Vec<(String, Instant)>);

impl Timers {
    /// Forgets the timers of the call before.
    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }

    /// The time that is to be logged, if any.
    pub(crate) fn act(&mut self, action: Action, label: &str) -> Result<Option<Duration>, &'static str> {
        let at = self.0.iter().position(|(known, _)| known == label);
        match (action, at) {
            (Action::Start, Some(_)) => Err("timer is already running"),
            (Action::Start, None) if self.0.len() == MAX_TIMERS => Err("too many timers, ignoring this one"),
            (Action::Start, None) => {
                self.0.push((label.into(), Instant::now()));
                Ok(None)
            }
            (Action::Show | Action::End, None) => Err("no such timer"),
            (Action::Show, Some(at)) => Ok(Some(self.0[at].1.elapsed())),
            (Action::End, Some(at)) => Ok(Some(self.0.swap_remove(at).1.elapsed())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timers_are_few() {
        let mut timers = Timers::default();
        for n in 0..10_000 {
            assert_eq!(timers.act(Action::Start, &n.to_string()).is_ok(), n < MAX_TIMERS);
        }
        assert_eq!(timers.0.len(), MAX_TIMERS);
        assert!(timers.act(Action::Start, "0").is_err());
        assert!(timers.act(Action::Show, "0").unwrap().is_some());
        assert!(timers.act(Action::End, "0").unwrap().is_some());
        assert!(timers.act(Action::End, "0").is_err());
        assert!(timers.act(Action::Start, "0").unwrap().is_none());
        timers.clear();
        assert!(timers.act(Action::Show, "1").is_err());
    }
}
