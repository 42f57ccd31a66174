//! Checks of a module's exports and imports. Each problem is described for the module's author,
//! with a hint.

use std::collections::HashSet;

use wasmparser::{ElementItems, Parser, Payload};
use wasmtime::{Engine, ExternType, FuncType, Linker, ValType};
use zentinel_wasm_contract::shortened;

use crate::host::state::HostState;

/// Most characters of an import's name in a message.
const MAX_NAME: usize = 60;

/// Most characters of a function's type in a report.
const MAX_SIGNATURE: usize = 100;

/// Most exports and imports in a report, each. Real modules have some dozens.
const MAX_LISTED: usize = 1000;

/// An export, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// Its name, shortened.
    pub name: String,
    /// Its type, such as `(i32) -> i32` or `memory`.
    pub ty: String,
}

/// An import, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Import {
    /// The name of the module that it is from, shortened.
    pub module: String,
    /// Its name, shortened.
    pub name: String,
    /// Its type, as for an export.
    pub ty: String,
}

/// The first [`MAX_LISTED`] exports and imports.
pub(crate) fn exports_and_imports(module: &wasmtime::Module) -> (Vec<Export>, Vec<Import>) {
    let short = |name: &str| shortened(name, MAX_NAME);
    let exports = module.exports().take(MAX_LISTED).map(|export| Export { name: short(export.name()), ty: describe(&export.ty()) });
    let imports = module.imports().take(MAX_LISTED).map(|import| Import {
        module: short(import.module()),
        name: short(import.name()),
        ty: describe(&import.ty()),
    });
    (exports.collect(), imports.collect())
}

fn describe(ty: &ExternType) -> String {
    match ty {
        // A type may have a thousand parameters.
        ExternType::Func(ty) => shortened(&signature(ty), MAX_SIGNATURE),
        ExternType::Global(_) => "global".into(),
        ExternType::Table(_) => "table".into(),
        ExternType::Memory(_) => "memory".into(),
        ExternType::Tag(_) => "tag".into(),
    }
}

/// Counts the elements of all segments. Stops at invalid bytes, which the compiler will report.
pub(crate) fn elements(module: &[u8]) -> u64 {
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

/// Checks that the module exports the function `name` with the type `wanted`.
pub(crate) fn check_function(module: &wasmtime::Module, name: &str, wanted: &str, required: bool, problems: &mut Vec<String>) -> bool {
    match module.get_export(name) {
        Some(ExternType::Func(ty)) if signature(&ty) == wanted => return true,
        Some(ExternType::Func(ty)) => problems.push(format!("its export `{name}` has the type {}, not {wanted}", signature(&ty))),
        Some(_) => problems.push(format!("its export `{name}` is not a function")),
        None if required => problems.push(format!("it does not export `{name}`: export it with the type {wanted}, as the SDKs do")),
        None => {}
    }
    false
}

pub(crate) fn check_imports(module: &wasmtime::Module, linker: &Linker<HostState>, engine: &Engine, problems: &mut Vec<String>) {
    let mut store = wasmtime::Store::new(engine, HostState::probe());
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
                "its import `{from}.{name}` has the type {}, but the agent provides {}",
                signature(&wanted),
                signature(&provided)
            )),
            _ => problems.push(format!(
                "unknown import `{}.{}`{}",
                shortened(from, MAX_NAME),
                shortened(name, MAX_NAME),
                import_hint(from, name)
            )),
        }
    }
}

fn import_hint(from: &str, name: &str) -> &'static str {
    match (from, name) {
        ("env", "memory") => " (the module must define and export its memory)",
        ("wasi_unstable", _) => " (build for WASI preview 1)",
        ("__wbindgen_placeholder__" | "./index_bg.js" | "wbg", _) => " (build without wasm-bindgen, which is for browsers)",
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
