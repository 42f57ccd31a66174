//! The agent's log: one line an entry on standard error, JSON unless told otherwise, and bounded.

use std::io::{IsTerminal, Write};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use tracing_subscriber::EnvFilter;

use crate::cli::LogFormat;

/// Sets the log up. `verbose` beats `RUST_LOG`, which the proxy's installer sets for every agent.
pub fn init(format: LogFormat, verbose: bool) {
    let default = if verbose { "debug" } else { "info" };
    let filter = EnvFilter::builder().with_default_directive(tracing::Level::ERROR.into());
    let filter = match std::env::var("RUST_LOG").ok().filter(|filter| !filter.is_empty()) {
        Some(wanted) if !verbose => filter.parse_lossy(wanted),
        _ => filter.parse_lossy(default),
    };
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Json => builder.json().flatten_event(true).with_current_span(false).with_span_list(false).init(),
        // The target tells the module's own lines, `guest`, from the agent's.
        LogFormat::Text => builder.with_writer(|| OneLine(std::io::stderr())).with_ansi(std::io::stderr().is_terminal()).init(),
    }
}

/// Keeps an entry on its line, whatever a module or a client has put into it. JSON does so by itself.
struct OneLine<W>(W);

impl<W: Write> Write for OneLine<W> {
    /// Takes one entry with its end of line: that is how entries are written.
    fn write(&mut self, entry: &[u8]) -> std::io::Result<usize> {
        let text = entry.strip_suffix(b"\n").unwrap_or(entry);
        if text.iter().any(|byte| matches!(byte, b'\n' | b'\r')) {
            let mut line: Vec<u8> = text.iter().map(|&byte| if matches!(byte, b'\n' | b'\r') { b' ' } else { byte }).collect();
            line.push(b'\n');
            self.0.write_all(&line)?;
        } else {
            self.0.write_all(entry)?;
        }
        Ok(entry.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.flush()
    }
}

/// Lines of one kind that may be logged at once.
const BURST: f64 = 20.0;

/// Lines of one kind that may be logged per second after that.
const PER_SECOND: f64 = 5.0;

/// Bounds how often one kind of line is logged.
#[derive(Debug)]
pub(crate) struct RateLimit(Mutex<Budget>);

#[derive(Debug)]
struct Budget {
    lines: f64,
    refilled: Instant,
    suppressed: u64,
}

impl RateLimit {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(Budget { lines: BURST, refilled: Instant::now(), suppressed: 0 }))
    }

    /// Whether a line may be logged now, and how many were left out before it.
    pub(crate) fn admit(&self) -> Option<u64> {
        let mut budget = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        budget.lines = (budget.lines + now.duration_since(budget.refilled).as_secs_f64() * PER_SECOND).min(BURST);
        budget.refilled = now;
        if budget.lines < 1.0 {
            budget.suppressed += 1;
            return None;
        }
        budget.lines -= 1.0;
        Some(std::mem::take(&mut budget.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_stays_on_its_line() {
        let mut out = Vec::new();
        for entry in ["plain\n", "one\ntwo\r\nthree\n"] {
            OneLine(&mut out).write_all(entry.as_bytes()).unwrap();
        }
        assert_eq!(out, b"plain\none two  three\n");
    }

    #[test]
    fn a_flood_is_cut_off_and_counted() {
        let limit = RateLimit::new();
        let admitted = (0..100_000).filter(|_| limit.admit().is_some()).count();
        assert!(admitted >= BURST as usize && admitted < 10_000, "{admitted}");
        assert!(limit.0.lock().unwrap().suppressed > 0);
    }
}
