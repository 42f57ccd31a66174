//! The instances of one module, and the calls made on them.

use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use tracing::warn;
use zentinel_wasm_contract::event::{RequestHeaders, ResponseHeaders};
use zentinel_wasm_contract::{Failure, FailureKind, HeaderCase, Hook, Hooks};

use crate::artifact::Artifact;
use crate::cache::Cache;
use crate::guest::{Call, RequestContext, ResponseContext, View};
use crate::module::Module;
use crate::runtime::Runtime;
use crate::sched::instances::{Instances, PoolSettings, StartError, first_slice};
use crate::sched::slot::{Lease, Slot};
use crate::sched::slow_lane::AbortOnDrop;

/// Time after its deadline in which a slow call may end itself: a tick, and a turn on a thread that
/// it shares with some others. It knows what it was doing.
const LAST_TURN: Duration = Duration::from_millis(5);

/// Slots of the engine in addition to the pool's size, because a replacement is created while its
/// predecessor is dropped.
const SPARE_SLOTS: u32 = 2;

/// Statistics of a pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// Instances that are free.
    pub available: usize,
    /// Calls that are waiting for an instance.
    pub waiting: usize,
    /// Instances discarded since the pool was started.
    pub discarded: u64,
    /// The largest linear memory of an instance after a call since the pool was started, in bytes.
    pub largest_memory: usize,
}

/// How long the parts of a call took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CallTimes {
    /// Waiting for an instance.
    pub waiting: Duration,
    /// From then until the hook had returned or failed. That includes the creation of an instance,
    /// unless instances are reused, and turns of other calls on the slow lane.
    pub in_guest: Duration,
}

/// Compiles a module for a pool and checks it.
pub(super) async fn compile(
    runtime: &Runtime,
    module: &Arc<Module>,
    settings: &PoolSettings,
    cache: Option<&Cache>,
) -> Result<Artifact, StartError> {
    let (compiled, cache, slots, max_memory) = (Arc::clone(module), cache.cloned(), settings.size + SPARE_SLOTS, settings.max_memory);
    let permit = runtime.compile_permit().await;
    let compiling = runtime.run_blocking(move || {
        // Owned by this task, because the caller may be gone, or have called again.
        let _permit = permit;
        Artifact::compile(&compiled, slots, max_memory, cache.as_ref())
    });
    let artifact = compiling.await.map_err(|panicked| module.error(format!("the compiler {panicked}: please report this")))??;
    runtime.ticker().watch(&artifact.engine);
    Ok(artifact)
}

/// The instances of one module. Clones share them.
#[derive(Clone)]
pub struct Pool(Arc<PoolHandle>);

/// Shared by the clones of a pool, but not by its calls and tasks. When it is dropped, no caller
/// needs instances any more.
struct PoolHandle(Arc<Instances>);

impl Drop for PoolHandle {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl Pool {
    /// Compiles the module and creates its first instance, which proves that the module can be
    /// served. The others are created in the background, some in parallel, and serve as they become
    /// ready; see [`warm`](Self::warm).
    ///
    /// # Errors
    ///
    /// The module cannot be served, does not start, or rejects its configuration.
    pub async fn start(runtime: &Runtime, module: &Arc<Module>, settings: PoolSettings, cache: Option<&Cache>) -> Result<Self, StartError> {
        let artifact = compile(runtime, module, &settings, cache).await?;
        if settings.config.is_some() && !artifact.hooks().contains(Hook::Configure) {
            module
                .log
                .unconfigurable
                .call_once(|| warn!("ignoring the module's configuration, because it does not export `{}`", Hook::Configure));
        }
        let instances = Instances::start(runtime.clone(), artifact, settings, Arc::clone(&module.log)).await?;
        Ok(Self(Arc::new(PoolHandle(instances))))
    }

    /// Waits until each instance was created, or failed once and is being retried.
    pub async fn warm(&self) {
        self.instances().warm().await;
    }

    pub(super) fn instances(&self) -> &Arc<Instances> {
        &self.0.0
    }

    #[cfg(test)]
    pub(super) fn instances_mut(&mut self) -> Option<&mut Instances> {
        Arc::get_mut(&mut Arc::get_mut(&mut self.0)?.0)
    }

    /// The hooks that the module exports.
    pub fn hooks(&self) -> Hooks {
        self.instances().artifact().hooks()
    }

    /// Whether `other` has the same instances.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// The settings of the pool.
    pub fn settings(&self) -> &PoolSettings {
        self.instances().settings()
    }

    /// Statistics of the pool. Visits every idle instance.
    pub fn stats(&self) -> PoolStats {
        let instances = self.instances();
        PoolStats {
            available: instances.available(),
            waiting: instances.waiting(),
            discarded: instances.discarded(),
            largest_memory: instances.largest_memory(),
        }
    }

    /// Calls that are waiting for an instance.
    pub fn waiting(&self) -> usize {
        self.instances().waiting()
    }

    /// Instances discarded since the pool was started.
    pub fn discarded(&self) -> u64 {
        self.instances().discarded()
    }

    /// Writes an event for the module.
    ///
    /// # Errors
    ///
    /// The body is over the limit or invalid base64.
    pub fn prepare(&self, view: &View<'_>) -> Result<Call, Failure> {
        self.instances().artifact().interface.prepare(view)
    }

    /// What later hooks get to see of a request. `call` is its prepared call.
    pub fn request_context(&self, event: &RequestHeaders<'_>, call: &Call) -> RequestContext {
        self.instances().artifact().interface.request_context(event, call)
    }

    /// What `on_response_body` gets to see of a response.
    pub fn response_context(&self, event: &ResponseHeaders<'_>, case: HeaderCase) -> ResponseContext {
        self.instances().artifact().interface.response_context(event, case)
    }

    /// Makes a call: waits for an instance, first come, first served, and runs it, all before
    /// `deadline`. `correlation_id` marks the guest's log lines.
    ///
    /// The call runs on the task that polls this future until it has used its first slice, and then
    /// on the slow lane. Dropping the future ends the call.
    ///
    /// # Errors
    ///
    /// Every module error that a call can end in.
    pub fn call(self, call: Call, correlation_id: Arc<str>, deadline: Instant) -> impl Future<Output = Result<Lease, Failure>> + Send {
        self.call_timed(call, correlation_id, deadline, None)
    }

    /// Like [`call`](Self::call). Measures the call into `times`, if given.
    ///
    /// # Errors
    ///
    /// As for [`call`](Self::call); `times` is measured then too.
    pub async fn call_timed(
        self,
        call: Call,
        correlation_id: Arc<str>,
        deadline: Instant,
        mut times: Option<&mut CallTimes>,
    ) -> Result<Lease, Failure> {
        let mut lap = times.is_some().then(Instant::now);
        let slot = Slot::acquire(self.instances(), deadline).await;
        if let (Some(times), Some(began)) = (&mut times, lap) {
            let now = Instant::now();
            (times.waiting, lap) = (now - began, Some(now));
        }
        let slot = slot?;
        let makes_one_slowly = slot.is_empty() && self.instances().is_slow_to_make();
        let mut running = Box::pin(slot.run(call, correlation_id, deadline));
        let first = if makes_one_slowly { Poll::Pending } else { first_slice(running.as_mut()).await };
        let result = match first {
            Poll::Ready(result) => result,
            // Boxed, because rare cases must not make every call's future large.
            Poll::Pending => Box::pin(self.run_slowly(running, deadline)).await,
        };
        if let (Some(times), Some(began)) = (times, lap) {
            times.in_guest = began.elapsed();
        }
        result
    }

    async fn run_slowly(
        &self,
        running: Pin<Box<impl Future<Output = Result<Lease, Failure>> + Send + 'static>>,
        deadline: Instant,
    ) -> Result<Lease, Failure> {
        let mut slow: AbortOnDrop<_> = self.instances().runtime().slow_lane().spawn(running);
        match tokio::time::timeout_at((deadline + LAST_TURN).into(), &mut slow.0).await {
            Ok(Ok(result)) => result,
            Ok(Err(error)) => Err(Failure::new(FailureKind::Trap, format!("internal error: {error}"))),
            // The slow lane was too busy to end the call itself.
            Err(_) => Err(Failure::new(FailureKind::Timeout, "the call exceeded its deadline")),
        }
    }
}
