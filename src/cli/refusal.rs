//! How a command line is refused.

use std::process::ExitCode;

/// Why the agent does not start with this command line.
#[derive(Debug)]
pub struct Refusal(pub(super) clap::Error);

impl Refusal {
    /// Says it and gives the exit status: help and version go to standard output with 0, anything wrong is one line for `say` with 2.
    pub fn tell(&self, say: impl FnOnce(&str)) -> ExitCode {
        if self.0.use_stderr() {
            say(&one_line(&self.0.to_string()));
            return ExitCode::from(2);
        }
        match self.0.print() {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        }
    }
}

/// The first paragraph of clap's message: what is wrong, with what, and what it takes.
pub(super) fn one_line(message: &str) -> String {
    let paragraph = message.split("\n\n").next().unwrap_or(message);
    paragraph.split_whitespace().collect::<Vec<_>>().join(" ")
}
