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
use zentinel_agent_wasm::takeover::control::ControlSocket;
use zentinel_agent_wasm::takeover::predecessor::{Predecessor, Wanted};
use zentinel_agent_wasm::takeover::store::Inherited;
use zentinel_agent_wasm::watch::FileWatcher;
use zentinel_wasm_protocol::Timeouts;
use zentinel_wasm_runtime::Runtime;

fn main() -> ExitCode {
    let inherited = Inherited::take();
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
    match run(cli, &log, inherited) {
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

fn run(cli: Cli, log: &Log, inherited: Inherited) -> anyhow::Result<()> {
    let decisions = cli.decision_log().map(|config| DecisionLog::start(config, log)).transpose()?;
    let runtime = process::runtime().context(NO_THREADS)?;
    let served = runtime.block_on(serve(cli, decisions.as_ref(), inherited));
    // Does not wait for a module that is being compiled.
    runtime.shutdown_background();
    served
}

async fn serve(cli: Cli, decisions: Option<&DecisionLog>, inherited: Inherited) -> anyhow::Result<()> {
    let mut signals = Signals::catch()?;
    if let Some(decisions) = decisions {
        tokio::spawn(decisions.reopen_on_hangup()?);
    }
    let tls = cli.grpc_tls().map(ReloadableTls::open).transpose()?;
    let wanted = Wanted {
        socket: &cli.socket,
        socket_mode: cli.socket_mode,
        grpc: cli.grpc_address,
        tls: tls.clone(),
        admin: cli.admin_address,
        takeover: cli.takeover,
    };
    let predecessor = Predecessor::find(inherited, &wanted).await?;
    // Addresses that are not taken over come before the module, because one that is in use should
    // not cost a compilation.
    let socket = if predecessor.has_socket(&cli.socket) { None } else { Some(SocketServer::bind(&cli.socket, cli.socket_mode)?) };
    let grpc = match cli.grpc_address.filter(|address| !predecessor.has_grpc(*address)) {
        Some(address) => Some(GrpcServer::bind(address, tls.clone()).await?),
        None => None,
    };
    let started = Arc::new(OnceLock::new());
    let admin = match cli.admin_address.filter(|address| !predecessor.has_admin(*address)) {
        // Served from now on, because the module may take long to compile.
        Some(address) => Some(AdminServer::bind(address).await?.spawn(Arc::clone(&started))),
        None => None,
    };

    let source = cli.source(tls);
    let exporting = cli.otlp().map(|options| options.start(Arc::clone(&started))).transpose()?;
    let (exporter, spans) = exporting.unzip();

    let cache = cache::open(cli.cache_dir.as_deref());
    // Before the files are read, so no change is missed.
    let watcher = if cli.watch { Some(FileWatcher::start(source.files()).context(NO_THREADS)?) } else { None };
    let runtime = Runtime::start().context(NO_THREADS)?;
    let observers = decisions.map(DecisionLog::observer).into_iter().chain(spans).collect();
    let agent = tokio::select! {
        agent = source.start(runtime, cli.settings(), cache, observers) => agent?,
        () = signals.termination.recv() => return Ok(()),
    };

    let mut inheritance = predecessor.take(&agent, &wanted).await?;
    // What the predecessor announced and did not hand over is bound now.
    let socket = match socket.or_else(|| inheritance.socket.take()) {
        Some(socket) => socket,
        None => SocketServer::bind(&cli.socket, cli.socket_mode)?,
    };
    let grpc = match (grpc.or_else(|| inheritance.grpc.take()), cli.grpc_address) {
        (None, Some(address)) => Some(GrpcServer::bind(address, wanted.tls).await?),
        (grpc, _) => grpc,
    };
    let admin = match (admin, inheritance.admin.take(), cli.admin_address) {
        (Some(admin), ..) => Some(admin),
        (None, Some(admin), _) => Some(admin.spawn(Arc::clone(&started))),
        (None, None, Some(address)) => Some(AdminServer::bind(address).await?.spawn(Arc::clone(&started))),
        (None, None, None) => None,
    };
    let control = match inheritance.control.take() {
        None if cli.takeover => Some(ControlSocket::bind(&cli.socket)?),
        control => control,
    };

    // Before the log reports that the agent serves.
    let _ = started.set(Arc::clone(&agent));
    let config = LifecycleConfig { grace: cli.grace(), timeouts: Timeouts::default() };
    let mut lifecycle = Lifecycle::new(agent, source, config, signals, watcher);
    lifecycle.serve_socket(socket).context(NO_THREADS)?;
    lifecycle.serve_inherited(inheritance).await;
    if let Some(grpc) = grpc {
        lifecycle.serve_grpc(grpc);
    }
    if let Some(admin) = admin {
        lifecycle.keep_admin(admin);
    }
    if let Some(control) = control {
        lifecycle.allow_takeover(control)?;
    }
    lifecycle.run().await;
    if let Some(exporter) = exporter {
        exporter.close();
    }
    Ok(())
}
