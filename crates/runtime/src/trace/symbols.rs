//! The symbols of a module's file: exports, names, and debug information.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use wasmparser::{BinaryReader, ExportSectionReader, ExternalKind, KnownCustom, Name, NameSectionReader, Parser, Payload};
use zentinel_wasm_bounds::LARGE;
use zentinel_wasm_contract::shortened;

use super::{lines, names};

/// Most names that are read of a section. Large Go programs have some ten thousand functions.
const MAX_NAMES: usize = 200_000;

/// Most parts of a name section that are looked at. Each kind of names has one, of about twelve.
const MAX_PARTS: usize = 100;

/// Longest name of a function in a trace, in characters.
const MAX_NAME: usize = 120;

/// Longest path of a source file in a trace, in characters. Longer paths lose their beginning.
const MAX_PATH: usize = 60;

/// A frame of a call, as the engine knows it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Frame {
    /// Index of the function.
    pub(crate) function: u32,
    /// Where the instruction is in the module's file.
    pub(crate) offset: Option<usize>,
}

/// A place in the guest's code. Inlined functions have places of their own.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Location {
    /// The demangled name of the function.
    function: Option<String>,
    /// The function, or the one into which it was inlined, only carries a failure on.
    pub(crate) is_machinery: bool,
    index: u32,
    offset: Option<usize>,
    /// The file and the line.
    source: Option<(String, Option<u32>)>,
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.function, self.offset) {
            (Some(function), _) => write!(f, "`{}`", shortened(function, MAX_NAME))?,
            // For tools that look it up in a build with names.
            (None, Some(offset)) => write!(f, "function {} at offset {offset:#x}", self.index)?,
            (None, None) => write!(f, "function {}", self.index)?,
        }
        match &self.source {
            Some((file, Some(line))) => write!(f, " at {}:{line}", short_path(file)),
            Some((file, None)) => write!(f, " in {}", short_path(file)),
            None => Ok(()),
        }
    }
}

/// The end of a path, from a separator on if there is one.
fn short_path(path: &str) -> String {
    let Some((start, _)) = path.char_indices().rev().nth(MAX_PATH - 1) else { return shortened(path, MAX_PATH) };
    if start == 0 {
        return shortened(path, MAX_PATH);
    }
    let end = &path[start..];
    let end = end.find('/').map_or(end, |separator| &end[separator..]);
    format!("…{}", shortened(end, MAX_PATH))
}

/// Where the symbols of a module's file are.
#[derive(Debug)]
pub(crate) struct Symbols {
    file: Arc<[u8]>,
    exports: Range<usize>,
    names: Range<usize>,
    /// Debug information has addresses relative to this one.
    code: usize,
    /// The sections of debug information, by name.
    debug: Vec<(&'static str, Range<usize>)>,
    /// It takes too long to read.
    is_hostile: AtomicBool,
}

impl Symbols {
    /// Finds the symbols in a module's file. Stops at invalid bytes, which the compiler will
    /// report.
    pub(crate) fn find(file: Arc<[u8]>) -> Self {
        let (debug, is_hostile) = (Vec::new(), AtomicBool::new(false));
        let mut symbols = Self { file: Arc::clone(&file), exports: 0..0, names: 0..0, code: 0, debug, is_hostile };
        for section in Parser::new(0).parse_all(&file).map_while(Result::ok) {
            match section {
                Payload::ExportSection(section) => symbols.exports = section.range(),
                Payload::CodeSectionStart { range, .. } => symbols.code = range.start,
                Payload::CustomSection(section) => {
                    let range = section.data_offset()..section.range().end;
                    if section.name() == "name" {
                        symbols.names = range;
                    } else if let Some(name) = lines::SECTIONS.into_iter().find(|name| *name == section.name())
                        && symbols.debug.iter().all(|(known, _)| *known != name)
                    {
                        symbols.debug.push((name, range));
                    }
                }
                _ => {}
            }
        }
        symbols
    }

    /// Whether looking something up may take milliseconds.
    pub(crate) fn are_slow(&self) -> bool {
        !self.debug.is_empty() || self.names.len() + self.exports.len() >= LARGE
    }

    /// The places of `frames`, in their order. A frame has several if functions were inlined.
    pub(crate) fn locate(&self, frames: &[Frame]) -> Vec<Location> {
        let names = self.names(frames);
        let address = |frame: &Frame| u64::try_from(frame.offset?.checked_sub(self.code)?).ok();
        let addresses: Vec<_> = frames.iter().map(address).collect();
        let lines = if self.debug.is_empty() { Vec::new() } else { lines::find(|name| self.debug(name), &addresses, &self.is_hostile) };
        let mut lines = lines.into_iter();
        let mut locations = Vec::new();
        for frame in frames {
            let name = names.get(&frame.function).map(|name| names::demangled(name));
            let is_machinery = |name: &Option<String>| name.as_deref().is_some_and(names::is_machinery);
            let whole = is_machinery(&name);
            let location = |function, source| {
                let is_machinery = whole || is_machinery(&function);
                Location { function, is_machinery, index: frame.function, offset: frame.offset, source }
            };
            let places = lines.next().unwrap_or_default();
            if places.is_empty() {
                locations.push(location(name, None));
                continue;
            }
            let outermost = places.len() - 1;
            for (at, place) in places.into_iter().enumerate() {
                // The name section has no inlined functions, but clearer names for all others.
                let function = if at == outermost { name.clone().or(place.function) } else { place.function };
                locations.push(location(function, place.source));
            }
        }
        locations
    }

    fn debug(&self, name: &str) -> &[u8] {
        self.debug.iter().find(|(known, _)| *known == name).map_or(&[][..], |(_, range)| &self.file[range.clone()])
    }

    /// The names of the functions of `frames`, or those under which they are exported.
    fn names(&self, frames: &[Frame]) -> HashMap<u32, &str> {
        let is_wanted = |index: &u32| frames.iter().any(|frame| frame.function == *index);
        let reader = |range: &Range<usize>| BinaryReader::new(&self.file[range.clone()], range.start);
        let mut found = HashMap::new();
        if let Ok(exports) = ExportSectionReader::new(reader(&self.exports)) {
            let exports = exports.into_iter().map_while(Result::ok).take(MAX_NAMES).filter(|export| export.kind == ExternalKind::Func);
            found.extend(exports.filter(|export| is_wanted(&export.index)).map(|export| (export.index, export.name)));
        }
        for subsection in NameSectionReader::new(reader(&self.names)).map_while(Result::ok).take(MAX_PARTS) {
            if let Name::Function(functions) = subsection {
                let functions = functions.into_iter().map_while(Result::ok).take(MAX_NAMES);
                found.extend(functions.filter(|function| is_wanted(&function.index)).map(|function| (function.index, function.name)));
                break;
            }
        }
        found
    }
}

/// The module without its names, which the engine would copy for each frame of each failed call,
/// however long they are. All offsets remain.
pub(crate) fn without_names(file: &[u8]) -> Cow<'_, [u8]> {
    let mut changed = Cow::Borrowed(file);
    for section in Parser::new(0).parse_all(file).map_while(Result::ok) {
        if let Payload::CustomSection(section) = section
            && let KnownCustom::Name(_) = section.as_known()
        {
            // The name of the section ends where its data begins.
            changed.to_mut()[section.data_offset() - 1] = b'_';
        }
    }
    changed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn located(wat: &str, functions: &[u32]) -> Vec<String> {
        let symbols = Symbols::find(wat::parse_str(wat).unwrap().into());
        let frames: Vec<_> = functions.iter().map(|function| Frame { function: *function, offset: None }).collect();
        symbols.locate(&frames).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn names_come_from_names_then_exports_then_indices() {
        let module = r#"(module (import "a" "b" (func $imported)) (func $named (export "other")) (func (export "exported")) (func))"#;
        assert_eq!(located(module, &[3, 2, 1]), ["function 3", "`exported`", "`named`"]);
    }

    #[test]
    fn names_are_short_and_on_one_line() {
        let name = format!("a\\nb{}", "x".repeat(1 << 20));
        let module = format!(r#"(module (func (@name "{name}")))"#);
        assert_eq!(located(&module, &[0]), [format!("`a b{}`", "x".repeat(MAX_NAME - 3))]);
    }

    #[test]
    fn an_engine_gets_no_names() {
        let file = wat::parse_str("(module $m (func $secret))").unwrap();
        let without = without_names(&file);
        assert_eq!(file.iter().zip(without.iter()).filter(|(before, after)| before != after).count(), 1);
        let engine = wasmtime::Engine::default();
        assert_eq!(wasmtime::Module::new(&engine, &file).unwrap().name(), Some("m"));
        assert_eq!(wasmtime::Module::new(&engine, &without).unwrap().name(), None);
        assert!(matches!(without_names(&wat::parse_str("(module (func))").unwrap()), Cow::Borrowed(_)));
    }

    #[test]
    fn long_paths_lose_their_beginning() {
        assert_eq!(short_path("src/lib.rs"), "src/lib.rs");
        assert_eq!(
            short_path("/rustc/0123456789012345678901234567890123456789/library/core/src/option.rs"),
            "…/library/core/src/option.rs"
        );
        assert_eq!(short_path(&"x".repeat(100)), format!("…{}", "x".repeat(MAX_PATH)));
        assert_eq!(short_path(&"\u{1f600}".repeat(MAX_PATH)), "\u{1f600}".repeat(MAX_PATH));
    }
}
