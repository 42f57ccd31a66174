//! The circuit breaker of a module, and which module errors it counts.

use zentinel_wasm_breaker::{BreakerLimits, CircuitBreaker};
use zentinel_wasm_contract::FailureKind;

/// The breaker of one module.
pub(crate) struct Breaker(CircuitBreaker);

impl Breaker {
    pub(crate) fn new(limits: BreakerLimits) -> Self {
        Self(CircuitBreaker::new(limits))
    }

    /// Whether calls are answered without the module.
    pub(crate) fn is_open(&self) -> bool {
        self.0.is_open()
    }

    /// Whether this call may reach the module.
    pub(crate) fn admits(&self) -> bool {
        self.0.admits()
    }

    /// A call has succeeded. True when that closes the breaker.
    pub(crate) fn succeeded(&self) -> bool {
        self.0.succeeded()
    }

    /// A call has failed. True when that opens the breaker.
    pub(crate) fn failed(&self, kind: FailureKind) -> bool {
        is_the_modules_fault(kind) && self.0.failed()
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

    fn opens_at_the_first_failure() -> Breaker {
        Breaker::new(BreakerLimits { failures: 1, window: Duration::ZERO, ..BreakerLimits::default() })
    }

    #[test]
    fn ignores_overload_and_invalid_input() {
        let breaker = opens_at_the_first_failure();
        for kind in [FailureKind::Overloaded, FailureKind::CircuitOpen, FailureKind::BodyLimit, FailureKind::InvalidEvent] {
            assert!(!breaker.failed(kind), "{kind:?}");
        }
        assert!(breaker.failed(FailureKind::Trap));
    }
}
