//! Compilers for the guests, from Debian and npm. What npm installs is kept in the cache.

use crate::tools::{self, announce, cache, install_debian, on_path, output, run};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Debian's packages of the C and C++ compilers for Wasm, their libraries and the linker. `libc++`
/// depends on `libc++abi`, whose package has a version in its name.
const DEBIAN: [&str; 5] = ["clang", "lld", "wasi-libc", "libclang-rt-dev-wasm32", "libc++-dev-wasm32"];

/// The C and C++ compilers.
pub(super) struct Clang {
    pub(super) c: String,
    pub(super) cpp: String,
}

impl Clang {
    pub(super) fn install() -> Result<Self> {
        if let Some(clang) = Self::find() {
            return Ok(clang);
        }
        install_debian("cannot find clang for Wasm", &DEBIAN)?;
        Self::find().context("cannot find clang for Wasm after its installation")
    }

    /// Finds the compilers, whose names contain a version on some Debian releases.
    fn find() -> Option<Self> {
        ["", "-14", "-16", "-19"].iter().find_map(|version| {
            let clang = Self { c: format!("clang{version}"), cpp: format!("clang++{version}") };
            (on_path(&clang.c).is_some() && on_path(&clang.cpp).is_some() && clang.links()).then_some(clang)
        })
    }

    /// Whether the linker and the libraries are installed too.
    fn links(&self) -> bool {
        let probe = |compiler: &str, language: &str, include: &str| {
            let program = format!("#include <{include}>\nint main() {{ return 0; }}");
            let arguments = format!(
                "printf '%s' \"$0\" | {compiler} --target=wasm32-wasi -mexec-model=reactor -fno-exceptions -x {language} -o /dev/null - 2>/dev/null"
            );
            Command::new("sh").args(["-c", &arguments, &program]).status().is_ok_and(|status| status.success())
        };
        probe(&self.c, "c", "stdlib.h") && probe(&self.cpp, "c++", "string")
    }

    pub(super) fn version(&self) -> Result<String> {
        let text = output(Command::new(&self.c).arg("-dumpversion"))?;
        Ok(format!("clang {}", text.trim()))
    }
}

/// Copies the AssemblyScript examples into the cache and installs their npm packages there, so the
/// clone stays clean.
pub(super) fn assemblyscript() -> Result<PathBuf> {
    for program in ["node", "npm"] {
        if on_path(program).is_none() {
            bail!("cannot find `{program}`: run `apt-get install nodejs npm`, version 20 or later");
        }
    }
    let workplace = cache()?.join("toolchains/assemblyscript");
    for folder in ["sdk/assemblyscript", "examples/assemblyscript"] {
        copy(&tools::root().join(folder), &workplace.join(folder))?;
    }
    let project = workplace.join("examples/assemblyscript");
    let lock = std::fs::read(project.join("package-lock.json"))?;
    let installed = project.join("node_modules/.installed-from");
    if std::fs::read(&installed).ok().as_deref() != Some(&lock) {
        announce("npm ci in a copy of examples/assemblyscript (once)");
        run(Command::new("npm").args(["ci", "--silent", "--no-audit", "--no-fund"]).current_dir(&project))?;
        std::fs::write(installed, lock)?;
    }
    Ok(project)
}

/// Copies a folder without installed packages and build output.
fn copy(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let (path, name) = (entry.path(), entry.file_name());
        if path.is_dir() {
            if name != "node_modules" && name != "build" {
                copy(&path, &to.join(name))?;
            }
        } else {
            std::fs::copy(&path, to.join(name)).with_context(|| format!("copying {}", path.display()))?;
        }
    }
    Ok(())
}
