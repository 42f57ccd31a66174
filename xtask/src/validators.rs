//! Programs from PyPI and npm that check samples for other programs, kept in the cache.

use crate::pypi::FromPypi;
use crate::tools::{announce, cache, on_path, run};
use anyhow::{Result, bail};
use std::path::PathBuf;
use std::process::Command;

/// The package with the JSON schema of compose files. It needs Node.js 20.
const DCLINT: &str = "dclint@3.1.0";

/// A Python with the JSON schemas of Kubernetes (`kubernetes_validate`) and a YAML reader (`yaml`).
pub(crate) fn python() -> Result<PathBuf> {
    Ok(FromPypi::KubernetesValidate.install()?.join("python3"))
}

/// The linter of compose files.
pub(crate) fn dclint() -> Result<PathBuf> {
    for program in ["node", "npm"] {
        if on_path(program).is_none() {
            bail!("cannot find `{program}`: run `apt-get install nodejs npm`, version 20 or later");
        }
    }
    let folder = cache()?.join("toolchains").join(DCLINT);
    // Written last, so an interrupted installation is repeated.
    let done = folder.join("complete");
    if !done.exists() {
        announce(&format!("installing {DCLINT} from npm (once)"));
        std::fs::create_dir_all(&folder)?;
        run(Command::new("npm").args(["install", "--silent", "--no-audit", "--no-fund", "--prefix"]).arg(&folder).arg(DCLINT))?;
        std::fs::write(&done, "")?;
    }
    Ok(folder.join("node_modules/.bin/dclint"))
}
