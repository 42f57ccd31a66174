//! What the command line asks for: to serve, or one of the commands.

use std::ffi::OsString;

use clap::CommandFactory as _;
use clap::error::ErrorKind;

use super::check::{self, CheckOptions};
use super::early_exit::EarlyExit;
use super::environment::{self, Environment};
use super::health::{self, HealthOptions};
use super::options::Cli;

/// What the command line asks for.
#[derive(Debug)]
pub enum Invocation {
    /// To serve a module.
    Serve(Box<Cli>),
    /// To check a module without serving it.
    Check(Box<CheckOptions>),
    /// To ask a running agent for its health.
    Health(HealthOptions),
}

impl Invocation {
    /// Reads the command line and the environment.
    ///
    /// # Errors
    ///
    /// They are invalid, or ask for help or the version.
    pub fn parse() -> Result<Self, EarlyExit> {
        let args: Vec<_> = std::env::args_os().collect();
        Self::read(&args, &std::env::vars_os().collect())
    }

    fn read(args: &[OsString], environment: &Environment) -> Result<Self, EarlyExit> {
        let Some(first) = args.get(1) else {
            if !environment::is_configured(environment) {
                return Err(EarlyExit::NOTHING_GIVEN);
            }
            return Ok(Self::serve(args, environment)?);
        };
        // A command comes first, and serving takes no arguments but options.
        match first.to_str() {
            Some("check") => Ok(Self::Check(Box::new(CheckOptions::read(&args[1..], environment)?))),
            Some("health") => Ok(Self::Health(HealthOptions::read(&args[1..], environment)?)),
            Some(word) if !word.starts_with('-') => Err(unknown(args).into()),
            _ => Ok(Self::serve(args, environment)?),
        }
    }

    fn serve(args: &[OsString], environment: &Environment) -> Result<Self, clap::Error> {
        let cli = Cli::read(args, environment).map_err(|error| match error.kind() {
            // With the commands.
            ErrorKind::DisplayHelp => command().try_get_matches_from(args).err().unwrap_or(error),
            _ => error,
        })?;
        Ok(Self::Serve(Box::new(cli)))
    }
}

/// The error about a word that is not a command, or what `help` shows.
fn unknown(args: &[OsString]) -> clap::Error {
    match command().try_get_matches_from(args) {
        Err(error) => error,
        Ok(_) => environment::invalid(ErrorKind::InvalidSubcommand, format!("unrecognized subcommand '{}'", args[1].display())),
    }
}

/// The options of serving with all commands, for help, man pages and completions.
pub fn command() -> clap::Command {
    Cli::command().subcommands([check::command(), health::command()]).subcommand_negates_reqs(true).args_conflicts_with_subcommands(true)
}

#[cfg(test)]
mod tests {
    use super::super::early_exit::one_line;
    use super::*;

    fn read(args: &[&str], environment: &[(&str, &str)]) -> Result<Invocation, EarlyExit> {
        let args: Vec<OsString> = ["zentinel-wasm-agent"].iter().chain(args).map(Into::into).collect();
        Invocation::read(&args, &environment.iter().map(|(name, value)| (name.into(), value.into())).collect())
    }

    /// The line about an invalid command line, or None for the overview.
    #[track_caller]
    fn problem(args: &[&str], environment: &[(&str, &str)]) -> Option<String> {
        read(args, environment).expect_err("it is invalid").error().map(one_line)
    }

    #[test]
    fn passes_the_checks_of_clap() {
        command().debug_assert();
    }

    #[test]
    fn serves_without_a_command() {
        assert!(matches!(read(&["--module", "health"], &[]), Ok(Invocation::Serve(cli)) if cli.module.as_os_str() == "health"));
        assert!(matches!(read(&[], &[("WASM_MODULE", "m.wasm")]), Ok(Invocation::Serve(_))));
        assert!(matches!(read(&["health"], &[("WASM_MODULE", "m.wasm")]), Ok(Invocation::Health(_))));
        assert!(matches!(read(&["check"], &[("WASM_MODULE", "m.wasm")]), Ok(Invocation::Check(_))));
        let late = problem(&["--module", "m.wasm", "health"], &[]);
        assert_eq!(late.as_deref(), Some("error: unexpected argument 'health' found"));
    }

    #[test]
    fn shows_the_overview_only_if_nothing_is_given() {
        const MISSING: &str = "error: the following required arguments were not provided: --module <FILE>";
        assert_eq!(problem(&[], &[]), None);
        assert_eq!(problem(&[], &[("PATH", "/bin"), ("WASMTIME_LOG", "x")]), None);
        assert_eq!(problem(&[], &[("WASM_MODULE", "")]).as_deref(), Some(MISSING));
        assert_eq!(problem(&[], &[("AGENT_SOCKET", "/s")]).as_deref(), Some(MISSING));
        let misspelled = problem(&[], &[("WASM_MODUL", "m.wasm")]).unwrap();
        assert!(misspelled.starts_with(MISSING) && misspelled.contains("`WASM_MODULE`"), "{misspelled}");
    }

    #[test]
    fn suggests_the_nearest_command() {
        for (word, expected) in [
            ("heath", "error: unrecognized subcommand 'heath'; a similar subcommand exists: 'health'"),
            ("chek", "error: unrecognized subcommand 'chek'; a similar subcommand exists: 'check'"),
            ("policy.wasm", "error: unrecognized subcommand 'policy.wasm'"),
            ("", "error: unrecognized subcommand ''"),
        ] {
            assert_eq!(problem(&[word], &[("WASM_MODULE", "m.wasm")]).as_deref(), Some(expected));
        }
    }

    #[test]
    fn shows_help_with_the_commands() {
        let help = |args: &[&str]| {
            let exit = read(args, &[]).unwrap_err();
            let error = exit.error().unwrap();
            assert_eq!(error.kind(), ErrorKind::DisplayHelp);
            error.to_string()
        };
        for args in [&["--help"][..], &["-h"], &["help"], &["--pool-size=2", "--help"]] {
            let help = help(args);
            assert!(help.contains("Commands:") && help.contains("health") && help.contains("--module"), "{help}");
        }
        for args in [&["health", "--help"][..], &["help", "health"]] {
            let help = help(args);
            assert!(help.contains("Usage: zentinel-wasm-agent health") && help.contains("--timeout-ms"), "{help}");
        }
    }
}
