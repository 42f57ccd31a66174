//! The directory of the compile cache.

use std::path::{Path, PathBuf};

use tracing::warn;
use zentinel_wasm_runtime::Cache;

/// Opens the compile cache in `directory`, or where systemd and the desktop conventions put caches:
/// `$CACHE_DIRECTORY`, `$XDG_CACHE_HOME` or `~/.cache`. Logs a warning if the directory cannot be
/// used.
pub fn open(directory: Option<&Path>) -> Option<Cache> {
    let from = |variable: &str| std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
    let name = "zentinel-wasm-agent";
    let directory = directory
        .map(Path::to_owned)
        // systemd may list several, separated by colons.
        .or_else(|| from("CACHE_DIRECTORY").map(|list| PathBuf::from(list.to_string_lossy().split(':').next().unwrap_or_default())))
        .or_else(|| from("XDG_CACHE_HOME").map(|cache| cache.join(name)))
        .or_else(|| from("HOME").map(|home| home.join(".cache").join(name)))?;
    match Cache::open(&directory) {
        Ok(cache) => Some(cache),
        Err(error) => {
            warn!("cannot use the cache directory `{}`, so compiled modules are not cached: {error}", directory.display());
            None
        }
    }
}
