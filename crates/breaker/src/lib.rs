//! A circuit breaker for a hook of a module that fails every call.
//!
//! Such a hook costs a deadline's worth of CPU time per call and decides nothing.
//! [`CircuitBreaker`] opens after a while, and its owner answers calls without the module. Now and
//! then it admits one call, a probe, and the first that succeeds closes it. [`BreakerLimits`]
//! define "a while" and "now and then".
//!
//! ```
//! use std::time::Duration;
//! use zentinel_wasm_breaker::{BreakerLimits, CircuitBreaker};
//!
//! let breaker = CircuitBreaker::new(BreakerLimits { failures: 2, window: Duration::ZERO, ..BreakerLimits::default() });
//! assert!(!breaker.failed());
//! assert!(breaker.failed());
//! assert!(breaker.is_open() && !breaker.admits());
//! assert!(breaker.succeeded());
//! assert!(!breaker.is_open() && breaker.admits());
//! ```
//!
//! The crate has no dependencies, so [loom](https://docs.rs/loom) can check every interleaving of
//! its calls without building anything else.

#![forbid(unsafe_code)]
#![deny(missing_docs)]

#[cfg(all(test, loom))]
use loom::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
#[cfg(all(test, loom))]
use loom::sync::{Mutex, MutexGuard};
use std::sync::PoisonError;
#[cfg(not(all(test, loom)))]
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
#[cfg(not(all(test, loom)))]
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// When a [`CircuitBreaker`] opens, and how often it probes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BreakerLimits {
    /// Consecutive failures before the breaker may open. Default: 100, so a handful of bad requests
    /// cannot open it.
    pub failures: u32,
    /// How long there must have been nothing but failures before it opens. Default: 10 s, which
    /// tells a burst of hostile requests from a module that is broken.
    pub window: Duration,
    /// Interval of probes while it is open. Default: 1 s.
    pub probe_interval: Duration,
    /// How long there must have been no call until an open breaker is no longer
    /// [failing](CircuitBreaker::is_failing). Default: 30 s, several times as often as an
    /// orchestrator checks readiness.
    pub idle: Duration,
}

impl Default for BreakerLimits {
    fn default() -> Self {
        let [window, probe_interval, idle] = [10, 1, 30].map(Duration::from_secs);
        Self { failures: 100, window, probe_interval, idle }
    }
}

/// Opens when every call has failed for a while, and closes after the first call that succeeds.
#[derive(Debug)]
pub struct CircuitBreaker {
    limits: BreakerLimits,
    created: Instant,
    /// Milliseconds from `created` to the first of the consecutive failures. Locked while
    /// `failures` or `open` changes, so the breaker is never open with no failure counted: no
    /// success would close it.
    first_failure: Mutex<u64>,
    /// Consecutive failures. A success reads it first, and has nothing to do when there are none.
    failures: AtomicU32,
    open: AtomicBool,
    /// Milliseconds from `created` to the next probe.
    next_probe: AtomicU64,
}

impl CircuitBreaker {
    /// A closed breaker.
    pub fn new(limits: BreakerLimits) -> Self {
        Self {
            limits,
            created: Instant::now(),
            first_failure: Mutex::new(0),
            failures: AtomicU32::new(0),
            open: AtomicBool::new(false),
            next_probe: AtomicU64::new(0),
        }
    }

    /// Whether calls fail without being made, except for probes.
    pub fn is_open(&self) -> bool {
        self.open.load(Relaxed)
    }

    /// Whether it is open and calls keep coming. Without calls there are no probes, so nobody knows
    /// whether they would still fail. An owner that gets no calls because this says that they fail
    /// would never be probed again.
    pub fn is_failing(&self) -> bool {
        self.is_open() && self.had_calls(self.millis(Instant::now()))
    }

    /// Whether the probe that was due last is not long overdue.
    fn had_calls(&self, now: u64) -> bool {
        now < self.next_probe.load(Relaxed).saturating_add(millis(self.limits.idle))
    }

    /// Whether the next call may be made. While the breaker is open, this is true once per
    /// [`probe_interval`](BreakerLimits::probe_interval).
    pub fn admits(&self) -> bool {
        !self.is_open() || self.admits_probe(self.millis(Instant::now()))
    }

    fn admits_probe(&self, now: u64) -> bool {
        let next = self.next_probe.load(Relaxed);
        now >= next && self.next_probe.compare_exchange(next, self.probe_after(now), Relaxed, Relaxed).is_ok()
    }

    /// Counts a call that has succeeded. True when that closes the breaker.
    pub fn succeeded(&self) -> bool {
        if self.failures.load(Relaxed) == 0 {
            return false;
        }
        let _changing = self.first_failure();
        self.failures.store(0, Relaxed);
        self.open.swap(false, Relaxed)
    }

    /// Counts a call that has failed. True when that opens the breaker.
    pub fn failed(&self) -> bool {
        self.failed_at(self.millis(Instant::now()))
    }

    fn failed_at(&self, now: u64) -> bool {
        let mut first_failure = self.first_failure();
        let failures = self.failures.load(Relaxed).saturating_add(1);
        self.failures.store(failures, Relaxed);
        if failures == 1 {
            *first_failure = now;
        }
        let lasted = now.saturating_sub(*first_failure);
        if self.is_open() || failures < self.limits.failures || lasted < millis(self.limits.window) {
            return false;
        }
        self.next_probe.store(self.probe_after(now), Relaxed);
        self.open.store(true, Relaxed);
        true
    }

    fn probe_after(&self, now: u64) -> u64 {
        now.saturating_add(millis(self.limits.probe_interval))
    }

    fn first_failure(&self) -> MutexGuard<'_, u64> {
        self.first_failure.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn millis(&self, now: Instant) -> u64 {
        millis(now.duration_since(self.created))
    }
}

fn millis(duration: Duration) -> u64 {
    duration.as_millis().try_into().unwrap_or(u64::MAX)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const FAILURES: u32 = 5;
    const WINDOW: u64 = 70;
    const PROBE: u64 = 9;
    const IDLE: u64 = 40;

    fn breaker() -> CircuitBreaker {
        let [window, probe_interval, idle] = [WINDOW, PROBE, IDLE].map(Duration::from_millis);
        CircuitBreaker::new(BreakerLimits { failures: FAILURES, window, probe_interval, idle })
    }

    fn opened() -> CircuitBreaker {
        let breaker = breaker();
        for _ in 1..FAILURES {
            assert!(!breaker.failed_at(0));
        }
        assert!(breaker.failed_at(WINDOW));
        breaker
    }

    #[test]
    fn has_the_documented_defaults() {
        let [window, probe_interval, idle] = [10, 1, 30].map(Duration::from_secs);
        assert_eq!(BreakerLimits::default(), BreakerLimits { failures: 100, window, probe_interval, idle });
    }

    #[test]
    fn opens_after_many_failures_over_the_whole_window() {
        let many = breaker();
        for _ in 0..FAILURES * 2 {
            assert!(!many.failed_at(WINDOW - 1));
        }
        let long = breaker();
        assert!(!long.failed_at(0));
        assert!(!long.failed_at(WINDOW * 2));
        assert!(opened().is_open());
    }

    #[test]
    fn counts_anew_after_one_success() {
        let breaker = breaker();
        for _ in 0..FAILURES {
            breaker.failed_at(0);
        }
        assert!(!breaker.succeeded());
        assert!(!breaker.failed_at(WINDOW));
    }

    #[test]
    fn probes_while_open_and_closes_after_a_success() {
        let breaker = opened();
        assert!(!breaker.admits_probe(WINDOW));
        assert!(breaker.admits_probe(WINDOW + PROBE));
        assert!(!breaker.admits_probe(WINDOW + PROBE));
        assert!(!breaker.failed_at(WINDOW + PROBE + 1));
        assert!(breaker.is_open());
        assert!(breaker.succeeded());
        assert!(!breaker.is_open() && breaker.admits());
    }

    #[test]
    fn is_failing_while_open_and_called() {
        assert!(!breaker().is_failing());
        let breaker = opened();
        assert!(breaker.is_failing());
        let probe_due = WINDOW + PROBE;
        assert!(breaker.had_calls(probe_due + IDLE - 1));
        assert!(!breaker.had_calls(probe_due + IDLE));
        // The next call is a probe.
        assert!(breaker.admits_probe(probe_due + IDLE));
        assert!(breaker.had_calls(probe_due + IDLE));
        assert!(breaker.succeeded());
        assert!(!breaker.is_failing());
    }
}

/// Every interleaving of calls that end at the same time. `cargo xtask test` runs these with
/// `--cfg loom`.
#[cfg(all(test, loom))]
mod loom_tests {
    use loom::sync::Arc;
    use loom::thread;

    use super::*;

    const PROBE: u64 = 1000;

    /// A breaker that one more failure opens.
    fn about_to_open() -> Arc<CircuitBreaker> {
        let probe_interval = Duration::from_millis(PROBE);
        let limits = BreakerLimits { failures: 2, window: Duration::ZERO, probe_interval, ..BreakerLimits::default() };
        let breaker = CircuitBreaker::new(limits);
        assert!(!breaker.failed_at(0));
        Arc::new(breaker)
    }

    fn spawn<T: 'static>(breaker: &Arc<CircuitBreaker>, run: impl FnOnce(&CircuitBreaker) -> T + 'static) -> thread::JoinHandle<T> {
        let breaker = Arc::clone(breaker);
        thread::spawn(move || run(&breaker))
    }

    #[test]
    fn a_success_always_closes_it() {
        loom::model(|| {
            let breaker = about_to_open();
            let failing = spawn(&breaker, |breaker| breaker.failed_at(0));
            // Between the counting of the failure and the opening, too.
            breaker.succeeded();
            failing.join().unwrap();
            breaker.succeeded();
            assert!(!breaker.is_open());
            // The failures before the success do not count.
            assert!(!breaker.failed_at(0));
        });
    }

    #[test]
    fn only_one_failure_opens_it() {
        loom::model(|| {
            let breaker = about_to_open();
            let other = spawn(&breaker, |breaker| breaker.failed_at(0));
            assert!(breaker.failed_at(0) != other.join().unwrap());
            assert!(breaker.is_open());
        });
    }

    #[test]
    fn only_one_success_closes_it() {
        loom::model(|| {
            let breaker = about_to_open();
            assert!(breaker.failed_at(0));
            let other = spawn(&breaker, CircuitBreaker::succeeded);
            assert!(breaker.succeeded() != other.join().unwrap());
            assert!(!breaker.is_open());
        });
    }

    #[test]
    fn only_one_call_of_an_interval_is_a_probe() {
        loom::model(|| {
            let breaker = about_to_open();
            assert!(breaker.failed_at(0));
            let other = spawn(&breaker, |breaker| breaker.admits_probe(PROBE));
            assert!(breaker.admits_probe(PROBE) != other.join().unwrap());
            assert!(!breaker.admits_probe(PROBE));
        });
    }
}
