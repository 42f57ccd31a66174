//! The circuit breakers of a module, and which module errors they count.

use zentinel_wasm_breaker::{BreakerLimits, CircuitBreaker};
use zentinel_wasm_contract::{FailureKind, Hook, Hooks};

/// The breakers of one module: one for each hook, because the successes of one hook say nothing
/// about another.
pub(crate) struct Breakers([CircuitBreaker; Hook::ALL.len()]);

impl Breakers {
    pub(crate) fn new(limits: BreakerLimits) -> Self {
        Self(Hook::ALL.map(|_| CircuitBreaker::new(limits)))
    }

    /// Hooks whose calls are answered without the module.
    pub(crate) fn open(&self) -> Hooks {
        self.hooks(CircuitBreaker::is_open)
    }

    /// Those of them that are still called.
    pub(crate) fn failing(&self) -> Hooks {
        self.hooks(CircuitBreaker::is_failing)
    }

    fn hooks(&self, has: impl Fn(&CircuitBreaker) -> bool) -> Hooks {
        Hook::ALL.into_iter().filter(|&hook| has(self.of(hook))).collect()
    }

    /// Whether this call of `hook` may reach the module.
    pub(crate) fn admits(&self, hook: Hook) -> bool {
        self.of(hook).admits()
    }

    /// A call of `hook` has succeeded. True when that closes its breaker.
    pub(crate) fn succeeded(&self, hook: Hook) -> bool {
        self.of(hook).succeeded()
    }

    /// A call of `hook` has failed. True when that opens its breaker.
    pub(crate) fn failed(&self, hook: Hook, kind: FailureKind) -> bool {
        is_the_modules_fault(kind) && self.of(hook).failed()
    }

    fn of(&self, hook: Hook) -> &CircuitBreaker {
        &self.0[hook as usize]
    }
}

/// Whether `kind` is evidence that the module is broken.
fn is_the_modules_fault(kind: FailureKind) -> bool {
    match kind {
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
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn open_at_the_first_failure() -> Breakers {
        Breakers::new(BreakerLimits { failures: 1, window: Duration::ZERO, ..BreakerLimits::default() })
    }

    #[test]
    fn ignore_overload_and_invalid_input() {
        let breakers = open_at_the_first_failure();
        for kind in [FailureKind::Overloaded, FailureKind::CircuitOpen, FailureKind::BodyLimit, FailureKind::InvalidEvent] {
            assert!(!breakers.failed(Hook::RequestHeaders, kind), "{kind:?}");
        }
        assert!(breakers.failed(Hook::RequestHeaders, FailureKind::Trap));
    }

    #[test]
    fn open_and_close_by_hook() {
        for hook in Hook::ALL {
            let breakers = open_at_the_first_failure();
            assert!(breakers.failed(hook, FailureKind::Trap));
            for other in Hook::ALL {
                assert_eq!(breakers.admits(other), other != hook, "{other}");
                assert_eq!(breakers.succeeded(other), other == hook, "{other}");
            }
            assert_eq!(breakers.open(), Hooks::default());
        }
    }

    #[test]
    fn report_the_open_hooks_in_the_order_of_a_request() {
        let breakers = open_at_the_first_failure();
        for hook in [Hook::ResponseBody, Hook::RequestHeaders] {
            assert!(breakers.failed(hook, FailureKind::Timeout));
        }
        for hooks in [breakers.open(), breakers.failing()] {
            assert_eq!(hooks.iter().collect::<Vec<_>>(), [Hook::RequestHeaders, Hook::ResponseBody]);
        }
    }
}
