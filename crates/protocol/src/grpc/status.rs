//! Statuses that end streams.

use tonic::{Code, Status};

/// Longest reason in a status, in bytes. It is sent in a header, and clients bound their size.
const MAX_REASON: usize = 1024;

/// A status with the reason why a stream ends, shortened if necessary.
pub(super) fn with_reason(code: Code, reason: &str) -> Status {
    let mut end = reason.len().min(MAX_REASON);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    Status::new(code, &reason[..end])
}
