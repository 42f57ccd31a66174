//! `zentinel-wasm-agent`: options, module, sockets, until a signal ends it.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use anyhow::Context as _;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use zentinel_agent_wasm::admin;
use zentinel_agent_wasm::agent::Agent;
use zentinel_agent_wasm::cli::Cli;
use zentinel_agent_wasm::grpc;
use zentinel_agent_wasm::lifecycle::{Lifecycle, Signals, Watched, open_cache};
use zentinel_agent_wasm::listener::Listener;
use zentinel_agent_wasm::logging;
use zentinel_wasm_runtime::Runtime;

/// Files that the agent may have open: those of all connections at their bounds, and room for the rest.
const FILES: u64 = 4096;

fn main() -> ExitCode {
    let cli = Cli::parse_or_exit();
    logging::init(cli.log_format, cli.verbose);
    raise_file_limit();
    let served =
        tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("agent").build().map_err(anyhow::Error::from).and_then(
            |runtime| {
                let served = runtime.block_on(serve(cli));
                // A module that is being compiled is not waited for.
                runtime.shutdown_background();
                served
            },
        );
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Said plainly, for whoever started it by hand, and not only in the log's form.
            eprintln!("zentinel-wasm-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Shells and service managers start processes with a limit of 1024 files, and let them raise it.
fn raise_file_limit() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let wanted = maximum.map_or(FILES, |maximum| maximum.min(FILES));
    if current.is_some_and(|current| current < wanted) {
        // Where that is refused, connections beyond the limit are turned away later than they would be otherwise: the listener waits and tries again.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum });
    }
}

async fn serve(cli: Cli) -> anyhow::Result<()> {
    let mut signals = Signals::listen()?;
    // Before the module: an address that is taken should not cost a compilation.
    let listener = Listener::bind(&cli.socket, cli.socket_mode)?;
    let tls = cli.grpc_tls().map(grpc::Tls::open).transpose()?;
    let source = cli.source(tls.clone());
    let grpc = match cli.grpc_address {
        Some(address) => Some(grpc::Listener::bind(address, tls).await?),
        None => None,
    };
    let admin = match cli.admin_address {
        Some(address) => Some(admin::bind(address).await?),
        None => None,
    };

    let cache = open_cache(cli.cache_dir.as_deref());
    let watched =
        if cli.watch { Some(Watched::start(source.files()).context("cannot start the thread that watches files")?) } else { None };
    let agent = tokio::select! {
        started = Agent::start(Runtime::start()?, source, cli.settings(), cache) => started?,
        () = signals.end() => return Ok(()),
    };

    let mut lifecycle = Lifecycle::new(agent, cli.grace(), signals, watched);
    lifecycle.serve_socket(listener)?;
    if let Some(grpc) = grpc {
        lifecycle.serve_grpc(grpc);
    }
    if let Some(admin) = admin {
        lifecycle.serve_admin(admin);
    }
    lifecycle.run().await;
    Ok(())
}
