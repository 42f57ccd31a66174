//! The agent with short timeouts, for which the binary has no option.
//!
//! It runs in a process of its own, like the binary: this test's executable, started once more.

// Every test binary has its own copy and uses only a part of it.
#![allow(dead_code)]

use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use clap::Parser as _;
use testkit::{Agent, Program};
use zentinel_agent_wasm::cli::Cli;
use zentinel_agent_wasm::lifecycle::{Lifecycle, LifecycleConfig};
use zentinel_agent_wasm::listen::admin::AdminServer;
use zentinel_agent_wasm::listen::grpc::GrpcServer;
use zentinel_agent_wasm::listen::unix::SocketServer;
use zentinel_agent_wasm::logging::Log;
use zentinel_agent_wasm::process;
use zentinel_agent_wasm::signals::Signals;
use zentinel_wasm_engine::{BreakerLimits, Settings};
use zentinel_wasm_protocol::Timeouts;
use zentinel_wasm_runtime::Runtime;

/// Timeout of the handshake and of stalled clients: long enough for correct clients on a busy
/// machine, and much shorter than the agent's own.
const TIMEOUT: Duration = Duration::from_secs(2);

/// [`TIMEOUT`] in log messages.
pub(crate) const LOGGED_TIMEOUT: &str = "2s";

/// The agent's command line, one argument per line. Set in the process that is the agent.
const COMMAND_LINE: &str = "SHORT_TIMEOUTS_COMMAND_LINE";

/// Set in a process with [`short_breaker`]: `idle` in milliseconds.
const SHORT_BREAKER: &str = "SHORT_TIMEOUTS_BREAKER";

/// As many failures as by default, in a tenth of the time.
fn short_breaker(idle: Duration) -> BreakerLimits {
    BreakerLimits { failures: 100, window: Duration::from_secs(1), probe_interval: Duration::from_millis(100), idle }
}

/// Starts the agent with a module and further options, and waits until it serves the socket.
#[track_caller]
pub(crate) fn start(module: &Path, options: &[&str]) -> Agent {
    launch(module, options, None)
}

/// The same with circuit breakers that open and probe sooner, and are idle after `idle`.
#[track_caller]
pub(crate) fn start_with_short_breaker(module: &Path, options: &[&str], idle: Duration) -> Agent {
    launch(module, options, Some(idle))
}

#[track_caller]
fn launch(module: &Path, options: &[&str], idle: Option<Duration>) -> Agent {
    let home = tempfile::tempdir().unwrap();
    let socket = home.path().join("wasm.sock");
    let paths = [&socket, module].map(|path| path.to_str().unwrap());
    let command_line = [&["zentinel-wasm-agent", "--socket", paths[0], "--module", paths[1]], options].concat();
    let mut command = Program(std::env::current_exe().unwrap()).command(home.path());
    command.args(["--exact", "short_timeouts::agent_process", "--nocapture"]).env(COMMAND_LINE, command_line.join("\n"));
    if let Some(idle) = idle {
        command.env(SHORT_BREAKER, idle.as_millis().to_string());
    }
    let agent = Agent::spawn(home, socket, command);
    agent.log.wait_until_serving();
    agent
}

/// Not a test, but the agent's process.
#[test]
fn agent_process() {
    let Ok(command_line) = std::env::var(COMMAND_LINE) else { return };
    let cli = Cli::try_parse_from(command_line.lines()).unwrap();
    let log = Log::start().unwrap();
    log.init(cli.log_format, cli.verbose);
    let runtime = process::runtime().unwrap();
    runtime.block_on(serve(cli)).unwrap();
    runtime.shutdown_background();
}

/// Like the binary's `main`.
async fn serve(cli: Cli) -> anyhow::Result<()> {
    let signals = Signals::catch()?;
    let socket = SocketServer::bind(&cli.socket, cli.socket_mode)?;
    let grpc = match cli.grpc_address {
        Some(address) => Some(GrpcServer::bind(address, None).await?),
        None => None,
    };
    let started = Arc::new(OnceLock::new());
    if let Some(address) = cli.admin_address {
        AdminServer::bind(address).await?.spawn(Arc::clone(&started));
    }
    let source = cli.source(None);
    let breaker = match std::env::var(SHORT_BREAKER) {
        Ok(idle) => short_breaker(Duration::from_millis(idle.parse()?)),
        Err(_) => BreakerLimits::default(),
    };
    let settings = Settings { breaker, ..cli.settings() };
    let agent = source.start(Runtime::start()?, settings, None, Vec::new()).await?;
    let _ = started.set(Arc::clone(&agent));
    let timeouts = Timeouts { handshake: TIMEOUT, stall: TIMEOUT, ..Timeouts::default() };
    let mut lifecycle = Lifecycle::new(agent, source, LifecycleConfig { grace: cli.grace(), timeouts }, signals, None);
    lifecycle.serve_socket(socket)?;
    if let Some(grpc) = grpc {
        lifecycle.serve_grpc(grpc);
    }
    lifecycle.run().await;
    Ok(())
}
