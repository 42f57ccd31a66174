//! The options of `check`: those of serving, so the command line of a deployment is checked by
//! writing `check` before its options.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{Arg, ArgAction, CommandFactory as _, value_parser};

use super::environment::{self, Environment, invalid};
use super::options::Cli;
use crate::logging::LogFormat;

/// Options that make a difference to a check. The others are accepted and not shown.
const WITH_EFFECT: [&str; 24] = [
    "socket",
    "module",
    "module_sha256",
    "module_config",
    "pool_size",
    "timeout_ms",
    "start_timeout_ms",
    "max_memory_mb",
    "max_body_bytes",
    "collect_request_body",
    "max_output_bytes",
    "isolation",
    "grpc_address",
    "grpc_tls_cert",
    "grpc_tls_key",
    "grpc_client_ca",
    "otlp_endpoint",
    "otlp_headers",
    "otlp_ca",
    "log_format",
    "decision_log",
    "decision_log_file",
    "verbose",
    "cache_dir",
];

/// What to check, and how to report it.
#[derive(Clone, Debug)]
pub struct CheckOptions {
    /// The options of serving.
    pub serve: Cli,
    /// The proxy's configuration, to be compared with the module and the options.
    pub proxy_config: Option<PathBuf>,
    /// Report one line of JSON.
    pub json: bool,
    /// Format of the log lines of the module and the agent: that of the report, if none is given.
    pub log_format: LogFormat,
}

impl CheckOptions {
    pub(super) fn read(args: &[OsString], environment: &Environment) -> Result<Self, clap::Error> {
        let parsed = environment::read(&command(), args, environment)?;
        if !parsed.is_set("module") {
            let problem = "no module: write `zentinel-wasm-agent check MODULE`, or set `WASM_MODULE`";
            let problem = match environment::unknown_variables(environment) {
                Some(unknown) => format!("{problem}; {unknown}"),
                None => problem.to_owned(),
            };
            return Err(invalid(ErrorKind::MissingRequiredArgument, problem));
        }
        let serve = Cli::from_parsed(&parsed, environment)?;
        let json = parsed.matches.get_flag("json");
        let log_format = match json {
            _ if parsed.is_set("log_format") => serve.log_format,
            true => LogFormat::Json,
            false => LogFormat::Text,
        };
        let proxy_config = parsed.matches.get_one::<PathBuf>("proxy_config").cloned();
        Ok(Self { serve, proxy_config, json, log_format })
    }
}

pub(super) fn command() -> clap::Command {
    Cli::command()
        .name("check")
        .bin_name("zentinel-wasm-agent check")
        .disable_version_flag(true)
        .mut_args(|arg| if WITH_EFFECT.contains(&arg.get_id().as_str()) { arg } else { arg.hide(true) })
        .override_usage("zentinel-wasm-agent check [OPTIONS] [MODULE]")
        .about("Checks a module and the options as serving would, without serving")
        .long_about(
            "Checks a module and the options as serving would, without serving\n\n\
             Takes every option of serving and its variable, and uses the same limits. Prints the exports,\n\
             imports, proposals, memory and times of the module, and every problem in one line. The exit status\n\
             is 0 if the agent would serve, and 1 if not.",
        )
        .arg(
            Arg::new("file")
                .value_name("MODULE")
                .value_parser(value_parser!(PathBuf))
                .conflicts_with("module")
                .help("Wasm module to check; by default that of the option or variable"),
        )
        .arg(
            Arg::new("proxy_config")
                .long("proxy-config")
                .value_name("FILE")
                .value_parser(value_parser!(PathBuf))
                .help("Also compare module and options with the proxy's configuration, KDL"),
        )
        .arg(Arg::new("json").long("json").action(ArgAction::SetTrue).help("Print one line of JSON instead of text"))
        .mut_arg("module", |arg| arg.required(false))
        .mut_arg("module_config", |arg| arg.visible_alias("config"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::early_exit::one_line;

    fn read(args: &[&str], environment: &[(&str, &str)]) -> Result<CheckOptions, String> {
        let args: Vec<OsString> = ["check"].iter().chain(args).map(Into::into).collect();
        let environment = environment.iter().map(|(name, value)| (name.into(), value.into())).collect();
        CheckOptions::read(&args, &environment).map_err(|error| one_line(&error))
    }

    #[test]
    fn every_option_with_effect_exists() {
        let command = Cli::command();
        for option in WITH_EFFECT {
            assert!(command.get_arguments().any(|arg| arg.get_id() == option), "{option}");
        }
    }

    #[test]
    fn the_module_is_an_argument_an_option_or_a_variable() {
        let module = |args: &[&str], environment: &[(&str, &str)]| read(args, environment).map(|options| options.serve.module);
        let variable = [("WASM_MODULE", "v.wasm")];
        assert_eq!(module(&["a.wasm"], &[]), Ok("a.wasm".into()));
        assert_eq!(module(&["a.wasm"], &variable), Ok("a.wasm".into()));
        assert_eq!(module(&["--module", "o.wasm"], &variable), Ok("o.wasm".into()));
        assert_eq!(module(&[], &variable), Ok("v.wasm".into()));
        let missing = "error: no module: write `zentinel-wasm-agent check MODULE`, or set `WASM_MODULE`";
        assert_eq!(module(&["--json"], &[]).unwrap_err(), missing);
        assert_eq!(
            module(&[], &[("WASM_MODUL", "m.wasm")]).unwrap_err(),
            format!("{missing}; ignoring unknown environment variable `WASM_MODUL` (did you mean `WASM_MODULE`?)")
        );
        assert_eq!(
            module(&["a.wasm", "--module", "o.wasm"], &[]).unwrap_err(),
            "error: the argument '[MODULE]' cannot be used with '--module <FILE>'"
        );
    }

    #[test]
    fn takes_every_option_of_serving() {
        let args = ["--socket=/s", "--module=m.wasm", "--pool-size=2", "--watch", "--fail-open=false", "--admin-address=127.0.0.1:1"];
        let options = read(&args, &[("WASM_MAX_MEMORY_MB", "7")]).unwrap();
        assert_eq!((options.serve.pool_size, options.serve.max_memory_mb), (2, 7));
        assert_eq!(read(&["m.wasm", "--config", "[1]"], &[]).unwrap().serve.module_config.unwrap().json[..], *b"[1]");
        for (args, environment, expected) in [
            (
                &["m.wasm", "--pool-size=0"][..],
                &[][..],
                "error: invalid value '0' for '--pool-size <N>': expected a whole number from 1 to 1024",
            ),
            (
                &["m.wasm"],
                &[("WASM_POOL_SIZE", "x")],
                "error: invalid value 'x' for 'WASM_POOL_SIZE': expected a whole number from 1 to 1024",
            ),
            (&["m.wasm", "--jso"], &[], "error: unexpected argument '--jso' found; a similar argument exists: '--json'"),
            (&["m.wasm", "--grpc-tls-cert", "c"], &[], "error: `--grpc-tls-cert` requires `--grpc-address`"),
            (&["m.wasm"], &[("FAIL_OPEN", "")], "error: the environment variable `FAIL_OPEN` is empty: set it to a value or unset it"),
        ] {
            assert_eq!(read(args, environment).unwrap_err(), expected);
        }
    }

    #[test]
    fn logs_in_the_format_of_the_report() {
        let format = |args: &[&str], environment: &[(&str, &str)]| read(args, environment).unwrap().log_format;
        assert_eq!(format(&["m.wasm"], &[]), LogFormat::Text);
        assert_eq!(format(&["m.wasm", "--json"], &[]), LogFormat::Json);
        assert_eq!(format(&["m.wasm", "--json"], &[("WASM_LOG_FORMAT", "text")]), LogFormat::Text);
    }
}
