//! The time of one call: its deadline, and the slices in which it may use a thread.

use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// CPU time that a call may use on its caller's task before it moves to the slow lane. Ordinary
/// calls take microseconds. A looping module can delay others on its thread by this time plus the
/// tick at which it is detected.
const FIRST_SLICE: Duration = Duration::from_micros(250);

/// CPU time of this thread. Wall time would include time in which the machine ran something else.
pub(crate) fn thread_cpu_time() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32)
}

/// The call is past its deadline.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DeadlineExceeded;

/// The deadline of one call, and the CPU time that it has used.
pub(crate) struct CallBudget {
    deadline: Instant,
    slice: Slice,
    /// Estimated CPU time that host functions have used since the last tick.
    hosted: Duration,
}

#[derive(Clone, Copy)]
enum Slice {
    /// No tick so far.
    Fresh,
    /// The thread's CPU time at the first tick.
    Since(Duration),
    /// The call has left its first thread, and takes turns with other slow calls.
    Slow,
}

/// What a running call does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    Continue,
    /// Let other tasks run first.
    Yield,
}

impl CallBudget {
    /// The budget of a call that must end before `deadline`.
    pub(crate) fn new(deadline: Instant) -> Self {
        Self { deadline, slice: Slice::Fresh, hosted: Duration::ZERO }
    }

    pub(crate) fn deadline(&self) -> Instant {
        self.deadline
    }

    pub(crate) fn check(&self) -> Result<(), DeadlineExceeded> {
        if Instant::now() < self.deadline { Ok(()) } else { Err(DeadlineExceeded) }
    }

    /// Accounts for about `cost` of CPU time in a host function. Ticks interrupt only the guest's
    /// own code, and a guest may call host functions without running any in between.
    pub(crate) fn spend(&mut self, cost: Duration) -> Result<Next, DeadlineExceeded> {
        self.check()?;
        self.hosted += cost;
        if self.hosted < FIRST_SLICE {
            return Ok(Next::Continue);
        }
        self.leave();
        Ok(Next::Yield)
    }

    /// A tick has interrupted the guest's code.
    pub(crate) fn tick(&mut self) -> Result<Next, DeadlineExceeded> {
        self.check()?;
        self.hosted = Duration::ZERO;
        match self.slice {
            Slice::Fresh => {
                self.slice = Slice::Since(thread_cpu_time());
                Ok(Next::Continue)
            }
            Slice::Since(then) if thread_cpu_time().saturating_sub(then) < FIRST_SLICE => Ok(Next::Continue),
            Slice::Since(_) | Slice::Slow => {
                self.leave();
                Ok(Next::Yield)
            }
        }
    }

    /// Records that the call leaves its thread. It may continue on another one, whose CPU time must
    /// not be compared with this one's.
    pub(crate) fn leave(&mut self) {
        self.slice = Slice::Slow;
        self.hosted = Duration::ZERO;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LATER: Duration = Duration::from_secs(3600);

    #[test]
    fn host_functions_yield_after_a_slice() {
        let mut budget = CallBudget::new(Instant::now() + LATER);
        assert_eq!(budget.spend(FIRST_SLICE / 2).unwrap(), Next::Continue);
        assert_eq!(budget.spend(FIRST_SLICE / 2).unwrap(), Next::Yield);
        assert_eq!(budget.spend(FIRST_SLICE / 2).unwrap(), Next::Continue);
    }

    #[test]
    fn a_call_in_the_slow_lane_yields_at_each_tick() {
        let mut budget = CallBudget::new(Instant::now() + LATER);
        assert_eq!(budget.tick().unwrap(), Next::Continue);
        budget.leave();
        assert_eq!([budget.tick().unwrap(), budget.tick().unwrap()], [Next::Yield; 2]);
    }

    #[test]
    fn a_call_past_its_deadline_ends() {
        let mut budget = CallBudget::new(Instant::now());
        assert!(budget.check().is_err() && budget.tick().is_err() && budget.spend(Duration::ZERO).is_err());
    }
}
