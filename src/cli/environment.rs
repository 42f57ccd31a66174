//! The command line and the environment together.

use std::ffi::{OsStr, OsString};

use clap::builder::Resettable;
use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{CommandFactory as _, FromArgMatches as _};

use super::options::Cli;
use super::refusal::Refusal;

/// Second name of the variable of `--grpc-address`.
const GRPC_ADDRESS_ALIAS: &str = "WASM_GRPC_ADDRESS";

/// Options whose variable may not be empty. For others that means unset; of these it would widen who may connect, what may be run, or what is allowed.
const NEVER_EMPTY: [&str; 3] = ["grpc_client_ca", "module_sha256", "fail_open"];

impl Cli {
    /// Reads the command line and the environment.
    ///
    /// # Errors
    ///
    /// Something is wrong with them, or they ask for help or the version.
    pub fn parse() -> Result<Self, Refusal> {
        Self::read(std::env::args_os(), std::env::var_os(GRPC_ADDRESS_ALIAS)).map_err(Refusal)
    }

    /// Reads `args`; `grpc_address` is what the second name of its variable holds.
    fn read<I, T>(args: I, grpc_address: Option<OsString>) -> Result<Self, clap::Error>
    where
        I: IntoIterator<Item = T>,
        T: Into<OsString> + Clone,
    {
        let mut command = Self::command();
        // clap knows one variable an option. A default is what the option and its first variable beat.
        if let Some(address) = grpc_address.filter(|address| !address.is_empty()) {
            command = command.mut_arg("grpc_address", |arg| arg.default_value(clap::builder::OsStr::from(address)));
        }
        let mut refused = Vec::new();
        // Templates of service files leave variables empty that are not wanted.
        command = command.mut_args(|arg| {
            let is_empty = |variable: &&OsStr| std::env::var_os(variable).is_some_and(|value| value.is_empty());
            let Some(variable) = arg.get_env().filter(is_empty) else { return arg };
            if NEVER_EMPTY.contains(&arg.get_id().as_str()) {
                refused.push((arg.get_id().clone(), variable.to_string_lossy().into_owned()));
            }
            arg.env(Resettable::Reset)
        });
        let matches = command.try_get_matches_from(args)?;
        for (id, variable) in refused {
            if matches.value_source(id.as_str()) != Some(ValueSource::CommandLine) {
                let problem = format!("the variable `{variable}` is empty: give it a value, or unset it");
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

    use super::super::refusal::one_line;
    use super::*;

    fn error(args: &[&str]) -> String {
        let args = ["zentinel-wasm-agent", "--module", "m.wasm"].iter().chain(args);
        one_line(&Cli::try_parse_from(args).unwrap_err().to_string())
    }

    #[test]
    fn a_bad_value_is_one_line_with_option_value_and_what_it_takes() {
        for (args, expected) in [
            (&["--pool-size", "0"][..], "error: invalid value '0' for '--pool-size <N>': it takes a whole number from 1 to 1024"),
            (&["--timeout-ms", "x"], "error: invalid value 'x' for '--timeout-ms <MS>': it takes a whole number from 1 to 60000"),
            (
                &["--socket-mode", "888"],
                "error: invalid value '888' for '--socket-mode <MODE>': it takes an octal mode from 000 to 777, such as 660",
            ),
            (&["--isolation", "none"], "error: invalid value 'none' for '--isolation <ISOLATION>' [possible values: pooled, request]"),
            (&["--module-sha256", "12"], "error: invalid value '12' for '--module-sha256 <HEX>': it takes 64 hexadecimal digits"),
            (&["--nonsense"], "error: unexpected argument '--nonsense' found"),
        ] {
            assert_eq!(error(args), expected);
        }
        assert!(error(&["--module-config", "{"]).contains("it takes JSON or @FILE"));
        assert!(one_line(&Cli::try_parse_from(["x"]).unwrap_err().to_string()).contains("--module <FILE>"));
    }

    #[test]
    fn the_grpc_address_has_a_variable_of_a_second_name() {
        let address = |args: &[&str], alias: &str| {
            let args = ["x", "--module", "m"].iter().chain(args);
            Cli::read(args, Some(alias.into())).map(|cli| cli.grpc_address.map(|address| address.to_string()))
        };
        assert_eq!(address(&[], "127.0.0.1:2").unwrap().as_deref(), Some("127.0.0.1:2"));
        assert_eq!(address(&["--grpc-address", "127.0.0.1:1"], "127.0.0.1:2").unwrap().as_deref(), Some("127.0.0.1:1"));
        assert_eq!(address(&[], "").unwrap(), None);
        assert!(one_line(&address(&[], "x").unwrap_err().to_string()).contains("'--grpc-address <IP:PORT>': it takes an IP address"));
    }

    #[test]
    fn half_a_tls_configuration_is_refused() {
        let error = |args: &[&str]| {
            let args = ["x", "--module", "m"].iter().chain(args);
            one_line(&Cli::read(args, None).unwrap_err().to_string())
        };
        let address = ["--grpc-address", "127.0.0.1:1"];
        assert_eq!(error(&["--grpc-tls-cert", "c", "--grpc-tls-key", "k"]), "error: `--grpc-tls-cert` also needs `--grpc-address`");
        assert_eq!(error(&[&address[..], &["--grpc-tls-cert", "c"]].concat()), "error: `--grpc-tls-cert` also needs `--grpc-tls-key`");
        assert_eq!(error(&[&address[..], &["--grpc-tls-key", "k"]].concat()), "error: `--grpc-tls-key` also needs `--grpc-tls-cert`");
        assert_eq!(error(&[&address[..], &["--grpc-client-ca", "c"]].concat()), "error: `--grpc-client-ca` also needs `--grpc-tls-cert`");
        let whole = [&address[..], &["--grpc-tls-cert", "c", "--grpc-tls-key", "k"]].concat();
        assert!(Cli::read(["x", "--module", "m"].iter().chain(&whole), None).unwrap().grpc_tls().is_some());
    }
}
