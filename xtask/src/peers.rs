//! The workspace in `peers/`: the programs that the agent is measured against, and the proxy's
//! published client. The published protocol crate needs `protoc` to generate code, so this uses one
//! from crates.io.

use crate::cargo;
use crate::tools::{output, root, run};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::process::Command;

/// `cargo <subcommand>` in `peers/`, with the path of a `protoc` in the environment.
pub(crate) fn cargo(subcommand: &str) -> Result<Command> {
    let protoc = match std::env::var_os("PROTOC") {
        Some(own) => PathBuf::from(own),
        None => {
            protoc_bin_vendored::protoc_bin_path().context("crates.io has no `protoc` for this system: install one and set `PROTOC`")?
        }
    };
    let mut command = cargo::command();
    command.args([subcommand, "--locked", "--manifest-path"]).arg(root().join("peers/Cargo.toml")).env("PROTOC", protoc);
    Ok(command)
}

/// The programs for measurements, built in release mode.
pub(crate) struct Programs {
    pub(crate) noop_agent: PathBuf,
    pub(crate) echo: PathBuf,
    pub(crate) loadgen: PathBuf,
}

/// Builds the no-op agent, the echo agent and the load generator.
pub(crate) fn programs() -> Result<Programs> {
    let mut build = cargo("build")?;
    build.args(["--release", "-p", "noop-agent", "-p", "echo", "-p", "loadgen", "--features", "noop-agent/binary-uds"]);
    run(&mut build)?;
    let release = target_dir()?.join("release");
    Ok(Programs { noop_agent: release.join("noop-agent"), echo: release.join("echo"), loadgen: release.join("loadgen") })
}

/// The target directory of `peers/`, which the user's configuration may change.
fn target_dir() -> Result<PathBuf> {
    let metadata = output(cargo("metadata")?.args(["--format-version=1", "--no-deps"]))?;
    let metadata: serde_json::Value = serde_json::from_str(&metadata).context("reading what `cargo metadata` printed")?;
    let dir = metadata["target_directory"].as_str().context("`cargo metadata` names no target directory")?;
    Ok(PathBuf::from(dir))
}

/// Runs the load generator's tests, and those of the published client with the built `agent`, once
/// for each encoding of the socket.
pub(crate) fn test_published_client(agent: &Path, security: &Path, bot_protection: &Path) -> Result<()> {
    for features in [None, Some("binary-uds")] {
        let mut test = cargo("test")?;
        test.args(["--no-fail-fast", "-p", "published-client"]);
        match features {
            Some(features) => test.args(["--features", features]),
            None => test.args(["-p", "loadgen"]),
        };
        test.env("ZENTINEL_WASM_AGENT", agent).env("ZENTINEL_WASM_SECURITY", security).env("ZENTINEL_WASM_BOT", bot_protection);
        run(&mut test)?;
    }
    Ok(())
}
