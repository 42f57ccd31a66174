//! Ends the agent because of its command line.

use std::process::ExitCode;

/// Why the agent does not start: an invalid command line, or one that asks for help or the version.
#[derive(Debug)]
pub struct EarlyExit(pub(super) clap::Error);

impl EarlyExit {
    /// Reports it and returns the exit status: 0 for help and version, which go to standard output,
    /// or 2 for an invalid command line, which is one line for `write_line`.
    pub fn report(&self, write_line: impl FnOnce(&str)) -> ExitCode {
        if self.0.use_stderr() {
            write_line(&one_line(&self.0.to_string()));
            return ExitCode::from(2);
        }
        match self.0.print() {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        }
    }
}

/// The first paragraph of clap's message: the option, its value, and what was expected.
pub(super) fn one_line(message: &str) -> String {
    let paragraph = message.split("\n\n").next().unwrap_or(message);
    paragraph.split_whitespace().collect::<Vec<_>>().join(" ")
}
