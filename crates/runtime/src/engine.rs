//! The configuration of wasmtime: the proposals that a module may use, and its limits.

use std::num::NonZero;
use std::sync::Once;

use tracing::warn;
use wasmparser::WasmFeatures;
use wasmtime::{Config, Enabled, Engine, InstanceAllocationStrategy, OptLevel, PoolingAllocationConfig, WasmBacktraceDetails};

use crate::{proposals, trace};

/// Native stack of a guest call, in bytes: the guest's part and room for host functions.
const STACK: usize = 1 << 20;

/// Part of the stack that guest code may use, in bytes. wasmtime's default, and more than real
/// modules need.
const WASM_STACK: usize = 512 << 10;

/// Most elements of a table. A table contains a module's function pointers; large Go programs have
/// about ten thousand.
pub(crate) const MAX_TABLE_ELEMENTS: usize = 100_000;

/// Most tables of a module. Toolchains emit one or two.
const MAX_TABLES: u32 = 8;

/// Memory of a slot that is overwritten when its instance is dropped, in bytes. Overwriting a few
/// pages costs less than returning them to the kernel and faulting them in again; the rest is
/// returned.
const KEEP_RESIDENT: usize = 64 << 10;

/// Stack of a slot that is kept resident, in bytes.
const KEEP_STACK: usize = 16 << 10;

/// Largest state of an instance without its memories and tables, in bytes: globals, imports,
/// function references. A Go program has about 100 kB.
const MAX_INSTANCE_STATE: usize = 4 << 20;

/// Address space of a linear memory, in bytes: all that 32-bit addresses reach, so accesses need no
/// bounds checks. The limiter decides how much an instance may use.
const MEMORY_RESERVATION: usize = 1 << 32;

/// Creates an engine whose pool has `slots` instances.
///
/// If the address space is too small for the pool, instances are allocated on demand, which is
/// slower but otherwise the same.
///
/// # Errors
///
/// The machine cannot run wasmtime at all.
pub(crate) fn new(slots: u32) -> wasmtime::Result<Engine> {
    let mut pool = PoolingAllocationConfig::new();
    // Every instance has a second one, the adapter, which has neither memory nor tables.
    pool.total_core_instances(slots * 2)
        .total_memories(slots)
        .total_tables(slots * MAX_TABLES)
        .total_stacks(slots)
        .max_core_instance_size(MAX_INSTANCE_STATE)
        .max_memories_per_module(1)
        .max_tables_per_module(MAX_TABLES)
        .table_elements(MAX_TABLE_ELEMENTS)
        .max_memory_size(MEMORY_RESERVATION)
        .max_unused_warm_slots(slots)
        .linear_memory_keep_resident(KEEP_RESIDENT)
        .table_keep_resident(KEEP_RESIDENT)
        .async_stack_keep_resident(KEEP_STACK)
        // A scan would find the few pages that a call has written, but it misses pages that are not
        // present at the moment: swapped out, or being migrated by the kernel's compaction, with or
        // without swap. They would be neither reset nor returned, so the slot's next instance could
        // read them.
        .pagemap_scan(Enabled::No);
    let mut config = base();
    config.allocation_strategy(InstanceAllocationStrategy::Pooling(pool));
    match Engine::new(&config) {
        Ok(engine) => Ok(engine),
        Err(error) => {
            // This does not change later, so it is logged once.
            static WARNED: Once = Once::new();
            WARNED.call_once(|| warn!("cannot reserve address space for {slots} instances, creating them on demand: {error:#}"));
            Engine::new(&base())
        }
    }
}

fn base() -> Config {
    let mut config = Config::new();
    config
        .epoch_interruption(true)
        .cranelift_opt_level(OptLevel::Speed)
        .max_wasm_stack(WASM_STACK)
        .async_stack_size(STACK)
        .wasm_backtrace_max_frames(NonZero::new(trace::MAX_KEPT))
        // Tracing a failed call must not read debug information, which may take long.
        .wasm_backtrace_details(WasmBacktraceDetails::Disable)
        // This proposal is not among wasmparser's features, because it reads a custom section.
        .wasm_branch_hinting(false)
        .wasm_features(proposals::ALLOWED, true)
        .wasm_features(WasmFeatures::all() - proposals::ALLOWED, false);
    config
}

#[cfg(test)]
mod tests {
    #[test]
    fn is_created() {
        super::new(6).unwrap();
    }
}
