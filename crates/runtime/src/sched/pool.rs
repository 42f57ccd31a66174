//! Warm instances, and the calls made on them.

use std::fmt;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, watch};
use tracing::{debug, warn};
use zentinel_wasm_contract::{Failure, FailureKind, Hook, Hooks};
use zentinel_wasm_guest_json::answer::read_configured;

use crate::cache::Cache;
use crate::host::guest_log::GuestLog;
use crate::instance::{Instance, Limits, Step, thread_cpu_time};
use crate::module::{Compiled, LoadError, Module};
use crate::{AbortOnDrop, Runtime};

/// Pause before a replacement that failed is tried again, doubled each time up to [`MAX_RETRY`].
const MIN_RETRY: Duration = Duration::from_millis(50);

/// See [`MIN_RETRY`].
const MAX_RETRY: Duration = Duration::from_secs(5);

/// Largest answer of `on_configure`, in bytes: a reason is all that it may say. It is read where the call was made, after the deadline was last looked at.
const MAX_CONFIGURED: usize = 64 << 10;

/// Most calls that wait for an instance. The proxy has at most 100 events under way per agent; ten proxies may share one.
const MAX_WAITING: usize = 1024;

/// CPU time in one piece from which making an instance is left to the slow lane. Guest code gives way after a
/// millisecond; copying segments and evaluating constant expressions does not, and a module may have so many of
/// them that it takes hundreds.
const MAX_PIECE: Duration = Duration::from_millis(2);

/// Instances beyond the pool's size that the engine has room for: one that is being torn down while its replacement is made.
const SPARE_SLOTS: u32 = 2;

/// Whether instances are used again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Isolation {
    /// An instance serves many calls.
    #[default]
    Pooled,
    /// Every call gets a fresh instance: nothing carries over.
    Request,
}

/// How a pool is set up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Instances, and thereby calls that run at once. At least 1.
    pub size: u32,
    /// Linear memory of one instance, in bytes.
    pub max_memory: usize,
    /// Largest answer, in bytes.
    pub max_output: usize,
    /// Whether instances are used again.
    pub isolation: Isolation,
    /// What `on_configure` is handed, if anything.
    pub config: Option<Arc<[u8]>>,
    /// Time that an instance has to become ready off the request path: start function, `_initialize` and
    /// `on_configure` together.
    pub start_timeout: Duration,
}

/// Why a pool cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The file is not a module that can be served.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// No instance could be made.
    #[error("cannot start the module `{path}`: {failure}")]
    Start {
        /// The module's file.
        path: String,
        /// What happened.
        failure: Failure,
    },
    /// `on_configure` has answered with an error.
    #[error("the module `{path}` rejects its configuration: {reason}")]
    Rejected {
        /// The module's file.
        path: String,
        /// What the module said.
        reason: String,
    },
}

/// One call.
#[derive(Debug)]
pub struct Request {
    /// What is called.
    pub hook: Hook,
    /// The JSON that it is handed.
    pub input: Vec<u8>,
    /// When it has to have ended, waiting included.
    pub deadline: Instant,
    /// What the guest's log lines are marked with.
    pub correlation_id: Arc<str>,
}

/// How a pool is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// Instances that could be called right now.
    pub available: usize,
    /// Calls that wait for an instance.
    pub waiting: usize,
    /// Instances thrown away since the pool was made.
    pub discarded: u64,
    /// The largest linear memory that an instance has had after a call since the pool was made, in bytes.
    pub largest_memory: usize,
}

/// Instances that wait for a call. Boxed, for they are moved into the future of each call and out again.
type Idle = Vec<Box<Instance>>;

/// The instances of one module. Clones share them.
#[derive(Clone)]
pub struct Pool(Arc<Front>);

/// What all clones of a pool hold and its calls and replacements do not: when it goes, nobody waits for instances any more.
struct Front(Arc<Shared>);

impl Drop for Front {
    fn drop(&mut self) {
        self.0.permits.close();
    }
}

struct Shared {
    runtime: Runtime,
    /// Where replacements are made: at the priority of ordinary work, for calls may be waiting for them.
    home: tokio::runtime::Handle,
    compiled: Compiled,
    settings: Settings,
    log: Arc<GuestLog>,
    idle: Mutex<Idle>,
    /// A permit is the right to take an idle instance or, with [`Isolation::Request`], to make one. Closed when the pool has gone.
    permits: Semaphore,
    waiting: AtomicUsize,
    discarded: AtomicU64,
    /// See [`PoolStats::largest_memory`]. Idle instances are looked at when it is asked for.
    largest_memory: AtomicUsize,
    /// Instances that still have to be made for the first time.
    missing: watch::Sender<u32>,
    /// Making an instance has taken more than [`MAX_PIECE`].
    is_slow_to_make: AtomicBool,
}

impl Pool {
    /// Compiles the module and makes its first instance, which proves that it can be served. The others are
    /// made in the background, some side by side, and serve as they become ready; see [`warm`](Self::warm).
    ///
    /// # Errors
    ///
    /// The module cannot be served, does not start, or rejects its configuration.
    pub async fn start(runtime: &Runtime, module: &Arc<Module>, settings: Settings, cache: Option<&Cache>) -> Result<Self, StartError> {
        let (module, cache, slots, max_memory) = (Arc::clone(module), cache.cloned(), settings.size + SPARE_SLOTS, settings.max_memory);
        let log = Arc::clone(&module.log);
        let turn = runtime.compiling().await;
        let failed = Arc::clone(&module);
        let compiling = runtime.run_blocking(move || {
            // Whoever asked for it may have gone, and asked again.
            let _turn = turn;
            module.compile(slots, max_memory, cache.as_ref())
        });
        let compiled = compiling.await.map_err(|panicked| failed.error(format!("compiling it failed: {panicked}: please report it")))??;
        runtime.ticker().watch(&compiled.engine);
        if settings.config.is_some() && !compiled.hooks.contains(Hook::Configure) {
            log.unconfigurable.call_once(|| warn!("the module has a configuration but does not export `{}`", Hook::Configure));
        }
        let shared = Arc::new(Shared {
            runtime: runtime.clone(),
            home: tokio::runtime::Handle::current(),
            compiled,
            permits: Semaphore::new(0),
            idle: Mutex::new(Vec::with_capacity(settings.size as usize)),
            settings,
            log,
            waiting: AtomicUsize::new(0),
            discarded: AtomicU64::new(0),
            largest_memory: AtomicUsize::new(0),
            missing: watch::Sender::new(0),
            is_slow_to_make: AtomicBool::new(false),
        });
        let first = shared.make_ready().await?;
        match shared.settings.isolation {
            // It was made to see that the module starts.
            Isolation::Request => {
                drop(first);
                shared.permits.add_permits(shared.settings.size as usize);
            }
            Isolation::Pooled => {
                shared.put(first);
                shared.fill();
            }
        }
        Ok(Self(Arc::new(Front(shared))))
    }

    /// Waits until each instance has been made, or has failed once and is retried from now on.
    pub async fn warm(&self) {
        // The sender is in the pool, so that it lives as long as this waits.
        let _ = self.shared().missing.subscribe().wait_for(|missing| *missing == 0).await;
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.0.0
    }

    /// The hooks that the module exports.
    pub fn hooks(&self) -> Hooks {
        self.shared().compiled.hooks
    }

    /// Whether `other` has the same instances.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// How the pool was set up.
    pub fn settings(&self) -> &Settings {
        &self.shared().settings
    }

    /// How the pool is doing.
    pub fn stats(&self) -> PoolStats {
        let shared = self.shared();
        let idle = shared.idle().iter().map(|instance| instance.memory_size()).max().unwrap_or(0);
        PoolStats {
            available: shared.permits.available_permits(),
            waiting: shared.waiting.load(Relaxed),
            discarded: shared.discarded.load(Relaxed),
            largest_memory: shared.largest_memory.fetch_max(idle, Relaxed).max(idle),
        }
    }

    /// Calls a hook: waits for an instance, first come, first served, and runs it, all before the deadline.
    ///
    /// The call runs on the task that polls this future until it has used its first slice, and then on the slow lane. Dropping the future ends it.
    ///
    /// # Errors
    ///
    /// Everything that is a module error.
    pub async fn call(self, request: Request) -> Result<Lease, Failure> {
        let deadline = request.deadline;
        let slot = self.slot(deadline).await?;
        let makes_one_slowly = slot.instance.is_none() && self.shared().is_slow_to_make.load(Relaxed);
        let mut running = Box::pin(slot.run(request));
        if !makes_one_slowly && let Poll::Ready(result) = first_slice(running.as_mut()).await {
            return result;
        }
        let mut slow: AbortOnDrop<_> = self.shared().runtime.spawn_slow(running);
        match tokio::time::timeout_at(deadline.into(), &mut slow.0).await {
            Ok(Ok(result)) => result,
            Ok(Err(error)) => Err(Failure::new(FailureKind::Trap, format!("the agent failed at the call: {error}"))),
            // The slow lane was too busy to find it out itself.
            Err(_) => Err(Failure::new(FailureKind::Timeout, "it did not end before its deadline")),
        }
    }

    async fn slot(&self, deadline: Instant) -> Result<Slot, Failure> {
        let shared = self.shared();
        let permit = match shared.permits.try_acquire() {
            Ok(permit) => permit,
            // Boxed, as is making an instance below: what is rare must not make every call's future large.
            Err(_) => Box::pin(shared.wait(deadline)).await?,
        };
        permit.forget();
        let mut slot = Slot { shared: Arc::clone(shared), instance: None, settled: false };
        if shared.settings.isolation == Isolation::Pooled {
            slot.instance = shared.idle().pop();
        }
        Ok(slot)
    }
}

impl Shared {
    fn idle(&self) -> std::sync::MutexGuard<'_, Idle> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn limits(&self) -> Limits {
        Limits { memory: self.settings.max_memory, output: self.settings.max_output }
    }

    async fn wait(&self, deadline: Instant) -> Result<tokio::sync::SemaphorePermit<'_>, Failure> {
        struct Waiting<'a>(&'a AtomicUsize);

        impl Drop for Waiting<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Relaxed);
            }
        }

        let before = self.waiting.fetch_add(1, Relaxed);
        let _waiting = Waiting(&self.waiting);
        if before >= MAX_WAITING {
            return Err(Failure::new(FailureKind::Overloaded, format!("{MAX_WAITING} calls are waiting for an instance already")));
        }
        match tokio::time::timeout_at(deadline.into(), self.permits.acquire()).await {
            Ok(Ok(permit)) if Instant::now() < deadline => Ok(permit),
            _ => Err(Failure::new(FailureKind::Overloaded, "no instance was free before the deadline: raise `--pool-size`")),
        }
    }

    /// Makes an instance, before `deadline`, and hands it its configuration.
    async fn make(&self, correlation_id: &Arc<str>, deadline: Instant) -> Result<Result<Box<Instance>, String>, (Step, Failure)> {
        let made = Instance::new(&self.compiled, self.limits(), Arc::clone(&self.log), Arc::clone(correlation_id), deadline).await?;
        let mut instance = Box::new(made);
        let Some(config) = self.settings.config.as_ref().filter(|_| self.compiled.hooks.contains(Hook::Configure)) else {
            return Ok(Ok(instance));
        };
        let configured = instance.call(Hook::Configure, config.to_vec(), Arc::clone(correlation_id), deadline).await;
        let rejected = configured.and_then(|()| {
            let said = instance.output();
            if said.len() > MAX_CONFIGURED {
                let detail = format!("the answer of `{}` has {} bytes, the limit is {MAX_CONFIGURED}", Hook::Configure, said.len());
                return Err(Failure::new(FailureKind::OutputLimit, detail));
            }
            Ok(read_configured(said)?)
        });
        match rejected {
            Ok(None) => {
                instance.tidy();
                Ok(Ok(instance))
            }
            Ok(Some(reason)) => Ok(Err(reason)),
            Err(failure) => Err((Step::Configure, failure)),
        }
    }

    /// Makes an instance off the request path.
    async fn make_ready(self: &Arc<Self>) -> Result<Box<Instance>, StartError> {
        let shared = Arc::clone(self);
        let limit = self.settings.start_timeout;
        let mut making = Box::pin(async move {
            let _running = shared.runtime.ticker().running();
            shared.make(&Arc::from(""), Instant::now() + limit).await
        });
        let first = if self.is_slow_to_make.load(Relaxed) { Poll::Pending } else { self.measured_slice(making.as_mut()).await };
        let made = match first {
            Poll::Ready(made) => Ok(made),
            Poll::Pending => (&mut self.runtime.spawn_slow(making).0).await,
        };
        let path = || self.compiled.path.clone();
        match made {
            Ok(Ok(Ok(instance))) => Ok(instance),
            Ok(Ok(Err(reason))) => Err(StartError::Rejected { path: path(), reason }),
            Ok(Err((step, failure))) => {
                let failure = failed_in(step, failure, format_args!("within {} ms: raise `--start-timeout-ms`", limit.as_millis()));
                Err(StartError::Start { path: path(), failure })
            }
            Err(error) => {
                Err(StartError::Start { path: path(), failure: Failure::new(FailureKind::Trap, format!("the agent failed: {error}")) })
            }
        }
    }

    /// The first slice of making an instance, which shows whether others may be made where calls begin.
    async fn measured_slice<F: Future>(&self, mut making: Pin<&mut F>) -> Poll<F::Output> {
        std::future::poll_fn(|context| {
            let before = thread_cpu_time();
            let made = making.as_mut().poll(context);
            if thread_cpu_time().saturating_sub(before) > MAX_PIECE {
                self.is_slow_to_make.store(true, Relaxed);
            }
            Poll::Ready(made)
        })
        .await
    }

    /// Makes an instance ready for calls.
    fn put(&self, instance: Box<Instance>) {
        self.idle().push(instance);
        self.permits.add_permits(1);
    }

    /// Makes the instances after the first in the background, as many at once as the slow lane has threads: their
    /// code runs there when it takes long, and more would only make each of them take longer.
    fn fill(self: &Arc<Self>) {
        let missing = self.settings.size - 1;
        self.missing.send_replace(missing);
        let left = Arc::new(AtomicU32::new(missing));
        for _ in 0..missing.min(self.runtime.0.slow_threads as u32) {
            let (shared, left) = (Arc::clone(self), Arc::clone(&left));
            self.home.spawn(async move {
                while left.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)).is_ok() && !shared.permits.is_closed() {
                    let _attempt = Attempt(&shared.missing);
                    match shared.make_ready().await {
                        Ok(instance) => shared.put(instance),
                        Err(error) => {
                            shared.could_not_make(&error, MIN_RETRY);
                            // The others are not kept waiting for this one.
                            shared.home.spawn(Arc::clone(&shared).retry(MIN_RETRY));
                        }
                    }
                    // There may be many of them, and others want this thread.
                    tokio::task::yield_now().await;
                }
            });
        }
    }

    fn could_not_make(&self, error: &StartError, pause: Duration) {
        self.runtime.0.failed_starts.fetch_add(1, Relaxed);
        if let Some(suppressed) = self.log.replacements.admit() {
            warn!(suppressed, "cannot make another instance, trying again in {pause:?}: {error}");
        }
    }

    /// Puts another instance in the place of one that was thrown away, however long that takes.
    async fn replace(self: Arc<Self>, discarded: Option<Box<Instance>>) {
        drop(discarded);
        self.retry(Duration::ZERO).await;
    }

    /// Makes an instance after `pause`, however often that fails.
    async fn retry(self: Arc<Self>, mut pause: Duration) {
        loop {
            if !pause.is_zero() {
                tokio::time::sleep(pause).await;
            }
            if self.permits.is_closed() {
                return;
            }
            match self.make_ready().await {
                Ok(instance) => return self.put(instance),
                Err(error) => {
                    pause = (pause * 2).clamp(MIN_RETRY, MAX_RETRY);
                    self.could_not_make(&error, pause);
                }
            }
        }
    }
}

/// An instance that is being made for the first time. It counts as tried however that ends.
struct Attempt<'a>(&'a watch::Sender<u32>);

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|missing| *missing = missing.saturating_sub(1));
    }
}

/// The failure of a step before the first call, with its name. `limit` is the one that a timeout has met.
fn failed_in(step: Step, failure: Failure, limit: fmt::Arguments<'_>) -> Failure {
    let detail = match (failure.kind, step) {
        (FailureKind::Timeout, _) => format!("{step} did not end {limit}"),
        // Copying segments belongs to the same step; what went wrong says which it was.
        (_, Step::Start) => failure.detail,
        _ => format!("{step}: {}", failure.detail),
    };
    Failure::new(failure.kind, detail)
}

/// Polls `future` once: what is guest code in it runs for its first slice.
async fn first_slice<F: Future>(mut future: Pin<&mut F>) -> Poll<F::Output> {
    std::future::poll_fn(|context| Poll::Ready(future.as_mut().poll(context))).await
}

/// The right to one instance, which goes back to the pool one way or another.
struct Slot {
    shared: Arc<Shared>,
    instance: Option<Box<Instance>>,
    /// The instance is back in the pool.
    settled: bool,
}

impl Slot {
    async fn run(mut self, request: Request) -> Result<Lease, Failure> {
        let _running = self.shared.runtime.ticker().running();
        if self.instance.is_none() {
            let made = Box::pin(self.shared.make(&request.correlation_id, request.deadline)).await;
            let made =
                made.map_err(|(step, failure)| failed_in(step, failure, format_args!("before the call's deadline: raise `--timeout-ms`")))?;
            let made = made.map_err(|reason| Failure::new(FailureKind::Trap, format!("it rejects its configuration: {reason}")))?;
            self.instance = Some(made);
        }
        let Some(instance) = &mut self.instance else {
            return Err(Failure::new(FailureKind::Overloaded, "no instance was free"));
        };
        instance.call(request.hook, request.input, request.correlation_id, request.deadline).await?;
        Ok(Lease(self))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if self.settled {
            return;
        }
        let instance = self.instance.take();
        if let Some(instance) = &instance {
            self.shared.largest_memory.fetch_max(instance.memory_size(), Relaxed);
        }
        match self.shared.settings.isolation {
            Isolation::Request => {
                drop(instance);
                self.shared.permits.add_permits(1);
            }
            Isolation::Pooled => {
                self.shared.discarded.fetch_add(1, Relaxed);
                debug!("throwing an instance away");
                self.shared.home.spawn(Arc::clone(&self.shared).replace(instance));
            }
        }
    }
}

/// An instance after its call. Unless [`accept`](Self::accept)ed, it is thrown away: whatever was wrong with its answer, its memory is not trusted.
pub struct Lease(Slot);

impl Lease {
    /// What the hook answered. Empty means that it has no opinion.
    pub fn output(&self) -> &[u8] {
        self.0.instance.as_ref().map(|instance| instance.output()).unwrap_or_default()
    }

    /// Takes the input's buffer back, to be used again.
    pub fn take_input(&mut self) -> Vec<u8> {
        self.0.instance.as_mut().map(|instance| instance.take_input()).unwrap_or_default()
    }

    /// Gives the instance back: its answer was good.
    pub fn accept(mut self) {
        if self.0.shared.settings.isolation == Isolation::Pooled
            && let Some(mut instance) = self.0.instance.take()
        {
            instance.tidy();
            self.0.shared.put(instance);
            self.0.settled = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instance::MAX_KEPT_OUTPUT;

    /// A module that traps at every call and rejects every configuration.
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

    fn settings(size: u32) -> Settings {
        Settings { size, max_memory: 1 << 20, max_output: 1024, isolation: Isolation::Pooled, config: None, start_timeout: START_TIMEOUT }
    }

    async fn wait_until(what: &str, done: impl Fn() -> bool) {
        let started = Instant::now();
        while !done() {
            assert!(started.elapsed() < Duration::from_secs(60), "waited in vain until {what}");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    #[tokio::test]
    async fn instances_that_cannot_be_replaced_are_given_up_with_the_pool_and_not_told_of_without_end() {
        const SIZE: u32 = 8;
        let module = module();
        let mut pool = Pool::start(&Runtime::start().unwrap(), &module, settings(SIZE), None).await.unwrap();
        pool.warm().await;
        // From now on no instance can be made.
        loop {
            // Those who made the others may still be about to end.
            match Arc::get_mut(&mut Arc::get_mut(&mut pool.0).unwrap().0) {
                Some(shared) => break shared.settings.config = Some(Arc::from(*b"{}")),
                None => tokio::task::yield_now().await,
            }
        }
        for _ in 0..SIZE {
            let deadline = Instant::now() + Duration::from_secs(60);
            let request = Request { hook: Hook::RequestHeaders, input: Vec::new(), deadline, correlation_id: Arc::from("") };
            assert_eq!(pool.clone().call(request).await.err().unwrap().kind, FailureKind::Trap);
        }
        wait_until("warnings are left out", || module.log.replacements.suppressed() > 0).await;
        assert_eq!(pool.stats().available, 0);
        let shared = Arc::downgrade(pool.shared());
        drop(pool);
        wait_until("the pool has gone", || shared.strong_count() == 0).await;
    }

    #[tokio::test]
    async fn an_idle_instance_keeps_no_large_answer() {
        const LARGE: usize = 1 << 20;
        // Answers with as many bytes as its input is long, at the same place.
        let echo = r#"(module (memory (export "memory") 64)
            (func (export "alloc") (param i32) (result i32) i32.const 1024)
            (func (export "dealloc") (param i32 i32))
            (func (export "on_request_headers") (param i32 i32) (result i64)
                (i64.or (i64.shl (i64.extend_i32_u (local.get 0)) (i64.const 32)) (i64.extend_i32_u (local.get 1)))))"#;
        let module = Arc::new(Module::from_bytes("echo.wasm", wat::parse_str(echo).unwrap(), None).unwrap());
        let settings = Settings { max_memory: 8 << 20, max_output: LARGE, ..settings(1) };
        let pool = Pool::start(&Runtime::start().unwrap(), &module, settings, None).await.unwrap();
        for (len, is_kept) in [(100, true), (LARGE, false), (MAX_KEPT_OUTPUT, true)] {
            let deadline = Instant::now() + Duration::from_secs(60);
            let request = Request { hook: Hook::RequestHeaders, input: vec![b'x'; len], deadline, correlation_id: Arc::from("") };
            let lease = pool.clone().call(request).await.unwrap();
            assert_eq!(lease.output().len(), len);
            lease.accept();
            let kept = pool.shared().idle().last().unwrap().kept_output();
            assert!(kept <= MAX_KEPT_OUTPUT && (kept >= len) == is_kept, "{kept} bytes are kept after an answer of {len}");
        }
    }

    #[tokio::test]
    async fn new_settings_bring_no_new_log() {
        let (runtime, module) = (Runtime::start().unwrap(), module());
        let first = Pool::start(&runtime, &module, settings(1), None).await.unwrap();
        let second = Pool::start(&runtime, &module, settings(2), None).await.unwrap();
        assert!(Arc::ptr_eq(&first.shared().log, &second.shared().log));
    }

    #[tokio::test]
    async fn compiling_goes_on_when_nobody_waits_for_it_and_nothing_else_is_compiled_meanwhile() {
        let more = "(func (param i32) (result i32) (i32.add (local.get 0) (i32.const 1)))".repeat(5000);
        let large = wat::parse_str(format!("{}{more})", BROKEN.strip_suffix(')').unwrap())).unwrap();
        let large = Arc::new(Module::from_bytes("large.wasm", large, None).unwrap());
        let runtime = Runtime::start().unwrap();
        let mut given_up = Box::pin(Pool::start(&runtime, &large, settings(1), None));
        assert!(first_slice(given_up.as_mut()).await.is_pending());
        drop(given_up);
        assert_eq!(runtime.0.compiling.available_permits(), 0);
        Pool::start(&runtime, &module(), settings(1), None).await.unwrap();
        assert_eq!(runtime.0.compiling.available_permits(), 1);
    }

    /// A module with these functions beside a good hook.
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
        let request = Request { hook: Hook::RequestHeaders, input: Vec::new(), deadline, correlation_id: Arc::from("") };
        pool.clone().call(request).await
    }

    #[tokio::test]
    async fn the_first_instance_serves_before_the_others_are_made() {
        const SIZE: u32 = 20;
        let pool = Pool::start(&Runtime::start().unwrap(), &good(""), settings(SIZE), None).await.unwrap();
        // On this runtime's one thread nothing else has run since.
        assert_eq!(pool.stats().available, 1);
        call(&pool).await.unwrap().accept();
        // More calls than there are instances yet: they wait for those.
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
    async fn instances_that_take_long_to_make_are_made_on_the_slow_lane() {
        let settings = Settings { isolation: Isolation::Request, ..settings(2) };
        let runtime = Runtime::start().unwrap();
        let pool = Pool::start(&runtime, &good(""), settings, None).await.unwrap();
        let busy = |time| async move {
            let before = thread_cpu_time();
            while thread_cpu_time() - before < time {}
        };
        pool.shared().is_slow_to_make.store(false, Relaxed);
        assert!(pool.shared().measured_slice(std::pin::pin!(busy(Duration::ZERO))).await.is_ready());
        assert!(!pool.shared().is_slow_to_make.load(Relaxed));
        assert!(pool.shared().measured_slice(std::pin::pin!(busy(2 * MAX_PIECE))).await.is_ready());
        // As long as the slow lane does not get to it, nothing of it is done.
        let (taken, open) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        for _ in 0..runtime.0.slow_threads {
            let (taken, open) = (Arc::clone(&taken), Arc::clone(&open));
            runtime.slow_handle().spawn(async move {
                taken.fetch_add(1, Relaxed);
                while !open.load(Relaxed) {
                    std::thread::yield_now();
                }
            });
        }
        wait_until("every thread of the slow lane is taken", || taken.load(Relaxed) == runtime.0.slow_threads).await;
        let mut asked = Box::pin(call(&pool));
        assert!(first_slice(asked.as_mut()).await.is_pending());
        open.store(true, Relaxed);
        assert!(asked.await.unwrap().output().is_empty());
    }

    #[tokio::test]
    async fn a_later_instance_that_fails_is_counted_and_tried_again() {
        const SIZE: u32 = 32;
        // Every other start fails.
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
        wait_until("all instances are there", || pool.stats().available == SIZE as usize).await;
    }

    #[tokio::test]
    async fn a_start_that_takes_too_long_is_told_with_function_limit_and_option() {
        let endless = "(loop $ever (br $ever))";
        let runtime = Runtime::start().unwrap();
        for (functions, name) in [
            (format!("(func $start {endless}) (start $start)"), "its start function"),
            (format!(r#"(func (export "_initialize") {endless})"#), "`_initialize`"),
            (format!(r#"(func (export "on_configure") (param i32 i32) (result i64) {endless} i64.const 0)"#), "`on_configure`"),
        ] {
            let module = good(&functions);
            let short = Settings { start_timeout: Duration::from_millis(20), config: Some(Arc::from(*b"{}")), ..settings(2) };
            let error = Pool::start(&runtime, &module, short.clone(), None).await.err().unwrap().to_string();
            assert!(error.ends_with(&format!("WASM_TIMEOUT: {name} did not end within 20 ms: raise `--start-timeout-ms`")), "{error}");
        }
    }

    #[tokio::test]
    async fn the_largest_memory_is_known_in_both_isolation_modes() {
        let hook = r#"(module (memory (export "memory") 2)
            (func (export "alloc") (param i32) (result i32) i32.const 1024)
            (func (export "dealloc") (param i32 i32))
            (func (export "on_request_headers") (param i32 i32) (result i64) (drop (memory.grow (i32.const 3))) i64.const 0))"#;
        let module = Arc::new(Module::from_bytes("test.wasm", wat::parse_str(hook).unwrap(), None).unwrap());
        let runtime = Runtime::start().unwrap();
        for isolation in [Isolation::Pooled, Isolation::Request] {
            let pool = Pool::start(&runtime, &module, Settings { isolation, ..settings(1) }, None).await.unwrap();
            call(&pool).await.unwrap().accept();
            assert_eq!(pool.stats().largest_memory, 5 << 16, "{isolation:?}");
            // An instance whose answer was bad counts too.
            drop(call(&pool).await.unwrap());
            let grown = if isolation == Isolation::Pooled { 8 } else { 5 };
            assert_eq!(pool.stats().largest_memory, grown << 16, "{isolation:?}");
        }
    }
}
