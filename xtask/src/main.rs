//! The project's chores: `cargo xtask --help` lists them.

mod bench;
mod cargo;
mod circles;
mod demo;
mod dist;
mod e2e;
mod fuzz;
mod guests;
mod lint;
mod peers;
mod prose;
mod proxy;
mod pypi;
mod soak;
mod table;
mod target;
mod test;
mod tools;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Chores of the zentinel-agent-wasm repository.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Build the agent and a module, send sample requests, show what was decided, keep serving
    Demo(demo::Args),
    /// Run every test: the workspace, SDK and examples, the published client, guests, the real proxy
    Test(test::Args),
    /// Run the tests by the proxy's published client
    Peers,
    /// Run the end-to-end tests behind the real proxy, which is built when it is missing
    E2e(e2e::Args),
    /// Measure what the agent costs beside an agent that does nothing
    Bench(bench::Args),
    /// Build the example policies in every language, ask them all cases, measure them
    Guests(guests::Args),
    /// Build release archives and their checksums into target/dist
    Dist(dist::Args),
    /// Give the agent's readers and its core whatever a fuzzer can think of
    Fuzz(fuzz::Args),
    /// A million requests to leaking, looping, panicking and good modules, with reloads in between
    Soak(soak::Args),
    /// Check formatting, clippy, the other targets, documentation, dependencies
    Lint(lint::Args),
    /// Do what continuous integration does: every test, then lint
    Ci,
}

fn main() -> ExitCode {
    let done = match Cli::parse().chore {
        Chore::Demo(args) => demo::run(&args),
        Chore::Test(args) => test::run(&args),
        Chore::Peers => test::published_client(),
        Chore::E2e(args) => e2e::run(&args),
        Chore::Bench(args) => bench::run(&args),
        Chore::Guests(args) => guests::run(&args),
        Chore::Dist(args) => dist::run(&args),
        Chore::Fuzz(args) => fuzz::fuzz(&args),
        Chore::Soak(args) => soak::run(&args),
        Chore::Lint(args) => lint::run(&args),
        Chore::Ci => test::run(&test::Args::default()).and_then(|()| lint::run(&lint::Args::default())),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
