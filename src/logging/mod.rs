//! The agent's log: one line an entry on standard error, JSON unless told otherwise, bounded, and never waited for.
//!
//! Whoever logs puts its line into a `queue` that a thread of its own writes. What cannot be written is lost and counted: a log must not hold up
//! or fail a request, a reload or the end.

mod queue;

use std::backtrace::{Backtrace, BacktraceStatus};
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd as _;
use std::panic::{self, PanicHookInfo};
use std::sync::LazyLock;
use std::thread;
use std::time::Duration;

use clap::ValueEnum;
use prometheus::IntCounter;
use serde_json::Value;
use tracing::{error, warn};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::Directive;
use zentinel_wasm_contract::shortened;

use queue::{Queue, captured};
use zentinel_wasm_engine::metrics::Metrics;

/// How log lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// One JSON object a line
    Json,
    /// For people
    Text,
}

/// Time that the last lines have to be written when the process ends. A reader that reads takes all that may be queued within milliseconds; one that
/// does not must not keep a service manager waiting.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// Most characters of a backtrace: the calls that lead to a panic, and not those below the runtime.
const MAX_BACKTRACE: usize = 8000;

/// Most characters of what was ignored in `RUST_LOG`.
const MAX_IGNORED: usize = 100;

/// Lines that were lost because they could not be written.
static LINES_LOST: LazyLock<IntCounter> =
    LazyLock::new(|| counter("wasm_agent_log_lines_lost_total", "Log lines lost because nobody read them or they could not be written."));

/// Panics of any thread.
static PANICS: LazyLock<IntCounter> = LazyLock::new(|| counter("wasm_agent_panics_total", "Panics in the agent's own code."));

/// The metrics of an agent, with what the process counts beside them.
pub fn metrics() -> Metrics {
    Metrics::new().with(&LINES_LOST).with(&PANICS)
}

fn counter(name: &str, help: &str) -> IntCounter {
    IntCounter::new(name, help).expect("the name is valid")
}

/// The way to standard error. Dropping it waits until everything is written, for a bounded time.
pub struct Log(Queue);

impl Log {
    /// Starts the thread that writes.
    ///
    /// # Errors
    ///
    /// The system gives no thread, or no file descriptor.
    pub fn start() -> io::Result<Self> {
        let queue = Queue::new(LINES_LOST.clone());
        // A descriptor of its own: a write that blocks holds the lock of `std::io::stderr`.
        let out = std::fs::File::from(io::stderr().as_fd().try_clone_to_owned()?);
        queue.start(out, |lost| captured(|| error!(lost, "log lines were lost here because they could not be written")))?;
        Ok(Self(queue))
    }

    /// Writes one plain line, for whoever started the agent by hand.
    pub fn say(&self, line: &str) {
        // Writing to the queue does not fail.
        let _ = Entries { out: self.0.clone(), format: LogFormat::Text }.write_all(format!("{line}\n").as_bytes());
    }

    /// Sets up what is logged, and how; panics are logged from now on. `verbose` beats `RUST_LOG`, which the proxy's installer sets for every agent.
    pub fn init(&self, format: LogFormat, verbose: bool) {
        let default = if verbose { "debug" } else { "info" };
        let wanted = std::env::var("RUST_LOG").ok().filter(|filter| !filter.is_empty() && !verbose);
        // Checked here, because the filter says on standard error what it ignores, and panics when it cannot.
        let (valid, ignored): (Vec<_>, Vec<_>) = wanted
            .as_deref()
            .unwrap_or(default)
            .split(',')
            .filter(|directive| !directive.is_empty())
            .partition(|directive| directive.parse::<Directive>().is_ok());
        let filter = EnvFilter::builder().with_default_directive(tracing::Level::ERROR.into()).parse_lossy(valid.join(","));
        let queue = self.0.clone();
        let builder = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .log_internal_errors(false)
            .with_writer(move || Entries { out: queue.clone(), format });
        match format {
            LogFormat::Json => builder.json().flatten_event(true).with_current_span(false).with_span_list(false).init(),
            // The target tells the module's own lines, `guest`, from the agent's.
            LogFormat::Text => builder.with_ansi(io::stderr().is_terminal()).init(),
        }
        panic::set_hook(Box::new(log_panic));
        if !ignored.is_empty() {
            warn!("ignoring what is not a filter in `RUST_LOG`: {}", shortened(&ignored.join(","), MAX_IGNORED));
        }
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.0.flush(FLUSH_TIMEOUT);
    }
}

/// Counts and logs a panic, which the standard library would write to standard error over several lines.
fn log_panic(panic: &PanicHookInfo<'_>) {
    PANICS.inc();
    let backtrace = Backtrace::capture();
    let backtrace = (backtrace.status() == BacktraceStatus::Captured).then(|| shortened(&backtrace.to_string(), MAX_BACKTRACE));
    error!(
        thread = thread::current().name(),
        location = panic.location().map(ToString::to_string),
        backtrace,
        "panicked: {}",
        shortened(panic.payload_as_str().unwrap_or("no message"), MAX_TEXT)
    );
}

/// Largest entry that is written as it is, in bytes: a module's longest line with every byte of it escaped, and what stands beside it.
const MAX_ENTRY: usize = 64 << 10;

/// What is left of a text in a larger entry, in characters. Only what a client has put into it is that long.
const MAX_TEXT: usize = 1000;

/// Writes entries as single lines of bounded length, whatever a module or a client has put into them.
struct Entries<W> {
    out: W,
    format: LogFormat,
}

impl<W: Write> Write for Entries<W> {
    /// Takes one entry with its end of line: that is how entries are written.
    fn write(&mut self, entry: &[u8]) -> io::Result<usize> {
        let text = entry.strip_suffix(b"\n").unwrap_or(entry);
        let breaks = |byte: &u8| matches!(byte, b'\n' | b'\r');
        if text.len() > MAX_ENTRY || text.iter().any(breaks) {
            let mut line = match self.format {
                LogFormat::Json => shorter(text),
                LogFormat::Text => text.iter().take(MAX_ENTRY).map(|byte| if breaks(byte) { b' ' } else { *byte }).collect(),
            };
            line.push(b'\n');
            self.out.write_all(&line)?;
        } else {
            self.out.write_all(entry)?;
        }
        Ok(entry.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// The object `entry` with its texts cut off.
fn shorter(entry: &[u8]) -> Vec<u8> {
    let mut fields: serde_json::Map<String, Value> = serde_json::from_slice(entry).unwrap_or_default();
    for value in fields.values_mut() {
        if let Value::String(text) = value
            && let Some((end, _)) = text.char_indices().nth(MAX_TEXT)
        {
            text.truncate(end);
            text.push('…');
        }
    }
    Value::Object(fields).to_string().into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(format: LogFormat, entry: &str) -> String {
        let mut out = Vec::new();
        Entries { out: &mut out, format }.write_all(entry.as_bytes()).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn an_entry_stays_on_its_line() {
        assert_eq!(written(LogFormat::Text, "plain\n"), "plain\n");
        assert_eq!(written(LogFormat::Text, "one\ntwo\r\nthree\n"), "one two  three\n");
    }

    #[test]
    fn a_long_entry_is_cut_off() {
        let long = "\u{e9}".repeat(10 << 20);
        let text = written(LogFormat::Text, &format!("{}\n", "x".repeat(10 << 20)));
        assert_eq!(text.len(), MAX_ENTRY + 1);
        assert!(text.ends_with("x\n"));
        let entry = serde_json::json!({"level": "WARN", "id": long, "count": 7, "message": "short"});
        let line = written(LogFormat::Json, &format!("{entry}\n"));
        let cut: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(cut["id"].as_str().unwrap().chars().count(), MAX_TEXT + 1);
        assert_eq!((&cut["level"], &cut["count"], &cut["message"]), (&entry["level"], &entry["count"], &entry["message"]));
        assert!(line.ends_with("}\n"));
    }

    #[test]
    fn a_module_s_longest_line_is_not_cut_off() {
        let entry = format!("{}\n", serde_json::json!({"message": "\u{1}".repeat(8 << 10)}));
        assert_eq!(written(LogFormat::Json, &entry), entry);
    }
}
