//! The command line. A flag beats its environment variable, which beats the default.

use std::ffi::{OsStr, OsString};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::builder::{BoolishValueParser, Resettable, TypedValueParser};
use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{CommandFactory, FromArgMatches, Parser, ValueEnum};
use zentinel_wasm_contract::HeaderCase;
use zentinel_wasm_protocol::MAX_FRAME;

use crate::listen::tls::{Tls, TlsFiles};
use crate::source::Source;
use zentinel_wasm_engine::settings::{Limits, Settings, checked_module_config};

/// Second name of the variable of `--grpc-address`.
const GRPC_ADDRESS_ALIAS: &str = "WASM_GRPC_ADDRESS";

/// Options whose variable may not be empty. For others that means unset; of these it would widen who may connect, what may be run, or what is allowed.
const NEVER_EMPTY: [&str; 3] = ["grpc_client_ca", "module_sha256", "fail_open"];

/// Runs WebAssembly modules as a policy agent of the Zentinel reverse proxy.
#[derive(Clone, Debug, Parser)]
#[command(name = "zentinel-wasm-agent", version, max_term_width = 110)]
pub struct Cli {
    /// Unix socket to serve
    #[arg(long, env = "AGENT_SOCKET", value_name = "PATH", default_value = "/tmp/zentinel-wasm.sock")]
    pub socket: PathBuf,

    /// Permissions of the socket, octal; without it the umask decides
    #[arg(long, env = "WASM_SOCKET_MODE", value_name = "MODE", value_parser = octal)]
    pub socket_mode: Option<u32>,

    /// Wasm module to run
    #[arg(long, env = "WASM_MODULE", value_name = "FILE")]
    pub module: PathBuf,

    /// Refuse a module whose SHA-256 differs
    #[arg(long, env = "WASM_MODULE_SHA256", value_name = "HEX", value_parser = sha256)]
    pub module_sha256: Option<String>,

    /// JSON handed to the module's `on_configure`, or `@` and a file that holds it
    #[arg(long, env = "WASM_MODULE_CONFIG", value_name = "JSON", value_parser = module_config)]
    pub module_config: Option<ModuleConfig>,

    /// Reload when the module or another file of these options changes; SIGHUP always reloads
    #[arg(long, env = "WASM_WATCH", value_parser = boolean(), default_value = "false", default_missing_value = "true", num_args = 0..=1, require_equals = true, hide_possible_values = true)]
    pub watch: bool,

    /// Instances of the module, and thereby calls that run at once
    #[arg(long, env = "WASM_POOL_SIZE", value_name = "N", default_value = "4", value_parser = number(1, Limits::POOL_SIZE))]
    pub pool_size: u64,

    /// Deadline of a whole call, waiting for an instance included
    #[arg(long, env = "WASM_TIMEOUT_MS", value_name = "MS", default_value = "40", value_parser = number(1, Limits::TIMEOUT_MS))]
    pub timeout_ms: u64,

    /// Time of one instance to become ready: start function, `_initialize` and `on_configure`
    #[arg(long, env = "WASM_START_TIMEOUT_MS", value_name = "MS", default_value = "5000", value_parser = number(1, Limits::START_TIMEOUT_MS))]
    pub start_timeout_ms: u64,

    /// Linear memory of one instance
    #[arg(long, env = "WASM_MAX_MEMORY_MB", value_name = "MB", default_value = "64", value_parser = number(1, Limits::MEMORY_MB))]
    pub max_memory_mb: u64,

    /// Largest body handed to the module
    #[arg(long, env = "WASM_MAX_BODY_BYTES", value_name = "BYTES", default_value = "1048576", value_parser = number(0, MAX_FRAME as u64))]
    pub max_body_bytes: u64,

    /// Hand a request body that the proxy streams to the module whole, up to the largest body; text only
    #[arg(long, env = "WASM_COLLECT_REQUEST_BODY", value_parser = boolean(), default_value = "false", default_missing_value = "true", num_args = 0..=1, require_equals = true, hide_possible_values = true)]
    pub collect_request_body: bool,

    /// Largest answer read from the module; without it, 1 MiB more than the largest body
    #[arg(long, env = "WASM_MAX_OUTPUT_BYTES", value_name = "BYTES", value_parser = number(1, MAX_FRAME as u64))]
    pub max_output_bytes: Option<u64>,

    /// Whether instances are used again, or every call gets a fresh one
    #[arg(long, env = "WASM_ISOLATION", value_enum, default_value = "pooled")]
    pub isolation: Isolation,

    /// How header names are written for the module
    #[arg(long, env = "WASM_HEADER_CASE", value_enum, default_value = "canonical")]
    pub header_case: Case,

    /// Allow requests on module errors
    #[arg(long, env = "FAIL_OPEN", value_parser = boolean(), default_value = "false", default_missing_value = "true", num_args = 0..=1, require_equals = true, hide_possible_values = true)]
    pub fail_open: bool,

    /// Serve gRPC on this address too
    #[arg(long, env = "AGENT_GRPC_ADDRESS", value_name = "IP:PORT", value_parser = address)]
    pub grpc_address: Option<SocketAddr>,

    /// Certificate chain for gRPC, PEM
    #[arg(long, env = "WASM_GRPC_TLS_CERT", value_name = "FILE")]
    pub grpc_tls_cert: Option<PathBuf>,

    /// Private key of that certificate, PEM
    #[arg(long, env = "WASM_GRPC_TLS_KEY", value_name = "FILE")]
    pub grpc_tls_key: Option<PathBuf>,

    /// Roots of the certificates that gRPC clients must show, PEM; without it any client may connect
    #[arg(long, env = "WASM_GRPC_CLIENT_CA", value_name = "FILE")]
    pub grpc_client_ca: Option<PathBuf>,

    /// HTTP address for `/metrics`, `/healthz` and `/readyz`
    #[arg(long, env = "WASM_ADMIN_ADDRESS", value_name = "IP:PORT", value_parser = address)]
    pub admin_address: Option<SocketAddr>,

    /// How log lines are written
    #[arg(long, env = "WASM_LOG_FORMAT", value_enum, default_value = "json")]
    pub log_format: LogFormat,

    /// Log at debug level
    #[arg(long, env = "WASM_VERBOSE", value_parser = boolean(), default_value = "false", default_missing_value = "true", num_args = 0..=1, require_equals = true, hide_possible_values = true)]
    pub verbose: bool,

    /// Time to finish what is in flight when ending
    #[arg(long, env = "WASM_SHUTDOWN_GRACE_MS", value_name = "MS", default_value = "10000", value_parser = number(0, Limits::GRACE_MS))]
    pub shutdown_grace_ms: u64,

    /// Directory for compiled modules; without it, $CACHE_DIRECTORY, $XDG_CACHE_HOME or ~/.cache
    #[arg(long, env = "WASM_CACHE_DIR", value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,
}

/// A module's configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModuleConfig {
    /// The JSON as it was when the command line was read.
    pub json: Arc<[u8]>,
    /// The regular file that it comes from. What was in a pipe can be read only once.
    pub file: Option<PathBuf>,
}

/// See [`zentinel_wasm_runtime::Isolation`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Isolation {
    /// Instances are used again
    Pooled,
    /// Every call gets a fresh instance; nothing carries over
    Request,
}

impl From<Isolation> for zentinel_wasm_runtime::Isolation {
    fn from(isolation: Isolation) -> Self {
        match isolation {
            Isolation::Pooled => Self::Pooled,
            Isolation::Request => Self::Request,
        }
    }
}

/// See [`HeaderCase`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Case {
    /// `User-Agent`, as people write them
    Canonical,
    /// `user-agent`, as received
    Lower,
}

impl From<Case> for HeaderCase {
    fn from(case: Case) -> Self {
        match case {
            Case::Canonical => Self::Canonical,
            Case::Lower => Self::Lower,
        }
    }
}

/// How log lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// One JSON object a line
    Json,
    /// For people
    Text,
}

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

    /// A half of a TLS configuration must not end in an address that is open to everybody.
    fn check_tls(&self) -> Result<(), String> {
        let options = [
            ("--grpc-tls-cert", self.grpc_tls_cert.is_some()),
            ("--grpc-tls-key", self.grpc_tls_key.is_some()),
            ("--grpc-client-ca", self.grpc_client_ca.is_some()),
        ];
        let Some((given, _)) = options.into_iter().find(|(_, is_given)| *is_given) else { return Ok(()) };
        let needed = [("--grpc-address", self.grpc_address.is_some()), options[0], options[1]];
        match needed.into_iter().find(|(_, is_given)| !is_given) {
            Some((missing, _)) => Err(format!("`{given}` also needs `{missing}`")),
            None => Ok(()),
        }
    }

    /// The files of the TLS configuration, if there is one.
    pub fn grpc_tls(&self) -> Option<TlsFiles> {
        let (cert, key) = self.grpc_tls_cert.clone().zip(self.grpc_tls_key.clone())?;
        Some(TlsFiles { cert, key, client_ca: self.grpc_client_ca.clone() })
    }

    /// Where everything is read from.
    pub fn source(&self, tls: Option<Tls>) -> Source {
        let module_config = self.module_config.as_ref().and_then(|config| config.file.clone());
        Source { module: self.module.clone(), sha256: self.module_sha256.clone(), module_config, tls }
    }

    /// The settings that these options give.
    pub fn settings(&self) -> Settings {
        let max_body = self.max_body_bytes as usize;
        Settings {
            pool_size: self.pool_size as u32,
            fail_open: self.fail_open,
            timeout: Duration::from_millis(self.timeout_ms),
            max_memory_mb: self.max_memory_mb as u32,
            isolation: self.isolation.into(),
            module_config: self.module_config.as_ref().map(|config| Arc::clone(&config.json)),
            max_body,
            collect_request_body: self.collect_request_body,
            max_output: self.max_output_bytes.map_or(max_body + (1 << 20), |bytes| bytes as usize),
            header_case: self.header_case.into(),
            start_timeout: Duration::from_millis(self.start_timeout_ms),
        }
    }

    /// Time to finish what is in flight when ending.
    pub fn grace(&self) -> Duration {
        Duration::from_millis(self.shutdown_grace_ms)
    }
}

/// Why the agent does not start with this command line.
#[derive(Debug)]
pub struct Refusal(clap::Error);

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

/// The command, for its help, man page and completions.
pub fn command() -> clap::Command {
    Cli::command()
}

/// The first paragraph of clap's message: what is wrong, with what, and what it takes.
fn one_line(message: &str) -> String {
    let paragraph = message.split("\n\n").next().unwrap_or(message);
    paragraph.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn boolean() -> impl TypedValueParser<Value = bool> {
    BoolishValueParser::new()
}

fn number(from: u64, to: u64) -> impl Fn(&str) -> Result<u64, String> + Clone + Send + Sync + 'static {
    move |text| match text.parse() {
        Ok(number) if (from..=to).contains(&number) => Ok(number),
        _ => Err(format!("it takes a whole number from {from} to {to}")),
    }
}

fn octal(text: &str) -> Result<u32, String> {
    let digits = text.strip_prefix("0o").unwrap_or(text);
    match u32::from_str_radix(digits, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err("it takes an octal mode from 000 to 777, such as 660".into()),
    }
}

fn sha256(text: &str) -> Result<String, String> {
    if text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        Ok(text.to_ascii_lowercase())
    } else {
        Err("it takes 64 hexadecimal digits".into())
    }
}

fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| "it takes an IP address and a port, such as 127.0.0.1:9090".into())
}

fn module_config(text: &str) -> Result<ModuleConfig, String> {
    let (json, file) = match text.strip_prefix('@') {
        None => (text.as_bytes().to_vec(), None),
        Some(file) => {
            let json = std::fs::read(file).map_err(|error| format!("it takes JSON or @FILE, and the file cannot be read: {error}"))?;
            (json, Some(PathBuf::from(file)).filter(|file| file.is_file()))
        }
    };
    let json = checked_module_config(&json).map_err(|error| format!("it takes JSON or @FILE: {error}"))?;
    Ok(ModuleConfig { json, file })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(args: &[&str]) -> String {
        let args = ["zentinel-wasm-agent", "--module", "m.wasm"].iter().chain(args);
        one_line(&Cli::try_parse_from(args).unwrap_err().to_string())
    }

    #[test]
    fn the_command_is_consistent() {
        command().debug_assert();
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

    #[test]
    fn flags_may_be_taken_back() {
        let parse = |args: &[&str]| Cli::try_parse_from(["x", "--module", "m"].iter().chain(args)).unwrap().fail_open;
        assert!(parse(&["--fail-open"]));
        assert!(!parse(&["--fail-open=false"]));
        assert!(!parse(&[]));
    }

    #[test]
    fn the_answer_s_limit_follows_the_body_s() {
        let cli = Cli::try_parse_from(["x", "--module", "m", "--max-body-bytes", "100"]).unwrap();
        assert_eq!(cli.settings().max_output, 100 + (1 << 20));
    }
}
