//! `cargo xtask lint`: the checks that need no reviewer.

use crate::tools::{announce, cache, on_path};
use crate::{cargo, circles, peers, prose, target, tools};
use anyhow::Result;
use std::path::PathBuf;
use std::process::Command;

/// Folders with nested workspaces. `fuzz` is not one of them, because the root's
/// `tests/fuzz_seeds.rs` includes its sources.
const NESTED: [&str; 3] = ["sdk", "examples", "fixtures"];

#[derive(clap::Args, Default)]
pub(crate) struct Args {
    /// Only check that comments and Markdown are at most 100 columns wide
    #[arg(long)]
    prose: bool,
    /// Only check that no files of a crate import each other in a circle
    #[arg(long)]
    circles: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if args.circles {
        circles::check()?;
    }
    if args.prose {
        prose::check()?;
    }
    if args.circles || args.prose {
        return Ok(());
    }
    run_all()
}

fn run_all() -> Result<()> {
    circles::check()?;
    prose::check()?;
    let nested = cargo::nested_workspaces(&NESTED)?;
    let others = cargo::nested_workspaces(&["peers"])?;
    for manifest in [tools::root().join("Cargo.toml")].iter().chain(&nested).chain(&others) {
        step(cargo::command().args(["fmt", "--all", "--check", "--manifest-path"]).arg(manifest))?;
    }
    let mut root = cargo::command();
    root.args(["clippy", "--locked"]);
    step(clippy(&mut root))?;
    for manifest in &nested {
        let mut nested = cargo::command();
        nested.args(["clippy", "--locked", "--manifest-path"]).arg(manifest);
        step(clippy(nested.env("CARGO_TARGET_DIR", tools::root().join("target/nested"))))?;
    }
    step(clippy(peers::cargo("clippy")?.arg("--all-features")))?;
    target::check_others()?;
    step(cargo::command().args(["doc", "--locked", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings"))?;
    deny()
}

fn step(command: &mut Command) -> Result<()> {
    announce(&tools::show(command));
    tools::run(command)
}

/// Adds the arguments of every run of clippy.
fn clippy(command: &mut Command) -> &mut Command {
    command.args(["--workspace", "--all-targets", "--", "-D", "warnings"])
}

/// Checks the licences, sources and duplicates of shipped dependencies. Known vulnerabilities are
/// checked too if the advisory database can be fetched.
fn deny() -> Result<()> {
    let program = cargo_deny()?;
    let deny = |manifest: &str, checks: &[&str]| {
        let mut command = Command::new(&program);
        command.current_dir(tools::root()).args(["--locked", "--manifest-path", manifest, "--config", "deny.toml"]);
        command.args(["check", "--hide-inclusion-graph"]).args(checks);
        command
    };
    // The SDK does not have the crates that are skipped for the agent.
    let sdk = |checks: &[&str]| deny("sdk/rust/Cargo.toml", &[&["--allow", "unmatched-skip"], checks].concat());
    step(&mut deny("Cargo.toml", &["bans", "licenses", "sources"]))?;
    step(&mut sdk(&["bans", "licenses", "sources"]))?;
    // The database is a git repository. Without network the other checks are still useful, so a
    // failed fetch is reported and not an error.
    let fetch = Command::new(&program).current_dir(tools::root()).args(["fetch", "db"]).env("GIT_TERMINAL_PROMPT", "0").output()?;
    if fetch.status.success() {
        step(&mut deny("Cargo.toml", &["advisories"]))?;
        return step(&mut sdk(&["advisories"]));
    }
    println!("advisories not checked: cannot fetch the advisory database");
    Ok(())
}

/// The path of cargo-deny, from the cache or PATH; installs it into the cache if it is missing.
fn cargo_deny() -> Result<PathBuf> {
    let home = cache()?.join("tools");
    let cached = home.join("bin/cargo-deny");
    if cached.is_file() {
        return Ok(cached);
    }
    if let Some(installed) = on_path("cargo-deny") {
        return Ok(installed);
    }
    announce("installing cargo-deny (takes minutes, once)");
    let target = home.join("target");
    tools::run(
        cargo::command()
            .args(["install", "--locked", "cargo-deny", "--root"])
            .arg(&home)
            .env("CARGO_TARGET_DIR", &target)
            // It runs for seconds, so a short build matters more than fast code.
            .env("CARGO_PROFILE_RELEASE_LTO", "off")
            .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16")
            .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1"),
    )?;
    std::fs::remove_dir_all(target)?;
    Ok(cached)
}
