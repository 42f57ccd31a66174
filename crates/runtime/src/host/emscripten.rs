//! What Emscripten's standalone modules import beside WASI.

use wasmtime::{Linker, Result};

use crate::host::state::HostState;

/// Defines `env.emscripten_notify_memory_growth`. Nothing caches the guest's memory, so it does
/// nothing.
pub(crate) fn define(linker: &mut Linker<HostState>) -> Result<()> {
    linker.func_wrap("env", "emscripten_notify_memory_growth", |_memory: i32| {})?;
    Ok(())
}
