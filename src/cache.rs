//! Where compiled modules are kept.

use std::path::{Path, PathBuf};

use tracing::warn;
use zentinel_wasm_runtime::Cache;

/// The directory for compiled modules: the given one, or where systemd and the desktop conventions put caches. One that cannot be used is a warning.
pub fn open(given: Option<&Path>) -> Option<Cache> {
    let from = |variable: &str| std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
    let name = "zentinel-wasm-agent";
    let directory = given
        .map(Path::to_owned)
        // systemd may name several, separated by colons.
        .or_else(|| from("CACHE_DIRECTORY").map(|list| PathBuf::from(list.to_string_lossy().split(':').next().unwrap_or_default())))
        .or_else(|| from("XDG_CACHE_HOME").map(|cache| cache.join(name)))
        .or_else(|| from("HOME").map(|home| home.join(".cache").join(name)))?;
    match Cache::open(&directory) {
        Ok(cache) => Some(cache),
        Err(error) => {
            warn!("compiled modules are not kept: the cache `{}` cannot be used: {error}", directory.display());
            None
        }
    }
}
