//! The bounds of events and answers.

/// Most entries of an object or list. An entry takes many times the bytes in memory that it may
/// take on the wire, and no real request has a thousand.
pub const MAX_ENTRIES: usize = 1 << 19;

/// Most values by which one call of `set` or `append` changes headers, because each value becomes a
/// change of its own.
pub const MAX_ADDED: usize = 10_000;

/// Largest sum of repeated header names in one call of `set` or `append`, in bytes. Each value
/// becomes a change with a copy of its name, so a long name with many values would grow far beyond
/// the answer that contained it.
pub const MAX_REPEATED_NAMES: usize = 1 << 20;

/// Most values in a guardrail verdict, which is some hundred detections. A few bytes of JSON become
/// half a kilobyte in memory.
pub const MAX_VERDICT_VALUES: usize = 10_000;

/// Longest reason of a closed WebSocket connection, in bytes: a control frame carries 125 bytes, of
/// which the code takes two (RFC 6455, 5.5).
pub const MAX_CLOSE_REASON: usize = 123;

/// Longest detail of a failure, in characters: one readable line of a log.
pub const MAX_DETAIL: usize = 1000;

/// Longest quote of a value in an error message, in characters: enough to recognise the value.
pub const MAX_QUOTE: usize = 40;
