//! `zentinel-wasm-agent` reads its options, loads the module, and serves it until a signal ends it;
//! or it runs a command.

#![forbid(unsafe_code)]
// The macros panic when standard error or output cannot be written.
#![deny(clippy::print_stderr, clippy::print_stdout)]

use std::io::{self, Write as _};
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};

use anyhow::Context as _;
use zentinel_agent_wasm::cache;
use zentinel_agent_wasm::cli::{CheckOptions, Cli, Invocation};
use zentinel_agent_wasm::commands::check::Report;
use zentinel_agent_wasm::commands::health;
use zentinel_agent_wasm::decisions::DecisionLog;
use zentinel_agent_wasm::lifecycle::{Lifecycle, LifecycleConfig};
use zentinel_agent_wasm::listen::admin::AdminServer;
use zentinel_agent_wasm::listen::grpc::GrpcServer;
use zentinel_agent_wasm::listen::tls::ReloadableTls;
use zentinel_agent_wasm::listen::unix::SocketServer;
use zentinel_agent_wasm::logging::Log;
use zentinel_agent_wasm::process::{self, NO_THREADS};
use zentinel_agent_wasm::signals::Signals;
use zentinel_agent_wasm::watch::FileWatcher;
use zentinel_wasm_protocol::Timeouts;
use zentinel_wasm_runtime::Runtime;

fn main() -> ExitCode {
    let log = match Log::start().context(NO_THREADS) {
        Ok(log) => log,
        Err(error) => {
            let _ = writeln!(io::stderr(), "zentinel-wasm-agent: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    let cli = match Invocation::parse() {
        Ok(Invocation::Serve(cli)) => *cli,
        Ok(Invocation::Check(options)) => {
            log.init(options.log_format, options.serve.verbose);
            return end(check(&options), &log);
        }
        Ok(Invocation::Health(options)) => return end(health::run(&options).map(|line| (line, ExitCode::SUCCESS)), &log),
        Err(exit) => return exit.report(|line| log.write_plain(line)),
    };
    log.init(cli.log_format, cli.verbose);
    cli.log_warnings();
    process::raise_file_limit();
    match run(cli, &log) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // A plain line whatever the log's format, because the agent may have been started by
            // hand.
            log.write_plain(&format!("zentinel-wasm-agent: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Ends a command: its result goes to standard output, or why there is none to standard error.
fn end(result: Result<(String, ExitCode), String>, log: &Log) -> ExitCode {
    match result {
        Ok((text, status)) if writeln!(io::stdout(), "{text}").is_ok() => status,
        Ok(_) => ExitCode::FAILURE,
        Err(line) => {
            log.write_plain(&line);
            ExitCode::FAILURE
        }
    }
}

/// Checks a module. The report is the result even if the module cannot be served.
fn check(options: &CheckOptions) -> Result<(String, ExitCode), String> {
    let runtime = process::runtime().map_err(|error| format!("zentinel-wasm-agent: {NO_THREADS}: {error}"))?;
    let report = runtime.block_on(Report::of(options));
    runtime.shutdown_background();
    let text = if options.json { report.json().to_string() } else { report.to_string().trim_end().to_owned() };
    Ok((text, if report.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }))
}

fn run(cli: Cli, log: &Log) -> anyhow::Result<()> {
    let decisions = cli.decision_log().map(|config| DecisionLog::start(config, log)).transpose()?;
    let runtime = process::runtime().context(NO_THREADS)?;
    let served = runtime.block_on(serve(cli, decisions.as_ref()));
    // Does not wait for a module that is being compiled.
    runtime.shutdown_background();
    served
}

async fn serve(cli: Cli, decisions: Option<&DecisionLog>) -> anyhow::Result<()> {
    let mut signals = Signals::catch()?;
    if let Some(decisions) = decisions {
        tokio::spawn(decisions.reopen_on_hangup()?);
    }
    // Addresses come before the module, because one that is in use should not cost a compilation.
    let socket = SocketServer::bind(&cli.socket, cli.socket_mode)?;
    let tls = cli.grpc_tls().map(ReloadableTls::open).transpose()?;
    let source = cli.source(tls.clone());
    let grpc = match cli.grpc_address {
        Some(address) => Some(GrpcServer::bind(address, tls).await?),
        None => None,
    };
    let started = Arc::new(OnceLock::new());
    if let Some(address) = cli.admin_address {
        // Served from now on, because the module may take long to compile.
        tokio::spawn(AdminServer::bind(address).await?.serve(Arc::clone(&started)));
    }

    let cache = cache::open(cli.cache_dir.as_deref());
    // Before the files are read, so no change is missed.
    let watcher = if cli.watch { Some(FileWatcher::start(source.files()).context(NO_THREADS)?) } else { None };
    let runtime = Runtime::start().context(NO_THREADS)?;
    let observers = decisions.map(DecisionLog::observer).into_iter().collect();
    let agent = tokio::select! {
        agent = source.start(runtime, cli.settings(), cache, observers) => agent?,
        () = signals.termination.recv() => return Ok(()),
    };

    // Before the log reports that the agent serves.
    let _ = started.set(Arc::clone(&agent));
    let config = LifecycleConfig { grace: cli.grace(), timeouts: Timeouts::default() };
    let mut lifecycle = Lifecycle::new(agent, source, config, signals, watcher);
    lifecycle.serve_socket(socket).context(NO_THREADS)?;
    if let Some(grpc) = grpc {
        lifecycle.serve_grpc(grpc);
    }
    lifecycle.run().await;
    Ok(())
}
