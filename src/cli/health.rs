//! The options of `health`.

use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{CommandFactory as _, FromArgMatches as _, Parser};

use super::environment::{self, Environment};
use super::options::DEFAULT_SOCKET;
use super::values::{address, number};

/// Longest wait for an answer, in milliseconds: one minute, more than any supervisor waits.
const MAX_TIMEOUT_MS: u64 = 60_000;

/// Asks a running agent whether it decides about requests
#[derive(Clone, Debug, Parser)]
#[command(
    name = "health",
    bin_name = "zentinel-wasm-agent health",
    long_about = "Asks a running agent whether it decides about requests\n\n\
                  Asks the admin address if there is one, otherwise the socket. The exit status is 0 if the agent\n\
                  decides, and 1 if not; one line has the reason."
)]
struct Arguments {
    /// Unix socket of the agent
    #[arg(long, env = "AGENT_SOCKET", value_name = "PATH", default_value = DEFAULT_SOCKET, conflicts_with = "admin_address")]
    socket: PathBuf,

    /// Admin address of the agent
    #[arg(long, env = "WASM_ADMIN_ADDRESS", value_name = "IP:PORT", value_parser = address)]
    admin_address: Option<SocketAddr>,

    // WASM_TIMEOUT_MS is the deadline of calls.
    /// Time for the whole answer
    #[arg(long, value_name = "MS", default_value = "2000", value_parser = number(1, MAX_TIMEOUT_MS))]
    timeout_ms: u64,
}

/// Which agent to ask, and for how long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthOptions {
    /// Where the agent is asked.
    pub target: HealthTarget,
    /// Time for the whole answer.
    pub timeout: Duration,
}

/// Where an agent is asked for its health.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HealthTarget {
    /// Its socket.
    Socket(PathBuf),
    /// Its admin address, as a client reaches it.
    Admin(SocketAddr),
}

impl HealthOptions {
    pub(super) fn read(args: &[OsString], environment: &Environment) -> Result<Self, clap::Error> {
        let parsed = environment::read(&command(), args, environment)?;
        let Arguments { socket, admin_address, timeout_ms } = Arguments::from_arg_matches(&parsed.matches)?;
        let target = match admin_address {
            Some(address) if !parsed.is_given("socket") => HealthTarget::Admin(reachable(address)),
            _ => HealthTarget::Socket(socket),
        };
        Ok(Self { target, timeout: Duration::from_millis(timeout_ms) })
    }
}

pub(super) fn command() -> clap::Command {
    Arguments::command()
}

/// The address at which this machine reaches what is bound to `address`: that of the loopback
/// interface, if it is bound to all interfaces.
fn reachable(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip(match address.ip() {
            IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        });
    }
    address
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::early_exit::one_line;

    fn read(args: &[&str], environment: &[(&str, &str)]) -> Result<HealthTarget, String> {
        let args: Vec<OsString> = ["health"].iter().chain(args).map(Into::into).collect();
        let environment = environment.iter().map(|(name, value)| (name.into(), value.into())).collect();
        HealthOptions::read(&args, &environment).map(|options| options.target).map_err(|error| one_line(&error))
    }

    fn socket(path: &str) -> Result<HealthTarget, String> {
        Ok(HealthTarget::Socket(path.into()))
    }

    fn admin(address: &str) -> Result<HealthTarget, String> {
        Ok(HealthTarget::Admin(address.parse().unwrap()))
    }

    #[test]
    fn asks_what_the_agents_variables_name() {
        assert_eq!(read(&[], &[]), socket("/tmp/zentinel-wasm.sock"));
        assert_eq!(read(&[], &[("AGENT_SOCKET", "/s")]), socket("/s"));
        let both = [("AGENT_SOCKET", "/s"), ("WASM_ADMIN_ADDRESS", "10.0.0.1:9191")];
        assert_eq!(read(&[], &both), admin("10.0.0.1:9191"));
        assert_eq!(read(&["--socket", "/other"], &both), socket("/other"));
        assert_eq!(read(&["--admin-address", "127.0.0.1:1"], &both), admin("127.0.0.1:1"));
        // Those of other options do not matter.
        assert_eq!(read(&[], &[("WASM_POOL_SIZE", "x"), ("WASM_TIMEOUT_MS", "x"), ("FAIL_OPEN", "")]), socket("/tmp/zentinel-wasm.sock"));
    }

    #[test]
    fn reaches_an_agent_on_all_interfaces_by_loopback() {
        assert_eq!(read(&["--admin-address", "0.0.0.0:9191"], &[]), admin("127.0.0.1:9191"));
        assert_eq!(read(&["--admin-address", "[::]:9191"], &[]), admin("[::1]:9191"));
    }

    #[test]
    fn names_invalid_options_and_variables() {
        for (args, environment, expected) in [
            (
                &["--timeout-ms", "0"][..],
                &[][..],
                "error: invalid value '0' for '--timeout-ms <MS>': expected a whole number from 1 to 60000",
            ),
            (
                &[],
                &[("WASM_ADMIN_ADDRESS", "x")],
                "error: invalid value 'x' for 'WASM_ADMIN_ADDRESS': expected an IP address and a port, such as 127.0.0.1:9090",
            ),
            (&["--sockt", "/s"], &[], "error: unexpected argument '--sockt' found; a similar argument exists: '--socket'"),
            (
                &["--socket", "/s", "--admin-address", "127.0.0.1:1"],
                &[],
                "error: the argument '--socket <PATH>' cannot be used with '--admin-address <IP:PORT>'",
            ),
        ] {
            assert_eq!(read(args, environment).unwrap_err(), expected);
        }
    }
}
