//! `zentinel-wasm-agent` reads its options, loads the module, and serves it until a signal ends it.

#![forbid(unsafe_code)]
// The macros panic when standard error or output cannot be written.
#![deny(clippy::print_stderr, clippy::print_stdout)]

use std::io::{self, Write as _};
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};

use anyhow::Context as _;
use zentinel_agent_wasm::cache;
use zentinel_agent_wasm::cli::Cli;
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
    let cli = match Cli::parse() {
        Ok(cli) => cli,
        Err(exit) => return exit.report(|line| log.write_plain(line)),
    };
    log.init(cli.log_format, cli.verbose);
    cli.log_warnings();
    process::raise_file_limit();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // A plain line whatever the log's format, because the agent may have been started by
            // hand.
            log.write_plain(&format!("zentinel-wasm-agent: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    let runtime = process::runtime().context(NO_THREADS)?;
    let served = runtime.block_on(serve(cli));
    // Does not wait for a module that is being compiled.
    runtime.shutdown_background();
    served
}

async fn serve(cli: Cli) -> anyhow::Result<()> {
    let mut signals = Signals::catch()?;
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
    let agent = tokio::select! {
        agent = source.start(runtime, cli.settings(), cache, Vec::new()) => agent?,
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
