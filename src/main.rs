//! `zentinel-wasm-agent`: options, module, sockets, until a signal ends it.

#![forbid(unsafe_code)]
// They panic when standard error or output cannot be written.
#![deny(clippy::print_stderr, clippy::print_stdout)]

use std::io::{self, Write as _};
use std::process::ExitCode;
use std::sync::{Arc, OnceLock, RwLock};
use std::time::Duration;

use anyhow::Context as _;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use zentinel_agent_wasm::cli::Cli;
use zentinel_agent_wasm::lifecycle::{Lifecycle, Signals, Watched, open_cache};
use zentinel_agent_wasm::listen::unix::Listener;
use zentinel_agent_wasm::listen::{admin, grpc, tls};
use zentinel_agent_wasm::logging::Log;
use zentinel_wasm_runtime::{Runtime, threads};

/// Files that the agent may have open: those of all connections at their bounds, and room for the rest.
const FILES: u64 = 4096;

/// Threads for files, beside one a core for large messages, which are read and written there.
const FILE_THREADS: usize = 4;

/// No agent runs longer.
const FOREVER: Duration = Duration::from_secs(u32::MAX as u64);

/// What to do when the system gives no more threads.
const NO_THREADS: &str = "cannot start the agent's threads: raise the limit on processes and threads (`ulimit -u`, `TasksMax=` of the unit, `pids.max` of the cgroup)";

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
    let runtime = runtime().context(NO_THREADS)?;
    let served = runtime.block_on(serve(cli));
    // A module that is being compiled is not waited for.
    runtime.shutdown_background();
    served
}

/// The runtime of the agent, with all threads that it will ever have: one that is refused later, when work should move to another thread, is a panic.
fn runtime() -> io::Result<tokio::runtime::Runtime> {
    let workers = threads::parallelism();
    let blocking = workers + FILE_THREADS;
    threads::check(workers + blocking)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .max_blocking_threads(blocking)
        .thread_keep_alive(FOREVER)
        .thread_name("agent")
        .enable_all()
        .build()?;
    // As long as the gate is closed each needs a thread of its own.
    let gate = Arc::new(RwLock::new(()));
    let closed = gate.write();
    for _ in 0..blocking {
        let gate = Arc::clone(&gate);
        runtime.spawn_blocking(move || drop(gate.read()));
    }
    drop(closed);
    Ok(runtime)
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

    let cache = open_cache(cli.cache_dir.as_deref());
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
