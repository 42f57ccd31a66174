//! Where in its code a guest was when its call failed, for the log.
//!
//! A failed call keeps two numbers per frame. Names and lines are looked up in the module's file,
//! and only if the failure is logged, because a module may fail all of its calls at full rate.

mod lines;
mod metered;
mod names;
pub(crate) mod symbols;

use std::sync::Arc;

use wasmtime::{Error, Module, WasmBacktrace};
use zentinel_wasm_contract::Trace;

use symbols::{Frame, Symbols};

/// Most frames that are shown. They begin at the cause of a failure, and its hook is logged too.
const MAX_SHOWN: usize = 8;

/// Most frames of a failed call that are kept: those that are shown, and as many of panic
/// machinery as languages have.
pub(crate) const MAX_KEPT: usize = 3 * MAX_SHOWN;

/// Makes the traces of one module's calls.
pub(crate) struct Tracer {
    symbols: Arc<Symbols>,
    /// Addresses of the guest's native code. Calls have frames of the adapter too.
    code: std::ops::Range<usize>,
}

impl Tracer {
    pub(crate) fn new(symbols: Arc<Symbols>, compiled: &Module) -> Self {
        Self { symbols, code: addresses(compiled) }
    }

    /// The guest's frames of the call that ended in `error`, if it had any.
    pub(crate) fn trace(&self, error: &Error) -> Option<Arc<dyn Trace>> {
        let frames = error.downcast_ref::<WasmBacktrace>()?.frames();
        let guest = frames.iter().filter(|frame| addresses(frame.module()) == self.code);
        let frames: Vec<_> = guest.map(|frame| Frame { function: frame.func_index(), offset: frame.module_offset() }).collect();
        (!frames.is_empty()).then(|| Arc::new(GuestTrace { symbols: Arc::clone(&self.symbols), frames }) as Arc<dyn Trace>)
    }
}

fn addresses(compiled: &Module) -> std::ops::Range<usize> {
    let range = compiled.image_range();
    range.start.addr()..range.end.addr()
}

/// The frames of one call, from the innermost.
struct GuestTrace {
    symbols: Arc<Symbols>,
    frames: Vec<Frame>,
}

impl std::fmt::Debug for GuestTrace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(&self.frames).finish()
    }
}

impl Trace for GuestTrace {
    fn describe(&self) -> String {
        let locations = self.symbols.locate(&self.frames);
        let mut own = locations.iter().filter(|location| !location.is_machinery).peekable();
        if own.peek().is_none() {
            return locations.first().map(ToString::to_string).unwrap_or_default();
        }
        let mut shown: Vec<_> = own.by_ref().take(MAX_SHOWN).map(ToString::to_string).collect();
        if own.next().is_some() {
            shown.push("…".into());
        }
        shown.join(" < ")
    }

    fn is_slow(&self) -> bool {
        self.symbols.are_slow()
    }
}
