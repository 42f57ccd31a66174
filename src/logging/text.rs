//! The fields of entries in the text format.

use std::error::Error;
use std::fmt;

use tracing::field::{Field, Visit};
use tracing_subscriber::field::{RecordFields, VisitOutput as _};
use tracing_subscriber::fmt::FormatFields;
use tracing_subscriber::fmt::format::{DefaultVisitor, Writer};

/// The field with the SHA-256 of the module.
const MODULE: &str = "module";

/// Digits of a SHA-256 in the text format: enough to tell modules apart, and to find one by its
/// digest in full.
const DIGITS: usize = 12;

/// Formats fields as `tracing_subscriber` does by default, with short digests.
pub(super) struct TextFields;

impl<'w> FormatFields<'w> for TextFields {
    fn format_fields<R: RecordFields>(&self, writer: Writer<'w>, fields: R) -> fmt::Result {
        let mut visitor = ShortDigests(DefaultVisitor::new(writer, true));
        fields.record(&mut visitor);
        visitor.0.finish()
    }
}

/// Truncates the digest of the module for the visitor `V`.
struct ShortDigests<V>(V);

impl<V: Visit> Visit for ShortDigests<V> {
    fn record_str(&mut self, field: &Field, value: &str) {
        let short = if field.name() == MODULE && is_digest(value) { &value[..DIGITS] } else { value };
        self.0.record_str(field, short);
    }

    fn record_error(&mut self, field: &Field, value: &(dyn Error + 'static)) {
        self.0.record_error(field, value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.record_debug(field, value);
    }
}

fn is_digest(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    use tracing::{info, subscriber};

    use super::*;

    /// What the text format has after the target.
    fn written(log: impl FnOnce()) -> String {
        #[derive(Clone, Default)]
        struct Buffer(Arc<Mutex<Vec<u8>>>);
        impl Write for Buffer {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                self.0.lock().unwrap().write(bytes)
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let buffer = Buffer::default();
        let writer = buffer.clone();
        let builder = tracing_subscriber::fmt().with_ansi(false).without_time().with_level(false).with_target(false);
        subscriber::with_default(builder.fmt_fields(TextFields).with_writer(move || writer.clone()).finish(), log);
        String::from_utf8(buffer.0.lock().unwrap().clone()).unwrap()
    }

    #[test]
    fn the_digest_of_the_module_is_short() {
        let digest = "0123456789abcdef".repeat(4);
        assert_eq!(written(|| info!(module = digest, "serves")), "serves module=\"0123456789ab\"\n");
        // In other fields it may be text of a client, and in the message of the module.
        assert_eq!(written(|| info!(correlation_id = digest, "{digest}")), format!("{digest} correlation_id=\"{digest}\"\n"));
        assert_eq!(written(|| info!(module = "m.wasm", "serves")), "serves module=\"m.wasm\"\n");
        let other = "\u{e9}".repeat(32);
        assert_eq!(written(|| info!(module = other, "serves")), format!("serves module=\"{other}\"\n"));
    }

    #[test]
    fn everything_else_has_the_default_format() {
        let missing: Option<u64> = None;
        let error = std::io::Error::other("e");
        let line = written(|| info!(number = 1, missing, yes = true, text = "a b", shown = %"c", error = &error as &dyn Error, "message"));
        assert_eq!(line, "message number=1 yes=true text=\"a b\" shown=c error=e\n");
    }
}
