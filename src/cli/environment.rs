//! Reads the options from the command line and the environment.

use std::ffi::{OsStr, OsString};

use clap::builder::Resettable;
use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{CommandFactory as _, FromArgMatches as _};

use super::early_exit::EarlyExit;
use super::options::Cli;

/// Alias of the environment variable of `--grpc-address`.
const GRPC_ADDRESS_ALIAS: &str = "WASM_GRPC_ADDRESS";

/// Options whose variables must not be empty. An empty variable of another option counts as unset;
/// for these, that would widen who may connect, what may be run, or what is allowed.
const REJECTED_IF_EMPTY: [&str; 3] = ["grpc_client_ca", "module_sha256", "fail_open"];

impl Cli {
    /// Reads the command line and the environment.
    ///
    /// # Errors
    ///
    /// They are invalid, or ask for help or the version.
    pub fn parse() -> Result<Self, EarlyExit> {
        Self::read(std::env::args_os(), std::env::var_os(GRPC_ADDRESS_ALIAS)).map_err(EarlyExit)
    }

    /// Reads `args` and the environment, where `grpc_address` is the value of its alias.
    fn read<I, T>(args: I, grpc_address: Option<OsString>) -> Result<Self, clap::Error>
    where
        I: IntoIterator<Item = T>,
        T: Into<OsString> + Clone,
    {
        let mut command = Self::command();
        // clap supports one variable per option. The alias is the default, because the option and
        // its variable take precedence over that.
        if let Some(address) = grpc_address.filter(|address| !address.is_empty()) {
            command = command.mut_arg("grpc_address", |arg| arg.default_value(clap::builder::OsStr::from(address)));
        }
        let mut rejected = Vec::new();
        // Templates of service files leave unused variables empty.
        command = command.mut_args(|arg| {
            let is_empty = |variable: &&OsStr| std::env::var_os(variable).is_some_and(|value| value.is_empty());
            let Some(variable) = arg.get_env().filter(is_empty) else { return arg };
            if REJECTED_IF_EMPTY.contains(&arg.get_id().as_str()) {
                rejected.push((arg.get_id().clone(), variable.to_string_lossy().into_owned()));
            }
            arg.env(Resettable::Reset)
        });
        let matches = command.try_get_matches_from(args)?;
        for (id, variable) in rejected {
            if matches.value_source(id.as_str()) != Some(ValueSource::CommandLine) {
                let problem = format!("the environment variable `{variable}` is empty: set it to a value or unset it");
                return Err(Self::command().error(ErrorKind::InvalidValue, problem));
            }
        }
        let cli = Self::from_arg_matches(&matches)?;
        cli.check_tls().map_err(|problem| Self::command().error(ErrorKind::MissingRequiredArgument, problem))?;
        Ok(cli)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::early_exit::one_line;

    fn error(args: &[&str]) -> String {
        let args = ["zentinel-wasm-agent", "--module", "m.wasm"].iter().chain(args);
        one_line(&Cli::try_parse_from(args).unwrap_err().to_string())
    }

    #[test]
    fn an_invalid_value_is_one_line_with_the_expected_ones() {
        for (args, expected) in [
            (&["--pool-size", "0"][..], "error: invalid value '0' for '--pool-size <N>': expected a whole number from 1 to 1024"),
            (&["--timeout-ms", "x"], "error: invalid value 'x' for '--timeout-ms <MS>': expected a whole number from 1 to 60000"),
            (
                &["--socket-mode", "888"],
                "error: invalid value '888' for '--socket-mode <MODE>': expected an octal mode from 000 to 777, such as 660",
            ),
            (&["--isolation", "none"], "error: invalid value 'none' for '--isolation <ISOLATION>' [possible values: pooled, request]"),
            (&["--module-sha256", "12"], "error: invalid value '12' for '--module-sha256 <HEX>': expected 64 hexadecimal digits"),
            (&["--nonsense"], "error: unexpected argument '--nonsense' found"),
        ] {
            assert_eq!(error(args), expected);
        }
        assert!(error(&["--module-config", "{"]).contains("expected JSON or @FILE"));
        assert!(one_line(&Cli::try_parse_from(["x"]).unwrap_err().to_string()).contains("--module <FILE>"));
    }

    #[test]
    fn the_variable_of_the_grpc_address_has_an_alias() {
        let address = |args: &[&str], alias: &str| {
            let args = ["x", "--module", "m"].iter().chain(args);
            Cli::read(args, Some(alias.into())).map(|cli| cli.grpc_address.map(|address| address.to_string()))
        };
        assert_eq!(address(&[], "127.0.0.1:2").unwrap().as_deref(), Some("127.0.0.1:2"));
        assert_eq!(address(&["--grpc-address", "127.0.0.1:1"], "127.0.0.1:2").unwrap().as_deref(), Some("127.0.0.1:1"));
        assert_eq!(address(&[], "").unwrap(), None);
        assert!(one_line(&address(&[], "x").unwrap_err().to_string()).contains("'--grpc-address <IP:PORT>': expected an IP address"));
    }

    #[test]
    fn rejects_half_a_tls_configuration() {
        let error = |args: &[&str]| {
            let args = ["x", "--module", "m"].iter().chain(args);
            one_line(&Cli::read(args, None).unwrap_err().to_string())
        };
        let address = ["--grpc-address", "127.0.0.1:1"];
        assert_eq!(error(&["--grpc-tls-cert", "c", "--grpc-tls-key", "k"]), "error: `--grpc-tls-cert` requires `--grpc-address`");
        assert_eq!(error(&[&address[..], &["--grpc-tls-cert", "c"]].concat()), "error: `--grpc-tls-cert` requires `--grpc-tls-key`");
        assert_eq!(error(&[&address[..], &["--grpc-tls-key", "k"]].concat()), "error: `--grpc-tls-key` requires `--grpc-tls-cert`");
        assert_eq!(error(&[&address[..], &["--grpc-client-ca", "c"]].concat()), "error: `--grpc-client-ca` requires `--grpc-tls-cert`");
        let whole = [&address[..], &["--grpc-tls-cert", "c", "--grpc-tls-key", "k"]].concat();
        assert!(Cli::read(["x", "--module", "m"].iter().chain(&whole), None).unwrap().grpc_tls().is_some());
    }
}
