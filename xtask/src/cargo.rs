//! Builds with cargo, and takes the paths of the results from its messages.

use crate::tools::{output, root, rust_target};
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The cargo that runs this program, so a selected toolchain is kept.
pub(crate) fn command() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root());
    cargo
}

/// Builds the agent and returns the binary's path.
pub(crate) fn agent(release: bool) -> Result<PathBuf> {
    let mut build = command();
    build.args(["build", "--locked", "--bin", "zentinel-wasm-agent"]);
    if release {
        build.arg("--release");
    }
    artifact(&mut build, |file| file.file_stem() == Some("zentinel-wasm-agent".as_ref()))
}

/// Builds the guest crate in `dir` (relative to the root) for wasm32-unknown-unknown and returns
/// the module's path.
pub(crate) fn guest(dir: &str) -> Result<PathBuf> {
    rust_target("wasm32-unknown-unknown")?;
    let manifest = root().join(dir).join("Cargo.toml");
    let mut build = command();
    build
        .args(["build", "--locked", "--release", "--lib"])
        .args(["--target", "wasm32-unknown-unknown", "--manifest-path"])
        .arg(&manifest)
        // Guests share one folder, so their dependencies are compiled once. Flags for the host,
        // such as sanitizers and linkers, do not apply to guests.
        .env("CARGO_TARGET_DIR", root().join("target/guests"))
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        // Guests are tested as users build them, without settings that make the agent build faster.
        .env_remove("CARGO_PROFILE_RELEASE_LTO")
        .env_remove("CARGO_PROFILE_RELEASE_CODEGEN_UNITS");
    artifact(&mut build, |file| file.extension() == Some("wasm".as_ref())).with_context(|| format!("building the guest in {dir}"))
}

/// Runs a `cargo build` and returns the last file it produced for which `wanted` is true.
fn artifact(build: &mut Command, wanted: impl Fn(&Path) -> bool) -> Result<PathBuf> {
    let messages = output(build.arg("--message-format=json-render-diagnostics"))?;
    let files = messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["reason"] == "compiler-artifact")
        .flat_map(|message| match message["filenames"].as_array() {
            Some(files) => files.clone(),
            None => Vec::new(),
        })
        .filter_map(|file| file.as_str().map(PathBuf::from));
    match files.filter(|file| wanted(file)).last() {
        Some(file) => Ok(file),
        None => bail!("{} did not produce the expected file", crate::tools::show(build)),
    }
}

/// The manifests of the nested workspaces in these folders, which the root manifest's `exclude`
/// lists.
pub(crate) fn nested_workspaces(under: &[&str]) -> Result<Vec<PathBuf>> {
    /// Levels of subfolders to search.
    const DEPTH: usize = 2;
    let mut found = Vec::new();
    for dir in under {
        collect_workspaces(&root().join(dir), DEPTH, &mut found)?;
    }
    found.sort();
    Ok(found)
}

fn collect_workspaces(dir: &Path, depth: usize, found: &mut Vec<PathBuf>) -> Result<()> {
    if !dir.is_dir() {
        return Ok(());
    }
    let manifest = dir.join("Cargo.toml");
    if manifest.is_file() {
        let text = std::fs::read_to_string(&manifest).with_context(|| format!("reading {}", manifest.display()))?;
        if text.lines().any(|line| line.trim().starts_with("[workspace]")) {
            found.push(manifest);
            return Ok(());
        }
    }
    if depth == 0 {
        return Ok(());
    }
    for entry in std::fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default();
        if path.is_dir() && name != "target" && name != "node_modules" {
            collect_workspaces(&path, depth - 1, found)?;
        }
    }
    Ok(())
}
