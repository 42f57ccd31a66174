//! Pools whose instances fail, are slow, or are replaced.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use zentinel_wasm_contract::{Decision, Event, Failure, FailureKind, HeaderCase, Hook};

use super::instances::{Isolation, MAX_PIECE, PoolSettings, first_slice};
use super::pool::Pool;
use super::slot::Lease;
use crate::budget::thread_cpu_time;
use crate::guest::exchange::MAX_KEPT_OUTPUT;
use crate::guest::{Call, View};
use crate::module::Module;
use crate::runtime::Runtime;

/// A module that traps in every call and rejects every configuration.
const BROKEN: &str = r#"(module (memory (export "memory") 1)
    (data (i32.const 64) "{\"error\":\"no\"}")
    (func (export "alloc") (param i32) (result i32) i32.const 1024)
    (func (export "dealloc") (param i32 i32))
    (func (export "on_request_headers") (param i32 i32) (result i64) unreachable)
    (func (export "on_configure") (param i32 i32) (result i64) i64.const 0x40_0000000e))"#;

fn module() -> Arc<Module> {
    Arc::new(Module::from_bytes("test.wasm", wat::parse_str(BROKEN).unwrap(), None).unwrap())
}

const START_TIMEOUT: Duration = Duration::from_secs(60);

fn settings(size: u32) -> PoolSettings {
    PoolSettings { size, max_memory: 1 << 20, max_output: 1024, isolation: Isolation::Pooled, config: None, start_timeout: START_TIMEOUT }
}

async fn wait_until(what: &str, done: impl Fn() -> bool) {
    let started = Instant::now();
    while !done() {
        assert!(started.elapsed() < Duration::from_secs(60), "timed out waiting until {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// A module with these functions and a valid hook.
fn good(functions: &str) -> Arc<Module> {
    let wat = format!(
        r#"(module (import "wasi_snapshot_preview1" "random_get" (func $random (param i32 i32) (result i32)))
        (memory (export "memory") 2)
        (func (export "alloc") (param i32) (result i32) i32.const 1024)
        (func (export "dealloc") (param i32 i32))
        (func (export "on_request_headers") (param i32 i32) (result i64) i64.const 0)
        {functions})"#
    );
    Arc::new(Module::from_bytes("test.wasm", wat::parse_str(wat).unwrap(), None).unwrap())
}

async fn call(pool: &Pool) -> Result<Lease, Failure> {
    let deadline = Instant::now() + Duration::from_secs(60);
    let call = Call::json(Hook::RequestHeaders, Vec::new());
    pool.clone().call(call, Arc::from(""), deadline).await
}

mod kinds {
    use super::*;

    const REFUSES: &str = r#"(module (func (export "decide") (result i32) i32.const 403))"#;
    const INVALID: &str = r#"(module (func (export "decide") (result i32) i32.const 7))"#;
    const LOOPS: &str = r#"(module (func (export "decide") (result i32) (loop $ever (br $ever)) i32.const 0))"#;

    async fn answer(wat: &str, isolation: Isolation, timeout: Duration) -> (Pool, Result<bool, FailureKind>) {
        let module = Arc::new(Module::from_bytes("verdict.wasm", wat::parse_str(wat).unwrap(), None).unwrap());
        let pool = Pool::start(&Runtime::start().unwrap(), &module, PoolSettings { isolation, ..settings(1) }, None).await.unwrap();
        let event = Event::ResponseHeaders(serde_json::from_str(r#"{"correlation_id":"a","status":200,"headers":{}}"#).unwrap());
        let view = View { event: &event, context: None, header_case: HeaderCase::Canonical, max_body: 0 };
        let call = pool.prepare(&view).unwrap();
        let answered = pool.clone().call(call, Arc::from(""), Instant::now() + timeout).await.and_then(|lease| {
            let blocks = matches!(lease.answer()?.decision, Decision::Block(_));
            lease.accept();
            Ok(blocks)
        });
        (pool, answered.map_err(|failure| failure.kind))
    }

    #[tokio::test]
    async fn without_memory_and_json_are_pooled_like_any_other() {
        for isolation in [Isolation::Pooled, Isolation::Request] {
            let (pool, answer) = answer(REFUSES, isolation, START_TIMEOUT).await;
            assert_eq!(answer, Ok(true));
            assert_eq!(pool.hooks(), [Hook::RequestHeaders].into_iter().collect());
            assert_eq!((pool.stats().available, pool.stats().discarded), (1, 0));
        }
    }

    #[tokio::test]
    async fn have_invalid_answers_and_timeouts_as_module_errors() {
        let (pool, invalid) = answer(INVALID, Isolation::Pooled, START_TIMEOUT).await;
        assert_eq!(invalid, Err(FailureKind::InvalidResult));
        wait_until("the instance is replaced", || (pool.stats().available, pool.stats().discarded) == (1, 1)).await;
        assert_eq!(answer(LOOPS, Isolation::Pooled, Duration::from_millis(20)).await.1, Err(FailureKind::Timeout));
    }
}

#[tokio::test]
async fn new_settings_keep_the_modules_log() {
    let (runtime, module) = (Runtime::start().unwrap(), module());
    let first = Pool::start(&runtime, &module, settings(1), None).await.unwrap();
    let second = Pool::start(&runtime, &module, settings(2), None).await.unwrap();
    assert!(Arc::ptr_eq(&first.instances().log, &second.instances().log));
}

mod retries {
    use super::*;

    #[tokio::test]
    async fn end_with_the_pool_and_are_logged_at_a_limited_rate() {
        const SIZE: u32 = 8;
        let module = module();
        let mut pool = Pool::start(&Runtime::start().unwrap(), &module, settings(SIZE), None).await.unwrap();
        pool.warm().await;
        // From now on no instance can be created.
        loop {
            // The tasks that created the others may not have ended yet.
            match pool.instances_mut() {
                Some(instances) => break instances.settings.config = Some(Arc::from(*b"{}")),
                None => tokio::task::yield_now().await,
            }
        }
        for _ in 0..SIZE {
            let deadline = Instant::now() + Duration::from_secs(60);
            let call = Call::json(Hook::RequestHeaders, Vec::new());
            assert_eq!(pool.clone().call(call, Arc::from(""), deadline).await.err().unwrap().kind, FailureKind::Trap);
        }
        wait_until("warnings are suppressed", || module.log.replacements.suppressed() > 0).await;
        assert_eq!(pool.stats().available, 0);
        let instances = Arc::downgrade(pool.instances());
        drop(pool);
        wait_until("the pool is dropped", || instances.strong_count() == 0).await;
    }

    #[tokio::test]
    async fn are_counted_and_succeed_eventually() {
        const SIZE: u32 = 32;
        // Half of the starts fail.
        let start = "(func $start (drop (call $random (i32.const 0) (i32.const 1)))
            (if (i32.and (i32.load8_u (i32.const 0)) (i32.const 1)) (then unreachable))) (start $start)";
        let (runtime, module) = (Runtime::start().unwrap(), good(start));
        let pool = loop {
            if let Ok(pool) = Pool::start(&runtime, &module, settings(SIZE), None).await {
                break pool;
            }
        };
        assert_eq!(runtime.failed_starts(), 0);
        pool.warm().await;
        assert!(runtime.failed_starts() > 0);
        wait_until("all instances exist", || pool.stats().available == SIZE as usize).await;
    }
}

mod memory {
    use super::*;

    #[tokio::test]
    async fn idle_instances_keep_no_large_answer() {
        const LARGE: usize = 1 << 20;
        // Returns its input as its answer.
        let echo = r#"(module (memory (export "memory") 64)
            (func (export "alloc") (param i32) (result i32) i32.const 1024)
            (func (export "dealloc") (param i32 i32))
            (func (export "on_request_headers") (param i32 i32) (result i64)
                (i64.or (i64.shl (i64.extend_i32_u (local.get 0)) (i64.const 32)) (i64.extend_i32_u (local.get 1)))))"#;
        let module = Arc::new(Module::from_bytes("echo.wasm", wat::parse_str(echo).unwrap(), None).unwrap());
        let settings = PoolSettings { max_memory: 8 << 20, max_output: LARGE, ..settings(1) };
        let pool = Pool::start(&Runtime::start().unwrap(), &module, settings, None).await.unwrap();
        for (len, is_kept) in [(100, true), (LARGE, false), (MAX_KEPT_OUTPUT, true)] {
            let deadline = Instant::now() + Duration::from_secs(60);
            let call = Call::json(Hook::RequestHeaders, vec![b'x'; len]);
            let lease = pool.clone().call(call, Arc::from(""), deadline).await.unwrap();
            assert_eq!(lease.output().len(), len);
            lease.accept();
            let kept = pool.instances().idle().last().unwrap().exchange().json().output.capacity();
            assert!(kept <= MAX_KEPT_OUTPUT && (kept >= len) == is_kept, "{kept} bytes are kept after an answer of {len}");
        }
    }

    #[tokio::test]
    async fn largest_is_known_in_both_isolation_modes() {
        let hook = r#"(module (memory (export "memory") 2)
            (func (export "alloc") (param i32) (result i32) i32.const 1024)
            (func (export "dealloc") (param i32 i32))
            (func (export "on_request_headers") (param i32 i32) (result i64) (drop (memory.grow (i32.const 3))) i64.const 0))"#;
        let module = Arc::new(Module::from_bytes("test.wasm", wat::parse_str(hook).unwrap(), None).unwrap());
        let runtime = Runtime::start().unwrap();
        for isolation in [Isolation::Pooled, Isolation::Request] {
            let pool = Pool::start(&runtime, &module, PoolSettings { isolation, ..settings(1) }, None).await.unwrap();
            call(&pool).await.unwrap().accept();
            assert_eq!(pool.stats().largest_memory, 5 << 16, "{isolation:?}");
            // An instance with an invalid answer counts too.
            drop(call(&pool).await.unwrap());
            let grown = if isolation == Isolation::Pooled { 8 } else { 5 };
            assert_eq!(pool.stats().largest_memory, grown << 16, "{isolation:?}");
        }
    }
}

mod start {
    use super::*;

    #[tokio::test]
    async fn compiling_continues_without_its_caller_and_excludes_others() {
        let more = "(func (param i32) (result i32) (i32.add (local.get 0) (i32.const 1)))".repeat(5000);
        let large = wat::parse_str(format!("{}{more})", BROKEN.strip_suffix(')').unwrap())).unwrap();
        let large = Arc::new(Module::from_bytes("large.wasm", large, None).unwrap());
        let runtime = Runtime::start().unwrap();
        let mut given_up = Box::pin(Pool::start(&runtime, &large, settings(1), None));
        assert!(first_slice(given_up.as_mut()).await.is_pending());
        drop(given_up);
        assert!(runtime.is_compiling());
        Pool::start(&runtime, &module(), settings(1), None).await.unwrap();
        assert!(!runtime.is_compiling());
    }

    #[tokio::test]
    async fn first_instance_serves_before_the_others_exist() {
        const SIZE: u32 = 20;
        let pool = Pool::start(&Runtime::start().unwrap(), &good(""), settings(SIZE), None).await.unwrap();
        // This runtime has one thread, and nothing else has run on it since.
        assert_eq!(pool.stats().available, 1);
        call(&pool).await.unwrap().accept();
        // More calls than instances so far: they wait for the others.
        let leases: Vec<_> = (0..SIZE).map(|_| call(&pool)).collect();
        let mut held = Vec::new();
        for lease in leases {
            held.push(lease.await.unwrap());
        }
        assert_eq!(pool.stats().available, 0);
        held.into_iter().for_each(Lease::accept);
        pool.warm().await;
        assert_eq!((pool.stats().available, pool.stats().largest_memory), (SIZE as usize, 2 << 16));
    }

    #[tokio::test]
    async fn slow_instances_are_created_on_the_slow_lane() {
        let settings = PoolSettings { isolation: Isolation::Request, ..settings(2) };
        let runtime = Runtime::start().unwrap();
        let pool = Pool::start(&runtime, &good(""), settings, None).await.unwrap();
        let busy = |time| async move {
            let before = thread_cpu_time();
            while thread_cpu_time() - before < time {}
        };
        pool.instances().is_slow_to_make.store(false, Relaxed);
        assert!(pool.instances().measured_slice(std::pin::pin!(busy(Duration::ZERO))).await.is_ready());
        assert!(!pool.instances().is_slow_to_make.load(Relaxed));
        assert!(pool.instances().measured_slice(std::pin::pin!(busy(2 * MAX_PIECE))).await.is_ready());
        // While the slow lane is busy, the instance is not created.
        let (taken, open) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let mut tasks = Vec::new();
        for _ in 0..runtime.slow_lane().threads() {
            let (taken, open) = (Arc::clone(&taken), Arc::clone(&open));
            tasks.push(runtime.slow_lane().spawn(Box::pin(async move {
                taken.fetch_add(1, Relaxed);
                while !open.load(Relaxed) {
                    std::thread::yield_now();
                }
            })));
        }
        wait_until("every thread of the slow lane is taken", || taken.load(Relaxed) == runtime.slow_lane().threads()).await;
        let mut asked = Box::pin(call(&pool));
        assert!(first_slice(asked.as_mut()).await.is_pending());
        open.store(true, Relaxed);
        assert!(asked.await.unwrap().output().is_empty());
    }

    #[tokio::test]
    async fn timeout_names_function_limit_and_option() {
        let endless = "(loop $ever (br $ever))";
        let runtime = Runtime::start().unwrap();
        for (functions, name) in [
            (format!("(func $start {endless}) (start $start)"), "its start function"),
            (format!(r#"(func (export "_initialize") {endless})"#), "`_initialize`"),
            (format!(r#"(func (export "on_configure") (param i32 i32) (result i64) {endless} i64.const 0)"#), "`on_configure`"),
        ] {
            let module = good(&functions);
            let short = PoolSettings { start_timeout: Duration::from_millis(20), config: Some(Arc::from(*b"{}")), ..settings(2) };
            let error = Pool::start(&runtime, &module, short.clone(), None).await.err().unwrap().to_string();
            assert!(error.contains(&format!("WASM_TIMEOUT: {name} did not end within 20 ms: raise `--start-timeout-ms`")), "{error}");
        }
    }
}
