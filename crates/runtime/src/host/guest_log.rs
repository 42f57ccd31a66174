//! Modules' log lines in the agent's log, marked as theirs and rate-limited.

use std::sync::Once;
use std::time::Duration;

use tracing::{debug, error, info, trace, warn};
use zentinel_wasm_bounds::RateLimit;

/// Longest line of a module, in bytes. Longer lines are truncated.
pub(crate) const MAX_LINE: usize = 8 * 1024;

/// Lines per second from all instances of a module, after the burst.
const LINES_PER_SECOND: f64 = 100.0;

/// Lines in a burst: enough for a panic with its backtrace in every instance.
const BURST: f64 = 500.0;

/// Approximate CPU time for logging a line, in addition to [`BYTE_COST`].
const LINE_COST: Duration = Duration::from_micros(5);

/// Approximate CPU time for logging a byte of a line.
const BYTE_COST: Duration = Duration::from_nanos(10);

/// Approximate CPU time for discarding a line.
const UNWANTED_COST: Duration = Duration::from_nanos(100);

/// Warnings about instances that cannot be created, in a burst. A pool may retry all of its slots
/// at the same time, and forever.
const REPLACEMENT_BURST: f64 = 5.0;

/// Such warnings per second, after the burst.
const REPLACEMENTS_PER_SECOND: f64 = 0.2;

/// The level of a line, numbered as in `zentinel.log`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    Trace,
    Debug,
    Info,
    Warn,
    Error,
}

impl Level {
    /// Converts a guest's number. Numbers out of range become the nearest level.
    pub(crate) fn from_guest(level: i32) -> Self {
        match level {
            i32::MIN..=0 => Self::Trace,
            1 => Self::Debug,
            2 => Self::Info,
            3 => Self::Warn,
            4.. => Self::Error,
        }
    }

    /// Whether lines of this level are logged.
    pub(crate) fn enabled(self) -> bool {
        match self {
            Self::Trace => tracing::enabled!(target: "guest", tracing::Level::TRACE),
            Self::Debug => tracing::enabled!(target: "guest", tracing::Level::DEBUG),
            Self::Info => tracing::enabled!(target: "guest", tracing::Level::INFO),
            Self::Warn => tracing::enabled!(target: "guest", tracing::Level::WARN),
            Self::Error => tracing::enabled!(target: "guest", tracing::Level::ERROR),
        }
    }
}

/// The log of a module and its rate limits. It belongs to the module rather than a pool, so new
/// settings do not reset the limits.
#[derive(Debug)]
pub(crate) struct GuestLog {
    module: String,
    lines: RateLimit,
    /// For the agent's warnings that an instance cannot be created.
    pub(crate) replacements: RateLimit,
    /// For the agent's warning that the module ignores its configuration.
    pub(crate) unconfigurable: Once,
}

impl GuestLog {
    /// Creates the log of the module with the digest `module`, with which lines are marked.
    pub(crate) fn new(module: String) -> Self {
        Self {
            module,
            lines: RateLimit::new(BURST, LINES_PER_SECOND),
            replacements: RateLimit::new(REPLACEMENT_BURST, REPLACEMENTS_PER_SECOND),
            unconfigurable: Once::new(),
        }
    }

    /// Logs a line of the module, unless its level is disabled or the rate limit is reached.
    /// Returns about how much CPU time that took.
    pub(crate) fn line(&self, level: Level, correlation_id: &str, line: &[u8]) -> Duration {
        if !level.enabled() {
            return UNWANTED_COST;
        }
        let Some(suppressed) = self.lines.admit() else { return UNWANTED_COST };
        let module = self.module.as_str();
        if suppressed.is_some() {
            warn!(target: "guest", module, suppressed, "the module logs too much: lines were dropped");
        }
        let line = &line[..line.len().min(MAX_LINE)];
        let cost = LINE_COST + BYTE_COST * line.len() as u32;
        let line = String::from_utf8_lossy(line);
        // In the text format, a line end would let the module forge entries of the agent.
        let line = line.replace(|c: char| c.is_control() && c != '\t', " ");
        match level {
            Level::Trace => trace!(target: "guest", module, correlation_id, "{line}"),
            Level::Debug => debug!(target: "guest", module, correlation_id, "{line}"),
            Level::Info => info!(target: "guest", module, correlation_id, "{line}"),
            Level::Warn => warn!(target: "guest", module, correlation_id, "{line}"),
            Level::Error => error!(target: "guest", module, correlation_id, "{line}"),
        }
        cost
    }
}

/// Buffers what a module writes to a stream until a line is complete.
#[derive(Default)]
pub(crate) struct LineBuffer(Vec<u8>);

impl LineBuffer {
    /// Appends bytes and calls `line` with every line that they complete.
    pub(crate) fn write(&mut self, bytes: &[u8], mut line: impl FnMut(&[u8])) {
        for part in bytes.split_inclusive(|&byte| byte == b'\n') {
            let ended = part.ends_with(b"\n");
            let part = if ended { &part[..part.len() - 1] } else { part };
            let room = MAX_LINE.saturating_sub(self.0.len());
            self.0.extend_from_slice(&part[..part.len().min(room)]);
            if ended {
                line(&self.0);
                self.0.clear();
            }
        }
    }

    /// Calls `line` with the rest that has no line end, if any.
    pub(crate) fn flush(&mut self, mut line: impl FnMut(&[u8])) {
        if !self.0.is_empty() {
            line(&self.0);
            self.0.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_complete_and_bounded() {
        let mut buffer = LineBuffer::default();
        let mut lines = Vec::new();
        buffer.write(b"one\ntw", |line| lines.push(line.to_vec()));
        buffer.write(b"o\n\n", |line| lines.push(line.to_vec()));
        buffer.write(&[b'x'; MAX_LINE * 2], |line| lines.push(line.to_vec()));
        buffer.flush(|line| lines.push(line.to_vec()));
        buffer.flush(|line| lines.push(line.to_vec()));
        assert_eq!(lines[..3], [b"one".to_vec(), b"two".to_vec(), vec![]]);
        assert_eq!(lines[3].len(), MAX_LINE);
        assert_eq!(lines.len(), 4);
    }

    #[test]
    fn endless_logging_is_rate_limited_and_counted() {
        let log = GuestLog::new("m".into());
        let taken = (0..1_000_000).filter(|_| log.lines.admit().is_some()).count();
        // The refill during the loop is small even on a slow machine: 100 lines per second.
        assert!(taken >= BURST as usize && taken < 100_000, "{taken}");
        assert!(log.lines.suppressed() > 0);
    }
}
