//! The targets that releases are built for, and how this machine compiles for each of them.

use crate::pypi::FromPypi;
use crate::tools::{install_debian, on_path, output, run, rust_target};
use crate::{cargo, tools};
use anyhow::{Context, Result};
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Runs programs for Linux on aarch64 on another processor.
const QEMU: &str = "qemu-aarch64-static";

/// A target with a release archive of its own.
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
        let told = output(Command::new("rustc").arg("-vV"))?;
        let host = told.lines().find_map(|line| line.strip_prefix("host: ")).context("`rustc -vV` names no host")?;
        let target = Self::ALL.into_iter().find(|target| target.triple() == host);
        target.with_context(|| format!("no releases are built for `{host}`: `cargo build --release` makes the binary alone"))
    }

    /// Rust's name of it.
    pub(crate) fn triple(self) -> &'static str {
        match self {
            Self::LinuxX86_64 => "x86_64-unknown-linux-gnu",
            Self::LinuxAarch64 => "aarch64-unknown-linux-gnu",
            Self::DarwinAarch64 => "aarch64-apple-darwin",
        }
    }

    /// The proxy's installer's name of it.
    pub(crate) fn platform(self) -> &'static str {
        match self {
            Self::LinuxX86_64 => "linux-x86_64",
            Self::LinuxAarch64 => "linux-aarch64",
            Self::DarwinAarch64 => "darwin-aarch64",
        }
    }

    /// `cargo SUBCOMMAND --target …`, with all that it needs to compile for this target.
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
                    // It looks for its Zig there.
                    cargo.current_dir(tools::root()).env("PATH", path_with(&programs)?);
                    zigbuild = true;
                }
            }
        }
        // Zig's cargo calls `build` by its own name.
        cargo.arg(if zigbuild && subcommand == "build" { "zigbuild" } else { subcommand });
        cargo.args(["--target", self.triple()]);
        Ok(cargo)
    }

    /// What starts `binary` here: itself, or a script in `dir` that has an emulator run it. None where this machine has neither.
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

    /// Why [`Self::runner`] has none, and what would change that.
    pub(crate) fn cannot_run(self) -> String {
        let remedy = match self {
            Self::LinuxAarch64 => format!("`apt-get install qemu-user-static` brings `{QEMU}`, which runs them"),
            Self::LinuxX86_64 | Self::DarwinAarch64 => "run this on a machine of that kind".to_owned(),
        };
        format!("programs for `{}` do not run here: {remedy}", self.triple())
    }
}

/// Has `cargo` compile and link with Debian's `gcc` for the target, which `packages` bring.
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

/// Compiles the agent, without making a binary, for the targets that this machine cannot run.
pub(crate) fn check_others() -> Result<()> {
    let host = Target::host()?;
    for target in Target::ALL.into_iter().filter(|target| *target != host) {
        let mut check = target.cargo("check")?;
        check.args(["--locked", "--bin", "zentinel-wasm-agent"]);
        tools::say(&tools::show(&check));
        run(&mut check)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::ValueEnum as _;

    #[test]
    fn a_target_is_chosen_by_the_name_that_rust_has_for_it() {
        for target in Target::ALL {
            assert_eq!(Target::from_str(target.triple(), false), Ok(target));
        }
    }
}
