//! Module errors: the module gave no usable answer to an event.

use std::fmt;
use std::sync::Arc;

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

/// Where in its code a guest was when its call failed.
pub trait Trace: fmt::Debug + Send + Sync {
    /// The active functions, from the innermost, on one line of bounded length. Looks up names and
    /// lines, so only failures that are logged should be described.
    fn describe(&self) -> String;

    /// Whether [`describe`](Self::describe) may take milliseconds.
    fn is_slow(&self) -> bool;
}

/// A module error.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Why.
    pub kind: FailureKind,
    /// One line for the log.
    pub detail: Box<str>,
    /// Where the guest was, if it was running. Boxed, because the future of every call has room for
    /// a failure.
    pub trace: Option<Box<Arc<dyn Trace>>>,
}

impl Failure {
    /// A module error of `kind`. `detail` is shortened to one line of [`MAX_DETAIL`] characters.
    pub fn new(kind: FailureKind, detail: impl Into<String>) -> Self {
        Self { kind, detail: shortened(&detail.into(), MAX_DETAIL).into(), trace: None }
    }

    /// The detail and the trace, on one line.
    pub fn description(&self) -> String {
        match &self.trace {
            Some(trace) => format!("{} (in {})", self.detail, trace.describe()),
            None => self.detail.to_string(),
        }
    }

    /// Whether [`description`](Self::description) may take milliseconds.
    pub fn is_slow_to_describe(&self) -> bool {
        self.trace.as_ref().is_some_and(|trace| trace.is_slow())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.kind.code(), self.description())
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
