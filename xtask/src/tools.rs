//! Where things are, and what to do when a tool is missing.

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The repository's root.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the repository's root")
}

/// Where slow-to-make things outlive a clone: `${XDG_CACHE_HOME:-~/.cache}/zentinel-agent-wasm`.
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

/// Runs a command to its end; its failure is an error that names it.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.stdin(Stdio::null()).status().with_context(|| format!("cannot start {}", show(command)))?;
    if !status.success() {
        bail!("{} failed: {status}", show(command));
    }
    Ok(())
}

/// Runs a command and returns what it printed; its failure is an error that names it.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output =
        command.stdin(Stdio::null()).stderr(Stdio::inherit()).output().with_context(|| format!("cannot start {}", show(command)))?;
    if !output.status.success() {
        bail!("{} failed: {}", show(command), output.status);
    }
    String::from_utf8(output.stdout).with_context(|| format!("{} printed no text", show(command)))
}

/// The files that git tracks and that match one of the `patterns`, relative to the root.
pub(crate) fn tracked(patterns: &[&str]) -> Result<Vec<PathBuf>> {
    let files = output(Command::new("git").current_dir(root()).args(["ls-files", "-z", "--"]).args(patterns))?;
    Ok(files.split_terminator('\0').map(PathBuf::from).collect())
}

/// The command as one would type it.
pub(crate) fn show(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let name = program.file_name().unwrap_or(program.as_os_str());
    let words = std::iter::once(name).chain(command.get_args());
    let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
    format!("`{}`", words.join(" "))
}

/// Says on stderr what is being done, as cargo does.
pub(crate) fn say(what: &str) {
    eprintln!("==> {what}");
}

/// Makes sure that rustc can compile for `target`; rustup installs what is missing.
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
            "the Rust target `{target}` is missing and there is no `rustup`: \
             install rustup from https://rustup.rs, or your distribution's package for this target"
        );
    }
    say(&format!("rustup target add {target}"));
    run(Command::new("rustup").args(["target", "add", target]))
}

/// Installs Debian packages where we may; elsewhere the error says what is `missing` and how to get it.
pub(crate) fn install_debian(missing: &str, packages: &[&str]) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    let list = packages.join(" ");
    let is_root = output(Command::new("id").arg("-u"))?.trim() == "0";
    if !is_root || on_path("apt-get").is_none() {
        bail!("{missing}: `apt-get install {list}`, or your system's packages of these");
    }
    say(&format!("apt-get install {list}"));
    run(Command::new("apt-get").args(["update", "-qq"]))?;
    let mut install = Command::new("apt-get");
    install.args(["install", "-qq", "-y", "--no-install-recommends"]).args(packages);
    run(install.env("DEBIAN_FRONTEND", "noninteractive"))
}
