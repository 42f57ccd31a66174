//! Ends the agent because of its command line.

use std::process::ExitCode;

use clap::error::ContextKind;

/// Why the agent does not start: an invalid command line, or one that asks for help or the version.
#[derive(Debug)]
pub struct EarlyExit(pub(super) clap::Error);

impl EarlyExit {
    /// Reports it and returns the exit status: 0 for help and version, which go to standard output,
    /// or 2 for an invalid command line, which is one line for `write_line`.
    pub fn report(&self, write_line: impl FnOnce(&str)) -> ExitCode {
        if self.0.use_stderr() {
            write_line(&one_line(&self.0));
            return ExitCode::from(2);
        }
        match self.0.print() {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        }
    }
}

/// clap's message in one line: the option, its value, what was expected, and what is similar. Usage
/// and the reference to `--help` are left out.
pub(super) fn one_line(error: &clap::Error) -> String {
    let message = error.to_string();
    let mut message = message.as_str();
    // clap adds no usage to an invalid value, which may contain the same text.
    let has_usage = error.get(ContextKind::InvalidValue).is_none();
    for part in [Some("\n\nFor more information"), has_usage.then_some("\n\nUsage: ")].into_iter().flatten() {
        message = message.rfind(part).map_or(message, |at| &message[..at]);
    }
    let parts = message.split("\n  tip: ").map(|part| part.split_whitespace().collect::<Vec<_>>().join(" "));
    parts.collect::<Vec<_>>().join("; ")
}
