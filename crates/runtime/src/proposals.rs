//! The WebAssembly proposals that a module may use: an allow-list, and a decision about all others.
//!
//! wasmtime enables more than its cargo features suggest: built without `gc`, version 48 still
//! accepts subtypes of function types and aborts the process when one is called
//! (RUSTSEC-2026-0570). Every proposal is code that a hostile module can reach, so only those are
//! enabled that toolchains emit for the modules that the agent runs. A test fails if an update adds
//! a proposal that is in neither list.

use wasmparser::{Validator, WasmFeatures};

/// The enabled proposals. All of them are deterministic.
pub(crate) const ALLOWED: WasmFeatures = union(&[
    // Part of WebAssembly 1.0, but wasmparser can disable it.
    WasmFeatures::FLOATS,
    // LLVM exports its stack pointer, a mutable global.
    WasmFeatures::MUTABLE_GLOBAL,
    // On by default in rustc, clang and Zig; Go emits the first two as well.
    WasmFeatures::SATURATING_FLOAT_TO_INT,
    WasmFeatures::SIGN_EXTENSION,
    WasmFeatures::MULTI_VALUE,
    // `memory.copy` and `memory.fill`, which every toolchain emits, including AssemblyScript and
    // Go.
    WasmFeatures::BULK_MEMORY,
    WasmFeatures::BULK_MEMORY_OPT,
    // Tables of function references, and the long encoding of `call_indirect` that LLVM emits since
    // version 19. `externref` also needs `GC_TYPES`, which is disabled.
    WasmFeatures::REFERENCE_TYPES,
    WasmFeatures::CALL_INDIRECT_OVERLONG,
    // Only with an option (`+simd128`, `-msimd128`, `--enable simd`), but it speeds up libraries
    // that parse or match.
    WasmFeatures::SIMD,
    // For addresses in position-independent code; part of LLVM's `lime1`.
    WasmFeatures::EXTENDED_CONST,
    // With an option (`-mtail-call`) and in functional languages. Function entries check the
    // deadline.
    WasmFeatures::TAIL_CALL,
]);

/// The enabled proposals beyond WebAssembly 1.0, by their public names.
const ENABLED: [(&str, WasmFeatures); 9] = [
    ("mutable-globals", WasmFeatures::MUTABLE_GLOBAL),
    ("saturating-float-to-int", WasmFeatures::SATURATING_FLOAT_TO_INT),
    ("sign-extension", WasmFeatures::SIGN_EXTENSION),
    ("multi-value", WasmFeatures::MULTI_VALUE),
    ("bulk-memory", union(&[WasmFeatures::BULK_MEMORY, WasmFeatures::BULK_MEMORY_OPT])),
    ("reference-types", union(&[WasmFeatures::REFERENCE_TYPES, WasmFeatures::CALL_INDIRECT_OVERLONG])),
    ("simd", WasmFeatures::SIMD),
    ("extended-const", WasmFeatures::EXTENDED_CONST),
    ("tail-call", WasmFeatures::TAIL_CALL),
];

/// A proposal that no module may use.
struct DisabledProposal {
    feature: WasmFeatures,
    /// Its public name.
    name: &'static str,
    /// What to build with instead.
    remedy: &'static str,
}

const NO_COLLECTOR: &str = "use a language that keeps its data in linear memory, such as Rust, C, C++, Zig, Go or AssemblyScript";

const NO_EXCEPTIONS: &str = "build without exceptions: clang++ and Zig with `-fno-exceptions`, rustc with `-C panic=abort`";

/// For proposals that no stable toolchain emits.
const EXPERIMENTAL: &str = "build without this experimental feature";

/// The proposals that a core module may not use.
const DISABLED: &[DisabledProposal] = &[
    // Not supported, because a call runs on one thread.
    DisabledProposal {
        feature: WasmFeatures::THREADS,
        name: "threads",
        remedy: "build without threads: clang without `-pthread` and `-matomics`, rustc without `-C target-feature=+atomics`, Zig with \
                 `-fsingle-threaded`, asc without `--enable threads`",
    },
    DisabledProposal { feature: WasmFeatures::SHARED_EVERYTHING_THREADS, name: "shared-everything-threads", remedy: EXPERIMENTAL },
    // Results depend on the processor.
    DisabledProposal {
        feature: WasmFeatures::RELAXED_SIMD,
        name: "relaxed-simd",
        remedy: "build with plain SIMD: clang without `-mrelaxed-simd`, rustc without `-C target-feature=+relaxed-simd`, Zig without \
                 `relaxed_simd` in `-mcpu`, asc without `--enable relaxed-simd`",
    },
    // The guest interface has one memory with 32-bit addresses.
    DisabledProposal { feature: WasmFeatures::MULTI_MEMORY, name: "multi-memory", remedy: "build and link it with one memory" },
    DisabledProposal { feature: WasmFeatures::MEMORY64, name: "memory64", remedy: "build for `wasm32`, not `wasm64`" },
    // Limits are in pages of 64 KiB.
    DisabledProposal {
        feature: WasmFeatures::CUSTOM_PAGE_SIZES,
        name: "custom-page-sizes",
        remedy: "link it with pages of 64 KiB: `wasm-ld` without `--page-size`",
    },
    DisabledProposal { feature: WasmFeatures::MEMORY_CONTROL, name: "memory-control", remedy: EXPERIMENTAL },
    // Exceptions and the following proposals use a garbage-collected heap, which the agent neither
    // bounds nor resets.
    DisabledProposal { feature: WasmFeatures::EXCEPTIONS, name: "exceptions", remedy: NO_EXCEPTIONS },
    DisabledProposal { feature: WasmFeatures::LEGACY_EXCEPTIONS, name: "legacy-exceptions", remedy: NO_EXCEPTIONS },
    // It includes subtypes and recursive types, also of functions.
    DisabledProposal { feature: WasmFeatures::GC, name: "gc", remedy: NO_COLLECTOR },
    DisabledProposal { feature: WasmFeatures::FUNCTION_REFERENCES, name: "function-references", remedy: NO_COLLECTOR },
    DisabledProposal {
        feature: WasmFeatures::GC_TYPES,
        name: "externref",
        remedy: "use numbers as handles, and build without wasm-bindgen, which is for browsers",
    },
    DisabledProposal { feature: WasmFeatures::CUSTOM_DESCRIPTORS, name: "custom-descriptors", remedy: NO_COLLECTOR },
    DisabledProposal { feature: WasmFeatures::STACK_SWITCHING, name: "stack-switching", remedy: EXPERIMENTAL },
    DisabledProposal {
        feature: WasmFeatures::WIDE_ARITHMETIC,
        name: "wide-arithmetic",
        remedy: "build without it: clang without `-mwide-arithmetic`, rustc without `-C target-feature=+wide-arithmetic`, Zig without \
                 `wide_arithmetic` in `-mcpu`",
    },
    DisabledProposal { feature: WasmFeatures::COMPACT_IMPORTS, name: "compact-import-section", remedy: EXPERIMENTAL },
];

/// Proposals for components, which are rejected by their header. Disabled too.
#[cfg(test)]
const OF_COMPONENTS: WasmFeatures = union(&[
    WasmFeatures::COMPONENT_MODEL,
    WasmFeatures::CM_VALUES,
    WasmFeatures::CM_NESTED_NAMES,
    WasmFeatures::CM_ASYNC,
    WasmFeatures::CM_ASYNC_STACKFUL,
    WasmFeatures::CM_MORE_ASYNC_BUILTINS,
    WasmFeatures::CM_THREADING,
    WasmFeatures::CM_ERROR_CONTEXT,
    WasmFeatures::CM_FIXED_LENGTH_LISTS,
    WasmFeatures::CM_GC,
    WasmFeatures::CM_MAP,
    WasmFeatures::CM64,
    WasmFeatures::CM_IMPLEMENTS,
    WasmFeatures::CM_CANON_NAMES,
]);

/// Proposals whose types also need `GC_TYPES`, like `externref`.
const WITH_GC_TYPES: WasmFeatures =
    union(&[WasmFeatures::GC, WasmFeatures::EXCEPTIONS, WasmFeatures::CUSTOM_DESCRIPTORS, WasmFeatures::STACK_SWITCHING]);

/// Most proposals named in one message. Each takes several validations of the whole module.
const MAX_NAMED: usize = 3;

/// Checks that `module` is valid and uses only what is [`ALLOWED`].
///
/// # Errors
///
/// The problem, in one line: the unsupported proposals and how to build without them, or why the
/// module is invalid.
pub(crate) fn check(module: &[u8]) -> Result<(), String> {
    let Err(error) = validate(module, ALLOWED) else { return Ok(()) };
    let needed = needed(module, &error);
    if needed.is_empty() {
        return Err(format!("invalid module: {error}"));
    }
    let names: Vec<_> = needed.iter().map(|proposal| format!("`{}`", proposal.name)).collect();
    let mut remedies: Vec<_> = needed.iter().map(|proposal| proposal.remedy).collect();
    remedies.dedup();
    let uses = if needed.len() == 1 { "proposal" } else { "proposals" };
    Err(format!("it uses the {uses} {}, which the agent does not support: {}", names.join(", "), remedies.join("; ")))
}

/// The enabled proposals that the valid module uses: those without which it is invalid.
pub(crate) fn used(module: &[u8]) -> Vec<&'static str> {
    let mvp = ENABLED.iter().fold(ALLOWED, |features, (_, feature)| features - *feature);
    if validate(module, mvp).is_ok() {
        return Vec::new();
    }
    ENABLED.iter().filter(|(_, feature)| validate(module, ALLOWED - *feature).is_err()).map(|(name, _)| *name).collect()
}

/// The proposals without which `module` fails with `error`. Empty if it is invalid even with all
/// proposals.
fn needed(module: &[u8], error: &wasmparser::Error) -> Vec<&'static DisabledProposal> {
    let mut needed: Vec<&DisabledProposal> = Vec::new();
    let mut features = ALLOWED;
    let (mut offset, mut missing) = (error.offset(), error.missing_wasm_feature());
    while needed.len() < MAX_NAMED {
        let candidates = DISABLED.iter().filter(|proposal| !features.contains(proposal.feature));
        let (proposal, outcome) = match missing.and_then(|feature| candidates.clone().find(|proposal| proposal.feature == feature)) {
            Some(proposal) => (proposal, validate(module, features | proposal.feature)),
            // Not every error names a proposal. Then it is the one with which validation gets
            // further.
            None => {
                let further = candidates
                    .map(|proposal| (proposal, validate(module, features | proposal.feature)))
                    .find(|(_, outcome)| outcome.as_ref().err().is_none_or(|error| error.offset() > offset));
                let Some(further) = further else { return Vec::new() };
                further
            }
        };
        needed.push(proposal);
        features |= proposal.feature;
        match outcome {
            Ok(()) => break,
            Err(error) => (offset, missing) = (error.offset(), error.missing_wasm_feature()),
        }
    }
    if needed.iter().any(|proposal| WITH_GC_TYPES.contains(proposal.feature)) {
        // Its remedy is sufficient, and the remedy for `externref` would be misleading.
        needed.retain(|proposal| proposal.feature != WasmFeatures::GC_TYPES);
    }
    needed
}

fn validate(module: &[u8], features: WasmFeatures) -> wasmparser::Result<()> {
    Validator::new_with_features(features).validate_all(module).map(|_| ())
}

const fn union(list: &[WasmFeatures]) -> WasmFeatures {
    let (mut all, mut at) = (WasmFeatures::empty(), 0);
    while at < list.len() {
        all = all.union(list[at]);
        at += 1;
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn fixture(name: &str) -> Vec<u8> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/hostile");
        let text = std::fs::read_to_string(folder.join(name).with_extension("wat")).unwrap_or_else(|error| panic!("{name}: {error}"));
        wat::parse_str(text).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    #[test]
    fn every_proposal_is_decided_on() {
        let disabled = DISABLED.iter().fold(OF_COMPONENTS, |all, proposal| {
            assert!(!all.intersects(proposal.feature), "{} is listed twice", proposal.name);
            all | proposal.feature
        });
        for (name, feature) in WasmFeatures::all().iter_names() {
            // A new proposal: find out which code it reaches, and which toolchains emit it, before
            // adding it to a list.
            assert!(ALLOWED.contains(feature) != disabled.contains(feature), "{name} is in both lists or in none");
        }
        assert_eq!((ALLOWED | disabled, ALLOWED & disabled), (WasmFeatures::all(), WasmFeatures::empty()));
    }

    #[test]
    fn every_enabled_proposal_has_a_name() {
        let named = ENABLED.iter().fold(WasmFeatures::FLOATS, |all, (name, feature)| {
            assert!(!all.intersects(*feature), "{name} is listed twice");
            all | *feature
        });
        assert_eq!(named, ALLOWED);
    }

    #[test]
    fn names_the_used_proposals() {
        for (text, names) in [
            ("(func (export \"f\") (param f64) (result i32) local.get 0 i32.trunc_f64_s)", &[][..]),
            ("(memory 1) (table 1 funcref) (func $f) (elem (i32.const 0) $f) (data (i32.const 0) \"x\")", &[]),
            ("(global (export \"sp\") (mut i32) (i32.const 0))", &["mutable-globals"]),
            ("(func (result i32) (i32.trunc_sat_f32_s (f32.const 1)))", &["saturating-float-to-int"]),
            ("(func (result i32) (i32.extend8_s (i32.const 1)))", &["sign-extension"]),
            ("(func (result i32 i32) (i32.const 1) (i32.const 2))", &["multi-value"]),
            ("(memory 1) (func (memory.fill (i32.const 0) (i32.const 0) (i32.const 1)))", &["bulk-memory"]),
            ("(table 1 funcref) (func (param i32) (result funcref) (table.get (local.get 0)))", &["reference-types"]),
            ("(func (result v128) (v128.const i64x2 1 2))", &["simd"]),
            ("(global i32 (i32.add (i32.const 1) (i32.const 2)))", &["extended-const"]),
            ("(func $f (return_call $f))", &["tail-call"]),
            ("(func $f (result i32 i32) (return_call $f))", &["multi-value", "tail-call"]),
        ] {
            assert_eq!(used(&wat::parse_str(format!("(module {text})")).unwrap()), names, "{text}");
        }
    }

    #[test]
    fn names_disabled_proposals_with_a_remedy() {
        for proposal in DISABLED {
            let module = fixture(proposal.name);
            let message = check(&module).unwrap_err();
            let DisabledProposal { name, remedy, .. } = proposal;
            assert!(message.contains(&format!("`{name}`")) && message.contains(remedy), "{name}: {message}");
            // The engine rejects it too.
            let engine = crate::engine::new(1).unwrap();
            assert!(wasmtime::Module::new(&engine, &module).is_err(), "{name}");
        }
    }

    #[test]
    fn rejects_subtypes_and_recursive_types_of_functions() {
        let types = [
            "(type (sub (func)))",
            "(type $a (sub (func))) (type (sub final $a (func)))",
            "(rec (type (func)))",
            "(rec (type (func)) (type (func (param i32))))",
            "(type $a (func (param (ref null $a))))",
            "(type $a (func)) (func (param (ref $a)))",
            "(func (param (ref func)))",
            "(func (param anyref))",
            "(func (result i32) (ref.test nullfuncref (ref.null func)))",
            "(type $a (func)) (func (call_ref $a (ref.null $a)))",
        ];
        let modules = types.map(|types| (types, wat::parse_str(format!("(module {types})")).unwrap()));
        let fixtures = ["subtyping-call-indirect", "subtyping-ref-test", "subtyping-initialize"].map(|name| (name, fixture(name)));
        for (name, module) in modules.into_iter().chain(fixtures) {
            let message = check(&module).unwrap_err();
            assert!(message.starts_with("it uses the proposal") && message.contains("linear memory"), "{name}: {message}");
            assert!(wasmtime::Module::new(&crate::engine::new(1).unwrap(), &module).is_err(), "{name}");
        }
    }

    #[test]
    fn distinguishes_types_of_a_proposal_from_externref() {
        for (text, named) in [
            ("(type (struct))", "the proposal `gc`"),
            ("(type (array i32))", "the proposal `gc`"),
            ("(func (param anyref))", "the proposal `gc`"),
            ("(type $f (func)) (type (cont $f))", "the proposal `stack-switching`"),
            ("(func (param externref))", "the proposal `externref`"),
        ] {
            let message = check(&wat::parse_str(format!("(module {text})")).unwrap()).unwrap_err();
            assert!(message.starts_with(&format!("it uses {named}")), "{text}: {message}");
        }
    }

    #[test]
    fn allows_what_toolchains_emit() {
        for text in [
            "(global (export \"sp\") (mut i32) (i32.const 0))",
            "(func (result i32) (i32.trunc_sat_f32_s (f32.const 1)))",
            "(func (result i32) (i32.extend8_s (i32.const 1)))",
            "(func (result i32 i32) (i32.const 1) (i32.const 2))",
            "(memory 1) (func (memory.fill (i32.const 0) (i32.const 0) (i32.const 1)))",
            "(memory 1) (data $d \"x\") (func (memory.init $d (i32.const 0) (i32.const 0) (i32.const 1)))",
            "(table 1 funcref) (func (param i32) (result funcref) (table.get (local.get 0)))",
            "(func (result v128) (v128.const i64x2 1 2))",
            "(global i32 (i32.add (i32.const 1) (i32.const 2)))",
            "(func $f (return_call $f))",
            "(type $a (sub final (func)))",
        ] {
            let module = wat::parse_str(format!("(module {text})")).unwrap();
            assert_eq!(check(&module), Ok(()), "{text}");
            wasmtime::Module::new(&crate::engine::new(1).unwrap(), &module).unwrap_or_else(|error| panic!("{text}: {error:#}"));
        }
    }

    #[test]
    fn reports_modules_that_are_invalid_with_any_proposals() {
        let module = wat::parse_str("(module (func (result i32) (i64.const 0)))").unwrap();
        assert!(check(&module).unwrap_err().starts_with("invalid module: "));
        let both = wat::parse_str("(module (memory i64 1) (func (result i32) (i64.const 0)))").unwrap();
        assert!(check(&both).unwrap_err().starts_with("invalid module: "));
    }
}
