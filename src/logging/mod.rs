//! The agent's log: entries of bounded length, one per line, on standard error.
//!
//! Entries go into a bounded `queue` that a thread of its own writes, so logging never blocks.
//! Lines that cannot be written are lost and counted, because the log must not delay or fail a
//! request, a reload or the shutdown.

mod lines;
mod queue;
mod text;

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
use zentinel_wasm_engine::Metrics;

use crate::otlp;
pub(crate) use lines::LineWriter;
use queue::{LogQueue, captured};
use text::TextFields;

/// Format of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// One JSON object per line
    Json,
    /// Human-readable text
    Text,
}

/// Time to write the last lines when the process ends. A reader takes a full queue within
/// milliseconds; one that does not read must not delay a service manager.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// Longest backtrace in the log, in characters: enough for the calls that lead to a panic, without
/// those below the runtime.
const MAX_BACKTRACE: usize = 8000;

/// Longest quotation of ignored directives of `RUST_LOG`, in characters.
const MAX_IGNORED: usize = 100;

/// Log lines that could not be written.
static LINES_LOST: LazyLock<IntCounter> = LazyLock::new(|| {
    counter("wasm_agent_log_lines_lost_total", "Log lines lost because standard error was not read or could not be written.")
});

/// Panics on any thread.
static PANICS: LazyLock<IntCounter> = LazyLock::new(|| counter("wasm_agent_panics_total", "Panics in the agent's own code."));

/// The metrics of an agent, including those of the whole process: lost log lines and spans, and
/// panics.
pub fn metrics() -> Metrics {
    Metrics::new().with(&LINES_LOST).with(&PANICS).with(&otlp::DROPPED)
}

fn counter(name: &str, help: &str) -> IntCounter {
    IntCounter::new(name, help).expect("the name is valid")
}

/// The log. Dropping it waits until everything is written, for a bounded time.
pub struct Log(LogQueue);

impl Log {
    /// Starts the thread that writes.
    ///
    /// # Errors
    ///
    /// The system cannot start the thread, or has no file descriptor left.
    pub fn start() -> io::Result<Self> {
        let queue = LogQueue::new(LINES_LOST.clone());
        // A descriptor of its own, because a blocked write would hold the lock of
        // `std::io::stderr`.
        let out = std::fs::File::from(io::stderr().as_fd().try_clone_to_owned()?);
        queue.start(out, |lost| captured(|| error!(lost, "log lines were lost here because they could not be written")))?;
        Ok(Self(queue))
    }

    /// Writes one line as it is, whatever the format of entries.
    pub fn write_plain(&self, line: &str) {
        // Writing to the queue does not fail.
        let _ = EntryWriter { out: self.0.clone(), format: LogFormat::Text }.write_all(format!("{line}\n").as_bytes());
    }

    /// Takes whole lines as they are. Writing to it never waits and never fails.
    pub(crate) fn raw(&self) -> impl Write + Send + use<> {
        self.0.clone()
    }

    /// Sets up the format and filter of entries, and logs panics from now on. `verbose` takes
    /// precedence over `RUST_LOG`, which the proxy's installer sets for every agent.
    pub fn init(&self, format: LogFormat, verbose: bool) {
        let default = if verbose { "debug" } else { "info" };
        let wanted = std::env::var("RUST_LOG").ok().filter(|filter| !filter.is_empty() && !verbose);
        // Checked here, because the filter prints what it ignores to standard error, and panics if
        // that fails.
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
            .with_writer(move || EntryWriter { out: queue.clone(), format });
        match format {
            LogFormat::Json => builder.json().flatten_event(true).with_current_span(false).with_span_list(false).init(),
            // Includes the target, which is `guest` for the module's own lines.
            LogFormat::Text => builder.fmt_fields(TextFields).with_ansi(io::stderr().is_terminal()).init(),
        }
        panic::set_hook(Box::new(log_panic));
        if !ignored.is_empty() {
            warn!("ignoring invalid directives in `RUST_LOG`: {}", shortened(&ignored.join(","), MAX_IGNORED));
        }
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.0.flush(FLUSH_TIMEOUT);
    }
}

/// Counts and logs a panic. The standard library would write it to standard error in several lines.
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

/// Largest entry that is written as it is, in bytes: a module's longest line with all of its bytes
/// escaped, and the other fields.
const MAX_ENTRY: usize = 64 << 10;

/// Longest text in a larger entry, in characters. Such an entry contains text from a client.
const MAX_TEXT: usize = 1000;

/// Writes entries as single lines of bounded length, whatever text of a module or a client they
/// contain.
struct EntryWriter<W> {
    out: W,
    format: LogFormat,
}

impl<W: Write> Write for EntryWriter<W> {
    /// Takes one entry with its line break. `tracing_subscriber` writes each entry in one call.
    fn write(&mut self, entry: &[u8]) -> io::Result<usize> {
        let text = entry.strip_suffix(b"\n").unwrap_or(entry);
        let breaks = |byte: &u8| matches!(byte, b'\n' | b'\r');
        if text.len() > MAX_ENTRY || text.iter().any(breaks) {
            let mut line = match self.format {
                LogFormat::Json => with_short_texts(text),
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

/// The object `entry` with its texts truncated.
fn with_short_texts(entry: &[u8]) -> Vec<u8> {
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
        EntryWriter { out: &mut out, format }.write_all(entry.as_bytes()).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn an_entry_is_one_line() {
        assert_eq!(written(LogFormat::Text, "plain\n"), "plain\n");
        assert_eq!(written(LogFormat::Text, "one\ntwo\r\nthree\n"), "one two  three\n");
    }

    #[test]
    fn truncates_a_long_entry() {
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
    fn keeps_the_longest_line_of_a_module() {
        let entry = format!("{}\n", serde_json::json!({"message": "\u{1}".repeat(8 << 10)}));
        assert_eq!(written(LogFormat::Json, &entry), entry);
    }
}
