//! `zentinel-wasm-agent`: options, module, sockets, until a signal ends it.

#![forbid(unsafe_code)]
// They panic when standard error or output cannot be written.
#![deny(clippy::print_stderr, clippy::print_stdout)]

use std::io::{self, Write as _};
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};

use anyhow::Context as _;
use zentinel_agent_wasm::cli::Cli;
use zentinel_agent_wasm::lifecycle::Lifecycle;
use zentinel_agent_wasm::listen::unix::Listener;
use zentinel_agent_wasm::listen::{admin, grpc, tls};
use zentinel_agent_wasm::logging::Log;
use zentinel_agent_wasm::process::{NO_THREADS, raise_file_limit};
use zentinel_agent_wasm::signals::Signals;
use zentinel_agent_wasm::watch::Watched;
use zentinel_agent_wasm::{cache, process};
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
        Err(refusal) => return refusal.tell(|line| log.say(line)),
    };
    log.init(cli.log_format, cli.verbose);
    raise_file_limit();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Said plainly, for whoever started it by hand, and not only in the log's form.
            log.say(&format!("zentinel-wasm-agent: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    let runtime = process::runtime().context(NO_THREADS)?;
    let served = runtime.block_on(serve(cli));
    // A module that is being compiled is not waited for.
    runtime.shutdown_background();
    served
}

async fn serve(cli: Cli) -> anyhow::Result<()> {
    let mut signals = Signals::listen()?;
    // Before the module: an address that is taken should not cost a compilation.
    let listener = Listener::bind(&cli.socket, cli.socket_mode)?;
    let tls = cli.grpc_tls().map(tls::Tls::open).transpose()?;
    let source = cli.source(tls.clone());
    let grpc = match cli.grpc_address {
        Some(address) => Some(grpc::Listener::bind(address, tls).await?),
        None => None,
    };
    let started = Arc::new(OnceLock::new());
    if let Some(address) = cli.admin_address {
        // From now on, because the module may take long to compile.
        tokio::spawn(admin::serve(admin::bind(address).await?, Arc::clone(&started)));
    }

    let cache = cache::open(cli.cache_dir.as_deref());
    let watched = if cli.watch { Some(Watched::start(source.files()).context(NO_THREADS)?) } else { None };
    let agent = tokio::select! {
        agent = source.start(Runtime::start().context(NO_THREADS)?, cli.settings(), cache) => agent?,
        () = signals.end() => return Ok(()),
    };

    // Before its log says that it serves.
    let _ = started.set(Arc::clone(&agent));
    let mut lifecycle = Lifecycle::new(agent, source, cli.grace(), signals, watched);
    lifecycle.serve_socket(listener).context(NO_THREADS)?;
    if let Some(grpc) = grpc {
        lifecycle.serve_grpc(grpc);
    }
    lifecycle.run().await;
    Ok(())
}
