//! A compiled module that can be instantiated, or one message with all of its problems.

use std::sync::Arc;

use wasmtime::{Engine, InstancePre, ModuleExport};
use zentinel_wasm_contract::Hooks;

use crate::cache::Cache;
use crate::guest::GuestInterface;
use crate::host::state::HostState;
use crate::inspect::{check_imports, elements};
use crate::module::{LoadError, Module};
use crate::trace::Tracer;
use crate::trace::symbols::without_names;
use crate::{engine, host, proposals};

/// Most problems of a module in one message. A module built for another host has some dozens.
const MAX_PROBLEMS: usize = 50;

/// Most elements in all segments together, the same as in a table. Each takes 16 bytes in every
/// instance, in addition to its tables.
const MAX_ELEMENTS: u64 = engine::MAX_TABLE_ELEMENTS as u64;

/// A compiled and checked module, for one engine.
pub(crate) struct Artifact {
    pub(crate) path: String,
    pub(crate) engine: Engine,
    pub(crate) guest: InstancePre<HostState>,
    pub(crate) initialize: Option<ModuleExport>,
    pub(crate) interface: GuestInterface,
    /// Nothing was compiled.
    pub(crate) from_cache: bool,
    pub(crate) tracer: Arc<Tracer>,
}

impl Artifact {
    /// Compiles `module` for a pool of `slots` instances and checks its imports and exports.
    ///
    /// # Errors
    ///
    /// The module cannot be served.
    pub(crate) fn compile(module: &Module, slots: u32, max_memory: usize, cache: Option<&Cache>) -> Result<Self, LoadError> {
        let elements = elements(&module.bytes);
        if elements > MAX_ELEMENTS {
            return Err(module.error(format!("its element segments have {elements} elements, more than the limit of {MAX_ELEMENTS}")));
        }
        let engine = engine::new(slots).map_err(|error| module.error(format!("cannot set up wasmtime on this machine: {error:#}")))?;
        let (compiled, from_cache) = code(module, &engine, cache)?;
        module.keep_compiled(compiled.clone());

        let linker = host::linker(&engine, &compiled).map_err(|error| module.error(format!("{error:#}")))?;
        let mut problems = Vec::new();
        let interface = GuestInterface::of(&engine, &compiled, max_memory, &mut problems);
        check_imports(&compiled, &linker, &engine, &mut problems);
        let Some(interface) = interface.filter(|_| problems.is_empty()) else {
            let more = problems.len().saturating_sub(MAX_PROBLEMS);
            problems.truncate(MAX_PROBLEMS);
            if more > 0 {
                problems.push(format!("and {more} more problems"));
            }
            return Err(module.errors(problems));
        };
        let guest = linker.instantiate_pre(&compiled).map_err(|error| module.error(one_line(&error)))?;
        let initialize = compiled.get_export_index("_initialize");
        let tracer = Arc::new(Tracer::new(Arc::clone(&module.symbols), &compiled));
        Ok(Self { path: module.path().to_owned(), engine, guest, initialize, interface, from_cache, tracer })
    }

    /// The hooks that the module takes.
    pub(crate) fn hooks(&self) -> Hooks {
        self.interface.hooks()
    }
}

/// The module's code for `engine`, and whether it existed: compiled earlier or in the cache.
/// Otherwise it is compiled now.
fn code(module: &Module, engine: &Engine, cache: Option<&Cache>) -> Result<(wasmtime::Module, bool), LoadError> {
    if let Some(code) = module.compiled_before(engine).or_else(|| cache.and_then(|cache| cache.load(engine, module.digest()))) {
        return Ok((code, true));
    }
    proposals::check(&module.bytes).map_err(|problem| module.error(problem))?;
    let code = wasmtime::Module::new(engine, without_names(&module.bytes))
        .map_err(|error| module.error(format!("invalid module: {}", one_line(&error))))?;
    if let Some(cache) = cache {
        cache.store(engine, module.digest(), &code);
    }
    Ok((code, false))
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

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(wat: &str) -> String {
        let bytes = wat::parse_str(wat).unwrap();
        match Module::from_bytes("m.wasm", bytes, None).and_then(|module| Artifact::compile(&module, 1, 1 << 20, None)) {
            Ok(_) => String::new(),
            Err(error) => error.to_string(),
        }
    }

    const GOOD: &str = r#"(module (memory (export "memory") 1)
        (func (export "alloc") (param i32) (result i32) i32.const 8)
        (func (export "dealloc") (param i32 i32))
        (func (export "on_request_headers") (param i32 i32) (result i64) i64.const 0))"#;
    #[test]
    fn accepts_a_valid_module() {
        assert_eq!(problem(GOOD), "");
    }

    #[test]
    fn names_all_problems_in_one_line() {
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
            "unknown import `env.nonsense`",
            "`wasi_snapshot_preview1.fd_write` has the type (i32) -> (), but the agent provides (i32, i32, i32, i32) -> i32",
            "unknown import `env.table`",
        ] {
            assert!(message.contains(part), "{part} in {message}");
        }
        assert!(!message.contains('\n'));
    }

    #[test]
    fn gives_a_hint_for_a_replaceable_import() {
        let message =
            problem(&GOOD.replace("(module ", r#"(module (import "env" "crypto.getRandomValuesN" (func (param i32) (result i32)))"#));
        assert!(
            message.contains("unknown import `env.crypto.getRandomValuesN` (import `wasi_snapshot_preview1.random_get` instead)"),
            "{message}"
        );
    }

    #[test]
    fn gives_a_hint_for_a_command() {
        assert!(problem(r#"(module (memory (export "memory") 1) (func (export "_start")))"#).contains("build a reactor"));
    }

    #[test]
    fn rejects_a_memory_over_the_limit() {
        let message = problem(&GOOD.replace("\"memory\") 1", "\"memory\") 17"));
        assert!(message.contains("more than the limit of 1048576: raise `--max-memory-mb`"), "{message}");
    }

    #[test]
    fn rejects_too_many_elements() {
        // One more than the limit, in two segments of two kinds.
        let segments = |more: usize| {
            format!("(func $f) (elem funcref {}) (elem func {}))", "(ref.null func)".repeat(50_000), "$f ".repeat(50_000 + more))
        };
        let module = |more| format!("{}{}", GOOD.strip_suffix(')').unwrap(), segments(more));
        assert_eq!(problem(&module(0)), "");
        assert!(problem(&module(1)).contains("100001 elements, more than the limit of 100000"));
    }

    #[test]
    fn distinguishes_other_files() {
        let message = |bytes: &[u8]| Module::from_bytes("m", bytes.to_vec(), None).unwrap_err().to_string();
        assert!(message(b"").contains("empty"));
        assert!(message(b"\0asm\x0d\0\x01\0").contains("component"));
        assert!(message(b"  (module)").contains("text format"));
        assert!(message(b"\x7fELF").contains("not Wasm"));
        assert!(message(b"\0asm\x02\0\0\0").contains("version"));
        assert!(problem("(module (func (result i32) (i64.const 0)))").contains("invalid module"));
        assert!(problem(r#"(module (memory (export "memory") i64 1))"#).contains("`memory64`, which the agent does not support"));
    }
}
