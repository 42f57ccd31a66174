//! The agent's log: one line an entry on standard error, JSON unless told otherwise, and bounded.

use std::io::{IsTerminal, Write};

use serde_json::Value;
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
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(move || Entries { out: std::io::stderr(), format });
    match format {
        LogFormat::Json => builder.json().flatten_event(true).with_current_span(false).with_span_list(false).init(),
        // The target tells the module's own lines, `guest`, from the agent's.
        LogFormat::Text => builder.with_ansi(std::io::stderr().is_terminal()).init(),
    }
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
    fn write(&mut self, entry: &[u8]) -> std::io::Result<usize> {
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

    fn flush(&mut self) -> std::io::Result<()> {
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
