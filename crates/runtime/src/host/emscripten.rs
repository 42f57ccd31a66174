//! The imports of Emscripten's standalone modules in addition to WASI.

use wasmtime::{Linker, Result};

use crate::host::state::HostState;

/// Defines `env.emscripten_notify_memory_growth`, which does nothing because the host does not
/// cache the guest's memory.
pub(crate) fn define(linker: &mut Linker<HostState>) -> Result<()> {
    linker.func_wrap("env", "emscripten_notify_memory_growth", |_memory: i32| {})?;
    Ok(())
}
