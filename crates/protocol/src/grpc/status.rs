//! Statuses that end streams.

use tonic::{Code, Status};

/// Longest reason in a status, in bytes: it travels in a header, and clients take few of these.
const MAX_REASON: usize = 1024;

/// A status that tells why a stream is ended.
pub(super) fn refusal(code: Code, reason: &str) -> Status {
    let mut end = reason.len().min(MAX_REASON);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    Status::new(code, &reason[..end])
}
