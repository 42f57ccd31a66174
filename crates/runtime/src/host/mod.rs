//! The functions that the agent itself gives to modules, beside those of WASI.

pub(crate) mod assemblyscript;
pub(crate) mod guest_log;
pub(crate) mod wasi;

use wasmtime::{Caller, Linker, Result};
use zentinel_wasm_contract::FailureKind;

use crate::host::guest_log::{Level, MAX_LINE};
use crate::instance::State;

/// Defines every import but those of WASI and of AssemblyScript.
pub(crate) fn define(linker: &mut Linker<State>) -> Result<()> {
    linker.func_wrap_async("zentinel", "log", |caller, (level, ptr, len): (i32, i32, i32)| {
        Box::new(log(caller, level, ptr, len.cast_unsigned().min(MAX_LINE as u32)))
    })?;
    linker.func_wrap("env", "emscripten_notify_memory_growth", |_memory: i32| {})?;
    Ok(())
}

async fn log(mut caller: Caller<'_, State>, level: i32, ptr: i32, len: u32) -> Result<()> {
    let (memory, state) = State::memory(&mut caller)?;
    let Some(line) = slice(memory, ptr, len) else {
        return Err(state.fail(FailureKind::Trap, "it called `zentinel.log` with text outside its memory"));
    };
    let cost = state.log(Level::from_guest(level), line);
    State::spend(&mut caller, cost).await
}

/// `len` bytes of the guest's memory at `ptr`, if it has them.
pub(crate) fn slice(memory: &[u8], ptr: i32, len: u32) -> Option<&[u8]> {
    let start = ptr.cast_unsigned() as usize;
    memory.get(start..start.checked_add(len as usize)?)
}

/// The same to write to.
pub(crate) fn slice_mut(memory: &mut [u8], ptr: i32, len: u32) -> Option<&mut [u8]> {
    let start = ptr.cast_unsigned() as usize;
    memory.get_mut(start..start.checked_add(len as usize)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_never_leave_the_memory() {
        let memory = [0; 16];
        assert!(slice(&memory, 0, 16).is_some());
        assert!(slice(&memory, 16, 0).is_some());
        for (ptr, len) in [(0, 17), (16, 1), (-1, 1), (8, u32::MAX), (-1, u32::MAX)] {
            assert!(slice(&memory, ptr, len).is_none(), "{ptr} {len}");
        }
    }
}
