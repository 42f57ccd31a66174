//! `cargo xtask fuzz`: hands the agent's readers, and the agent's core through modules, whatever a fuzzer can think of.

use crate::cargo;
use crate::tools::{cache, on_path, root, run, say};
use anyhow::{Result, bail};
use std::path::PathBuf;

/// The fuzz targets, as `fuzz/Cargo.toml` has them.
const TARGETS: [&str; 5] = ["frames", "messages", "answers", "headers", CORE];

/// The target that runs the whole core; the others are built without a compiler, in a fraction of the time.
const CORE: &str = "modules";

/// Longest input, in bytes. What goes wrong goes wrong with short ones, and they are tried faster.
const MAX_LEN: usize = 4096;

/// Seconds after which an input counts as stuck. The slowest that are right, generated modules, take one or two when their start function loops.
const STUCK: u64 = 20;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Seconds for each target
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Only this target
    #[arg(long, value_parser = clap::builder::PossibleValuesParser::new(TARGETS))]
    target: Option<String>,
}

pub(crate) fn fuzz(args: &Args) -> Result<()> {
    let program = cargo_fuzz()?;
    let wanted = |target: &&str| args.target.as_deref().is_none_or(|only| only == *target);
    let mut broken = Vec::new();
    for target in TARGETS.into_iter().filter(|target| wanted(target)) {
        let seeds = root().join("fuzz/seeds").join(target);
        // What is found on the way is kept for the next run, and is not committed.
        let corpus = root().join("fuzz/corpus").join(target);
        std::fs::create_dir_all(&corpus)?;
        let mut command = cargo::command();
        command
            .env("PATH", with_tools(&program))
            // Sanitizers are not stable; the compiler is.
            .env("RUSTC_BOOTSTRAP", "1")
            .args(["fuzz", "run", "--fuzz-dir", "fuzz"])
            .args(if target == CORE { &["--features", "core"][..] } else { &[] })
            .arg(target)
            .arg(&corpus)
            .arg(&seeds)
            .arg("--")
            .arg(format!("-max_total_time={}", args.seconds))
            .arg(format!("-max_len={MAX_LEN}"))
            .arg(format!("-timeout={STUCK}"))
            .args(["-rss_limit_mb=4096", "-print_final_stats=1", "-print_funcs=0", "-verbosity=0"])
            // While a thread runs a guest, on a stack of the guest's own, the sanitizer takes what only the thread's stack points to for leaked.
            .args(if target == CORE { &["-detect_leaks=0"][..] } else { &[] });
        say(&crate::tools::show(&command));
        if run(&mut command).is_err() {
            broken.push(target);
        }
    }
    if !broken.is_empty() {
        bail!("found something in {}: the input lies in fuzz/artifacts", broken.join(", "));
    }
    Ok(())
}

/// `PATH` with cargo-fuzz on it, for `cargo fuzz` to find.
fn with_tools(program: &std::path::Path) -> std::ffi::OsString {
    let mut folders: Vec<_> = program.parent().map(PathBuf::from).into_iter().collect();
    if let Some(path) = std::env::var_os("PATH") {
        folders.extend(std::env::split_paths(&path));
    }
    std::env::join_paths(folders).unwrap_or_default()
}

/// cargo-fuzz on PATH or in the cache; installed into the cache when it is missing.
fn cargo_fuzz() -> Result<PathBuf> {
    let home = cache()?.join("tools");
    let cached = home.join("bin/cargo-fuzz");
    if cached.is_file() {
        return Ok(cached);
    }
    if let Some(installed) = on_path("cargo-fuzz") {
        return Ok(installed);
    }
    say("installing cargo-fuzz (minutes, once)");
    let target = home.join("target");
    run(cargo::command()
        .args(["install", "--locked", "cargo-fuzz", "--root"])
        .arg(&home)
        .env("CARGO_TARGET_DIR", &target)
        // It only starts others.
        .env("CARGO_PROFILE_RELEASE_LTO", "off")
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1"))?;
    std::fs::remove_dir_all(target)?;
    Ok(cached)
}
