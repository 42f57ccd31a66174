//! `zentinel.log`: a line for the agent's log.

use wasmtime::{Caller, Linker, Result};
use zentinel_wasm_contract::FailureKind;

use crate::host::guest_log::{Level, MAX_LINE};
use crate::host::state::HostState;
use crate::memory::slice;

/// Defines `zentinel.log(level, ptr, len)`.
pub(crate) fn define(linker: &mut Linker<HostState>) -> Result<()> {
    linker.func_wrap_async("zentinel", "log", |caller, (level, ptr, len): (i32, i32, i32)| {
        Box::new(log(caller, level, ptr, len.cast_unsigned().min(MAX_LINE as u32)))
    })?;
    Ok(())
}

async fn log(mut caller: Caller<'_, HostState>, level: i32, ptr: i32, len: u32) -> Result<()> {
    let (memory, state) = HostState::memory(&mut caller)?;
    let Some(line) = slice(memory, ptr, len) else {
        return Err(state.fail(FailureKind::Trap, "it called `zentinel.log` with text outside its memory"));
    };
    let cost = state.log(Level::from_guest(level), line);
    HostState::spend(&mut caller, cost).await
}
