//! Keeps one client or module from taking the log or a thread from all others.
//!
//! * [`RateLimit`] is a token bucket, and [`log_limited!`] logs through one;
//! * [`run_blocking_if_large`] moves work on many bytes out of the way of other tasks.
//!
//! ```
//! use zentinel_wasm_bounds::RateLimit;
//!
//! // Two at once, then one every ten seconds.
//! let limit = RateLimit::new(2.0, 0.1);
//! assert_eq!(limit.admit(), Some(None));
//! assert_eq!(limit.admit(), Some(None));
//! assert_eq!(limit.admit(), None);
//! ```

#![forbid(unsafe_code)]
#![deny(missing_docs)]
#![deny(clippy::print_stderr, clippy::print_stdout)]

mod large;
mod rate_limit;

pub use large::{LARGE, run_blocking_if_large};
pub use rate_limit::RateLimit;

// For `log_limited!`.
#[doc(hidden)]
pub use tracing;
