//! `cargo xtask lint`: what a reviewer should not have to say.

use crate::tools::{cache, on_path, say};
use crate::{cargo, circles, peers, prose, target, tools};
use anyhow::Result;
use std::path::PathBuf;
use std::process::Command;

/// Workspaces beside the root's; fuzzing is not among them, for its targets are part of the root's `tests/fuzz_seeds.rs`.
const NESTED: [&str; 3] = ["sdk", "examples", "fixtures"];

#[derive(clap::Args, Default)]
pub(crate) struct Args {
    /// Check only that comments and Markdown are at most 100 columns wide
    #[arg(long)]
    prose: bool,
    /// Check only that no files of a crate import each other in a circle
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
    say(&tools::show(command));
    tools::run(command)
}

/// Adds what every run of clippy is asked.
fn clippy(command: &mut Command) -> &mut Command {
    command.args(["--workspace", "--all-targets", "--", "-D", "warnings"])
}

/// Licences, sources and duplicate crates of what is shipped; known vulnerabilities where their database can be had.
fn deny() -> Result<()> {
    let program = cargo_deny()?;
    let deny = |manifest: &str, checks: &[&str]| {
        let mut command = Command::new(&program);
        command.current_dir(tools::root()).args(["--locked", "--manifest-path", manifest, "--config", "deny.toml"]);
        command.args(["check", "--hide-inclusion-graph"]).args(checks);
        command
    };
    // What is skipped for the agent the SDK does not have.
    let sdk = |checks: &[&str]| deny("sdk/rust/Cargo.toml", &[&["--allow", "unmatched-skip"], checks].concat());
    step(&mut deny("Cargo.toml", &["bans", "licenses", "sources"]))?;
    step(&mut sdk(&["bans", "licenses", "sources"]))?;
    // The database is a git repository. Without a way to it the other checks still stand, so its
    // absence is said and not a failure; an advisory that it holds is one.
    let fetch = Command::new(&program).current_dir(tools::root()).args(["fetch", "db"]).env("GIT_TERMINAL_PROMPT", "0").output()?;
    if fetch.status.success() {
        step(&mut deny("Cargo.toml", &["advisories"]))?;
        return step(&mut sdk(&["advisories"]));
    }
    println!("advisories not checked: the advisory database cannot be fetched from here");
    Ok(())
}

/// cargo-deny on PATH or in the cache; installed into the cache when it is missing.
fn cargo_deny() -> Result<PathBuf> {
    let home = cache()?.join("tools");
    let cached = home.join("bin/cargo-deny");
    if cached.is_file() {
        return Ok(cached);
    }
    if let Some(installed) = on_path("cargo-deny") {
        return Ok(installed);
    }
    say("installing cargo-deny (minutes, once)");
    let target = home.join("target");
    tools::run(
        cargo::command()
            .args(["install", "--locked", "cargo-deny", "--root"])
            .arg(&home)
            .env("CARGO_TARGET_DIR", &target)
            // It runs for seconds: building it fast counts for more than building it well.
            .env("CARGO_PROFILE_RELEASE_LTO", "off")
            .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16")
            .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1"),
    )?;
    std::fs::remove_dir_all(target)?;
    Ok(cached)
}
