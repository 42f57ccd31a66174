//! WASI preview 1 without access to anything: no files, no network, no environment, no arguments.
//!
//! Functions that real toolchains need work: clocks, random numbers, output (which goes to the
//! log), sleeping (within the deadline), and what language runtimes call at their start. All others
//! exist, so modules link, and return that there is no such file. `wasmtime-wasi` is not used,
//! because a fresh instance per request must not pay for a file system that it cannot use, and
//! because every call must keep the deadline.
//!
//! Names, types and error numbers:
//! <https://github.com/WebAssembly/WASI/blob/wasi-0.1/preview1/docs.md>.

use std::time::{Duration, Instant};

use wasmtime::{Caller, FuncType, Linker, Result, Val, ValType};
use zentinel_wasm_contract::FailureKind;

use crate::host::clock;
use crate::host::state::HostState;
use crate::memory::{slice, slice_mut};

pub(crate) const MODULE: &str = "wasi_snapshot_preview1";

const SUCCESS: i32 = 0;
const BADF: i32 = 8;
const FAULT: i32 = 21;
const INVAL: i32 = 28;
const IO: i32 = 29;
const SPIPE: i32 = 70;

/// Random bytes generated at once, which takes about 10 µs: unlike the guest's code, a host
/// function cannot be interrupted.
const RANDOM_CHUNK: u32 = 8 << 10;

/// Approximate CPU time for a random byte.
const RANDOM_COST: Duration = Duration::from_nanos(4);

/// Most bytes of one write, for the same reason. A guest with more bytes calls again, as POSIX
/// programs do.
const MAX_WRITE: usize = 8 << 10;

/// Approximate CPU time for a buffer of a write, or a subscription of a poll.
const ENTRY_COST: Duration = Duration::from_nanos(100);

/// Most buffers of one write, and most subscriptions of one poll.
const MAX_ENTRIES: u32 = 1024;

/// Functions that always return "no such file", with their parameters: `i` is an i32, `I` an i64.
const NO_FILE: &[(&str, &str)] = &[
    ("fd_advise", "iIIi"),
    ("fd_allocate", "iII"),
    ("fd_datasync", "i"),
    ("fd_fdstat_set_rights", "iII"),
    ("fd_filestat_set_size", "iI"),
    ("fd_filestat_set_times", "iIIi"),
    ("fd_pread", "iiiIi"),
    ("fd_prestat_get", "ii"),
    ("fd_prestat_dir_name", "iii"),
    ("fd_pwrite", "iiiIi"),
    ("fd_readdir", "iiiIi"),
    ("fd_renumber", "ii"),
    ("fd_sync", "i"),
    ("path_create_directory", "iii"),
    ("path_filestat_get", "iiiii"),
    ("path_filestat_set_times", "iiiiIIi"),
    ("path_link", "iiiiiii"),
    ("path_open", "iiiiiIIii"),
    ("path_readlink", "iiiiii"),
    ("path_remove_directory", "iii"),
    ("path_rename", "iiiiii"),
    ("path_symlink", "iiiii"),
    ("path_unlink_file", "iii"),
    ("sock_accept", "iii"),
    ("sock_recv", "iiiiii"),
    ("sock_send", "iiiii"),
    ("sock_shutdown", "ii"),
];

/// Defines all of WASI preview 1.
pub(crate) fn define(linker: &mut Linker<HostState>) -> Result<()> {
    for (name, params) in NO_FILE {
        let params = params.chars().map(|param| if param == 'I' { ValType::I64 } else { ValType::I32 });
        let ty = FuncType::new(linker.engine(), params, [ValType::I32]);
        linker.func_new(MODULE, name, ty, |_, _, results| {
            results[0] = Val::I32(BADF);
            Ok(())
        })?;
    }
    // Neither arguments nor environment: no entries, no bytes.
    for name in ["args_sizes_get", "environ_sizes_get"] {
        linker.func_wrap(MODULE, name, |mut caller: Caller<'_, HostState>, count: i32, size: i32| {
            Ok(errno(write(&mut caller, count, &[0; 4])? && write(&mut caller, size, &[0; 4])?))
        })?;
    }
    for name in ["args_get", "environ_get"] {
        linker.func_wrap(MODULE, name, |_entries: i32, _bytes: i32| SUCCESS)?;
    }
    linker.func_wrap(MODULE, "clock_res_get", |mut caller: Caller<'_, HostState>, clock: i32, out: i32| {
        if clock::now(clock).is_none() {
            return Ok(INVAL);
        }
        Ok(errno(write(&mut caller, out, &1_u64.to_le_bytes())?))
    })?;
    linker.func_wrap(MODULE, "clock_time_get", |mut caller: Caller<'_, HostState>, clock: i32, _precision: i64, out: i32| {
        let Some(now) = clock::now(clock) else { return Ok(INVAL) };
        Ok(errno(write(&mut caller, out, &now.to_le_bytes())?))
    })?;
    linker
        .func_wrap_async(MODULE, "random_get", |caller, (ptr, len): (i32, i32)| Box::new(random_get(caller, ptr, len.cast_unsigned())))?;
    linker.func_wrap(MODULE, "sched_yield", |mut caller: Caller<'_, HostState>| -> Result<i32> {
        caller.data_mut().check_deadline()?;
        Ok(SUCCESS)
    })?;
    linker.func_wrap(MODULE, "proc_exit", |mut caller: Caller<'_, HostState>, code: i32| -> Result<()> {
        Err(caller.data_mut().fail(FailureKind::Trap, format!("it called `proc_exit({code})`")))
    })?;
    linker.func_wrap(MODULE, "proc_raise", |mut caller: Caller<'_, HostState>, signal: i32| -> Result<i32> {
        Err(caller.data_mut().fail(FailureKind::Trap, format!("it called `proc_raise({signal})`")))
    })?;
    define_standard_streams(linker)?;
    linker.func_wrap_async(MODULE, "poll_oneoff", |caller, (subscriptions, events, count, out): (i32, i32, i32, i32)| {
        Box::new(poll_oneoff(caller, subscriptions, events, count.cast_unsigned(), out))
    })?;
    Ok(())
}

fn define_standard_streams(linker: &mut Linker<HostState>) -> Result<()> {
    let is_stream = |fd: i32| (0..=2).contains(&fd);
    linker.func_wrap_async(MODULE, "fd_write", |caller, (fd, buffers, count, out): (i32, i32, i32, i32)| {
        Box::new(fd_write(caller, fd, buffers, count.cast_unsigned(), out))
    })?;
    linker.func_wrap(MODULE, "fd_read", |mut caller: Caller<'_, HostState>, fd: i32, _buffers: i32, _count: i32, out: i32| {
        // Standard input is empty.
        if fd == 0 { Ok(errno(write(&mut caller, out, &[0; 4])?)) } else { Ok::<_, wasmtime::Error>(BADF) }
    })?;
    linker.func_wrap(MODULE, "fd_close", move |fd: i32| if is_stream(fd) { SUCCESS } else { BADF })?;
    linker.func_wrap(MODULE, "fd_fdstat_set_flags", move |fd: i32, _flags: i32| if is_stream(fd) { SUCCESS } else { BADF })?;
    linker.func_wrap(MODULE, "fd_seek", move |fd: i32, _offset: i64, _whence: i32, _out: i32| if is_stream(fd) { SPIPE } else { BADF })?;
    linker.func_wrap(MODULE, "fd_tell", move |fd: i32, _out: i32| if is_stream(fd) { SPIPE } else { BADF })?;
    const CHARACTER_DEVICE: u8 = 2;
    linker.func_wrap(MODULE, "fd_fdstat_get", move |mut caller: Caller<'_, HostState>, fd: i32, out: i32| {
        if !is_stream(fd) {
            return Ok(BADF);
        }
        const RIGHT_READ: u64 = 1 << 1;
        const RIGHT_WRITE: u64 = 1 << 6;
        let mut stat = [0; 24];
        stat[0] = CHARACTER_DEVICE;
        stat[8..16].copy_from_slice(&(if fd == 0 { RIGHT_READ } else { RIGHT_WRITE }).to_le_bytes());
        Ok(errno(write(&mut caller, out, &stat)?))
    })?;
    linker.func_wrap(MODULE, "fd_filestat_get", move |mut caller: Caller<'_, HostState>, fd: i32, out: i32| {
        if !is_stream(fd) {
            return Ok(BADF);
        }
        let mut stat = [0; 64];
        stat[16] = CHARACTER_DEVICE;
        Ok(errno(write(&mut caller, out, &stat)?))
    })?;
    Ok(())
}

const fn errno(written: bool) -> i32 {
    if written { SUCCESS } else { FAULT }
}

/// Writes to the guest's memory. Returns false if the target is out of bounds.
fn write(caller: &mut Caller<'_, HostState>, ptr: i32, bytes: &[u8]) -> Result<bool> {
    let (memory, _) = HostState::memory(caller)?;
    Ok(match slice_mut(memory, ptr, bytes.len() as u32) {
        Some(target) => {
            target.copy_from_slice(bytes);
            true
        }
        None => false,
    })
}

fn read_u32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn read_u64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes)
}

async fn random_get(mut caller: Caller<'_, HostState>, ptr: i32, len: u32) -> Result<i32> {
    let (memory, _) = HostState::memory(&mut caller)?;
    if slice(memory, ptr, len).is_none() {
        return Ok(FAULT);
    }
    let mut done = 0;
    while done < len {
        let chunk = (len - done).min(RANDOM_CHUNK);
        HostState::spend(&mut caller, RANDOM_COST * chunk).await?;
        let (memory, _) = HostState::memory(&mut caller)?;
        let target = slice_mut(memory, ptr.wrapping_add(done.cast_signed()), chunk);
        if target.is_none_or(|target| getrandom::fill(target).is_err()) {
            return Ok(IO);
        }
        done += chunk;
    }
    Ok(SUCCESS)
}

async fn fd_write(mut caller: Caller<'_, HostState>, fd: i32, buffers: i32, count: u32, out: i32) -> Result<i32> {
    if !matches!(fd, 1 | 2) {
        return Ok(BADF);
    }
    if count > MAX_ENTRIES {
        return Ok(INVAL);
    }
    HostState::spend(&mut caller, ENTRY_COST * count).await?;
    let (memory, _) = HostState::memory(&mut caller)?;
    let Some(buffers) = slice(memory, buffers, count * 8) else { return Ok(FAULT) };
    let mut text = Vec::new();
    for buffer in buffers.chunks_exact(8) {
        let Some(bytes) = slice(memory, read_u32(buffer, 0).cast_signed(), read_u32(buffer, 4)) else { return Ok(FAULT) };
        text.extend_from_slice(&bytes[..bytes.len().min(MAX_WRITE - text.len())]);
    }
    for line in text.split_inclusive(|&byte| byte == b'\n') {
        let cost = caller.data_mut().write_stream(fd == 2, line);
        HostState::spend(&mut caller, cost).await?;
    }
    Ok(errno(write(&mut caller, out, &(text.len() as u32).to_le_bytes())?))
}

/// Waits for the first of the subscriptions: clocks become ready at their time, output is always
/// ready, all others are invalid files.
async fn poll_oneoff(mut caller: Caller<'_, HostState>, subscriptions: i32, events: i32, count: u32, out: i32) -> Result<i32> {
    const SUBSCRIPTION: usize = 48;
    const EVENT: usize = 32;
    const CLOCK: u8 = 0;
    const FD_WRITE: u8 = 2;

    if count == 0 || count > MAX_ENTRIES {
        return Ok(INVAL);
    }
    HostState::spend(&mut caller, ENTRY_COST * count).await?;
    let (memory, state) = HostState::memory(&mut caller)?;
    let Some(subscriptions) = slice(memory, subscriptions, count * SUBSCRIPTION as u32) else { return Ok(FAULT) };
    let subscriptions: Vec<[u8; SUBSCRIPTION]> = subscriptions.chunks_exact(SUBSCRIPTION).filter_map(|s| s.try_into().ok()).collect();

    // For each subscription: how long it waits, and its error.
    let waits: Vec<(Duration, i32)> = subscriptions
        .iter()
        .map(|subscription| match subscription[8] {
            CLOCK => match clock::now(read_u32(subscription, 16).cast_signed()) {
                Some(now) => {
                    let timeout = read_u64(subscription, 24);
                    let absolute = subscription[40] & 1 != 0;
                    (Duration::from_nanos(if absolute { timeout.saturating_sub(now) } else { timeout }), SUCCESS)
                }
                None => (Duration::ZERO, INVAL),
            },
            FD_WRITE if (1..=2).contains(&read_u32(subscription, 16)) => (Duration::ZERO, SUCCESS),
            _ => (Duration::ZERO, BADF),
        })
        .collect();
    let shortest = waits.iter().map(|(wait, _)| *wait).min().unwrap_or_default();
    let deadline = state.budget.deadline();
    state.budget.leave();
    let until = Instant::now().checked_add(shortest).map_or(deadline, |until| until.min(deadline));
    tokio::time::sleep_until(until.into()).await;
    caller.data_mut().check_deadline()?;

    let mut happened = Vec::new();
    for (subscription, (wait, error)) in subscriptions.iter().zip(&waits) {
        if *wait <= shortest {
            let mut event = [0; EVENT];
            event[..8].copy_from_slice(&subscription[..8]);
            event[8..10].copy_from_slice(&(*error as u16).to_le_bytes());
            event[10] = subscription[8];
            happened.extend_from_slice(&event);
        }
    }
    let number = (happened.len() / EVENT) as u32;
    Ok(errno(write(&mut caller, events, &happened)? && write(&mut caller, out, &number.to_le_bytes())?))
}
