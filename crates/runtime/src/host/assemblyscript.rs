//! The imports of AssemblyScript's standard library: `abort`, `Math.random`, `Date.now`,
//! `console.log` and similar functions, `trace`, `performance.now` and `process.exit`, with the
//! names and types that `asc` 0.28 emits.
//!
//! Strings are UTF-16, with their length in bytes in the four bytes before them. The guest controls
//! both, so the whole string is checked against the memory before any part of it is read.

use std::fmt::Write as _;
use std::time::Duration;

use wasmtime::{Caller, Linker, Result};
use zentinel_wasm_contract::FailureKind;

use crate::host::clock;
use crate::host::guest_log::{Level, MAX_LINE};
use crate::host::state::HostState;
use crate::host::timers::TimerAction;
use crate::memory::slice;

const MODULE: &str = "env";

/// UTF-16 units of a string that are read for the log: at least as many as fit in a line.
const MAX_UNITS: usize = MAX_LINE;

/// The same for the message and the file of an abort: enough to find the location.
const MAX_ABORT_UNITS: usize = 512;

/// The same for the label of a timer. Labels that start with the same units share a timer.
const MAX_LABEL_UNITS: usize = 64;

/// Approximate CPU time for converting a unit to text.
const UNIT_COST: Duration = Duration::from_nanos(4);

/// Approximate CPU time for reading a clock or a timer.
const CLOCK_COST: Duration = Duration::from_nanos(100);

/// Approximate CPU time for a seed, which comes from the kernel.
const SEED_COST: Duration = Duration::from_micros(1);

/// Defines the functions that `asc` imports.
pub(crate) fn define(linker: &mut Linker<HostState>) -> Result<()> {
    linker.func_wrap(
        MODULE,
        "abort",
        |mut caller: Caller<'_, HostState>, message: i32, file: i32, line: i32, column: i32| -> Result<()> {
            let (memory, state) = HostState::memory(&mut caller)?;
            let shown = |ptr| string(memory, ptr, MAX_ABORT_UNITS).filter(|_| ptr != 0).unwrap_or_else(|| "?".into());
            let (message, file) = (shown(message), shown(file));
            let detail = format!("it aborted: {message} at {file}:{line}:{column}").replace(char::is_control, " ");
            state.log(Level::Error, detail.as_bytes());
            Err(state.fail(FailureKind::Trap, detail))
        },
    )?;
    linker.func_wrap(MODULE, "process.exit", |mut caller: Caller<'_, HostState>, code: i32| -> Result<()> {
        Err(caller.data_mut().fail(FailureKind::Trap, format!("it called `process.exit({code})`")))
    })?;
    define_console(linker)?;
    linker.func_wrap_async(MODULE, "trace", |caller, (message, count, a, b, c, d, e): (i32, i32, f64, f64, f64, f64, f64)| {
        Box::new(trace(caller, message, count, [a, b, c, d, e]))
    })?;
    linker.func_wrap_async(MODULE, "seed", |caller, (): ()| Box::new(seed(caller)))?;
    linker.func_wrap_async(MODULE, "Date.now", |caller, (): ()| {
        Box::new(async move { Ok(milliseconds(caller, clock::REALTIME, "Date.now").await?.floor()) })
    })?;
    linker
        .func_wrap_async(MODULE, "performance.now", |caller, (): ()| Box::new(milliseconds(caller, clock::MONOTONIC, "performance.now")))?;
    Ok(())
}

fn define_console(linker: &mut Linker<HostState>) -> Result<()> {
    for (name, level) in [
        ("console.log", Level::Info),
        ("console.debug", Level::Debug),
        ("console.info", Level::Info),
        ("console.warn", Level::Warn),
        ("console.error", Level::Error),
    ] {
        linker.func_wrap_async(MODULE, name, move |caller, (text,): (i32,)| Box::new(write(caller, name, level, text, "")))?;
    }
    linker.func_wrap_async(MODULE, "console.assert", |caller, (condition, text): (i32, i32)| {
        Box::new(async move {
            if condition != 0 {
                return Ok(());
            }
            write(caller, "console.assert", Level::Error, text, "assertion failed: ").await
        })
    })?;
    for (name, action) in
        [("console.time", TimerAction::Start), ("console.timeLog", TimerAction::Show), ("console.timeEnd", TimerAction::End)]
    {
        linker.func_wrap_async(MODULE, name, move |caller, (label,): (i32,)| Box::new(time(caller, name, action, label)))?;
    }
    Ok(())
}

/// Logs `prefix` and the guest's `text`.
async fn write(mut caller: Caller<'_, HostState>, name: &str, level: Level, text: i32, prefix: &str) -> Result<()> {
    let text = argument(&mut caller, name, level, text)?;
    let cost = caller.data().log(level, format!("{prefix}{text}").as_bytes()) + UNIT_COST * text.len() as u32;
    HostState::spend(&mut caller, cost).await
}

/// Logs the message with the first `count` of the numbers.
async fn trace(mut caller: Caller<'_, HostState>, message: i32, count: i32, numbers: [f64; 5]) -> Result<()> {
    let mut line = argument(&mut caller, "trace", Level::Debug, message)?;
    for number in numbers.iter().take(usize::try_from(count).unwrap_or(0)) {
        // Writing to a string does not fail.
        let _ = write!(line, " {number}");
    }
    let cost = caller.data().log(Level::Debug, line.as_bytes()) + UNIT_COST * line.len() as u32;
    HostState::spend(&mut caller, cost).await
}

/// Reads the text argument of a log function: empty if `level` is not logged, an error if the text
/// is not in the guest's memory.
fn argument(caller: &mut Caller<'_, HostState>, name: &str, level: Level, ptr: i32) -> Result<String> {
    let (memory, state) = HostState::memory(caller)?;
    let most = if level.enabled() { MAX_UNITS } else { 0 };
    string(memory, ptr, most).ok_or_else(|| outside(state, name))
}

fn outside(state: &mut HostState, name: &str) -> wasmtime::Error {
    state.fail(FailureKind::Trap, format!("it called `{MODULE}.{name}` with text outside its memory"))
}

/// Reads the first `most` units of a guest's string. `None` if any part of the string is outside
/// its memory.
fn string(memory: &[u8], ptr: i32, most: usize) -> Option<String> {
    if ptr == 0 {
        return Some("null".into());
    }
    let len = u32::from_le_bytes(slice(memory, ptr.wrapping_sub(4), 4)?.try_into().ok()?);
    let (units, _half) = slice(memory, ptr, len)?.as_chunks::<2>();
    let units = units[..units.len().min(most)].iter().map(|unit| u16::from_le_bytes(*unit));
    Some(char::decode_utf16(units).map(|unit| unit.unwrap_or(char::REPLACEMENT_CHARACTER)).collect())
}

/// The number from which `Math.random` generates all others in this instance.
async fn seed(mut caller: Caller<'_, HostState>) -> Result<f64> {
    /// Without this bit of the exponent a number is finite. Processors may change the bits of a
    /// NaN.
    const LARGE: u64 = 1 << 62;
    HostState::spend(&mut caller, SEED_COST).await?;
    let mut bytes = [0; 8];
    if getrandom::fill(&mut bytes).is_err() {
        return Err(caller.data_mut().fail(FailureKind::Trap, "it called `Math.random`, but the system has no random numbers"));
    }
    Ok(f64::from_bits(u64::from_le_bytes(bytes) & !LARGE))
}

/// The time of a clock, in milliseconds.
async fn milliseconds(mut caller: Caller<'_, HostState>, clock: i32, name: &str) -> Result<f64> {
    HostState::spend(&mut caller, CLOCK_COST).await?;
    match clock::now(clock) {
        Some(now) => Ok(now as f64 / 1e6),
        None => Err(caller.data_mut().fail(FailureKind::Trap, format!("it called `{name}`, but the system has no such clock"))),
    }
}

async fn time(mut caller: Caller<'_, HostState>, name: &str, action: TimerAction, label: i32) -> Result<()> {
    let (memory, state) = HostState::memory(&mut caller)?;
    let Some(label) = string(memory, label, MAX_LABEL_UNITS) else { return Err(outside(state, name)) };
    let mut cost = CLOCK_COST + UNIT_COST * label.len() as u32;
    let (level, line) = match state.timers.act(action, &label) {
        Ok(None) => return HostState::spend(&mut caller, cost).await,
        Ok(Some(passed)) => (Level::Info, format!("{label}: {:.3} ms", passed.as_secs_f64() * 1e3)),
        Err(problem) => (Level::Warn, format!("{name}: {problem}: {label}")),
    };
    cost += state.log(level, line.as_bytes());
    HostState::spend(&mut caller, cost).await
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 64 bytes with a string of these bytes at offset 8.
    fn memory(len: u32, text: &[u8]) -> Vec<u8> {
        let mut memory = vec![0; 64];
        memory[4..8].copy_from_slice(&len.to_le_bytes());
        memory[8..8 + text.len()].copy_from_slice(text);
        memory
    }

    #[test]
    fn reads_strings() {
        assert_eq!(string(&memory(4, b"h\0i\0"), 8, 10).unwrap(), "hi");
        assert_eq!(string(&memory(4, b"h\0i\0"), 8, 1).unwrap(), "h");
        assert_eq!(string(&memory(0, b""), 8, 10).unwrap(), "");
        assert_eq!(string(&memory(4, b"\x3d\xd8\x00\xde"), 8, 10).unwrap(), "😀");
        // Half a surrogate pair, and half a unit.
        assert_eq!(string(&memory(3, b"\x3d\xd8x"), 8, 10).unwrap(), "\u{fffd}");
        assert_eq!(string(&[], 0, 10).unwrap(), "null");
    }

    #[test]
    fn rejects_strings_out_of_bounds() {
        for ptr in [1, 2, 3, 65, 68, i32::MAX, i32::MIN, -1, -4, -8] {
            assert!(string(&memory(4, b""), ptr, 10).is_none(), "{ptr}");
        }
        // Up to the last byte but not beyond, although only the beginning is read.
        assert!(string(&memory(56, b""), 8, 1).is_some());
        for len in [57, 58, u32::MAX - 8, u32::MAX] {
            assert!(string(&memory(len, b""), 8, 1).is_none(), "{len}");
        }
        // A length at the very end, and one that is partly beyond the end.
        assert_eq!(string(&memory(0, b""), 64, 10).unwrap(), "");
        assert!(string(&memory(0, b""), 66, 10).is_none());
    }
}
