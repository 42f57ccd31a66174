//! Warm instances, and the calls made on them.

use std::pin::Pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;
use tracing::{debug, warn};
use zentinel_wasm_contract::answer::parse_configured;
use zentinel_wasm_contract::{Failure, FailureKind, Hook, Hooks};

use crate::cache::Cache;
use crate::instance::{Instance, Limits};
use crate::log::GuestLog;
use crate::module::{Compiled, LoadError, Module};
use crate::{AbortOnDrop, Runtime};

/// Time that an instance has to become ready off the request path: start function, `_initialize` and `on_configure`.
const READY_TIMEOUT: Duration = Duration::from_secs(1);

/// Pause before a replacement that failed is tried again, doubled each time up to [`MAX_RETRY`].
const MIN_RETRY: Duration = Duration::from_millis(50);

/// See [`MIN_RETRY`].
const MAX_RETRY: Duration = Duration::from_secs(5);

/// Largest answer of `on_configure`, in bytes: a reason is all that it may say. It is read where the call was made, after the deadline was last looked at.
const MAX_CONFIGURED: usize = 64 << 10;

/// Most calls that wait for an instance. The proxy has at most 100 events under way per agent; ten proxies may share one.
const MAX_WAITING: usize = 1024;

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
    /// Linear memory of the largest idle instance, in bytes.
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
}

impl Pool {
    /// Compiles the module and makes its instances.
    ///
    /// # Errors
    ///
    /// The module cannot be served, does not start, or rejects its configuration.
    pub async fn start(runtime: &Runtime, module: &Arc<Module>, settings: Settings, cache: Option<&Cache>) -> Result<Self, StartError> {
        let (module, cache, slots, max_memory) = (Arc::clone(module), cache.cloned(), settings.size + SPARE_SLOTS, settings.max_memory);
        let log = Arc::clone(&module.log);
        let turn = runtime.compiling().await;
        let compiling = tokio::task::spawn_blocking(move || {
            // Whoever asked for it may have gone, and asked again.
            let _turn = turn;
            module.compile(slots, max_memory, cache.as_ref())
        });
        let compiled = compiling.await.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?;
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
        });
        // The first instance of a fresh-instance pool proves that the module starts, and is then let go.
        let made = if shared.settings.isolation == Isolation::Request { 1 } else { shared.settings.size };
        for _ in 0..made {
            let instance = shared.make_ready().await?;
            if shared.settings.isolation == Isolation::Pooled {
                shared.idle().push(instance);
            }
            // There may be many of them, and others want this thread.
            tokio::task::yield_now().await;
        }
        shared.permits.add_permits(shared.settings.size as usize);
        Ok(Self(Arc::new(Front(shared))))
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
        PoolStats {
            available: shared.permits.available_permits(),
            waiting: shared.waiting.load(Relaxed),
            discarded: shared.discarded.load(Relaxed),
            largest_memory: shared.idle().iter().map(|instance| instance.memory_size()).max().unwrap_or(0),
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
        let mut running = Box::pin(slot.run(request));
        if let Poll::Ready(result) = first_slice(running.as_mut()).await {
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
    async fn make(&self, correlation_id: &Arc<str>, deadline: Instant) -> Result<Result<Box<Instance>, String>, Failure> {
        let made = Instance::new(&self.compiled, self.limits(), Arc::clone(&self.log), Arc::clone(correlation_id), deadline).await?;
        let mut instance = Box::new(made);
        if let Some(config) = &self.settings.config
            && self.compiled.hooks.contains(Hook::Configure)
        {
            instance.call(Hook::Configure, config.to_vec(), Arc::clone(correlation_id), deadline).await?;
            let said = instance.output();
            if said.len() > MAX_CONFIGURED {
                let detail = format!("the answer of `{}` has {} bytes, the limit is {MAX_CONFIGURED}", Hook::Configure, said.len());
                return Err(Failure::new(FailureKind::OutputLimit, detail));
            }
            if let Some(reason) = parse_configured(said)? {
                return Ok(Err(reason));
            }
            instance.tidy();
        }
        Ok(Ok(instance))
    }

    /// Makes an instance off the request path.
    async fn make_ready(self: &Arc<Self>) -> Result<Box<Instance>, StartError> {
        let shared = Arc::clone(self);
        let mut making = Box::pin(async move {
            let _running = shared.runtime.ticker().running();
            shared.make(&Arc::from(""), Instant::now() + READY_TIMEOUT).await
        });
        let made = match first_slice(making.as_mut()).await {
            Poll::Ready(made) => Ok(made),
            Poll::Pending => (&mut self.runtime.spawn_slow(making).0).await,
        };
        let path = || self.compiled.path.clone();
        match made {
            Ok(Ok(Ok(instance))) => Ok(instance),
            Ok(Ok(Err(reason))) => Err(StartError::Rejected { path: path(), reason }),
            Ok(Err(failure)) => Err(StartError::Start { path: path(), failure }),
            Err(error) => {
                Err(StartError::Start { path: path(), failure: Failure::new(FailureKind::Trap, format!("the agent failed: {error}")) })
            }
        }
    }

    /// Puts another instance in the place of one that was thrown away, however long that takes.
    async fn replace(self: Arc<Self>, discarded: Option<Box<Instance>>) {
        drop(discarded);
        let mut pause = MIN_RETRY;
        let instance = loop {
            if self.permits.is_closed() {
                return;
            }
            match self.make_ready().await {
                Ok(instance) => break instance,
                Err(error) => {
                    if let Some(suppressed) = self.log.replacements.take() {
                        warn!(suppressed, "cannot replace an instance, trying again in {pause:?}: {error}");
                    }
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(MAX_RETRY);
                }
            }
        };
        self.idle().push(instance);
        self.permits.add_permits(1);
    }
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
            let made = Box::pin(self.shared.make(&request.correlation_id, request.deadline)).await?;
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
            self.0.shared.idle().push(instance);
            self.0.shared.permits.add_permits(1);
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

    fn settings(size: u32) -> Settings {
        Settings { size, max_memory: 1 << 20, max_output: 1024, isolation: Isolation::Pooled, config: None }
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
        // From now on no instance can be made.
        Arc::get_mut(&mut Arc::get_mut(&mut pool.0).unwrap().0).unwrap().settings.config = Some(Arc::from(*b"{}"));
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

    #[tokio::test]
    async fn starting_gives_way_to_others_between_two_instances() {
        const SIZE: u32 = 20;
        let (runtime, module) = (Runtime::start().unwrap(), module());
        let mut start = Box::pin(Pool::start(&runtime, &module, settings(SIZE), None));
        let mut polls = 0;
        let started = std::future::poll_fn(|context| {
            polls += 1;
            start.as_mut().poll(context)
        });
        started.await.unwrap();
        assert!(polls > SIZE, "{polls}");
    }
}
