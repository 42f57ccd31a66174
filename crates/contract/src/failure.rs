//! Module errors: the module gave no usable answer to an event.

use std::fmt;

use crate::limits::MAX_DETAIL;
use crate::text::shortened;

/// Why a module gave no usable answer. The code of each kind is stable across versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FailureKind {
    /// The module trapped: `unreachable`, an access out of bounds, a stack overflow, an abort,
    /// `proc_exit`.
    Trap,
    /// The deadline was exceeded.
    Timeout,
    /// The module trapped after it was refused more memory.
    MemoryLimit,
    /// The answer is larger than the limit.
    OutputLimit,
    /// The module's `alloc` returned null, or a region outside of its memory.
    AllocFailed,
    /// The answer breaks a rule of the contract.
    InvalidResult,
    /// The body is larger than the limit; the module was not called.
    BodyLimit,
    /// A body that the module is to see whole cannot be collected, or cannot be put back; the
    /// module was not called.
    BodyNotCollected,
    /// No instance became free before the deadline, or too many events were waiting.
    Overloaded,
    /// The circuit is open: the module failed every call for a while, so it was not called.
    CircuitOpen,
    /// The event cannot be decoded; the module was not called.
    InvalidEvent,
}

impl FailureKind {
    /// Every kind.
    pub const ALL: [Self; 11] = [
        Self::Trap,
        Self::Timeout,
        Self::MemoryLimit,
        Self::OutputLimit,
        Self::AllocFailed,
        Self::InvalidResult,
        Self::BodyLimit,
        Self::BodyNotCollected,
        Self::Overloaded,
        Self::CircuitOpen,
        Self::InvalidEvent,
    ];

    /// The stable code, as in `reason_codes`.
    pub const fn code(self) -> &'static str {
        match self {
            Self::Trap => "WASM_TRAP",
            Self::Timeout => "WASM_TIMEOUT",
            Self::MemoryLimit => "WASM_MEMORY_LIMIT",
            Self::OutputLimit => "WASM_OUTPUT_LIMIT",
            Self::AllocFailed => "WASM_ALLOC_FAILED",
            Self::InvalidResult => "WASM_INVALID_RESULT",
            Self::BodyLimit => "WASM_BODY_LIMIT",
            Self::BodyNotCollected => "WASM_BODY_NOT_COLLECTED",
            Self::Overloaded => "WASM_OVERLOADED",
            Self::CircuitOpen => "WASM_CIRCUIT_OPEN",
            Self::InvalidEvent => "WASM_INVALID_EVENT",
        }
    }

    /// The label of metrics: the code in lower case, without its prefix.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Trap => "trap",
            Self::Timeout => "timeout",
            Self::MemoryLimit => "memory_limit",
            Self::OutputLimit => "output_limit",
            Self::AllocFailed => "alloc_failed",
            Self::InvalidResult => "invalid_result",
            Self::BodyLimit => "body_limit",
            Self::BodyNotCollected => "body_not_collected",
            Self::Overloaded => "overloaded",
            Self::CircuitOpen => "circuit_open",
            Self::InvalidEvent => "invalid_event",
        }
    }
}

/// A module error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Why.
    pub kind: FailureKind,
    /// One line for the log.
    pub detail: String,
}

impl Failure {
    /// A module error of `kind`. `detail` is shortened to one line of [`MAX_DETAIL`] characters.
    pub fn new(kind: FailureKind, detail: impl Into<String>) -> Self {
        Self { kind, detail: shortened(&detail.into(), MAX_DETAIL) }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.kind.code(), self.detail)
    }
}

impl std::error::Error for Failure {}

#[cfg(test)]
mod tests {
    use super::FailureKind;

    #[test]
    fn labels_are_the_codes_in_lower_case() {
        for kind in FailureKind::ALL {
            assert_eq!(kind.code(), format!("WASM_{}", kind.label().to_uppercase()));
        }
    }
}
