//! Fuzzes the agent's core, from the bytes of a module to its answers.

use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use wasmparser::{Validator, WasmFeatures};
use zentinel_wasm_contract::Hook;
use zentinel_wasm_runtime::{Call, Isolation, Module, Pool, PoolSettings, Runtime};

use crate::readers::answers;

static RUNTIME: LazyLock<(tokio::runtime::Runtime, Runtime)> = LazyLock::new(|| {
    let tokio = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("threads");
    (tokio, Runtime::start().expect("threads"))
});

/// The exports that a module needs, and the imports that it may have.
const INTERFACE: &str = r#"(module
    (import "zentinel" "log" (func (param i32 i32 i32)))
    (import "env" "abort" (func (param i32 i32 i32 i32)))
    (import "wasi_snapshot_preview1" "fd_write" (func (param i32 i32 i32 i32) (result i32)))
    (import "wasi_snapshot_preview1" "fd_read" (func (param i32 i32 i32 i32) (result i32)))
    (import "wasi_snapshot_preview1" "random_get" (func (param i32 i32) (result i32)))
    (import "wasi_snapshot_preview1" "poll_oneoff" (func (param i32 i32 i32 i32) (result i32)))
    (import "wasi_snapshot_preview1" "clock_time_get" (func (param i32 i64 i32) (result i32)))
    (import "wasi_snapshot_preview1" "environ_sizes_get" (func (param i32 i32) (result i32)))
    (import "wasi_snapshot_preview1" "environ_get" (func (param i32 i32) (result i32)))
    (import "wasi_snapshot_preview1" "fd_fdstat_get" (func (param i32 i32) (result i32)))
    (import "wasi_snapshot_preview1" "path_open" (func (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
    (import "wasi_snapshot_preview1" "sched_yield" (func (result i32)))
    (import "wasi_snapshot_preview1" "proc_exit" (func (param i32)))
    (memory (export "memory") 1 64)
    (func (export "alloc") (param i32) (result i32) unreachable)
    (func (export "dealloc") (param i32 i32))
    (func (export "on_request_headers") (param i32 i32) (result i64) unreachable)
    (func (export "on_configure") (param i32 i32) (result i64) unreachable)
    (func (export "_initialize")))"#;

/// Deadline of a call, well below the fuzzer's own limit: a call that reaches that is stuck.
const TIMEOUT: Duration = Duration::from_millis(30);

/// Deadline of a module's start, because inputs that loop there are among the slowest.
const START_TIMEOUT: Duration = Duration::from_secs(1);

/// The proposals that a module may use, listed a second time because the agent's own list must not
/// accept more.
const SERVED: WasmFeatures =
    WasmFeatures::WASM2.union(WasmFeatures::EXTENDED_CONST).union(WasmFeatures::TAIL_CALL).difference(WasmFeatures::GC_TYPES);

/// Generates a module from the bytes. Either the agent rejects it, as it must if the module uses a
/// disabled proposal, or its calls end before their deadline with an answer or a failure.
pub fn modules(data: &[u8]) {
    static INTERFACE_BYTES: LazyLock<Vec<u8>> = LazyLock::new(|| wat::parse_str(INTERFACE).expect("the interface is valid"));

    let [choice, proposals, rest @ ..] = data else { return };
    let is = |bit: u8| choice & 1 << bit != 0;
    // Half of the modules use no disabled proposal, so they can be served.
    let uses = |bit: u8| is(0) && proposals & 1 << bit != 0;
    let config = wasm_smith::Config {
        exports: Some(INTERFACE_BYTES.clone()),
        available_imports: Some(INTERFACE_BYTES.clone()),
        max_memories: 1 + usize::from(uses(0)),
        memory64_enabled: uses(0),
        gc_enabled: uses(1),
        custom_descriptors_enabled: uses(1) && uses(6),
        exceptions_enabled: uses(2),
        threads_enabled: uses(3),
        shared_everything_threads_enabled: uses(3) && uses(6),
        relaxed_simd_enabled: uses(4),
        wide_arithmetic_enabled: uses(5),
        custom_page_sizes_enabled: uses(7),
        allow_start_export: is(3),
        disallow_traps: is(4),
        max_instructions: if is(5) { 1000 } else { 50 },
        max_memory32_bytes: 4 << 20,
        ..wasm_smith::Config::default()
    };
    let mut unstructured = arbitrary::Unstructured::new(rest);
    let Ok(generated) = wasm_smith::Module::new(config, &mut unstructured) else { return };
    module(generated.to_bytes(), if is(6) { Isolation::Request } else { Isolation::Pooled }, is(7));
}

/// Loads a module and calls it twice.
fn module(bytes: Vec<u8>, isolation: Isolation, configured: bool) {
    let (tokio, runtime) = &*RUNTIME;
    let may_be_served = Validator::new_with_features(SERVED).validate_all(&bytes).is_ok();
    let Ok(module) = Module::from_bytes("generated", bytes, None) else { return };
    let settings = PoolSettings {
        size: 1,
        max_memory: 4 << 20,
        max_output: 64 << 10,
        isolation,
        config: configured.then(|| Arc::from(&b"{}"[..])),
        start_timeout: START_TIMEOUT,
    };
    tokio.block_on(async {
        let Ok(pool) = Pool::start(runtime, &Arc::new(module), settings, None).await else { return };
        assert!(may_be_served, "served a module that uses a disabled proposal");
        for at in 0..2 {
            let call = Call::json(Hook::RequestHeaders, br#"{"method":"GET","uri":"/","headers":{}}"#.to_vec());
            if let Ok(lease) = pool.clone().call(call, Arc::from("id"), Instant::now() + TIMEOUT).await {
                assert!(lease.output().len() <= 64 << 10);
                answers(lease.output());
                if at == 0 {
                    lease.accept();
                }
            }
        }
    });
}
