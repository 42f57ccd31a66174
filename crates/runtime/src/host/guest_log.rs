//! What modules write goes to the agent's log, marked as theirs and bounded.

use std::sync::Once;
use std::time::Duration;

use tracing::{debug, error, info, trace, warn};
use zentinel_wasm_bounds::RateLimit;

/// Longest line taken from a module, in bytes; the rest of it is cut.
pub(crate) const MAX_LINE: usize = 8 * 1024;

/// Lines a second taken from all instances of a module, once the burst is used up.
const LINES_PER_SECOND: f64 = 100.0;

/// Lines taken at once: enough for a panic with its backtrace in every instance.
const BURST: f64 = 500.0;

/// CPU time that a line takes, roughly, and each byte of it.
const LINE_COST: Duration = Duration::from_micros(5);

/// See [`LINE_COST`].
const BYTE_COST: Duration = Duration::from_nanos(10);

/// CPU time that it takes to find out that a line is not wanted, roughly.
const UNWANTED_COST: Duration = Duration::from_nanos(100);

/// Warnings of instances that cannot be replaced, at once and then a second. All slots of a pool may be tried at once, and each for ever.
const REPLACEMENT_BURST: f64 = 5.0;

/// See [`REPLACEMENT_BURST`].
const REPLACEMENTS_PER_SECOND: f64 = 0.2;

/// How serious a line is, as the import `zentinel.log` numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    Trace,
    Debug,
    Info,
    Warn,
    Error,
}

impl Level {
    /// Numbers beyond the scale count as the nearest end of it.
    pub(crate) fn from_guest(level: i32) -> Self {
        match level {
            i32::MIN..=0 => Self::Trace,
            1 => Self::Debug,
            2 => Self::Info,
            3 => Self::Warn,
            4.. => Self::Error,
        }
    }

    /// Whether lines of this level are logged at all.
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

/// What is logged of a module, and how much of it. It belongs to the module and not to a pool, so that new settings bring no new budget.
#[derive(Debug)]
pub(crate) struct GuestLog {
    module: String,
    lines: RateLimit,
    /// For the agent's warnings that an instance cannot be replaced.
    pub(crate) replacements: RateLimit,
    /// For the agent's warning that nothing takes the configuration.
    pub(crate) unconfigurable: Once,
}

impl GuestLog {
    /// `module` is the digest that lines are marked with.
    pub(crate) fn new(module: String) -> Self {
        Self {
            module,
            lines: RateLimit::new(BURST, LINES_PER_SECOND),
            replacements: RateLimit::new(REPLACEMENT_BURST, REPLACEMENTS_PER_SECOND),
            unconfigurable: Once::new(),
        }
    }

    /// Logs one line of a module, unless its level is off or the budget is used up, and tells what CPU time that took, roughly.
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
        // In the text format a line's end would let the module forge entries of the agent's own.
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

/// Collects what a module writes to a stream until a line is whole.
#[derive(Default)]
pub(crate) struct LineBuffer(Vec<u8>);

impl LineBuffer {
    /// Takes bytes and hands on every line that they end.
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

    /// Hands on what is left without a line's end.
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
    fn lines_are_whole_and_bounded() {
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
    fn a_module_that_logs_without_end_is_cut_off_and_counted() {
        let log = GuestLog::new("m".into());
        let taken = (0..1_000_000).filter(|_| log.lines.admit().is_some()).count();
        // The refill during the loop is small, however slow the machine is: a hundred lines a second.
        assert!(taken >= BURST as usize && taken < 100_000, "{taken}");
        assert!(log.lines.suppressed() > 0);
    }
}
