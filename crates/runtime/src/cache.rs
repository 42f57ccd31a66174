//! Compiled modules on disk, so that a restart does not compile again: 0.5 ms instead of seconds for a Go module.
//!
//! A compiled module is native code, and loading it trusts it. The directory must therefore belong to this user alone, and every file carries a
//! digest of its content, so that a torn write is not run.

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tracing::{debug, warn};
use wasmtime::{Engine, Module};

/// Files kept; the oldest go first. A host runs few modules, each in few versions.
const MAX_FILES: usize = 32;

/// A directory of compiled modules.
#[derive(Clone, Debug)]
pub struct Cache {
    directory: PathBuf,
}

impl Cache {
    /// The cache in `directory`, which is made where it is missing.
    ///
    /// # Errors
    ///
    /// The directory cannot be made or written, or somebody else may write to it.
    pub fn open(directory: impl Into<PathBuf>) -> io::Result<Self> {
        let directory = directory.into();
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&directory)?;
        let metadata = fs::metadata(&directory)?;
        if metadata.uid() != rustix::process::geteuid().as_raw() || metadata.mode() & 0o022 != 0 {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, "others may write to it"));
        }
        rustix::fs::access(&directory, rustix::fs::Access::WRITE_OK)?;
        Ok(Self { directory })
    }

    /// The compiled form of the module `wasm` with this digest, if it was kept for this engine.
    #[allow(unsafe_code, reason = "loading native code trusts it")]
    pub(crate) fn load(&self, engine: &Engine, digest: &str) -> Option<Module> {
        let file = self.path(engine, digest);
        let bytes = fs::read(&file).ok()?;
        let (code, sum) = bytes.split_at_checked(bytes.len().checked_sub(32)?)?;
        if Sha256::digest(code).as_slice() != sum {
            warn!("leaving the compile cache's file `{}` aside: its checksum is wrong", file.display());
            return None;
        }
        // SAFETY: the code comes from `store` of this very version (the name holds the engine's compatibility hash), is whole (the checksum), and
        // nobody else may write to the directory (`open`).
        match unsafe { Module::deserialize(engine, code) } {
            Ok(module) => Some(module),
            Err(error) => {
                warn!("leaving the compile cache's file `{}` aside: {error:#}", file.display());
                None
            }
        }
    }

    /// Keeps `module`. That it cannot be kept is logged and costs only time.
    pub(crate) fn store(&self, engine: &Engine, digest: &str, module: &Module) {
        let file = self.path(engine, digest);
        match module.serialize().map_err(|error| io::Error::other(format!("{error:#}"))).and_then(|code| self.write(&file, &code)) {
            Ok(()) => debug!("kept the compiled module in `{}`", file.display()),
            Err(error) => warn!("cannot keep the compiled module in `{}`: {error}", file.display()),
        }
    }

    fn write(&self, file: &Path, code: &[u8]) -> io::Result<()> {
        let unfinished = file.with_extension(format!("{}.tmp", std::process::id()));
        let written = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&unfinished)
            .and_then(|mut out| {
                out.write_all(code)?;
                out.write_all(&Sha256::digest(code))
            })
            .and_then(|()| fs::rename(&unfinished, file));
        if written.is_err() {
            let _ = fs::remove_file(&unfinished);
        }
        written?;
        self.prune()
    }

    fn prune(&self) -> io::Result<()> {
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            let entry = entry?;
            // The directory may hold what somebody else has put there.
            if entry.file_name().to_str().is_some_and(is_own) {
                files.push((entry.metadata()?.modified()?, entry.path()));
            }
        }
        files.sort();
        for (_, file) in files.iter().rev().skip(MAX_FILES) {
            fs::remove_file(file)?;
        }
        Ok(())
    }

    fn path(&self, engine: &Engine, digest: &str) -> PathBuf {
        let mut hasher = DefaultHasher::new();
        engine.precompile_compatibility_hash().hash(&mut hasher);
        self.directory.join(format!("{digest}-{:016x}.cwasm", hasher.finish()))
    }
}

/// Whether a file of this name is one that `path` names, or one that `write` did not finish.
fn is_own(name: &str) -> bool {
    let is_hex = |text: &str, len| text.len() == len && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let Some((stem, extension)) = name.split_once('.') else { return false };
    stem.split_once('-').is_some_and(|(digest, engine)| is_hex(digest, 64) && is_hex(engine, 16))
        && (extension == "cwasm" || extension.strip_suffix(".tmp").is_some_and(|process| process.parse::<u32>().is_ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let directory = std::env::temp_dir().join(format!("wasm-cache-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&directory);
        directory
    }

    #[test]
    fn a_compiled_module_is_found_again_unless_it_is_damaged() {
        let directory = scratch("found");
        let cache = Cache::open(&directory).unwrap();
        let engine = Engine::default();
        let module = Module::new(&engine, wat::parse_str("(module)").unwrap()).unwrap();
        assert!(cache.load(&engine, "d").is_none());
        cache.store(&engine, "d", &module);
        assert!(cache.load(&engine, "d").is_some());

        let file = cache.path(&engine, "d");
        let mut bytes = fs::read(&file).unwrap();
        bytes[100] ^= 1;
        fs::write(&file, &bytes).unwrap();
        assert!(cache.load(&engine, "d").is_none());
        fs::write(&file, b"short").unwrap();
        assert!(cache.load(&engine, "d").is_none());
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn the_number_of_own_files_is_bounded_and_no_other_is_touched() {
        let directory = scratch("bounded");
        let cache = Cache::open(&directory).unwrap();
        let engine = Engine::default();
        let own = |at: usize| cache.path(&engine, &format!("{at:064x}"));
        let unfinished = own(1000).with_extension("4711.tmp");
        let others = ["key.pem", "other.cwasm", "4711.tmp", "a.b.c"].map(|name| directory.join(name));
        others.iter().chain([&unfinished]).for_each(|file| fs::write(file, b"x").unwrap());
        fs::File::open(&unfinished).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
        fs::create_dir(directory.join("folder")).unwrap();
        for at in 0..MAX_FILES + 5 {
            cache.write(&own(at), b"x").unwrap();
        }
        assert_eq!(fs::read_dir(&directory).unwrap().count(), MAX_FILES + others.len() + 1);
        assert!(others.iter().all(|file| file.exists()) && !unfinished.exists());
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn a_directory_that_others_may_write_to_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let directory = scratch("shared");
        fs::create_dir(&directory).unwrap();
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(Cache::open(&directory).is_err());
        fs::remove_dir(directory).unwrap();
    }
}
