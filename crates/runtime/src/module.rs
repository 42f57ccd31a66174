//! A module's file.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use sha2::{Digest, Sha256};
use wasmtime::Engine;
use zentinel_wasm_contract::shortened;

use crate::host::guest_log::GuestLog;
use crate::inspect::{self, Export, Import};
use crate::trace::symbols::Symbols;

/// Largest module file, in bytes. Real modules have up to 5 MB; compiling a much larger one would
/// take minutes.
const MAX_FILE: u64 = 64 << 20;

/// Most characters of a [`LoadError`]: enough for some dozens of problems.
const MAX_PROBLEM: usize = 4000;

/// Why a module cannot be served. The message names the file, every problem, and what to do.
#[derive(Debug, thiserror::Error)]
#[error("cannot serve the module `{path}`: {}", joined(.problems))]
pub struct LoadError {
    path: String,
    problems: Vec<String>,
}

fn joined(problems: &[String]) -> String {
    shortened(&problems.join("; "), MAX_PROBLEM)
}

impl LoadError {
    /// Every problem, each in one line.
    pub fn problems(&self) -> &[String] {
        &self.problems
    }
}

/// The bytes of a core Wasm module. A pool compiles them, because its engine depends on its
/// settings.
#[derive(Debug)]
pub struct Module {
    path: String,
    pub(crate) bytes: Arc<[u8]>,
    pub(crate) symbols: Arc<Symbols>,
    digest: String,
    /// Shared by all instances of all pools.
    pub(crate) log: Arc<GuestLog>,
    /// The code compiled last. An engine of another size loads it without compiling again.
    compiled: Mutex<Option<wasmtime::Module>>,
}

impl Module {
    /// Reads the module in the file `path`. Its SHA-256 must be `expected`, if given.
    ///
    /// # Errors
    ///
    /// The file cannot be read, is not a regular file, is too large, is not a core module in the
    /// binary format, or has another SHA-256.
    pub fn read(path: &Path, expected: Option<&str>) -> Result<Self, LoadError> {
        let error = |problem: String| LoadError { path: path.display().to_string(), problems: vec![problem] };
        let metadata = fs::metadata(path).map_err(|cause| error(cause.to_string()))?;
        if !metadata.is_file() {
            return Err(error("it is not a regular file".into()));
        }
        if metadata.len() > MAX_FILE {
            return Err(error(format!("it has {} bytes, more than the limit of {MAX_FILE}", metadata.len())));
        }
        let bytes = fs::read(path).map_err(|cause| error(cause.to_string()))?;
        Self::from_bytes(path.display().to_string(), bytes, expected)
    }

    /// A module from its bytes. Messages call it `path`.
    ///
    /// # Errors
    ///
    /// As for [`read`](Self::read).
    pub fn from_bytes(path: impl Into<String>, bytes: Vec<u8>, expected: Option<&str>) -> Result<Self, LoadError> {
        let path = path.into();
        if let Some(problem) = not_a_module(&bytes) {
            return Err(LoadError { path, problems: vec![problem.into()] });
        }
        let mut digest = String::with_capacity(64);
        for byte in Sha256::digest(&bytes) {
            // Writing to a string does not fail.
            let _ = write!(digest, "{byte:02x}");
        }
        if let Some(expected) = expected
            && !expected.eq_ignore_ascii_case(&digest)
        {
            let problem = format!("its SHA-256 is {digest}, but `--module-sha256` is {expected}");
            return Err(LoadError { path, problems: vec![problem] });
        }
        let log = Arc::new(GuestLog::new(digest.clone()));
        let bytes: Arc<[u8]> = bytes.into();
        let symbols = Arc::new(Symbols::find(Arc::clone(&bytes)));
        Ok(Self { path, bytes, symbols, digest, log, compiled: Mutex::new(None) })
    }

    /// The file, as messages name it.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Size of the file, in bytes.
    pub fn size(&self) -> usize {
        self.bytes.len()
    }

    /// SHA-256 of the file, in lower-case hexadecimal.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// The code compiled for an engine of another size, for `engine`.
    #[allow(unsafe_code, reason = "loading native code trusts it")]
    pub(crate) fn compiled_before(&self, engine: &Engine) -> Option<wasmtime::Module> {
        let compiled = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        let code = compiled.as_ref()?.serialize().ok()?;
        // SAFETY: the code was compiled by this process, and the engines differ only in the size of
        // their pools.
        unsafe { wasmtime::Module::deserialize(engine, code) }.ok()
    }

    /// Keeps compiled code for [`compiled_before`](Self::compiled_before).
    pub(crate) fn keep_compiled(&self, compiled: wasmtime::Module) {
        *self.compiled.lock().unwrap_or_else(PoisonError::into_inner) = Some(compiled);
    }

    /// The exports and imports of the compiled code, as far as a report needs them. Empty if
    /// nothing was compiled.
    pub(crate) fn exports_and_imports(&self) -> (Vec<Export>, Vec<Import>) {
        let compiled = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        compiled.as_ref().map(inspect::exports_and_imports).unwrap_or_default()
    }

    /// An error that names the module's file.
    pub(crate) fn error(&self, problem: impl Into<String>) -> LoadError {
        self.errors(vec![problem.into()])
    }

    /// An error that names the module's file and several problems.
    pub(crate) fn errors(&self, problems: Vec<String>) -> LoadError {
        let problems = problems.into_iter().map(|problem| shortened(&problem, MAX_PROBLEM)).collect();
        LoadError { path: self.path.clone(), problems }
    }
}

fn not_a_module(bytes: &[u8]) -> Option<&'static str> {
    match bytes {
        [] => Some("it is empty"),
        [0, b'a', b's', b'm', 1, 0, 0, 0, ..] => None,
        [0, b'a', b's', b'm', _, 0, 1, 0, ..] => {
            Some("it is a component: build a core module, for Rust with `--target wasm32-unknown-unknown` or `wasm32-wasip1`")
        }
        [0, b'a', b's', b'm', ..] => Some("unknown version of the Wasm binary format"),
        _ if bytes.trim_ascii_start().starts_with(b"(module") => {
            Some("it is in the Wasm text format: convert it to the binary format, for example with `wat2wasm`")
        }
        _ => Some("it is not Wasm: it does not begin with the bytes 00 61 73 6d"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"(module (memory (export "memory") 1)
        (func (export "alloc") (param i32) (result i32) i32.const 8)
        (func (export "dealloc") (param i32 i32))
        (func (export "on_request_headers") (param i32 i32) (result i64) i64.const 0))"#;

    #[test]
    fn checks_the_expected_digest() {
        let bytes = wat::parse_str(GOOD).unwrap();
        let digest = Module::from_bytes("m", bytes.clone(), None).unwrap().digest().to_owned();
        Module::from_bytes("m", bytes.clone(), Some(&digest.to_uppercase())).unwrap();
        assert!(Module::from_bytes("m", bytes, Some("00")).unwrap_err().to_string().contains(&digest));
    }
}
