//! The functions that the agent itself gives to modules, beside those of WASI.

use wasmtime::{Caller, Linker, Result};
use zentinel_wasm_contract::FailureKind;

use crate::instance::State;
use crate::log::{Level, MAX_LINE};

/// Defines every import but WASI's.
pub(crate) fn define(linker: &mut Linker<State>) -> Result<()> {
    linker.func_wrap_async("zentinel", "log", |caller, (level, ptr, len): (i32, i32, i32)| {
        Box::new(log(caller, level, ptr, len.cast_unsigned().min(MAX_LINE as u32)))
    })?;
    linker.func_wrap("env", "emscripten_notify_memory_growth", |_memory: i32| {})?;
    linker.func_wrap("env", "abort", |mut caller: Caller<'_, State>, message: i32, file: i32, line: i32, column: i32| -> Result<()> {
        let (memory, state) = State::memory(&mut caller)?;
        let message = assemblyscript_string(memory, message);
        let file = assemblyscript_string(memory, file);
        let detail = format!("it aborted: {message} at {file}:{line}:{column}");
        state.log(Level::Error, detail.as_bytes());
        Err(state.fail(FailureKind::Trap, detail))
    })?;
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

/// A string of AssemblyScript: UTF-16, its length in bytes in the four bytes before it. Its first part is enough for a message.
fn assemblyscript_string(memory: &[u8], ptr: i32) -> String {
    const SHOWN: u32 = 1024;
    if ptr == 0 {
        return "?".into();
    }
    let text = slice(memory, ptr.wrapping_sub(4), 4)
        .and_then(|len| len.try_into().ok().map(u32::from_le_bytes))
        .and_then(|len| slice(memory, ptr, len.min(SHOWN)));
    let Some(text) = text else { return "?".into() };
    let units = text.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
    char::decode_utf16(units)
        .map(|unit| unit.unwrap_or(char::REPLACEMENT_CHARACTER))
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
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

    #[test]
    fn strings_of_assemblyscript_are_read() {
        let mut memory = vec![0; 16];
        memory[4..8].copy_from_slice(&4_u32.to_le_bytes());
        memory[8..12].copy_from_slice(&[b'h', 0, b'i', 0]);
        assert_eq!(assemblyscript_string(&memory, 8), "hi");
        assert_eq!(assemblyscript_string(&memory, 0), "?");
        assert_eq!(assemblyscript_string(&memory, 2), "?");
        memory[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(assemblyscript_string(&memory, 8), "?");
    }
}
