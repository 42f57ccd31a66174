//! The targets of releases, and how to compile for each of them.

use crate::pypi::FromPypi;
use crate::tools::{install_debian, on_path, output, run, rust_target};
use crate::{cargo, tools};
use anyhow::{Context, Result};
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The emulator that runs programs for Linux on aarch64.
const QEMU: &str = "qemu-aarch64-static";

/// A target that releases are built for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Target {
    #[value(name = "x86_64-unknown-linux-gnu")]
    LinuxX86_64,
    #[value(name = "aarch64-unknown-linux-gnu")]
    LinuxAarch64,
    #[value(name = "aarch64-apple-darwin")]
    DarwinAarch64,
}

impl Target {
    pub(crate) const ALL: [Self; 3] = [Self::LinuxX86_64, Self::LinuxAarch64, Self::DarwinAarch64];

    /// The target that rustc compiles for by default.
    pub(crate) fn host() -> Result<Self> {
        let printed = output(Command::new("rustc").arg("-vV"))?;
        let host = printed.lines().find_map(|line| line.strip_prefix("host: ")).context("`rustc -vV` names no host")?;
        let target = Self::ALL.into_iter().find(|target| target.triple() == host);
        target.with_context(|| format!("no releases are built for `{host}`: run `cargo build --release` for the binary alone"))
    }

    /// Rust's name for it.
    pub(crate) fn triple(self) -> &'static str {
        match self {
            Self::LinuxX86_64 => "x86_64-unknown-linux-gnu",
            Self::LinuxAarch64 => "aarch64-unknown-linux-gnu",
            Self::DarwinAarch64 => "aarch64-apple-darwin",
        }
    }

    /// The name that the proxy's installer uses for it.
    pub(crate) fn platform(self) -> &'static str {
        match self {
            Self::LinuxX86_64 => "linux-x86_64",
            Self::LinuxAarch64 => "linux-aarch64",
            Self::DarwinAarch64 => "darwin-aarch64",
        }
    }

    /// `cargo SUBCOMMAND --target …`, set up to compile for this target.
    pub(crate) fn cargo(self, subcommand: &str) -> Result<Command> {
        let mut cargo = cargo::command();
        let mut zigbuild = false;
        if self != Self::host()? {
            rust_target(self.triple())?;
            match self {
                // gcc links glibc statically, which Zig does not.
                Self::LinuxX86_64 => {
                    cross_gcc(&mut cargo, self, "x86_64-linux-gnu-gcc", ["gcc-x86-64-linux-gnu", "libc6-dev-amd64-cross"])?
                }
                Self::LinuxAarch64 => {
                    cross_gcc(&mut cargo, self, "aarch64-linux-gnu-gcc", ["gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross"])?
                }
                Self::DarwinAarch64 => {
                    let programs = FromPypi::CargoZigbuild.install()?;
                    cargo = Command::new(programs.join("cargo-zigbuild"));
                    // It looks up its Zig in PATH.
                    cargo.current_dir(tools::root()).env("PATH", path_with(&programs)?);
                    zigbuild = true;
                }
            }
        }
        // cargo-zigbuild has its own name for `build`.
        cargo.arg(if zigbuild && subcommand == "build" { "zigbuild" } else { subcommand });
        cargo.args(["--target", self.triple()]);
        Ok(cargo)
    }

    /// The program that runs `binary` on this machine: itself, or a script in `dir` that starts an
    /// emulator. `None` if this machine cannot run it.
    pub(crate) fn runner(self, binary: &Path, dir: &Path) -> Result<Option<PathBuf>> {
        if self == Self::host()? {
            return Ok(Some(binary.to_owned()));
        }
        if self != Self::LinuxAarch64 {
            return Ok(None);
        }
        let Some(qemu) = on_path(QEMU) else { return Ok(None) };
        let script = dir.join(format!("run-{}", self.platform()));
        let quoted = |path: &Path| format!("'{}'", path.display().to_string().replace('\'', r"'\''"));
        fs::write(&script, format!("#!/bin/sh\nexec {} {} \"$@\"\n", quoted(&qemu), quoted(binary)))?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
        Ok(Some(script))
    }

    /// Why [`Self::runner`] returned `None`, and what to do.
    pub(crate) fn cannot_run(self) -> String {
        let remedy = match self {
            Self::LinuxAarch64 => format!("run `apt-get install qemu-user-static`, which contains `{QEMU}`"),
            Self::LinuxX86_64 | Self::DarwinAarch64 => "use a machine of that kind".to_owned(),
        };
        format!("cannot run programs for `{}` on this machine: {remedy}", self.triple())
    }
}

/// Makes `cargo` compile and link with Debian's `gcc` for the target, and installs `packages` if it
/// is missing.
fn cross_gcc(cargo: &mut Command, target: Target, gcc: &str, packages: [&str; 2]) -> Result<()> {
    if on_path(gcc).is_none() {
        install_debian(&format!("`{gcc}` is missing"), &packages)?;
    }
    let name = target.triple().replace('-', "_");
    cargo.env(format!("CARGO_TARGET_{}_LINKER", name.to_uppercase()), gcc).env(format!("CC_{name}"), gcc);
    Ok(())
}

/// This process's `PATH` with `first` before it.
fn path_with(first: &Path) -> Result<OsString> {
    let rest = std::env::var_os("PATH").unwrap_or_default();
    Ok(std::env::join_paths(std::iter::once(first.to_owned()).chain(std::env::split_paths(&rest)))?)
}

/// Checks that the agent compiles for the targets other than this machine's.
pub(crate) fn check_others() -> Result<()> {
    let host = Target::host()?;
    for target in Target::ALL.into_iter().filter(|target| *target != host) {
        let mut check = target.cargo("check")?;
        check.args(["--locked", "--bin", "zentinel-wasm-agent"]);
        tools::announce(&tools::show(&check));
        run(&mut check)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::ValueEnum as _;

    #[test]
    fn is_selected_by_its_triple() {
        for target in Target::ALL {
            assert_eq!(Target::from_str(target.triple(), false), Ok(target));
        }
    }
}
