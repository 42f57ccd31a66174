//! Calls of small modules, each with one behaviour.

use std::sync::Arc;
use std::time::{Duration, Instant};

use zentinel_wasm_contract::{Failure, FailureKind, Hook};
use zentinel_wasm_runtime::{Call, Isolation, Lease, Module, Pool, PoolSettings, Runtime, StartError};

fn settings() -> PoolSettings {
    PoolSettings { size: 2, max_memory: 4 << 20, max_output: 1024, isolation: Isolation::Pooled, config: None, start_timeout: LONG }
}

/// A module with a bump allocator, an `on_request_headers` with the body `hook`, and `extra` items.
fn module(hook: &str, extra: &str) -> Arc<Module> {
    let wat = format!(
        r#"(module
            (import "zentinel" "log" (func $log (param i32 i32 i32)))
            (import "wasi_snapshot_preview1" "random_get" (func $random_get (param i32 i32) (result i32)))
            (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
            (import "wasi_snapshot_preview1" "clock_time_get" (func $clock (param i32 i64 i32) (result i32)))
            (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))
            (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
            (memory (export "memory") 2)
            (global $next (mut i32) (i32.const 4096))
            (global $count (mut i64) (i64.const 0))
            (data (i32.const 16) "{{\"decision\":\"block\"}}")
            (func (export "alloc") (param i32) (result i32)
                (local $ptr i32)
                (local.set $ptr (global.get $next))
                (global.set $next (i32.add (global.get $next) (local.get 0)))
                (local.get $ptr))
            (func (export "dealloc") (param i32 i32) (global.set $next (i32.const 4096)))
            (func (export "on_request_headers") (param $ptr i32) (param $len i32) (result i64) {hook})
            {extra})"#
    );
    Arc::new(Module::from_bytes("test.wasm", wat::parse_str(wat).unwrap(), None).unwrap())
}

async fn pool(module: &Arc<Module>, settings: PoolSettings) -> Pool {
    let pool = Pool::start(&Runtime::start().unwrap(), module, settings, None).await.unwrap();
    pool.warm().await;
    pool
}

async fn call(pool: &Pool, timeout: Duration) -> Result<Lease, Failure> {
    let call = Call::json(Hook::RequestHeaders, br#"{"uri":"/"}"#.to_vec());
    pool.clone().call(call, Arc::from("id"), Instant::now() + timeout).await
}

async fn call_owned(pool: Pool) -> Option<Failure> {
    call(&pool, LONG).await.err()
}

const LONG: Duration = Duration::from_secs(20);

/// Returns the answer in the data segment.
const ANSWER: &str = "(i64.const 0x10_0000_0014)";

/// Returns the input.
const ECHO: &str = "(i64.or (i64.shl (i64.extend_i32_u (local.get $ptr)) (i64.const 32)) (i64.extend_i32_u (local.get $len)))";

async fn failure(hook: &str, extra: &str) -> Failure {
    let pool = pool(&module(hook, extra), settings()).await;
    let failure = call(&pool, Duration::from_millis(200)).await.err().expect("the call fails");
    // The instance is replaced, so the pool is complete again.
    while pool.stats().available < 2 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(pool.stats().discarded, 1);
    failure
}

/// Returns eight bytes: the number of calls of this instance.
const COUNT: &str = "(global.set $count (i64.add (global.get $count) (i64.const 1))) (i64.store (i32.const 64) (global.get $count)) (i64.const 0x40_00000008)";

async fn start_error(hook: &str, extra: &str, config: Option<&str>) -> String {
    let settings = PoolSettings { config: config.map(|config| config.as_bytes().into()), ..settings() };
    let result: Result<Pool, StartError> = Pool::start(&Runtime::start().unwrap(), &module(hook, extra), settings, None).await;
    result.err().map(|error| error.to_string()).unwrap_or_default()
}

mod answers {
    use super::*;

    #[tokio::test]
    async fn are_returned() {
        let pool = pool(&module(ANSWER, ""), settings()).await;
        let lease = call(&pool, LONG).await.unwrap();
        assert_eq!(lease.output(), br#"{"decision":"block"}"#);
        lease.accept();
        assert_eq!(pool.stats().available, 2);
    }

    #[tokio::test]
    async fn may_depend_on_the_input() {
        let pool = pool(&module(ECHO, ""), settings()).await;
        let lease = call(&pool, LONG).await.unwrap();
        assert_eq!(lease.output(), br#"{"uri":"/"}"#);
    }

    #[tokio::test]
    async fn without_bytes_mean_no_opinion() {
        for hook in ["(i64.const 0)", "(i64.const 0x10_0000_0000)"] {
            let pool = pool(&module(hook, ""), settings()).await;
            assert_eq!(call(&pool, LONG).await.unwrap().output(), b"");
        }
    }
}

mod module_errors {
    use super::*;

    #[tokio::test]
    async fn have_their_kind() {
        use FailureKind::*;
        for (hook, extra, kind) in [
            ("unreachable", "", Trap),
            ("(i64.const 0x7fffffff_00000010)", "", InvalidResult),
            ("(i64.const 0x10)", "", InvalidResult),
            ("(i64.const 0x10_7fffffff)", "", OutputLimit),
            ("(i64.const -1)", "", OutputLimit),
            ("(loop (br 0)) (i64.const 0)", "", Timeout),
            ("(call $f) (i64.const 0)", "(func $f (call $f))", Trap),
            ("(call $exit (i32.const 1)) (i64.const 0)", "", Trap),
            ("(if (i32.eq (memory.grow (i32.const 1000)) (i32.const -1)) (then unreachable)) (i64.const 0)", "", MemoryLimit),
            ("(loop (drop (call $random_get (i32.const 0) (i32.const 131072))) (br 0)) (i64.const 0)", "", Timeout),
            ("(call $log (i32.const 4) (i32.const -8) (i32.const 100)) (i64.const 0)", "", Trap),
        ] {
            assert_eq!(failure(hook, extra).await.kind, kind, "{hook}");
        }
    }
}

mod traces {
    use super::*;

    async fn description(hook: &str, functions: &str) -> String {
        failure(hook, functions).await.description()
    }

    #[tokio::test]
    async fn have_the_guests_functions_from_the_innermost() {
        let functions = "(func $outer (call $divide)) (func $divide (drop (i32.div_u (i32.const 1) (i32.const 0))))";
        assert_eq!(
            description("(call $outer) (i64.const 0)", functions).await,
            "wasm trap: integer divide by zero (in `divide` < `outer` < `on_request_headers`)"
        );
    }

    #[tokio::test]
    async fn have_indices_and_offsets_without_names() {
        // After six imports and three functions.
        let description = description("(call 9) (i64.const 0)", "(func (unreachable))").await;
        let (index, rest) = description.split_once(" at offset 0x").unwrap();
        assert_eq!(index, "wasm trap: wasm `unreachable` instruction executed (in function 9");
        let (offset, rest) = rest.split_once(' ').unwrap();
        assert!(usize::from_str_radix(offset, 16).is_ok_and(|offset| offset > 100), "{description}");
        assert_eq!(rest, "< `on_request_headers`)");
    }

    #[tokio::test]
    async fn omit_panic_machinery() {
        let functions = r#"
            (func $f (@name "_ZN9my_policy5check17h0123456789abcdefE") (call $g))
            (func $g (@name "core::option::unwrap_failed") (call $h))
            (func $h (@name "_ZN4core9panicking9panic_fmt17h0123456789abcdefE") (unreachable))"#;
        assert!(description("(call $f) (i64.const 0)", functions).await.ends_with("(in `my_policy::check` < `on_request_headers`)"));
    }

    #[tokio::test]
    async fn keep_the_innermost_function_of_nothing_but_machinery() {
        let module = r#"(module (memory (export "memory") 1)
            (func $abort (unreachable)) (func $exit (export "_initialize") (call $abort))
            (func (export "alloc") (param i32) (result i32) i32.const 8)
            (func (export "dealloc") (param i32 i32))
            (func (export "on_request_headers") (param i32 i32) (result i64) i64.const 0))"#;
        let module = Arc::new(Module::from_bytes("test.wasm", wat::parse_str(module).unwrap(), None).unwrap());
        let error = Pool::start(&Runtime::start().unwrap(), &module, settings(), None).await.err().unwrap().to_string();
        assert!(error.ends_with("`_initialize`: wasm trap: wasm `unreachable` instruction executed (in `abort`)"), "{error}");
    }

    #[tokio::test]
    async fn of_a_timeout_name_what_ran() {
        let spin = "(func $spin (loop (br 0)))";
        assert_eq!(
            description("(call $spin) (i64.const 0)", spin).await,
            "the call exceeded its deadline (in `spin` < `on_request_headers`)"
        );
        // Host functions that take long are interrupted too.
        let write = "(func $noisy (loop (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1024) (i32.const 80))) (br 0)))";
        assert_eq!(
            description("(call $noisy) (i64.const 0)", write).await,
            "the call exceeded its deadline (in `noisy` < `on_request_headers`)"
        );
    }

    #[tokio::test]
    async fn of_host_functions_name_their_caller() {
        assert_eq!(
            description("(call $leave) (i64.const 0)", "(func $leave (call $exit (i32.const 3)))").await,
            "it called `proc_exit(3)` (in `leave` < `on_request_headers`)"
        );
    }

    #[tokio::test]
    async fn of_deep_recursion_are_short() {
        let description = description("(call $deeper) (i64.const 0)", "(func $deeper (call $deeper))").await;
        assert_eq!(description, format!("wasm trap: call stack exhausted (in {}…)", "`deeper` < ".repeat(8)));
    }

    #[tokio::test]
    async fn of_rejected_answers_are_absent() {
        let failure = failure("(i64.const 0x10_7fffffff)", "").await;
        assert_eq!(failure.description(), &*failure.detail);
    }
}

mod deadline {
    use super::*;

    #[tokio::test]
    async fn ends_sleep() {
        // One relative clock subscription of 1 h at address 64: kind at 72, clock at 80, timeout at
        // 88.
        let hook = "(i64.store (i32.const 88) (i64.const 3600000000000))
                    (drop (call $poll (i32.const 64) (i32.const 256) (i32.const 1) (i32.const 512))) (i64.const 0)";
        assert_eq!(failure(hook, "").await.kind, FailureKind::Timeout);
        let hook = "(i64.store (i32.const 88) (i64.const 1000))
                    (if (call $poll (i32.const 64) (i32.const 256) (i32.const 1) (i32.const 512)) (then unreachable))
                    (if (i32.ne (i32.load (i32.const 512)) (i32.const 1)) (then unreachable)) (i64.const 0)";
        let pool = pool(&module(hook, ""), settings()).await;
        call(&pool, LONG).await.unwrap();
    }

    /// Host functions are called in a row, without a loop or a function entry at which a tick could
    /// interrupt the guest.
    #[tokio::test]
    async fn ends_rows_of_host_functions_that_also_yield() {
        const TIMES: usize = 20_000;
        // 64 KiB of random bytes; 8 KiB of line ends, at the end of the memory; the longest line; a
        // poll of many clocks that are ready.
        let random = "(drop (call $random_get (i32.const 0) (i32.const 65536)))";
        let write = "(drop (call $write (i32.const 1) (i32.const 64) (i32.const 1) (i32.const 80)))";
        // Two buffers, of which the second is out of bounds; and as many empty buffers as possible.
        let fault = "(drop (call $write (i32.const 1) (i32.const 64) (i32.const 2) (i32.const 80)))";
        let empty = "(drop (call $write (i32.const 1) (i32.const 8192) (i32.const 1024) (i32.const 80)))";
        let log = "(call $log (i32.const 0) (i32.const 65536) (i32.const 65536))";
        let poll = "(drop (call $poll (i32.const 8192) (i32.const 65536) (i32.const 1024) (i32.const 80)))";
        for one in [random, write, fault, empty, log, poll] {
            let hook = format!(
                "(i32.store (i32.const 64) (i32.const 65536)) (i32.store (i32.const 68) (i32.const 8192)) (i32.store (i32.const 72) (i32.const -1))
                 (memory.fill (i32.const 65536) (i32.const 10) (i32.const 65536)) {} (i64.const 0)",
                one.repeat(TIMES)
            );
            let pool = pool(&module(&hook, ""), settings()).await;
            // This thread runs nothing else: this task, which is queued behind the call, continues
            // only when the call yields.
            let called = tokio::spawn(async move { call(&pool, Duration::from_secs(1)).await.err() });
            tokio::task::yield_now().await;
            assert!(!called.is_finished(), "{one}");
            // Lines that are not logged take hardly any time.
            let failure = called.await.unwrap();
            assert!(failure.as_ref().map_or(one != random, |failure| failure.kind == FailureKind::Timeout), "{one}: {failure:?}");
        }
    }
}

mod slow_lane {
    use super::*;

    #[tokio::test]
    async fn takes_calls_that_have_slept() {
        const ENOUGH: Duration = Duration::from_secs(4);
        // This thread has used more CPU time than any thread of the slow lane, so comparing the two
        // would be wrong.
        let busy = Instant::now();
        while busy.elapsed() < ENOUGH + ENOUGH / 2 {
            std::hint::spin_loop();
        }
        // Work until about one tick has passed, 1 ms of sleep, and then an endless loop.
        let hook = "(local $end i64)
            (drop (call $clock (i32.const 1) (i64.const 0) (i32.const 1024)))
            (local.set $end (i64.add (i64.load (i32.const 1024)) (i64.const 550000)))
            (loop $work
                (drop (call $clock (i32.const 1) (i64.const 0) (i32.const 1024)))
                (br_if $work (i64.lt_u (i64.load (i32.const 1024)) (local.get $end))))
            (i64.store (i32.const 88) (i64.const 1000000))
            (drop (call $poll (i32.const 64) (i32.const 256) (i32.const 1) (i32.const 512)))
            (loop (br 0)) (i64.const 0)";
        let runtime = Runtime::start().unwrap();
        // More than the slow lane has threads.
        let looping = std::thread::available_parallelism().unwrap().get() as u32 + 4;
        let pool = Pool::start(&runtime, &module(hook, ""), PoolSettings { size: looping, ..settings() }, None).await.unwrap();
        let loops: Vec<_> = (0..looping).map(|_| tokio::spawn(call_owned(pool.clone()))).collect();
        // It wakes long after the others have begun to loop.
        let hook = "(i64.store (i32.const 88) (i64.const 200000000))
            (drop (call $poll (i32.const 64) (i32.const 256) (i32.const 1) (i32.const 512))) (i64.const 0)";
        let sleeper = Pool::start(&runtime, &module(hook, ""), settings(), None).await.unwrap();
        call(&sleeper, ENOUGH).await.unwrap();
        for one in loops {
            assert!(!one.is_finished());
            one.abort();
        }
    }
}

mod pool_bounds {
    use super::*;

    #[tokio::test]
    async fn full_pool_is_overloaded_but_not_blocked() {
        let pool = pool(&module("(loop (br 0)) (i64.const 0)", ""), settings()).await;
        let loops: Vec<_> = (0..2)
            .map(|_| {
                tokio::spawn({
                    let pool = pool.clone();
                    async move { call(&pool, Duration::from_millis(500)).await.err() }
                })
            })
            .collect();
        while pool.stats().available > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let failure = call(&pool, Duration::from_millis(50)).await.err().unwrap();
        assert_eq!(failure.to_string(), "WASM_OVERLOADED: no instance was free before the deadline: raise `--pool-size`");
        for one in loops {
            assert_eq!(one.await.unwrap().unwrap().kind, FailureKind::Timeout);
        }
    }

    #[tokio::test]
    async fn dropped_call_frees_its_slot() {
        let pool = pool(&module("(loop (br 0)) (i64.const 0)", ""), settings()).await;
        let looping = tokio::spawn({
            let pool = pool.clone();
            async move { call(&pool, LONG).await.err() }
        });
        while pool.stats().available == 2 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        looping.abort();
        while pool.stats().available < 2 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

mod isolation {
    use super::*;

    #[tokio::test]
    async fn decides_whether_state_is_kept() {
        let one = PoolSettings { size: 1, ..settings() };
        for (isolation, expected) in [(Isolation::Pooled, [1, 2, 3]), (Isolation::Request, [1, 1, 1])] {
            let pool = pool(&module(COUNT, ""), PoolSettings { isolation, ..one.clone() }).await;
            for count in expected {
                let lease = call(&pool, LONG).await.unwrap();
                assert_eq!(lease.output(), u64::to_le_bytes(count));
                lease.accept();
            }
        }
    }

    #[tokio::test]
    async fn instances_that_are_not_accepted_are_discarded() {
        let pool = pool(&module(COUNT, ""), PoolSettings { size: 1, ..settings() }).await;
        for _ in 0..3 {
            assert_eq!(call(&pool, LONG).await.unwrap().output(), 1_u64.to_le_bytes());
        }
        assert_eq!(pool.stats().discarded, 3);
    }
}

mod start {
    use super::*;

    #[tokio::test]
    async fn fails_if_the_module_traps_or_loops() {
        let message = start_error(ANSWER, "(func $start unreachable) (start $start)", None).await;
        assert!(message.starts_with("cannot start the module `test.wasm`: WASM_TRAP"), "{message}");
        let message = start_error(ANSWER, "(func (export \"_initialize\") (loop (br 0)))", None).await;
        assert!(message.contains("WASM_TIMEOUT"), "{message}");
    }

    #[tokio::test]
    async fn fails_if_the_module_rejects_its_configuration() {
        let reject = r#"(data (i32.const 64) "{\"error\":\"no key\"}")
            (func (export "on_configure") (param i32 i32) (result i64) (i64.const 0x40_00000012))"#;
        assert_eq!(start_error(ANSWER, reject, Some("{}")).await, "the module `test.wasm` rejects its configuration: no key");
        assert_eq!(start_error(ANSWER, reject, None).await, "");
    }
}
