//! Compiled modules on disk, so a restart does not compile again: 0.5 ms instead of seconds for a
//! Go module.
//!
//! A compiled module is native code, and loading it means trusting it. So the cache's folder must
//! belong to the agent's user, and no other user may write to it. If others can write to the given
//! directory (an `emptyDir` of Kubernetes, a volume with `fsGroup`), the cache is a private folder
//! in it. The folder is opened once, checked by its descriptor, and used only through that
//! descriptor, so nothing is loaded from another folder or symlink that replaces it. Files must
//! belong to the agent's user too, and contain a digest of their content, so a torn write is not
//! run.

use std::collections::hash_map::DefaultHasher;
use std::fs::{self, File};
use std::hash::{Hash, Hasher};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, CWD, Dir, Mode, OFlags};
use rustix::io::Errno;
use sha2::{Digest, Sha256};
use tracing::{debug, warn};
use wasmtime::{Engine, Module};

use crate::proposals;

/// Files kept; the oldest are removed first. A host runs few modules, each in few versions.
const MAX_FILES: usize = 32;

/// A directory of compiled modules. Clones share it.
#[derive(Clone, Debug)]
pub struct Cache(Arc<Folder>);

#[derive(Debug)]
struct Folder {
    /// For messages only.
    path: PathBuf,
    descriptor: File,
}

impl Cache {
    /// Opens the cache in `directory`, which is created if missing. If other users can write to it,
    /// the cache is a folder in it that belongs to this user alone.
    ///
    /// # Errors
    ///
    /// The directory or the folder in it cannot be created or written, or the folder does not
    /// belong to this user alone.
    pub fn open(directory: impl Into<PathBuf>) -> io::Result<Self> {
        let directory = directory.into();
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&directory)?;
        // The directory itself may be a symlink, because the operator configured it.
        let given = File::from(rustix::fs::openat(CWD, &directory, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?);
        let folder =
            if is_own_alone(&given, 0o022)? { Folder { path: directory, descriptor: given } } else { own_folder(&directory, &given)? };
        rustix::fs::accessat(&folder.descriptor, ".", rustix::fs::Access::WRITE_OK, AtFlags::empty())?;
        Ok(Self(Arc::new(folder)))
    }

    /// Loads the compiled module with this digest, if it was stored for this engine.
    #[allow(unsafe_code, reason = "loading native code trusts it")]
    pub(crate) fn load(&self, engine: &Engine, digest: &str) -> Option<Module> {
        let name = name(engine, digest);
        let bytes = match self.read(&name) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => {
                warn!("ignoring the compile cache file `{}`: {error}", self.shown(&name));
                return None;
            }
        };
        let (code, sum) = bytes.split_at_checked(bytes.len().checked_sub(32)?)?;
        if Sha256::digest(code).as_slice() != sum {
            warn!("ignoring the compile cache file `{}`: wrong checksum", self.shown(&name));
            return None;
        }
        // SAFETY: the code was stored by this version (the name contains the engine's compatibility
        // hash), is complete (the checksum), and no other user can write to the folder or the file
        // (`open`, `read`).
        match unsafe { Module::deserialize(engine, code) } {
            Ok(module) => Some(module),
            Err(error) => {
                warn!("ignoring the compile cache file `{}`: {error:#}", self.shown(&name));
                None
            }
        }
    }

    /// Stores `module`. A failure is only logged, because it only costs time.
    pub(crate) fn store(&self, engine: &Engine, digest: &str, module: &Module) {
        let name = name(engine, digest);
        match module.serialize().map_err(|error| io::Error::other(format!("{error:#}"))).and_then(|code| self.write(&name, &code)) {
            Ok(()) => debug!("stored the compiled module in `{}`", self.shown(&name)),
            Err(error) => warn!("cannot store the compiled module in `{}`: {error}", self.shown(&name)),
        }
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        // Non-blocking, so opening a FIFO does not wait.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let mut file = File::from(rustix::fs::openat(&self.0.descriptor, name, flags, Mode::empty())?);
        if !file.metadata()?.is_file() || !is_own_alone(&file, 0o022)? {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "not a regular file that belongs to the agent's user and that only this user can write",
            ));
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn write(&self, name: &str, code: &[u8]) -> io::Result<()> {
        let folder = &self.0.descriptor;
        // A process id is not enough, because agents in two containers may share a volume, and both
        // may be process 1.
        let unfinished = format!("{}.{}.tmp", name.trim_end_matches(".cwasm"), random()?);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let mut out = File::from(rustix::fs::openat(folder, &unfinished, flags, Mode::RUSR | Mode::WUSR)?);
        let written = out
            .write_all(code)
            .and_then(|()| out.write_all(&Sha256::digest(code)))
            // Another agent may have pruned it.
            .and_then(|()| unless_gone(rustix::fs::renameat(folder, &unfinished, folder, name)));
        if written.is_err() {
            let _ = rustix::fs::unlinkat(folder, &unfinished, AtFlags::empty());
        }
        written?;
        self.prune()
    }

    /// Removes the oldest files. Other agents may do so at the same time, so a missing file is not
    /// an error.
    fn prune(&self) -> io::Result<()> {
        let folder = &self.0.descriptor;
        let mut files = Vec::new();
        for entry in Dir::read_from(folder)? {
            let entry = entry?;
            // The directory may contain other files.
            let Some(name) = entry.file_name().to_str().ok().filter(|name| is_own(name)) else { continue };
            if let Some(status) = unless_gone(rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW))? {
                files.push((status.st_mtime, status.st_mtime_nsec, name.to_owned()));
            }
        }
        files.sort();
        for (.., name) in files.iter().rev().skip(MAX_FILES) {
            unless_gone(rustix::fs::unlinkat(folder, name, AtFlags::empty()))?;
        }
        Ok(())
    }

    fn shown(&self, name: &str) -> String {
        self.0.path.join(name).display().to_string()
    }
}

/// Opens this user's folder in `directory`, to which others can write.
fn own_folder(directory: &Path, given: &File) -> io::Result<Folder> {
    // One per user, because agents of several users may share the directory.
    let name = format!("zentinel-wasm-agent-{}", rustix::process::geteuid().as_raw());
    let path = directory.join(&name);
    match rustix::fs::mkdirat(given, &name, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error.into()),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let descriptor = File::from(rustix::fs::openat(given, &name, flags, Mode::empty())?);
    // Another user may have created the folder first.
    if !is_own_alone(&descriptor, 0o077)? {
        let problem = format!(
            "other users can write to it, and `{name}` in it is not a directory that belongs to the agent's user alone (mode 0700)"
        );
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, problem));
    }
    Ok(Folder { path, descriptor })
}

/// Whether `file` belongs to this user and grants none of `rights` to others.
fn is_own_alone(file: &File, rights: u32) -> io::Result<bool> {
    let metadata = file.metadata()?;
    Ok(metadata.uid() == rustix::process::geteuid().as_raw() && metadata.mode() & rights == 0)
}

fn unless_gone<T>(result: rustix::io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn random() -> io::Result<u32> {
    let mut bytes = [0; 4];
    getrandom::fill(&mut bytes).map_err(|error| io::Error::other(error.to_string()))?;
    Ok(u32::from_ne_bytes(bytes))
}

/// The name of the file with the module of this digest, compiled for `engine`.
fn name(engine: &Engine, digest: &str) -> String {
    let mut hasher = DefaultHasher::new();
    engine.precompile_compatibility_hash().hash(&mut hasher);
    // Code compiled with other proposals must not be loaded.
    proposals::ALLOWED.hash(&mut hasher);
    // Earlier versions kept names, however long.
    "without names".hash(&mut hasher);
    format!("{digest}-{:016x}.cwasm", hasher.finish())
}

/// Whether `name` is the name of a cache file, or of one that `write` did not finish.
fn is_own(name: &str) -> bool {
    let is_hex = |text: &str, len| text.len() == len && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let Some((stem, extension)) = name.split_once('.') else { return false };
    stem.split_once('-').is_some_and(|(digest, engine)| is_hex(digest, 64) && is_hex(engine, 16))
        && (extension == "cwasm" || extension.strip_suffix(".tmp").is_some_and(|process| process.parse::<u32>().is_ok()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    /// A test's directory, removed at its end.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let directory = std::env::temp_dir().join(format!("wasm-cache-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&directory);
            Self(directory)
        }

        /// A directory with these permissions.
        fn with_mode(name: &str, mode: u32) -> Self {
            let scratch = Self::new(name);
            fs::create_dir(&scratch.0).unwrap();
            fs::set_permissions(&scratch.0, fs::Permissions::from_mode(mode)).unwrap();
            scratch
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn module(engine: &Engine) -> Module {
        Module::new(engine, wat::parse_str("(module)").unwrap()).unwrap()
    }

    fn folder_name() -> String {
        format!("zentinel-wasm-agent-{}", rustix::process::geteuid().as_raw())
    }

    mod loading {
        use super::*;

        #[test]
        fn finds_stored_code_unless_it_is_damaged() {
            let directory = Scratch::new("found");
            let cache = Cache::open(&directory.0).unwrap();
            let engine = Engine::default();
            assert!(cache.load(&engine, "d").is_none());
            cache.store(&engine, "d", &module(&engine));
            assert!(cache.load(&engine, "d").is_some());

            let file = directory.0.join(name(&engine, "d"));
            let mut bytes = fs::read(&file).unwrap();
            bytes[100] ^= 1;
            fs::write(&file, &bytes).unwrap();
            assert!(cache.load(&engine, "d").is_none());
            fs::write(&file, b"short").unwrap();
            assert!(cache.load(&engine, "d").is_none());
        }

        #[test]
        fn ignores_files_that_others_can_write() {
            let directory = Scratch::new("files");
            let cache = Cache::open(&directory.0).unwrap();
            let engine = Engine::default();
            cache.store(&engine, "d", &module(&engine));
            let file = directory.0.join(name(&engine, "d"));
            let code = fs::read(&file).unwrap();

            fs::set_permissions(&file, fs::Permissions::from_mode(0o620)).unwrap();
            assert!(cache.load(&engine, "d").is_none());
            let elsewhere = directory.0.join("elsewhere");
            fs::write(&elsewhere, &code).unwrap();
            fs::remove_file(&file).unwrap();
            symlink(&elsewhere, &file).unwrap();
            assert!(cache.load(&engine, "d").is_none());
            fs::remove_file(&file).unwrap();
            rustix::fs::mknodat(CWD, &file, rustix::fs::FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
            assert!(cache.load(&engine, "d").is_none());
            fs::remove_file(&file).unwrap();
            fs::write(&file, &code).unwrap();
            assert!(cache.load(&engine, "d").is_some());
        }

        #[test]
        fn ignores_code_compiled_with_other_proposals() {
            let engine = Engine::default();
            let mut hasher = DefaultHasher::new();
            // The name that versions before the allow-list used.
            engine.precompile_compatibility_hash().hash(&mut hasher);
            assert_ne!(name(&engine, "d"), format!("d-{:016x}.cwasm", hasher.finish()));
        }
    }

    mod pruning {
        use super::*;

        #[test]
        fn keeps_a_bounded_number_of_files_and_all_others() {
            let directory = Scratch::new("bounded");
            let cache = Cache::open(&directory.0).unwrap();
            let engine = Engine::default();
            let own = |at: usize| name(&engine, &format!("{at:064x}"));
            let unfinished = directory.0.join(own(1000)).with_extension("4711.tmp");
            let others = ["key.pem", "other.cwasm", "4711.tmp", "a.b.c"].map(|name| directory.0.join(name));
            others.iter().chain([&unfinished]).for_each(|file| fs::write(file, b"x").unwrap());
            File::open(&unfinished).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
            fs::create_dir(directory.0.join("folder")).unwrap();
            for at in 0..MAX_FILES + 5 {
                cache.write(&own(at), b"x").unwrap();
            }
            assert_eq!(fs::read_dir(&directory.0).unwrap().count(), MAX_FILES + others.len() + 1);
            assert!(others.iter().all(|file| file.exists()) && !unfinished.exists());
        }

        #[test]
        fn works_with_concurrent_agents() {
            let directory = Scratch::new("together");
            let engine = Engine::default();
            std::thread::scope(|scope| {
                for agent in 0..4 {
                    let (cache, engine) = (Cache::open(&directory.0).unwrap(), &engine);
                    scope.spawn(move || {
                        for at in 0..200 {
                            // All agents have some files in common, as for the same module.
                            let digest = format!("{:064x}", if at % 3 == 0 { at } else { 1000 * (agent + 1) + at });
                            cache.write(&name(engine, &digest), b"x").unwrap();
                        }
                    });
                }
            });
            // Each agent has pruned after its last write, and no unfinished file is left.
            let left: Vec<_> = fs::read_dir(&directory.0).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            assert!(left.len() <= MAX_FILES && left.iter().all(|name| name.ends_with(".cwasm")), "{left:?}");
        }
    }

    mod shared_directory {
        use super::*;

        #[test]
        fn gets_a_private_folder() {
            // An `emptyDir`, a volume with `fsGroup`, and a folder like `/tmp`.
            for mode in [0o777, 0o2775, 0o1777] {
                let directory = Scratch::with_mode(&format!("shared-{mode:o}"), mode);
                let engine = Engine::default();
                let cache = Cache::open(&directory.0).unwrap();
                cache.store(&engine, "d", &module(&engine));
                assert!(Cache::open(&directory.0).unwrap().load(&engine, "d").is_some());
                let folder = directory.0.join(folder_name());
                assert_eq!(fs::metadata(&folder).unwrap().mode() & 0o777, 0o700);
                assert_eq!(fs::read_dir(&directory.0).unwrap().count(), 1);

                // The folder is replaced: the cache stays in the one that was checked.
                fs::rename(&folder, directory.0.join("away")).unwrap();
                fs::create_dir(&folder).unwrap();
                fs::write(folder.join(name(&engine, "e")), fs::read(directory.0.join("away").join(name(&engine, "d"))).unwrap()).unwrap();
                assert!(cache.load(&engine, "d").is_some() && cache.load(&engine, "e").is_none());
                cache.store(&engine, "f", &module(&engine));
                assert!(directory.0.join("away").join(name(&engine, "f")).exists());
            }
        }

        #[test]
        fn rejects_a_folder_of_others() {
            let directory = Scratch::with_mode("planted", 0o777);
            let folder = directory.0.join(folder_name());
            let refused = || Cache::open(&directory.0).unwrap_err();

            fs::create_dir(&folder).unwrap();
            fs::set_permissions(&folder, fs::Permissions::from_mode(0o750)).unwrap();
            assert_eq!(refused().kind(), io::ErrorKind::PermissionDenied);
            fs::remove_dir(&folder).unwrap();
            fs::write(&folder, b"").unwrap();
            refused();
            fs::remove_file(&folder).unwrap();
            let elsewhere = Scratch::with_mode("elsewhere", 0o700);
            symlink(&elsewhere.0, &folder).unwrap();
            refused();
            fs::remove_file(&folder).unwrap();
            // A folder of another user, which only the superuser can create.
            if rustix::process::geteuid().is_root() {
                fs::create_dir(&folder).unwrap();
                fs::set_permissions(&folder, fs::Permissions::from_mode(0o700)).unwrap();
                std::os::unix::fs::chown(&folder, Some(65534), None).unwrap();
                assert_eq!(refused().kind(), io::ErrorKind::PermissionDenied);
            }
        }
    }
}
