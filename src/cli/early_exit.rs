//! Ends the agent because of its command line.

use std::process::ExitCode;

use clap::error::ContextKind;

/// What one can do, for somebody who has given nothing.
const OVERVIEW: &str = "\
Runs WebAssembly modules as a policy agent of the Zentinel reverse proxy.

  zentinel-wasm-agent --module policy.wasm    serve a module on /tmp/zentinel-wasm.sock
  zentinel-wasm-agent check policy.wasm       check a module without serving it
  zentinel-wasm-agent health                  ask the running agent whether it decides
  zentinel-wasm-agent --help                  every option, with its variable
  zentinel-wasm-agent help check              the options of a command

Options may be variables, such as WASM_MODULE and AGENT_SOCKET.";

/// Why the agent does not start: an invalid command line, or one that asks for help or the version.
#[derive(Debug)]
pub struct EarlyExit(Reason);

#[derive(Debug)]
enum Reason {
    Clap(clap::Error),
    NothingGiven,
}

impl From<clap::Error> for EarlyExit {
    fn from(error: clap::Error) -> Self {
        Self(Reason::Clap(error))
    }
}

impl EarlyExit {
    /// Neither an argument nor a variable is given.
    pub(super) const NOTHING_GIVEN: Self = Self(Reason::NothingGiven);

    /// Reports it and returns the exit status: 0 for help and version, which go to standard output,
    /// or 2 for an invalid command line, which is one line for `write_line`.
    pub fn report(&self, write_line: impl Fn(&str)) -> ExitCode {
        let error = match &self.0 {
            Reason::Clap(error) => error,
            Reason::NothingGiven => {
                OVERVIEW.lines().for_each(write_line);
                return ExitCode::from(2);
            }
        };
        if error.use_stderr() {
            write_line(&one_line(error));
            return ExitCode::from(2);
        }
        match error.print() {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        }
    }

    #[cfg(test)]
    pub(super) fn error(&self) -> Option<&clap::Error> {
        match &self.0 {
            Reason::Clap(error) => Some(error),
            Reason::NothingGiven => None,
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
