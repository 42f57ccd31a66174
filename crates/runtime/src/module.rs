//! From a file to a module that can be served, or to one message that says everything that is wrong with it.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use sha2::{Digest, Sha256};
use wasmparser::{ElementItems, Parser, Payload};
use wasmtime::{Engine, ExternType, FuncType, InstancePre, Linker, ModuleExport, ValType};
use zentinel_wasm_contract::{Hook, Hooks, shortened};

use crate::cache::Cache;
use crate::guest::adapter;
use crate::host::guest_log::GuestLog;
use crate::host::{assemblyscript, wasi};
use crate::instance::State;
use crate::{engine, host, proposals};

/// Largest module file, in bytes. Real ones have up to 5 MB; compiling one much larger would take minutes.
const MAX_FILE: u64 = 64 << 20;

/// Problems of a module that are told. A module built for another host has some dozens.
const MAX_PROBLEMS: usize = 50;

/// Most characters that are told of what is wrong with a module: what that many problems need.
const MAX_PROBLEM: usize = 4000;

/// Most elements of all segments together, each of which takes 16 bytes in every instance, outside its tables. As many as a table may have.
const MAX_ELEMENTS: u64 = engine::MAX_TABLE_ELEMENTS as u64;

/// Most characters that are shown of the name of an import.
const MAX_NAME: usize = 60;

/// Why a module cannot be served. The message is complete: it names the file, every problem, and what to do.
#[derive(Debug, thiserror::Error)]
#[error("cannot serve the module `{path}`: {problem}")]
pub struct LoadError {
    path: String,
    problem: String,
}

/// A module's bytes, read and found to be Wasm. Compiling them is left to the pool, whose engine depends on the settings.
#[derive(Debug)]
pub struct Module {
    path: String,
    bytes: Vec<u8>,
    digest: String,
    /// Shared by all instances, whatever pool they are in.
    pub(crate) log: Arc<GuestLog>,
    /// What was compiled last, from which an engine of another size is served without compiling again.
    compiled: Mutex<Option<wasmtime::Module>>,
}

impl Module {
    /// Reads the module in `path`, whose SHA-256 must be `expected` if one is given.
    ///
    /// # Errors
    ///
    /// The file cannot be read, is not a regular file, too large, not a core module in binary form, or another one than expected.
    pub fn read(path: &Path, expected: Option<&str>) -> Result<Self, LoadError> {
        let error = |problem: String| LoadError { path: path.display().to_string(), problem };
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

    /// The module `bytes`, called `path` in messages.
    ///
    /// # Errors
    ///
    /// As for [`read`](Self::read).
    pub fn from_bytes(path: impl Into<String>, bytes: Vec<u8>, expected: Option<&str>) -> Result<Self, LoadError> {
        let path = path.into();
        if let Some(problem) = not_a_module(&bytes) {
            return Err(LoadError { path, problem: problem.into() });
        }
        let mut digest = String::with_capacity(64);
        for byte in Sha256::digest(&bytes) {
            // Writing to a string does not fail.
            let _ = write!(digest, "{byte:02x}");
        }
        if let Some(expected) = expected
            && !expected.eq_ignore_ascii_case(&digest)
        {
            let problem = format!("its SHA-256 is {digest}, not {expected} as `--module-sha256` wants");
            return Err(LoadError { path, problem });
        }
        let log = Arc::new(GuestLog::new(digest.clone()));
        Ok(Self { path, bytes, digest, log, compiled: Mutex::new(None) })
    }

    /// The file, as messages name it.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// SHA-256 of the file, in lower-case hexadecimal.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// The module as it was compiled for an engine of another size.
    #[allow(unsafe_code, reason = "loading native code trusts it")]
    fn compiled_before(&self, engine: &Engine) -> Option<wasmtime::Module> {
        let compiled = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        let code = compiled.as_ref()?.serialize().ok()?;
        // SAFETY: the code was made by this process, and the engines differ only in the size of their pools.
        unsafe { wasmtime::Module::deserialize(engine, code) }.ok()
    }

    pub(crate) fn error(&self, problem: impl Into<String>) -> LoadError {
        LoadError { path: self.path.clone(), problem: shortened(&problem.into(), MAX_PROBLEM) }
    }

    /// Compiles the module for a pool of `slots` instances and checks what it imports and exports.
    pub(crate) fn compile(&self, slots: u32, max_memory: usize, cache: Option<&Cache>) -> Result<Compiled, LoadError> {
        let elements = elements(&self.bytes);
        if elements > MAX_ELEMENTS {
            return Err(self.error(format!("its element segments have {elements} elements, more than the limit of {MAX_ELEMENTS}")));
        }
        let engine = engine::new(slots).map_err(|error| self.error(format!("this machine cannot run Wasm: {error:#}")))?;
        let module = match self.compiled_before(&engine).or_else(|| cache.and_then(|cache| cache.load(&engine, &self.digest))) {
            Some(module) => module,
            None => {
                proposals::check(&self.bytes).map_err(|problem| self.error(problem))?;
                let module = wasmtime::Module::new(&engine, &self.bytes)
                    .map_err(|error| self.error(format!("it is not valid: {}", one_line(&error))))?;
                if let Some(cache) = cache {
                    cache.store(&engine, &self.digest, &module);
                }
                module
            }
        };

        *self.compiled.lock().unwrap_or_else(PoisonError::into_inner) = Some(module.clone());

        let mut linker = Linker::new(&engine);
        // The same import may be defined once only: what goes wrong here is wrong for every module.
        host::define(&mut linker)
            .and_then(|()| assemblyscript::define(&mut linker))
            .and_then(|()| wasi::define(&mut linker))
            .map_err(|error| self.error(format!("{error:#}")))?;

        let mut problems = Vec::new();
        let hooks = check_exports(&module, max_memory, &mut problems);
        check_imports(&module, &linker, &engine, &mut problems);
        if !problems.is_empty() {
            let more = problems.len().saturating_sub(MAX_PROBLEMS);
            problems.truncate(MAX_PROBLEMS);
            if more > 0 {
                problems.push(format!("and {more} more problems"));
            }
            return Err(self.error(problems.join("; ")));
        }
        let export = |name: &str| module.get_export_index(name).ok_or_else(|| self.error(format!("it does not export `{name}`")));
        let exports = Exports {
            memory: export("memory")?,
            alloc: export("alloc")?,
            dealloc: export("dealloc")?,
            hooks: hooks.iter().map(|hook| Ok((hook, export(hook.export())?))).collect::<Result<_, LoadError>>()?,
            initialize: module.get_export_index("_initialize"),
        };
        let adapter =
            wasmtime::Module::new(&engine, adapter::module(hooks)).map_err(|error| self.error(format!("the adapter failed: {error:#}")))?;
        let mut adapter_linker = Linker::new(&engine);
        crate::instance::define_adapter(&mut adapter_linker).map_err(|error| self.error(format!("{error:#}")))?;
        let guest = linker.instantiate_pre(&module).map_err(|error| self.error(one_line(&error)))?;
        Ok(Compiled { path: self.path.clone(), engine, guest, adapter, adapter_linker, exports, hooks })
    }
}

/// A module that was compiled and checked.
pub(crate) struct Compiled {
    pub(crate) path: String,
    pub(crate) engine: Engine,
    pub(crate) guest: InstancePre<State>,
    pub(crate) adapter: wasmtime::Module,
    pub(crate) adapter_linker: Linker<State>,
    pub(crate) exports: Exports,
    pub(crate) hooks: Hooks,
}

/// Where the exports of a module stand.
pub(crate) struct Exports {
    pub(crate) memory: ModuleExport,
    pub(crate) alloc: ModuleExport,
    pub(crate) dealloc: ModuleExport,
    pub(crate) hooks: Vec<(Hook, ModuleExport)>,
    pub(crate) initialize: Option<ModuleExport>,
}

fn not_a_module(bytes: &[u8]) -> Option<&'static str> {
    match bytes {
        [] => Some("it is empty"),
        [0, b'a', b's', b'm', 1, 0, 0, 0, ..] => None,
        [0, b'a', b's', b'm', _, 0, 1, 0, ..] => {
            Some("it is a component: build a core module, for Rust with `--target wasm32-unknown-unknown` or `wasm32-wasip1`")
        }
        [0, b'a', b's', b'm', ..] => Some("it has a version of the Wasm format that is not known"),
        _ if bytes.trim_ascii_start().starts_with(b"(module") => {
            Some("it is Wasm in text form: turn it into binary form, for example with `wat2wasm`")
        }
        _ => Some("it is not Wasm: it does not begin with the bytes 00 61 73 6d"),
    }
}

/// Elements of all segments. What cannot be read ends the count: it is no valid module, as the compiler will tell.
fn elements(module: &[u8]) -> u64 {
    let sections = Parser::new(0).parse_all(module).map_while(Result::ok);
    let segments = sections.filter_map(|section| if let Payload::ElementSection(segments) = section { Some(segments) } else { None });
    let items = segments.flat_map(|segments| segments.into_iter().map_while(Result::ok)).map(|segment| segment.items);
    items
        .map(|items| match items {
            ElementItems::Functions(items) => u64::from(items.count()),
            ElementItems::Expressions(_, items) => u64::from(items.count()),
        })
        .sum()
}

fn one_line(error: &wasmtime::Error) -> String {
    let text = format!("{error:#}");
    let mut line = String::with_capacity(text.len());
    for word in text.split_whitespace() {
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    line
}

fn check_exports(module: &wasmtime::Module, max_memory: usize, problems: &mut Vec<String>) -> Hooks {
    match module.get_export("memory") {
        Some(ExternType::Memory(memory)) if memory.is_shared() || memory.is_64() => {
            problems.push("its export `memory` must be an ordinary 32-bit memory".into());
        }
        Some(ExternType::Memory(memory)) => {
            let initial = memory.minimum().saturating_mul(memory.page_size());
            if initial > max_memory as u64 {
                problems.push(format!(
                    "it begins with {initial} bytes of memory, more than the limit of {max_memory}: raise `--max-memory-mb`"
                ));
            }
        }
        Some(_) => problems.push("its export `memory` is not a memory".into()),
        None => problems.push("it does not export `memory`".into()),
    }
    check_function(module, "alloc", "(i32) -> i32", true, problems);
    check_function(module, "dealloc", "(i32, i32) -> ()", true, problems);
    check_function(module, "_initialize", "() -> ()", false, problems);
    let hooks: Hooks =
        Hook::ALL.into_iter().filter(|hook| check_function(module, hook.export(), "(i32, i32) -> i64", false, problems)).collect();
    // A hook of a wrong type was meant to be one: its own message is enough.
    if !Hook::HANDLERS.iter().any(|hook| module.get_export(hook.export()).is_some()) {
        if module.get_export("_start").is_some() {
            problems.push(
                "it is a command with `_start`: build a reactor, for Go with `-buildmode=c-shared`, for C with `-mexec-model=reactor`, for Rust as a `cdylib`"
                    .into(),
            );
        } else {
            let names: Vec<_> = Hook::HANDLERS.iter().map(|hook| format!("`{hook}`")).collect();
            problems.push(format!("it exports none of {}", names.join(", ")));
        }
    }
    hooks
}

/// Whether the module exports the function `name` and its type is right.
fn check_function(module: &wasmtime::Module, name: &str, wanted: &str, required: bool, problems: &mut Vec<String>) -> bool {
    match module.get_export(name) {
        Some(ExternType::Func(ty)) if signature(&ty) == wanted => return true,
        Some(ExternType::Func(ty)) => problems.push(format!("its export `{name}` has the type {}, not {wanted}", signature(&ty))),
        Some(_) => problems.push(format!("its export `{name}` is not a function")),
        None if required => problems.push(format!("it does not export `{name}`")),
        None => {}
    }
    false
}

fn check_imports(module: &wasmtime::Module, linker: &Linker<State>, engine: &Engine, problems: &mut Vec<String>) {
    let mut store = wasmtime::Store::new(engine, State::probe());
    let mut seen = HashSet::new();
    for import in module.imports() {
        let (from, name) = (import.module(), import.name());
        // Go imports one function twice.
        if !seen.insert((from, name)) {
            continue;
        }
        let provided = linker.get(&mut store, from, name);
        match (import.ty(), provided.map(|provided| provided.ty(&store))) {
            (ExternType::Func(wanted), Ok(ExternType::Func(provided))) if signature(&wanted) == signature(&provided) => {}
            (ExternType::Func(wanted), Ok(ExternType::Func(provided))) => problems.push(format!(
                "its import `{from}.{name}` has the type {}, the agent's has {}",
                signature(&wanted),
                signature(&provided)
            )),
            _ => problems.push(format!(
                "its import `{}.{}` is not known{}",
                shortened(from, MAX_NAME),
                shortened(name, MAX_NAME),
                import_hint(from, name)
            )),
        }
    }
}

fn import_hint(from: &str, name: &str) -> &'static str {
    match (from, name) {
        ("env", "memory") => " (the module must have and export its memory)",
        ("wasi_unstable", _) => " (build for WASI preview 1)",
        ("__wbindgen_placeholder__" | "./index_bg.js" | "wbg", _) => " (wasm-bindgen is for browsers: build without it)",
        ("env", name) if name.starts_with("crypto.") => " (import `wasi_snapshot_preview1.random_get` instead)",
        ("gojs" | "go", _) => " (build with GOOS=wasip1, not js)",
        _ => "",
    }
}

fn signature(ty: &FuncType) -> String {
    let list = |types: &mut dyn Iterator<Item = ValType>| types.map(|ty| ty.to_string()).collect::<Vec<_>>().join(", ");
    let params = list(&mut ty.params());
    let results = list(&mut ty.results());
    if ty.results().len() == 1 { format!("({params}) -> {results}") } else { format!("({params}) -> ({results})") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(wat: &str) -> String {
        let bytes = wat::parse_str(wat).unwrap();
        match Module::from_bytes("m.wasm", bytes, None).and_then(|module| module.compile(1, 1 << 20, None)) {
            Ok(_) => String::new(),
            Err(error) => error.to_string(),
        }
    }

    const GOOD: &str = r#"(module (memory (export "memory") 1)
        (func (export "alloc") (param i32) (result i32) i32.const 8)
        (func (export "dealloc") (param i32 i32))
        (func (export "on_request_headers") (param i32 i32) (result i64) i64.const 0))"#;

    #[test]
    fn a_good_module_is_taken() {
        assert_eq!(problem(GOOD), "");
    }

    #[test]
    fn every_problem_is_named_in_one_line() {
        let message = problem(
            r#"(module
                (import "env" "nonsense" (func))
                (import "wasi_snapshot_preview1" "fd_write" (func (param i32)))
                (import "env" "table" (table 1 funcref))
                (func (export "alloc") (param i64) (result i32) i32.const 8)
                (func (export "on_request_headers") (param i32 i32 i32) (result i32) i32.const 0))"#,
        );
        for part in [
            "cannot serve the module `m.wasm`",
            "it does not export `memory`",
            "`alloc` has the type (i64) -> i32, not (i32) -> i32",
            "it does not export `dealloc`",
            "`on_request_headers` has the type (i32, i32, i32) -> i32, not (i32, i32) -> i64",
            "`env.nonsense` is not known",
            "`wasi_snapshot_preview1.fd_write` has the type (i32) -> (), the agent's has (i32, i32, i32, i32) -> i32",
            "`env.table` is not known",
        ] {
            assert!(message.contains(part), "{part} in {message}");
        }
        assert!(!message.contains('\n'));
    }

    #[test]
    fn an_import_that_the_agent_has_otherwise_is_refused_with_a_hint() {
        let message =
            problem(&GOOD.replace("(module ", r#"(module (import "env" "crypto.getRandomValuesN" (func (param i32) (result i32)))"#));
        assert!(
            message.contains("`env.crypto.getRandomValuesN` is not known (import `wasi_snapshot_preview1.random_get` instead)"),
            "{message}"
        );
    }

    #[test]
    fn a_command_is_refused_with_a_hint() {
        assert!(problem(r#"(module (memory (export "memory") 1) (func (export "_start")))"#).contains("build a reactor"));
    }

    #[test]
    fn a_memory_larger_than_the_limit_is_refused() {
        let message = problem(&GOOD.replace("\"memory\") 1", "\"memory\") 17"));
        assert!(message.contains("more than the limit of 1048576: raise `--max-memory-mb`"), "{message}");
    }

    #[test]
    fn more_elements_than_a_table_may_have_are_refused() {
        // One too many, in two segments of two kinds.
        let segments = |more: usize| {
            format!("(func $f) (elem funcref {}) (elem func {}))", "(ref.null func)".repeat(50_000), "$f ".repeat(50_000 + more))
        };
        let module = |more| format!("{}{}", GOOD.strip_suffix(')').unwrap(), segments(more));
        assert_eq!(problem(&module(0)), "");
        assert!(problem(&module(1)).contains("100001 elements, more than the limit of 100000"));
    }

    #[test]
    fn what_is_no_module_is_told_apart() {
        let message = |bytes: &[u8]| Module::from_bytes("m", bytes.to_vec(), None).unwrap_err().to_string();
        assert!(message(b"").contains("empty"));
        assert!(message(b"\0asm\x0d\0\x01\0").contains("component"));
        assert!(message(b"  (module)").contains("text form"));
        assert!(message(b"\x7fELF").contains("not Wasm"));
        assert!(message(b"\0asm\x02\0\0\0").contains("version"));
        assert!(problem("(module (func (result i32) (i64.const 0)))").contains("not valid"));
        assert!(problem(r#"(module (memory (export "memory") i64 1))"#).contains("`memory64`, which the agent does not support"));
    }

    #[test]
    fn the_digest_must_be_the_expected_one() {
        let bytes = wat::parse_str(GOOD).unwrap();
        let digest = Module::from_bytes("m", bytes.clone(), None).unwrap().digest().to_owned();
        Module::from_bytes("m", bytes.clone(), Some(&digest.to_uppercase())).unwrap();
        assert!(Module::from_bytes("m", bytes, Some("00")).unwrap_err().to_string().contains(&digest));
    }
}
