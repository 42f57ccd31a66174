//! The project's tasks: `cargo xtask --help` lists them.

mod bench;
mod cargo;
mod circles;
mod crash;
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
mod restart;
mod soak;
mod table;
mod target;
mod test;
mod tools;
mod validators;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Tasks of the zentinel-agent-wasm repository
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Build the agent and a module, send sample requests, show the decisions, keep serving
    Demo(demo::Args),
    /// Run all tests: workspace, SDK and examples, published client, guests, real proxy
    Test(test::Args),
    /// Run the tests with the proxy's published client
    Peers,
    /// Run the end-to-end tests behind the real proxy, building it if necessary
    E2e(e2e::Args),
    /// Measure the agent's cost relative to an agent that does nothing
    Bench(bench::Args),
    /// Measure how long requests fail after a crash of the agent, with the samples for the proxy
    Crash(crash::Args),
    /// Measure what restarts and upgrades of the agent cost its clients, behind the real proxy
    Restart(restart::Args),
    /// Build, test and measure the example policies in every language
    Guests(guests::Args),
    /// Build release archives and their checksums into target/dist
    Dist(dist::Args),
    /// Fuzz the agent's parsers and its core
    Fuzz(fuzz::Args),
    /// Send a million requests to good, leaking, looping and panicking modules, with reloads
    Soak(soak::Args),
    /// Check formatting, clippy, the other targets, documentation and dependencies
    Lint(lint::Args),
    /// Do what continuous integration does: run all tests, then lint
    Ci,
}

fn main() -> ExitCode {
    let done = match Cli::parse().task {
        Task::Demo(args) => demo::run(&args),
        Task::Test(args) => test::run(&args),
        Task::Peers => test::published_client(),
        Task::E2e(args) => e2e::run(&args),
        Task::Bench(args) => bench::run(&args),
        Task::Crash(args) => crash::run(&args),
        Task::Restart(args) => restart::run(&args),
        Task::Guests(args) => guests::run(&args),
        Task::Dist(args) => dist::run(&args),
        Task::Fuzz(args) => fuzz::fuzz(&args),
        Task::Soak(args) => soak::run(&args),
        Task::Lint(args) => lint::run(&args),
        Task::Ci => test::run(&test::Args::default()).and_then(|()| lint::run(&lint::Args::default())),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
