//! Paths, child processes, and the installation of missing tools.

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The repository's root.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the manifest is in the folder `xtask`")
}

/// The cache for what takes long to build, shared by all clones:
/// `${XDG_CACHE_HOME:-~/.cache}/zentinel-agent-wasm`.
pub(crate) fn cache() -> Result<PathBuf> {
    let base = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .or_else(|| std::env::home_dir().map(|home| home.join(".cache")))
        .context("no cache directory: set `HOME` or `XDG_CACHE_HOME`")?;
    Ok(base.join("zentinel-agent-wasm"))
}

/// Finds a program on `PATH`.
pub(crate) fn on_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|file| file.is_file())
}

/// Runs a command to completion; if it fails, the error names it.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.stdin(Stdio::null()).status().with_context(|| format!("cannot start {}", show(command)))?;
    if !status.success() {
        bail!("{} failed: {status}", show(command));
    }
    Ok(())
}

/// Runs a command and returns its standard output; if it fails, the error names it.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output =
        command.stdin(Stdio::null()).stderr(Stdio::inherit()).output().with_context(|| format!("cannot start {}", show(command)))?;
    if !output.status.success() {
        bail!("{} failed: {}", show(command), output.status);
    }
    String::from_utf8(output.stdout).with_context(|| format!("{} printed invalid UTF-8", show(command)))
}

/// The files that git tracks and that match one of the `patterns`, relative to the root.
pub(crate) fn tracked(patterns: &[&str]) -> Result<Vec<PathBuf>> {
    let files = output(Command::new("git").current_dir(root()).args(["ls-files", "-z", "--"]).args(patterns))?;
    Ok(files.split_terminator('\0').map(PathBuf::from).collect())
}

/// The command as a user would type it.
pub(crate) fn show(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let name = program.file_name().unwrap_or(program.as_os_str());
    let words = std::iter::once(name).chain(command.get_args());
    let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
    format!("`{}`", words.join(" "))
}

/// Reports progress on stderr, as cargo does.
pub(crate) fn announce(what: &str) {
    eprintln!("==> {what}");
}

/// Ensures that rustc can compile for `target`, if necessary by installing the target with rustup.
pub(crate) fn rust_target(target: &str) -> Result<()> {
    let has_target = |rustc: &mut Command| -> Result<bool> {
        let dir = output(rustc.args(["--print", "target-libdir", "--target", target]))?;
        Ok(Path::new(dir.trim()).is_dir())
    };
    if has_target(&mut Command::new("rustc"))? {
        return Ok(());
    }
    if on_path("rustup").is_none() {
        bail!(
            "the Rust target `{target}` and `rustup` are not installed: \
             install rustup from https://rustup.rs, or your distribution's package for this target"
        );
    }
    announce(&format!("rustup target add {target}"));
    run(Command::new("rustup").args(["target", "add", target]))
}

/// Installs Debian packages if running as root on Debian. Otherwise fails with an error that
/// describes what is `missing` and how to install it.
pub(crate) fn install_debian(missing: &str, packages: &[&str]) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    let list = packages.join(" ");
    let is_root = output(Command::new("id").arg("-u"))?.trim() == "0";
    if !is_root || on_path("apt-get").is_none() {
        bail!("{missing}: run `apt-get install {list}`, or install your system's equivalents");
    }
    announce(&format!("apt-get install {list}"));
    run(Command::new("apt-get").args(["update", "-qq"]))?;
    let mut install = Command::new("apt-get");
    install.args(["install", "-qq", "-y", "--no-install-recommends"]).args(packages);
    run(install.env("DEBIAN_FRONTEND", "noninteractive"))
}
