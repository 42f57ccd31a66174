//! The functions that modules may import. Each interface is a file, and a module gets the
//! interfaces from which it imports.

mod assemblyscript;
mod clock;
mod emscripten;
pub(crate) mod guest_log;
mod log;
pub(crate) mod state;
mod timers;
mod wasi;

use wasmtime::{Engine, Linker, Module, Result};

use state::HostState;

/// An interface of the host.
struct HostInterface {
    /// The module name of its imports.
    namespace: &'static str,
    define: fn(&mut Linker<HostState>) -> Result<()>,
}

/// Every interface.
const INTERFACES: [HostInterface; 4] = [
    HostInterface { namespace: "zentinel", define: log::define },
    HostInterface { namespace: "env", define: emscripten::define },
    HostInterface { namespace: "env", define: assemblyscript::define },
    HostInterface { namespace: wasi::MODULE, define: wasi::define },
];

/// A linker with the interfaces that `module` imports from.
///
/// # Errors
///
/// Two functions have the same name, which is a bug in this crate.
pub(crate) fn linker(engine: &Engine, module: &Module) -> Result<Linker<HostState>> {
    let mut linker = Linker::new(engine);
    for HostInterface { namespace, define } in INTERFACES {
        if module.imports().any(|import| import.module() == namespace) {
            define(&mut linker)?;
        }
    }
    Ok(linker)
}
