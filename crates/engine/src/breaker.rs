//! Leaves a module alone that fails every call.
//!
//! A module that loops on every request costs a deadline's worth of CPU each time and decides nothing. After a while of nothing but failures its calls
//! are answered at once by the failure mode; now and then one is let through, and the first that succeeds closes the breaker again.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use zentinel_wasm_contract::FailureKind;

/// Failures in a row before the breaker may open: enough that no handful of bad requests can do it.
const MIN_FAILURES: u32 = 100;

/// Time over which there was nothing but failures before the breaker opens: long enough for a burst of hostile requests to be told from a module
/// that is broken.
const WINDOW: Duration = Duration::from_secs(10);

/// Time between two calls that are let through while the breaker is open.
const PROBE: Duration = Duration::from_secs(1);

/// The breaker of one module.
pub(crate) struct Breaker {
    made: Instant,
    /// Milliseconds since `made` of the first failure in a row. Held while the row or `open` changes, so that the breaker is never open with no
    /// failure counted: no success would close it.
    first_failure: Mutex<u64>,
    /// Failures in a row. A success looks at it first, and has nothing to do when there are none.
    failures: AtomicU32,
    open: AtomicBool,
    /// Milliseconds since `made` of the next probe.
    next_probe: AtomicU64,
}

impl Breaker {
    pub(crate) fn new() -> Self {
        Self {
            made: Instant::now(),
            first_failure: Mutex::new(0),
            failures: AtomicU32::new(0),
            open: AtomicBool::new(false),
            next_probe: AtomicU64::new(0),
        }
    }

    /// Whether calls are being answered without the module.
    pub(crate) fn is_open(&self) -> bool {
        self.open.load(Relaxed)
    }

    /// Whether this call may reach the module.
    pub(crate) fn admits(&self) -> bool {
        !self.is_open() || self.admits_probe(self.millis(Instant::now()))
    }

    fn admits_probe(&self, now: u64) -> bool {
        let next = self.next_probe.load(Relaxed);
        now >= next && self.next_probe.compare_exchange(next, now + PROBE.as_millis() as u64, Relaxed, Relaxed).is_ok()
    }

    /// A call has succeeded. True when that closes the breaker.
    pub(crate) fn succeeded(&self) -> bool {
        if self.failures.load(Relaxed) == 0 {
            return false;
        }
        let _changing = self.first_failure();
        self.failures.store(0, Relaxed);
        self.open.swap(false, Relaxed)
    }

    /// A call has failed. True when that opens the breaker.
    pub(crate) fn failed(&self, kind: FailureKind) -> bool {
        // The others say nothing of the module.
        let counts = match kind {
            FailureKind::Trap
            | FailureKind::Timeout
            | FailureKind::MemoryLimit
            | FailureKind::OutputLimit
            | FailureKind::AllocFailed
            | FailureKind::InvalidResult => true,
            FailureKind::BodyLimit
            | FailureKind::BodyNotCollected
            | FailureKind::Overloaded
            | FailureKind::CircuitOpen
            | FailureKind::InvalidEvent => false,
        };
        counts && self.failed_at(self.millis(Instant::now()))
    }

    fn failed_at(&self, now: u64) -> bool {
        let mut first_failure = self.first_failure();
        let failures = self.failures.load(Relaxed).saturating_add(1);
        self.failures.store(failures, Relaxed);
        if failures == 1 {
            *first_failure = now;
        }
        let lasted = now.saturating_sub(*first_failure);
        if self.is_open() || failures < MIN_FAILURES || lasted < WINDOW.as_millis() as u64 {
            return false;
        }
        self.next_probe.store(now + PROBE.as_millis() as u64, Relaxed);
        self.open.store(true, Relaxed);
        true
    }

    fn first_failure(&self) -> MutexGuard<'_, u64> {
        self.first_failure.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn millis(&self, now: Instant) -> u64 {
        now.duration_since(self.made).as_millis() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    const LONG: u64 = WINDOW.as_millis() as u64;

    fn opened() -> Breaker {
        let breaker = Breaker::new();
        for _ in 1..MIN_FAILURES {
            assert!(!breaker.failed_at(0));
        }
        assert!(breaker.failed_at(LONG));
        breaker
    }

    #[test]
    fn only_a_long_row_of_failures_opens_it() {
        let breaker = Breaker::new();
        for _ in 0..MIN_FAILURES * 2 {
            assert!(!breaker.failed_at(LONG - 1));
        }
        let breaker = Breaker::new();
        assert!(!breaker.failed_at(0));
        assert!(!breaker.failed_at(LONG * 2));
        assert!(opened().is_open());
    }

    #[test]
    fn one_success_begins_the_row_anew() {
        let breaker = Breaker::new();
        for _ in 0..MIN_FAILURES {
            breaker.failed_at(0);
        }
        assert!(!breaker.succeeded());
        assert!(!breaker.failed_at(LONG));
    }

    #[test]
    fn while_open_it_probes_and_a_success_closes_it() {
        let breaker = opened();
        assert!(!breaker.admits_probe(LONG));
        assert!(breaker.admits_probe(LONG + 1000));
        assert!(!breaker.admits_probe(LONG + 1000));
        assert!(!breaker.failed_at(LONG + 1001));
        assert!(breaker.is_open());
        assert!(breaker.succeeded());
        assert!(!breaker.is_open() && breaker.admits());
    }

    #[test]
    fn a_success_closes_it_whatever_happened_at_once() {
        const ROUNDS: usize = 3000;
        let breakers: Vec<_> = (0..ROUNDS).map(|_| Breaker::new()).collect();
        for breaker in &breakers {
            (1..MIN_FAILURES).for_each(|_| assert!(!breaker.failed_at(0)));
        }
        let ready = AtomicUsize::new(0);
        let spin_until = |done: &dyn Fn() -> bool| {
            for spins in 1.. {
                if done() {
                    break;
                }
                if spins % 10_000 == 0 {
                    // The other thread may be waiting for this core.
                    std::thread::yield_now();
                }
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for (round, breaker) in breakers.iter().enumerate() {
                    spin_until(&|| ready.load(Relaxed) > round);
                    breaker.failed_at(LONG);
                }
            });
            // The success comes as soon as the last failure is counted.
            for breaker in &breakers {
                ready.fetch_add(1, Relaxed);
                spin_until(&|| breaker.failures.load(Relaxed) == MIN_FAILURES);
                breaker.succeeded();
            }
        });
        for breaker in &breakers {
            breaker.succeeded();
            assert!(!breaker.is_open());
        }
    }

    #[test]
    fn overload_and_bad_input_say_nothing_of_the_module() {
        let breaker = Breaker::new();
        breaker.failed(FailureKind::Overloaded);
        breaker.failed(FailureKind::BodyLimit);
        assert_eq!(breaker.failures.load(Relaxed), 0);
    }
}
