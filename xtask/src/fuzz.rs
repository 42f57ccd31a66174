//! `cargo xtask fuzz`: fuzzes the agent's parsers, and its core through generated modules.

use crate::cargo;
use crate::tools::{announce, cache, on_path, root, run};
use anyhow::{Result, bail};
use std::path::PathBuf;

/// The fuzz targets in `fuzz/Cargo.toml`.
const TARGETS: [&str; 5] = ["frames", "messages", "answers", "headers", CORE];

/// The target that runs the whole core. The others are built without the Wasm compiler, in a
/// fraction of the time.
const CORE: &str = "modules";

/// Bytes of the longest input. Short inputs find the same bugs, and run faster.
const MAX_LEN: usize = 4096;

/// Seconds after which an input counts as hung. The slowest valid inputs are generated modules with
/// a looping start function, which take 1 to 2 s.
const TIMEOUT_SECS: u64 = 20;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Seconds per target
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
        // Interesting inputs are kept for the next run. They are not committed.
        let corpus = root().join("fuzz/corpus").join(target);
        std::fs::create_dir_all(&corpus)?;
        let mut command = cargo::command();
        command
            .env("PATH", with_tools(&program))
            // Sanitizers need a nightly feature; this enables it in the stable compiler.
            .env("RUSTC_BOOTSTRAP", "1")
            .args(["fuzz", "run", "--fuzz-dir", "fuzz"])
            .args(if target == CORE { &["--features", "core"][..] } else { &[] })
            .arg(target)
            .arg(&corpus)
            .arg(&seeds)
            .arg("--")
            .arg(format!("-max_total_time={}", args.seconds))
            .arg(format!("-max_len={MAX_LEN}"))
            .arg(format!("-timeout={TIMEOUT_SECS}"))
            .args(["-rss_limit_mb=4096", "-print_final_stats=1", "-print_funcs=0", "-verbosity=0"])
            // While a thread runs a guest on the guest's stack, the sanitizer does not see the
            // thread's stack and reports what only that stack refers to as leaked.
            .args(if target == CORE { &["-detect_leaks=0"][..] } else { &[] });
        announce(&crate::tools::show(&command));
        if run(&mut command).is_err() {
            broken.push(target);
        }
    }
    if !broken.is_empty() {
        bail!("{} failed: the inputs are in fuzz/artifacts", broken.join(", "));
    }
    Ok(())
}

/// `PATH` with the folder of cargo-fuzz, so `cargo fuzz` finds it.
fn with_tools(program: &std::path::Path) -> std::ffi::OsString {
    let mut folders: Vec<_> = program.parent().map(PathBuf::from).into_iter().collect();
    if let Some(path) = std::env::var_os("PATH") {
        folders.extend(std::env::split_paths(&path));
    }
    std::env::join_paths(folders).unwrap_or_default()
}

/// The path of cargo-fuzz, from the cache or PATH; installs it into the cache if it is missing.
fn cargo_fuzz() -> Result<PathBuf> {
    let home = cache()?.join("tools");
    let cached = home.join("bin/cargo-fuzz");
    if cached.is_file() {
        return Ok(cached);
    }
    if let Some(installed) = on_path("cargo-fuzz") {
        return Ok(installed);
    }
    announce("installing cargo-fuzz (takes minutes, once)");
    let target = home.join("target");
    run(cargo::command()
        .args(["install", "--locked", "cargo-fuzz", "--root"])
        .arg(&home)
        .env("CARGO_TARGET_DIR", &target)
        // It only starts other programs, so fast code does not matter.
        .env("CARGO_PROFILE_RELEASE_LTO", "off")
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1"))?;
    std::fs::remove_dir_all(target)?;
    Ok(cached)
}
