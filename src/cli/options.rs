//! The options.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use zentinel_wasm_contract::HeaderCase;
use zentinel_wasm_engine::{BreakerLimits, SettingLimits, Settings};
use zentinel_wasm_otlp::{Endpoint, Headers, InvalidOption};
use zentinel_wasm_protocol::MAX_FRAME;
use zentinel_wasm_runtime::Isolation;

use super::values::{ModuleConfig, address, boolean, headers, module_config, number, octal, sha256, share};
use crate::decisions::{ClientPrivacy, DecisionFile, DecisionLogConfig, Privacy, Recorded};
use crate::listen::tls::{ReloadableTls, TlsFiles};
use crate::logging::LogFormat;
use crate::otlp::OtlpOptions;
use crate::source::Source;

/// The socket if none is given.
pub(super) const DEFAULT_SOCKET: &str = "/tmp/zentinel-wasm.sock";

/// Largest file of the decision log: as large as files can be on every file system.
const MAX_DECISION_LOG: u64 = 1 << 40;

/// Most files of the decision log. Each rotation renames all of them.
const MAX_DECISION_LOG_FILES: u64 = 100;

/// Runs WebAssembly modules as a policy agent of the Zentinel reverse proxy.
#[derive(Clone, Debug, Parser)]
#[command(name = "zentinel-wasm-agent", version, max_term_width = 110)]
pub struct Cli {
    /// Unix socket to serve
    #[arg(long, env = "AGENT_SOCKET", value_name = "PATH", default_value = DEFAULT_SOCKET)]
    pub socket: PathBuf,

    /// Permissions of the socket, in octal; by default the umask decides
    #[arg(long, env = "WASM_SOCKET_MODE", value_name = "MODE", value_parser = octal)]
    pub socket_mode: Option<u32>,

    /// Wasm module to run
    #[arg(long, env = "WASM_MODULE", value_name = "FILE")]
    pub module: PathBuf,

    /// Reject a module with another SHA-256
    #[arg(long, env = "WASM_MODULE_SHA256", value_name = "HEX", value_parser = sha256)]
    pub module_sha256: Option<String>,

    /// JSON passed to the module's `on_configure`, or `@FILE` to read it from a file
    #[arg(long, env = "WASM_MODULE_CONFIG", value_name = "JSON", value_parser = module_config)]
    pub module_config: Option<ModuleConfig>,

    /// Reload when the module or another file named by these options changes; SIGHUP always reloads
    #[arg(long, env = "WASM_WATCH", value_parser = boolean(), default_value = "false", default_missing_value = "true", num_args = 0..=1, require_equals = true, hide_possible_values = true)]
    pub watch: bool,

    /// Instances of the module, and so calls that run at once
    #[arg(long, env = "WASM_POOL_SIZE", value_name = "N", default_value = "4", value_parser = number(1, SettingLimits::POOL_SIZE))]
    pub pool_size: u64,

    /// Deadline of a call, including the wait for an instance
    #[arg(long, env = "WASM_TIMEOUT_MS", value_name = "MS", default_value = "40", value_parser = number(1, SettingLimits::TIMEOUT_MS))]
    pub timeout_ms: u64,

    /// Time limit for an instance to become ready: start function, `_initialize` and `on_configure`
    #[arg(long, env = "WASM_START_TIMEOUT_MS", value_name = "MS", default_value = "5000", value_parser = number(1, SettingLimits::START_TIMEOUT_MS))]
    pub start_timeout_ms: u64,

    /// Limit on the linear memory of an instance
    #[arg(long, env = "WASM_MAX_MEMORY_MB", value_name = "MB", default_value = "64", value_parser = number(1, SettingLimits::MEMORY_MB))]
    pub max_memory_mb: u64,

    /// Largest body passed to the module
    #[arg(long, env = "WASM_MAX_BODY_BYTES", value_name = "BYTES", default_value = "1048576", value_parser = number(0, MAX_FRAME as u64))]
    pub max_body_bytes: u64,

    /// Collect a streamed request body and pass it to the module whole, up to the largest body;
    /// text only
    #[arg(long, env = "WASM_COLLECT_REQUEST_BODY", value_parser = boolean(), default_value = "false", default_missing_value = "true", num_args = 0..=1, require_equals = true, hide_possible_values = true)]
    pub collect_request_body: bool,

    /// Largest answer read from the module; by default 1 MiB more than the largest body
    #[arg(long, env = "WASM_MAX_OUTPUT_BYTES", value_name = "BYTES", value_parser = number(1, MAX_FRAME as u64))]
    pub max_output_bytes: Option<u64>,

    /// Whether instances are reused or every call gets a fresh one
    #[arg(long, env = "WASM_ISOLATION", value_enum, default_value = "pooled")]
    pub isolation: IsolationArg,

    /// Spelling of header names in the module's input
    #[arg(long, env = "WASM_HEADER_CASE", value_enum, default_value = "canonical")]
    pub header_case: HeaderCaseArg,

    /// Allow requests on module errors; also set by `WASM_FAIL_OPEN`
    #[arg(long, env = "FAIL_OPEN", value_parser = boolean(), default_value = "false", default_missing_value = "true", num_args = 0..=1, require_equals = true, hide_possible_values = true)]
    pub fail_open: bool,

    /// Also serve gRPC on this address
    #[arg(long, env = "AGENT_GRPC_ADDRESS", value_name = "IP:PORT", value_parser = address)]
    pub grpc_address: Option<SocketAddr>,

    /// Take over from the agent that serves the socket, and let another one take over from this one
    #[arg(long, env = "WASM_TAKEOVER", value_parser = boolean(), default_value = "false", default_missing_value = "true", num_args = 0..=1, require_equals = true, hide_possible_values = true)]
    pub takeover: bool,

    /// Certificate chain for gRPC, PEM
    #[arg(long, env = "WASM_GRPC_TLS_CERT", value_name = "FILE")]
    pub grpc_tls_cert: Option<PathBuf>,

    /// Private key of the gRPC certificate, PEM
    #[arg(long, env = "WASM_GRPC_TLS_KEY", value_name = "FILE")]
    pub grpc_tls_key: Option<PathBuf>,

    /// CA certificates that verify gRPC clients, PEM; by default any client may connect
    #[arg(long, env = "WASM_GRPC_CLIENT_CA", value_name = "FILE")]
    pub grpc_client_ca: Option<PathBuf>,

    /// HTTP address for `/metrics`, `/healthz` and `/readyz`
    #[arg(long, env = "WASM_ADMIN_ADDRESS", value_name = "IP:PORT", value_parser = address)]
    pub admin_address: Option<SocketAddr>,

    /// Send a span for each event, and the metrics, to this collector: OTLP over HTTP, as protobuf
    #[arg(long, env = "WASM_OTLP_ENDPOINT", value_name = "URL")]
    pub otlp_endpoint: Option<Endpoint>,

    /// Headers for the collector: `NAME=VALUE` pairs, separated by commas, with percent-encoded
    /// values
    #[arg(long, env = "WASM_OTLP_HEADERS", value_name = "HEADERS", hide_env_values = true, value_parser = headers)]
    pub otlp_headers: Option<Result<Headers, InvalidOption>>,

    /// CA certificates that verify a collector with an `https://` URL, PEM
    #[arg(long, env = "WASM_OTLP_CA", value_name = "FILE")]
    pub otlp_ca: Option<PathBuf>,

    /// Format of log lines
    #[arg(long, env = "WASM_LOG_FORMAT", value_enum, default_value = "json")]
    pub log_format: LogFormat,

    /// Which requests get a line in the decision log
    #[arg(long, env = "WASM_DECISION_LOG", value_enum, default_value = "off")]
    pub decision_log: DecisionLogArg,

    /// Share of the allowed requests that `--decision-log all` records, from 0 to 1
    #[arg(long, env = "WASM_DECISION_LOG_SAMPLE", value_name = "SHARE", default_value = "1", value_parser = share)]
    pub decision_log_sample: f64,

    /// File of the decision log; by default its lines are part of the log
    #[arg(long, env = "WASM_DECISION_LOG_FILE", value_name = "FILE")]
    pub decision_log_file: Option<PathBuf>,

    /// Size at which the file of the decision log is rotated; 0 never rotates it
    #[arg(long, env = "WASM_DECISION_LOG_MAX_BYTES", value_name = "BYTES", default_value = "67108864", value_parser = number(0, MAX_DECISION_LOG))]
    pub decision_log_max_bytes: u64,

    /// Files of the decision log that are kept, with the current one
    #[arg(long, env = "WASM_DECISION_LOG_FILES", value_name = "N", default_value = "5", value_parser = number(1, MAX_DECISION_LOG_FILES))]
    pub decision_log_files: u64,

    /// Record queries in the decision log, beside paths
    #[arg(long, env = "WASM_DECISION_LOG_QUERY", value_parser = boolean(), default_value = "false", default_missing_value = "true", num_args = 0..=1, require_equals = true, hide_possible_values = true)]
    pub decision_log_query: bool,

    /// How much of a client's address is recorded in the decision log
    #[arg(long, env = "WASM_DECISION_LOG_CLIENT", value_enum, default_value = "truncated")]
    pub decision_log_client: ClientArg,

    /// Log at debug level
    #[arg(long, env = "WASM_VERBOSE", value_parser = boolean(), default_value = "false", default_missing_value = "true", num_args = 0..=1, require_equals = true, hide_possible_values = true)]
    pub verbose: bool,

    /// Time to finish in-flight events at shutdown
    #[arg(long, env = "WASM_SHUTDOWN_GRACE_MS", value_name = "MS", default_value = "10000", value_parser = number(0, SettingLimits::GRACE_MS))]
    pub shutdown_grace_ms: u64,

    /// Directory for compiled modules; by default $CACHE_DIRECTORY, $XDG_CACHE_HOME or ~/.cache
    #[arg(long, env = "WASM_CACHE_DIR", value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,

    /// What is suspicious about the environment.
    #[arg(skip)]
    pub(super) warnings: Vec<String>,
}

/// An option that is given without one that it requires, by their ids.
pub(super) struct Incomplete {
    pub(super) given: &'static str,
    pub(super) missing: &'static str,
    /// What is required of the missing one or said about the given one.
    pub(super) detail: &'static str,
}

/// An [`Isolation`] on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum IsolationArg {
    /// Instances are reused
    Pooled,
    /// Every call gets a fresh instance; nothing carries over
    Request,
}

impl From<IsolationArg> for Isolation {
    fn from(isolation: IsolationArg) -> Self {
        match isolation {
            IsolationArg::Pooled => Self::Pooled,
            IsolationArg::Request => Self::Request,
        }
    }
}

/// A [`HeaderCase`] on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum HeaderCaseArg {
    /// `User-Agent`, as usually written
    Canonical,
    /// `user-agent`, as received
    Lower,
}

impl From<HeaderCaseArg> for HeaderCase {
    fn from(case: HeaderCaseArg) -> Self {
        match case {
            HeaderCaseArg::Canonical => Self::Canonical,
            HeaderCaseArg::Lower => Self::Lower,
        }
    }
}

/// Which requests are in the decision log, on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DecisionLogArg {
    /// None
    Off,
    /// Those that were refused or had a module error
    Refused,
    /// All
    All,
}

/// A [`ClientPrivacy`] on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ClientArg {
    /// The address
    Full,
    /// Its network, /24 of IPv4 and /48 of IPv6
    Truncated,
    /// Nothing
    Off,
}

impl From<ClientArg> for ClientPrivacy {
    fn from(client: ClientArg) -> Self {
        match client {
            ClientArg::Full => Self::Full,
            ClientArg::Truncated => Self::Truncated,
            ClientArg::Off => Self::Off,
        }
    }
}

impl Cli {
    /// Checks that the TLS configuration is complete, because half of one must not result in an
    /// address that is open to everybody.
    pub(super) fn check_tls(&self) -> Result<(), Incomplete> {
        let options = [
            ("grpc_tls_cert", self.grpc_tls_cert.is_some()),
            ("grpc_tls_key", self.grpc_tls_key.is_some()),
            ("grpc_client_ca", self.grpc_client_ca.is_some()),
        ];
        let Some((given, _)) = options.into_iter().find(|(_, is_given)| *is_given) else { return Ok(()) };
        let needed = [("grpc_address", self.grpc_address.is_some()), options[0], options[1]];
        match needed.into_iter().find(|(_, is_given)| !is_given) {
            Some((missing, _)) => Err(Incomplete { given, missing, detail: "" }),
            None => Ok(()),
        }
    }

    /// Checks that the options of the collector belong together.
    pub(super) fn check_otlp(&self) -> Result<(), Incomplete> {
        let missing = |given, missing, detail| Err(Incomplete { given, missing, detail });
        match (&self.otlp_endpoint, &self.otlp_ca) {
            (None, Some(_)) => missing("otlp_ca", "otlp_endpoint", ""),
            (None, None) if self.otlp_headers.is_some() => missing("otlp_headers", "otlp_endpoint", ""),
            (Some(endpoint), None) if endpoint.is_tls => {
                missing("otlp_endpoint", "otlp_ca", " for an `https://` URL, such as /etc/ssl/certs/ca-certificates.crt")
            }
            (Some(endpoint), Some(_)) if !endpoint.is_tls => missing("otlp_ca", "otlp_endpoint", " with an `https://` URL"),
            _ => Ok(()),
        }
    }

    /// Where spans and metrics go, if anywhere.
    pub fn otlp(&self) -> Option<OtlpOptions> {
        let endpoint = self.otlp_endpoint.clone()?;
        // An error has been reported.
        let headers = self.otlp_headers.clone().and_then(Result::ok).unwrap_or_default();
        Some(OtlpOptions { endpoint, headers, ca: self.otlp_ca.clone(), module: self.module.clone() })
    }

    /// The files of the TLS configuration, if there is one.
    pub fn grpc_tls(&self) -> Option<TlsFiles> {
        let (cert, key) = self.grpc_tls_cert.clone().zip(self.grpc_tls_key.clone())?;
        Some(TlsFiles { cert, key, client_ca: self.grpc_client_ca.clone() })
    }

    /// The files that the agent reads.
    pub fn source(&self, tls: Option<ReloadableTls>) -> Source {
        let module_config = self.module_config.as_ref().and_then(|config| config.file.clone());
        Source { module: self.module.clone(), sha256: self.module_sha256.clone(), module_config, tls }
    }

    /// The settings of the engine.
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
            breaker: BreakerLimits::default(),
        }
    }

    /// What is suspicious about the environment, each in one line.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The decision log, unless it is off.
    pub fn decision_log(&self) -> Option<DecisionLogConfig> {
        let recorded = match self.decision_log {
            DecisionLogArg::Off => return None,
            DecisionLogArg::Refused => Recorded::Refused,
            DecisionLogArg::All => Recorded::All(self.decision_log_sample),
        };
        let privacy = Privacy { query: self.decision_log_query, client: self.decision_log_client.into() };
        let file = self.decision_log_file.clone().map(|path| DecisionFile {
            path,
            max_bytes: self.decision_log_max_bytes,
            files: self.decision_log_files,
        });
        Some(DecisionLogConfig { recorded, privacy, file })
    }

    /// Time to finish in-flight events at shutdown.
    pub fn grace(&self) -> Duration {
        Duration::from_millis(self.shutdown_grace_ms)
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn passes_the_checks_of_clap() {
        Cli::command().debug_assert();
    }

    #[test]
    fn flags_can_be_negated() {
        let parse = |args: &[&str]| Cli::try_parse_from(["x", "--module", "m"].iter().chain(args)).unwrap().fail_open;
        assert!(parse(&["--fail-open"]));
        assert!(!parse(&["--fail-open=false"]));
        assert!(!parse(&[]));
    }

    #[test]
    fn the_limit_on_answers_follows_the_limit_on_bodies() {
        let cli = Cli::try_parse_from(["x", "--module", "m", "--max-body-bytes", "100"]).unwrap();
        assert_eq!(cli.settings().max_output, 100 + (1 << 20));
    }
}
