//! Reads the options of a command from the command line and the environment.

use std::any::TypeId;
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use clap::builder::{Resettable, StyledStr, TypedValueParser as _, ValueParser};
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, CommandFactory as _, FromArgMatches as _};
use tracing::warn;
use zentinel_wasm_contract::shortened;

use super::early_exit::one_line;
use super::options::{Cli, DecisionLogArg, Incomplete};
use super::values::boolean;

/// The names and values of environment variables.
pub(super) type Environment = BTreeMap<OsString, OsString>;

/// Second variables of options. clap supports one per option.
const ALIASES: [(&str, &str); 2] = [("grpc_address", "WASM_GRPC_ADDRESS"), ("fail_open", "WASM_FAIL_OPEN")];

/// Options that a positional argument of a command may give instead.
const POSITIONALS: [(&str, &str); 1] = [("module", "file")];

/// Options whose variables must not be empty. An empty variable of another option counts as unset;
/// for these, that would widen who may connect, what may be run, or what is allowed.
const REJECTED_IF_EMPTY: [&str; 3] = ["grpc_client_ca", "module_sha256", "fail_open"];

/// How similar a name must be to be suggested. clap uses the same measure for options.
const MIN_SIMILARITY: f64 = 0.7;

/// Longest list of unknown variables in a message, in characters.
const MAX_UNKNOWN: usize = 1000;

/// The variable that an option's value is taken from.
struct Variable {
    option: String,
    /// The option as clap names it in messages.
    shown_option: String,
    name: String,
    value: OsString,
}

/// What was read of a command's options.
pub(super) struct Parsed {
    pub(super) matches: ArgMatches,
    pub(super) warnings: Vec<String>,
    variables: Vec<Variable>,
}

impl Parsed {
    /// Whether the option has a value of the command line or of a variable.
    pub(super) fn is_set(&self, option: &str) -> bool {
        self.is_given(option) || self.is_variable(option)
    }

    /// Whether the option is on the command line.
    pub(super) fn is_given(&self, option: &str) -> bool {
        self.matches.value_source(option) == Some(ValueSource::CommandLine)
    }

    /// Describes an incomplete configuration: by its variables, if the incomplete part is one.
    pub(super) fn describe(&self, Incomplete { given, missing, detail }: &Incomplete) -> clap::Error {
        let by_variable = self.is_variable(given);
        let problem = format!("`{}` requires `{}`{detail}", name_of(given, by_variable), name_of(missing, by_variable));
        invalid(ErrorKind::MissingRequiredArgument, problem)
    }

    /// Whether the option has the value of a variable.
    fn is_variable(&self, option: &str) -> bool {
        self.variables.iter().any(|variable| variable.option == option)
    }
}

impl Cli {
    /// Reads the options of serving. `args` begin with the program's name.
    ///
    /// # Errors
    ///
    /// They are invalid, or ask for help or the version.
    pub(super) fn read(args: &[OsString], environment: &Environment) -> Result<Self, clap::Error> {
        let parsed = read(&Self::command(), args, environment).map_err(|error| with_unknown(error, environment))?;
        Self::from_parsed(&parsed, environment)
    }

    /// Logs what is suspicious about the environment. To be called once, when the log is set up.
    pub fn log_warnings(&self) {
        for warning in &self.warnings {
            warn!("{warning}");
        }
    }

    /// The options of serving that were read, whatever the command.
    pub(super) fn from_parsed(parsed: &Parsed, environment: &Environment) -> Result<Self, clap::Error> {
        let mut cli = Self::from_arg_matches(&parsed.matches)?;
        cli.check_tls().and_then(|()| cli.check_otlp()).map_err(|incomplete| parsed.describe(&incomplete))?;
        if let Some(Err(error)) = &cli.otlp_headers {
            let name = name_of("otlp_headers", parsed.is_variable("otlp_headers"));
            return Err(invalid(ErrorKind::ValueValidation, format!("invalid value for `{name}`: {error}")));
        }
        cli.warnings.clone_from(&parsed.warnings);
        cli.warnings.extend(unknown_variables(environment));
        if cli.decision_log == DecisionLogArg::Off && cli.decision_log_file.is_some() {
            cli.warnings.push("ignoring `--decision-log-file`, because `--decision-log` is off".into());
        }
        Ok(cli)
    }
}

/// Reads the options of `command` from `args`, which begin with the program's name, and from the
/// environment.
pub(super) fn read(command: &clap::Command, args: &[OsString], environment: &Environment) -> Result<Parsed, clap::Error> {
    let given = given(command, args)?;
    let mut variables = Vec::new();
    let mut warnings = Vec::new();
    for arg in built(command).get_arguments() {
        let option = arg.get_id().as_str();
        if given.value_source(option) == Some(ValueSource::CommandLine) {
            for value in given.get_raw(option).into_iter().flatten() {
                check_utf8(arg, value, &arg.to_string())?;
            }
        } else if let Some(value) = positional(option, &given) {
            let name = arg.to_string();
            variables.push(Variable { option: option.to_owned(), shown_option: name.clone(), name, value });
        } else {
            variables.extend(variable_of(command, arg, environment, &mut warnings)?);
        }
    }
    let with_values = command.clone().mut_args(|arg| {
        let arg = arg.env(Resettable::Reset);
        match variables.iter().find(|variable| variable.option == arg.get_id().as_str()) {
            // As the default, because the command line takes precedence over that.
            Some(variable) => arg.default_value(clap::builder::OsStr::from(variable.value.clone())).required(false),
            None => arg,
        }
    });
    let matches = with_values.try_get_matches_from(args).map_err(|mut error| {
        if let Some(ContextValue::String(option)) = error.get(ContextKind::InvalidArg)
            && let Some(variable) = variables.iter().find(|variable| variable.shown_option == *option)
        {
            error.insert(ContextKind::InvalidArg, ContextValue::String(variable.name.clone()));
        }
        error
    })?;
    Ok(Parsed { matches, warnings, variables })
}

/// Adds the unknown variables to the error about a missing option, because one of them may be meant
/// for it.
pub(super) fn with_unknown(error: clap::Error, environment: &Environment) -> clap::Error {
    match unknown_variables(environment) {
        Some(unknown) if error.kind() == ErrorKind::MissingRequiredArgument => {
            let problem = one_line(&error);
            invalid(ErrorKind::MissingRequiredArgument, format!("{}; {unknown}", problem.trim_start_matches("error: ")))
        }
        _ => error,
    }
}

/// The value that a positional argument gives to an option.
fn positional(option: &str, given: &ArgMatches) -> Option<OsString> {
    let (_, argument) = POSITIONALS.iter().find(|(named, _)| *named == option)?;
    given.try_get_raw(argument).ok()??.next().map(OsStr::to_owned)
}

/// The command, whose arguments clap can display only once it is built.
fn built(command: &clap::Command) -> clap::Command {
    let mut command = command.clone();
    command.build();
    command
}

pub(super) fn invalid(kind: ErrorKind, problem: String) -> clap::Error {
    Cli::command().error(kind, problem)
}

/// The options that are given on the command line. Their values are not parsed, because a value may
/// be a pipe, which can be read only once.
fn given(command: &clap::Command, args: &[OsString]) -> Result<ArgMatches, clap::Error> {
    let unparsed = command.clone().mut_args(|arg| arg.env(Resettable::Reset).required(false).value_parser(ValueParser::os_string()));
    unparsed.try_get_matches_from(args).map_err(|error| {
        // From the real command, whose help has the variables and possible values.
        let mut error = command.clone().try_get_matches_from(args).err().unwrap_or(error);
        if let Some(switch) = separated_switch(command, &error, args) {
            let write = StyledStr::from(format!("write '{switch}'"));
            error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![write]));
        }
        error
    })
}

/// The right form of a switch whose value is an argument of its own, such as `--watch true`, if
/// that is the error.
fn separated_switch(command: &clap::Command, error: &clap::Error, args: &[OsString]) -> Option<String> {
    let Some(ContextValue::String(value)) = error.get(ContextKind::InvalidArg) else { return None };
    let at = args.iter().position(|arg| arg == value.as_str())?;
    let switch = args.get(at.checked_sub(1)?)?.to_str()?;
    let arg = command.get_arguments().find(|arg| switch.strip_prefix("--").is_some_and(|name| arg.get_long() == Some(name)))?;
    (arg.is_require_equals_set() && boolean_of(command, arg, OsStr::new(value)).is_some()).then(|| format!("{switch}={value}"))
}

fn boolean_of(command: &clap::Command, arg: &Arg, value: &OsStr) -> Option<bool> {
    boolean().parse_ref(command, Some(arg), value).ok()
}

/// The variable that has the value of the option `arg`.
fn variable_of(
    command: &clap::Command,
    arg: &Arg,
    environment: &Environment,
    warnings: &mut Vec<String>,
) -> Result<Option<Variable>, clap::Error> {
    let option = arg.get_id().as_str();
    let mut set = Vec::new();
    for name in names(arg) {
        let Some(value) = environment.get(OsStr::new(&name)) else { continue };
        if !value.is_empty() {
            check_utf8(arg, value, &name)?;
            set.push(Variable { option: option.to_owned(), shown_option: arg.to_string(), name, value: value.clone() });
        } else if REJECTED_IF_EMPTY.contains(&option) {
            let problem = format!("the environment variable `{name}` is empty: set it to a value or unset it");
            return Err(invalid(ErrorKind::InvalidValue, problem));
        }
        // Templates of service files leave unused variables empty.
    }
    if let [first, second] = set.as_slice() {
        if option == "fail_open" {
            match (boolean_of(command, arg, &first.value), boolean_of(command, arg, &second.value)) {
                // Neither may decide alone whether requests are allowed.
                (Some(one), Some(other)) if one != other => {
                    let problem = format!(
                        "the environment variables `{}` and `{}` differ: unset one of them, or give both the same value",
                        first.name, second.name
                    );
                    return Err(invalid(ErrorKind::InvalidValue, problem));
                }
                // Its error is reported.
                (Some(_), None) => return Ok(set.pop()),
                _ => {}
            }
        } else if first.value != second.value {
            warnings.push(format!("ignoring the environment variable `{}` because `{}` differs", second.name, first.name));
        }
    }
    Ok(set.into_iter().next())
}

/// The names of an option's variables. The first one takes precedence.
fn names(arg: &Arg) -> impl Iterator<Item = String> {
    let aliases = ALIASES.iter().filter(|(option, _)| *option == arg.get_id().as_str()).map(|(_, alias)| (*alias).to_owned());
    arg.get_env().map(|name| name.to_string_lossy().into_owned()).into_iter().chain(aliases)
}

/// Rejects a value that is not UTF-8, unless it is a path. clap's own message does not name the
/// option. `name` is the option or the variable.
fn check_utf8(arg: &Arg, value: &OsStr, name: &str) -> Result<(), clap::Error> {
    if value.to_str().is_some() || arg.get_value_parser().type_id() == TypeId::of::<PathBuf>() {
        return Ok(());
    }
    Err(invalid(ErrorKind::InvalidUtf8, format!("invalid value '{}' for '{name}': expected UTF-8", value.display())))
}

/// The name of an option for messages: that of its variable or the option itself.
fn name_of(option: &str, by_variable: bool) -> String {
    let command = Cli::command();
    let arg = command.get_arguments().find(|arg| arg.get_id() == option);
    let variable = arg.filter(|_| by_variable).and_then(|arg| names(arg).next());
    variable.unwrap_or_else(|| format!("--{}", option.replace('_', "-")))
}

/// Describes the variables that look as if they were meant for the agent and are ignored.
pub(super) fn unknown_variables(environment: &Environment) -> Option<String> {
    let known = known_variables();
    // Kubernetes sets variables for each service, such as `WASM_SERVICE_HOST` and `WASM_PORT`.
    let services: Vec<_> = environment.keys().filter_map(|name| name.to_str()?.strip_suffix("_SERVICE_HOST")).collect();
    let is_of_service = |name: &str| {
        let rests = services.iter().filter_map(|service| name.strip_prefix(service));
        rests.into_iter().any(|rest| rest.starts_with("_SERVICE_") || rest == "_PORT" || rest.starts_with("_PORT_"))
    };
    let unknown: Vec<_> = environment
        .iter()
        .filter(|(_, value)| !value.is_empty())
        .map(|(name, _)| name.to_string_lossy())
        .filter(|name| name.starts_with("WASM_") && !known.iter().any(|known| known == name) && !is_of_service(name))
        .map(|name| match nearest(&name, &known) {
            Some(nearest) => format!("`{name}` (did you mean `{nearest}`?)"),
            None => format!("`{name}`"),
        })
        .collect();
    let variables = if unknown.len() == 1 { "variable" } else { "variables" };
    (!unknown.is_empty()).then(|| format!("ignoring unknown environment {variables} {}", shortened(&unknown.join(", "), MAX_UNKNOWN)))
}

/// The names of all variables.
fn known_variables() -> Vec<String> {
    Cli::command().get_arguments().flat_map(names).collect()
}

/// Whether the environment has a variable of the agent, even an empty one, or one that looks like
/// it.
pub(super) fn is_configured(environment: &Environment) -> bool {
    let known = known_variables();
    unknown_variables(environment).is_some() || environment.keys().any(|name| known.iter().any(|known| **name == **known))
}

/// The known name most similar to `name`, if there is a similar one.
fn nearest<'k>(name: &str, known: &'k [String]) -> Option<&'k str> {
    // Prefixes differ between known variables, so `WASM_SOCKET` is near to `AGENT_SOCKET`.
    fn bare(name: &str) -> &str {
        name.strip_prefix("WASM_").or_else(|| name.strip_prefix("AGENT_")).unwrap_or(name)
    }
    let similar = known.iter().map(|known| (strsim::jaro(bare(name), bare(known)), known.as_str()));
    // Of equally similar ones the last, because aliases have the prefix `WASM_`.
    similar.filter(|(similarity, _)| *similarity > MIN_SIMILARITY).max_by(|(a, _), (b, _)| a.total_cmp(b)).map(|(_, known)| known)
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt as _;

    use super::*;

    const NOT_UTF8: &[u8] = b"\xff";

    fn read_bytes(args: &[&[u8]], environment: &[(&str, &[u8])]) -> Result<Cli, String> {
        let args = [b"x".as_slice(), b"--module", b"m.wasm"].into_iter().chain(args.iter().copied());
        let environment = environment.iter().map(|(name, value)| (name.into(), OsStr::from_bytes(value).to_owned())).collect();
        let args: Vec<_> = args.map(|arg| OsStr::from_bytes(arg).to_owned()).collect();
        Cli::read(&args, &environment).map_err(|error| one_line(&error))
    }

    fn read(args: &[&str], environment: &[(&str, &str)]) -> Result<Cli, String> {
        let args: Vec<_> = args.iter().map(|arg| arg.as_bytes()).collect();
        let environment: Vec<_> = environment.iter().map(|(name, value)| (*name, value.as_bytes())).collect();
        read_bytes(&args, &environment)
    }

    #[track_caller]
    fn error(args: &[&str], environment: &[(&str, &str)]) -> String {
        read(args, environment).expect_err("it is invalid")
    }

    fn warnings(environment: &[(&str, &str)]) -> Vec<String> {
        read(&[], environment).unwrap().warnings
    }

    mod invalid_options {
        use super::*;

        #[test]
        fn are_one_line_with_the_expected_values() {
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
                (
                    &["--pool-size=a\n\nUsage: b"],
                    "error: invalid value 'a Usage: b' for '--pool-size <N>': expected a whole number from 1 to 1024",
                ),
            ] {
                assert_eq!(error(args, &[]), expected);
            }
            assert!(error(&["--module-config", "{"], &[]).contains("expected JSON or @FILE"));
            let missing = Cli::read(&["x".into()], &Environment::new()).unwrap_err();
            assert_eq!(one_line(&missing), "error: the following required arguments were not provided: --module <FILE>");
        }

        #[test]
        fn suggest_the_nearest_name_or_value() {
            for (arg, expected) in [
                ("--modul", "error: unexpected argument '--modul' found; a similar argument exists: '--module'"),
                ("--modul=m.wasm", "error: unexpected argument '--modul' found; a similar argument exists: '--module'"),
                ("--fail-opened=true", "error: unexpected argument '--fail-opened' found; a similar argument exists: '--fail-open'"),
                (
                    "--isolation=pool",
                    "error: invalid value 'pool' for '--isolation <ISOLATION>' [possible values: pooled, request]; \
                     a similar value exists: 'pooled'",
                ),
            ] {
                assert_eq!(error(&[arg], &[]), expected);
            }
        }

        #[test]
        fn show_how_to_give_a_switch_its_value() {
            assert_eq!(error(&["--fail-open", "false"], &[]), "error: unexpected argument 'false' found; write '--fail-open=false'");
            assert_eq!(error(&["--fail-open", "maybe"], &[]), "error: unexpected argument 'maybe' found");
            assert_eq!(error(&["--pool-size", "2", "true"], &[]), "error: unexpected argument 'true' found");
        }

        #[test]
        fn that_are_not_utf8_are_named() {
            let error = |arg: &[u8]| read_bytes(&[arg], &[]).unwrap_err();
            assert_eq!(error(b"--pool-size=\xff"), "error: invalid value '\u{fffd}' for '--pool-size <N>': expected UTF-8");
            assert_eq!(error(b"--fail-open=\xff"), "error: invalid value '\u{fffd}' for '--fail-open[=<FAIL_OPEN>]': expected UTF-8");
            assert_eq!(read_bytes(&[b"--socket=\xff"], &[]).unwrap().socket.as_os_str().as_bytes(), NOT_UTF8);
        }
    }

    mod variables {
        use super::*;

        #[test]
        fn are_named_if_invalid() {
            for (name, value, expected) in [
                ("WASM_POOL_SIZE", "x", "error: invalid value 'x' for 'WASM_POOL_SIZE': expected a whole number from 1 to 1024"),
                ("WASM_WATCH", "2", "error: invalid value '2' for 'WASM_WATCH': value was not a boolean"),
                ("FAIL_OPEN", "2", "error: invalid value '2' for 'FAIL_OPEN': value was not a boolean"),
                ("WASM_FAIL_OPEN", "2", "error: invalid value '2' for 'WASM_FAIL_OPEN': value was not a boolean"),
                (
                    "WASM_LOG_FORMAT",
                    "jso",
                    "error: invalid value 'jso' for 'WASM_LOG_FORMAT' [possible values: json, text]; a similar value exists: 'json'",
                ),
                (
                    "WASM_GRPC_ADDRESS",
                    "x",
                    "error: invalid value 'x' for 'WASM_GRPC_ADDRESS': expected an IP address and a port, such as 127.0.0.1:9090",
                ),
            ] {
                assert_eq!(error(&[], &[(name, value)]), expected);
            }
            // The option is named if it is what is invalid.
            let expected = "error: invalid value 'x' for '--pool-size <N>': expected a whole number from 1 to 1024";
            assert_eq!(error(&["--pool-size=x"], &[("WASM_POOL_SIZE", "x")]), expected);
            assert_eq!(error(&["--pool-size=x"], &[("WASM_TIMEOUT_MS", "1")]), expected);
        }

        #[test]
        fn are_overridden_by_options() {
            let environment = [("WASM_POOL_SIZE", "x"), ("FAIL_OPEN", ""), ("WASM_FAIL_OPEN", "x"), ("WASM_TIMEOUT_MS", "7")];
            let cli = read(&["--pool-size=3", "--fail-open=false"], &environment).unwrap();
            assert_eq!((cli.pool_size, cli.fail_open, cli.timeout_ms), (3, false, 7));
        }

        #[test]
        fn of_required_options_are_enough() {
            let environment = [("WASM_MODULE", "m.wasm")].map(|(name, value)| (name.into(), value.into())).into();
            assert_eq!(Cli::read(&["x".into()], &environment).unwrap().module, PathBuf::from("m.wasm"));
        }

        #[test]
        fn that_are_not_utf8_are_named() {
            for name in ["WASM_POOL_SIZE", "FAIL_OPEN", "WASM_FAIL_OPEN", "WASM_GRPC_ADDRESS", "WASM_LOG_FORMAT", "WASM_MODULE_CONFIG"] {
                let error = read_bytes(&[], &[(name, NOT_UTF8)]).unwrap_err();
                assert_eq!(error, format!("error: invalid value '\u{fffd}' for '{name}': expected UTF-8"));
            }
            assert_eq!(read_bytes(&[], &[("AGENT_SOCKET", NOT_UTF8)]).unwrap().socket.as_os_str().as_bytes(), NOT_UTF8);
        }

        #[test]
        fn do_not_keep_help_from_being_shown() {
            let environment = [("WASM_POOL_SIZE", "x"), ("FAIL_OPEN", "")].map(|(name, value)| (name.into(), value.into())).into();
            let help = Cli::read(&["x".into(), "--help".into()], &environment).unwrap_err();
            assert_eq!(help.kind(), ErrorKind::DisplayHelp);
            assert!(help.to_string().contains("[env: FAIL_OPEN="), "{help}");
        }
    }

    mod aliases {
        use super::*;

        #[test]
        fn set_the_option() {
            let address =
                |args: &[&str], environment: &[(&str, &str)]| read(args, environment).unwrap().grpc_address.map(|a| a.to_string());
            let alias = ("WASM_GRPC_ADDRESS", "127.0.0.1:2");
            assert_eq!(address(&[], &[alias]).as_deref(), Some("127.0.0.1:2"));
            assert_eq!(address(&["--grpc-address", "127.0.0.1:1"], &[alias]).as_deref(), Some("127.0.0.1:1"));
            assert_eq!(address(&[], &[("WASM_GRPC_ADDRESS", "")]), None);
            assert!(read(&[], &[("WASM_FAIL_OPEN", "true")]).unwrap().fail_open);
            assert!(!read(&[], &[("WASM_FAIL_OPEN", "0")]).unwrap().fail_open);
            assert!(!read(&["--fail-open=false"], &[("WASM_FAIL_OPEN", "true")]).unwrap().fail_open);
            assert!(read(&["--fail-open"], &[("WASM_FAIL_OPEN", "0"), ("FAIL_OPEN", "1")]).unwrap().fail_open);
        }

        #[test]
        fn of_fail_open_must_agree() {
            let both = |one, other| read(&[], &[("FAIL_OPEN", one), ("WASM_FAIL_OPEN", other)]).map(|cli| cli.fail_open);
            assert_eq!(both("1", "true"), Ok(true));
            assert_eq!(both("off", "no"), Ok(false));
            let differ =
                "error: the environment variables `FAIL_OPEN` and `WASM_FAIL_OPEN` differ: unset one of them, or give both the same value";
            assert_eq!(both("1", "false").unwrap_err(), differ);
            assert_eq!(both("0", "on").unwrap_err(), differ);
            assert_eq!(both("1", "x").unwrap_err(), "error: invalid value 'x' for 'WASM_FAIL_OPEN': value was not a boolean");
            assert_eq!(both("x", "1").unwrap_err(), "error: invalid value 'x' for 'FAIL_OPEN': value was not a boolean");
            for (one, other, name) in [("", "1", "FAIL_OPEN"), ("1", "", "WASM_FAIL_OPEN")] {
                let expected = format!("error: the environment variable `{name}` is empty: set it to a value or unset it");
                assert_eq!(both(one, other).unwrap_err(), expected);
            }
        }

        #[test]
        fn of_the_grpc_address_are_ignored_with_a_warning() {
            let environment = [("AGENT_GRPC_ADDRESS", "127.0.0.1:1"), ("WASM_GRPC_ADDRESS", "127.0.0.1:2")];
            let cli = read(&[], &environment).unwrap();
            assert_eq!(cli.grpc_address.unwrap().port(), 1);
            assert_eq!(cli.warnings, ["ignoring the environment variable `WASM_GRPC_ADDRESS` because `AGENT_GRPC_ADDRESS` differs"]);
            assert!(warnings(&[environment[0], ("WASM_GRPC_ADDRESS", "127.0.0.1:1")]).is_empty());
        }
    }

    mod unknown_variables {
        use super::*;

        #[test]
        fn are_one_warning_with_the_nearest_names() {
            for (name, nearest) in [
                ("WASM_POOLSIZE", "WASM_POOL_SIZE"),
                ("WASM_TIMEOUT", "WASM_TIMEOUT_MS"),
                ("WASM_SOCKET", "AGENT_SOCKET"),
                ("WASM_FAILOPEN", "WASM_FAIL_OPEN"),
                ("WASM_GRPC_ADDR", "WASM_GRPC_ADDRESS"),
                ("WASM_MODULE_", "WASM_MODULE"),
            ] {
                let expected = format!("ignoring unknown environment variable `{name}` (did you mean `{nearest}`?)");
                assert_eq!(warnings(&[(name, "secret")]), [expected]);
            }
            assert_eq!(warnings(&[("WASM_XYZ", "x")]), ["ignoring unknown environment variable `WASM_XYZ`"]);
            assert_eq!(
                warnings(&[("WASM_XYZ", "x"), ("WASM_ISOLATIONS", "x")]),
                ["ignoring unknown environment variables `WASM_ISOLATIONS` (did you mean `WASM_ISOLATION`?), `WASM_XYZ`"]
            );
        }

        #[test]
        fn are_bounded() {
            let names: Vec<_> = (0..1000).map(|number| format!("WASM_{number}_{}", "X".repeat(1000))).collect();
            let environment: Vec<_> = names.iter().map(|name| (name.as_str(), "x")).collect();
            assert!(warnings(&environment)[0].chars().count() < MAX_UNKNOWN + 100);
        }

        #[test]
        fn are_named_when_the_module_is_missing() {
            let environment = [("WASM_MODUL", "m.wasm")].map(|(name, value)| (name.into(), value.into())).into();
            assert_eq!(
                one_line(&Cli::read(&["x".into()], &environment).unwrap_err()),
                "error: the following required arguments were not provided: --module <FILE>; \
                 ignoring unknown environment variable `WASM_MODUL` (did you mean `WASM_MODULE`?)"
            );
        }

        #[test]
        fn of_others_are_no_reason_to_warn() {
            assert!(warnings(&[("AGENT_POOL_SIZE", "1"), ("WASMTIME_LOG", "x"), ("wasm_x", "x"), ("PATH", "/bin")]).is_empty());
            // Empty variables count as unset.
            assert!(warnings(&[("WASM_XYZ", "")]).is_empty());
            let kubernetes = [
                ("WASM_AGENT_SERVICE_HOST", "10.0.0.1"),
                ("WASM_AGENT_SERVICE_PORT", "9090"),
                ("WASM_AGENT_SERVICE_PORT_GRPC", "9090"),
                ("WASM_AGENT_PORT", "tcp://10.0.0.1:9090"),
                ("WASM_AGENT_PORT_9090_TCP_ADDR", "10.0.0.1"),
            ];
            assert!(warnings(&kubernetes).is_empty());
            assert_eq!(warnings(&kubernetes[1..]).len(), 1);
        }
    }

    #[test]
    fn rejects_half_a_tls_configuration() {
        let address = ["--grpc-address", "127.0.0.1:1"];
        assert_eq!(error(&["--grpc-tls-cert", "c", "--grpc-tls-key", "k"], &[]), "error: `--grpc-tls-cert` requires `--grpc-address`");
        assert_eq!(error(&[&address[..], &["--grpc-tls-cert", "c"]].concat(), &[]), "error: `--grpc-tls-cert` requires `--grpc-tls-key`");
        assert_eq!(error(&[&address[..], &["--grpc-tls-key", "k"]].concat(), &[]), "error: `--grpc-tls-key` requires `--grpc-tls-cert`");
        assert_eq!(
            error(&[&address[..], &["--grpc-client-ca", "c"]].concat(), &[]),
            "error: `--grpc-client-ca` requires `--grpc-tls-cert`"
        );
        let whole = [&address[..], &["--grpc-tls-cert", "c", "--grpc-tls-key", "k"]].concat();
        assert!(read(&whole, &[]).unwrap().grpc_tls().is_some());
        assert_eq!(error(&address, &[("WASM_GRPC_TLS_CERT", "c")]), "error: `WASM_GRPC_TLS_CERT` requires `WASM_GRPC_TLS_KEY`");
        assert_eq!(error(&[], &[("WASM_GRPC_CLIENT_CA", "c")]), "error: `WASM_GRPC_CLIENT_CA` requires `AGENT_GRPC_ADDRESS`");
    }

    #[test]
    fn rejects_options_of_a_collector_that_do_not_belong_together() {
        let (http, https) = (["--otlp-endpoint", "http://a:1"], ["--otlp-endpoint", "https://a:1"]);
        assert_eq!(error(&["--otlp-headers", "a=b"], &[]), "error: `--otlp-headers` requires `--otlp-endpoint`");
        assert_eq!(error(&["--otlp-ca", "c"], &[]), "error: `--otlp-ca` requires `--otlp-endpoint`");
        assert_eq!(
            error(&[&http[..], &["--otlp-ca", "c"]].concat(), &[]),
            "error: `--otlp-ca` requires `--otlp-endpoint` with an `https://` URL"
        );
        assert_eq!(
            error(&https, &[]),
            "error: `--otlp-endpoint` requires `--otlp-ca` for an `https://` URL, such as /etc/ssl/certs/ca-certificates.crt"
        );
        assert_eq!(
            error(&[], &[("WASM_OTLP_ENDPOINT", "https://a:1")]),
            "error: `WASM_OTLP_ENDPOINT` requires `WASM_OTLP_CA` for an `https://` URL, such as /etc/ssl/certs/ca-certificates.crt"
        );
        assert!(read(&[&https[..], &["--otlp-ca", "c"]].concat(), &[]).unwrap().otlp().is_some());
        assert!(read(&[], &[("WASM_OTLP_ENDPOINT", "http://a:1")]).unwrap().otlp().is_some());
        assert!(read(&[], &[]).unwrap().otlp().is_none());
    }

    #[test]
    fn does_not_show_the_headers_for_a_collector() {
        let environment = [("WASM_OTLP_HEADERS", "authorization=secret")];
        let expected = "expected `name=value` pairs, separated by commas, with percent-encoded values";
        let endpoint = ["--otlp-endpoint", "http://a:1"];
        let problem = error(&endpoint, &[("WASM_OTLP_HEADERS", "secret")]);
        assert_eq!(problem, format!("error: invalid value for `WASM_OTLP_HEADERS`: {expected}"));
        let problem = error(&[&endpoint[..], &["--otlp-headers", "secret"]].concat(), &[]);
        assert_eq!(problem, format!("error: invalid value for `--otlp-headers`: {expected}"));
        let cli = read(&["--otlp-endpoint", "http://a:1"], &environment).unwrap();
        assert!(!format!("{cli:?}").contains("secret"), "{cli:?}");
    }
}
