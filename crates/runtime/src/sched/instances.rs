//! The instances of a pool: the idle ones, the permits to take one, and how more are created.

use std::fmt;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, watch};
use tracing::warn;
use zentinel_wasm_contract::{Failure, FailureKind, Hook};

use crate::artifact::Artifact;
use crate::budget::thread_cpu_time;
use crate::host::guest_log::GuestLog;
use crate::host::state::InstanceLimits;
use crate::instance::{Instance, StartStep};
use crate::module::LoadError;
use crate::runtime::Runtime;

/// Pause before a failed start of an instance is retried. Doubled each time, up to [`MAX_RETRY`].
const MIN_RETRY: Duration = Duration::from_millis(50);

/// Longest pause before a retry.
const MAX_RETRY: Duration = Duration::from_secs(5);

/// Most calls that wait for an instance. The proxy has at most 100 events in flight per agent, and
/// ten proxies may share an agent.
const MAX_WAITING: usize = 1024;

/// CPU time without a yield above which instances are created on the slow lane. Guest code yields
/// after 1 ms, but copying segments and evaluating constant expressions do not, and a module may
/// have so many of them that they take hundreds of ms.
pub(super) const MAX_PIECE: Duration = Duration::from_millis(2);

/// Whether instances are reused.
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
pub struct PoolSettings {
    /// Number of instances, and so of concurrent calls. At least 1.
    pub size: u32,
    /// Linear memory of one instance, in bytes.
    pub max_memory: usize,
    /// Largest answer, in bytes.
    pub max_output: usize,
    /// Whether instances are reused.
    pub isolation: Isolation,
    /// The input of `on_configure`, if any.
    pub config: Option<Arc<[u8]>>,
    /// Time for an instance to become ready off the request path: start function, `_initialize` and
    /// `on_configure` together.
    pub start_timeout: Duration,
}

/// Why a pool cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The file is not a module that can be served.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// No instance could be created.
    #[error("cannot start the module `{path}`: {failure}")]
    Start {
        /// The module's file.
        path: String,
        /// What happened.
        failure: Failure,
    },
    /// `on_configure` returned an error.
    #[error("the module `{path}` rejects its configuration: {reason}")]
    Rejected {
        /// The module's file.
        path: String,
        /// The module's reason.
        reason: String,
    },
}

impl StartError {
    /// Every problem without the module's file, each in one line.
    pub fn problems(&self) -> Vec<String> {
        match self {
            Self::Load(error) => error.problems().to_vec(),
            Self::Start { failure, .. } => vec![format!("it does not start: {failure}")],
            Self::Rejected { reason, .. } => vec![format!("it rejects its configuration: {reason}")],
        }
    }
}

/// Idle instances. Boxed, because they are moved into the future of each call and out again.
type Idle = Vec<Box<Instance>>;

/// The instances of one pool.
pub(crate) struct Instances {
    runtime: Runtime,
    /// Where instances are created: at the priority of ordinary work, because calls may be waiting
    /// for them.
    home: tokio::runtime::Handle,
    artifact: Artifact,
    pub(super) settings: PoolSettings,
    pub(super) log: Arc<GuestLog>,
    idle: Mutex<Idle>,
    /// A permit allows taking an idle instance or, with [`Isolation::Request`], creating one.
    /// Closed when the pool is dropped.
    permits: Semaphore,
    waiting: AtomicUsize,
    discarded: AtomicU64,
    /// See [`PoolStats::largest_memory`](super::pool::PoolStats). Idle instances are checked when
    /// it is read.
    largest_memory: AtomicUsize,
    /// Instances that have not been attempted yet.
    missing: watch::Sender<u32>,
    /// Creating an instance took more than [`MAX_PIECE`].
    pub(super) is_slow_to_make: AtomicBool,
}

impl Instances {
    /// A pool without instances.
    pub(super) fn new(runtime: Runtime, artifact: Artifact, settings: PoolSettings, log: Arc<GuestLog>) -> Arc<Self> {
        Arc::new(Self {
            runtime,
            home: tokio::runtime::Handle::current(),
            artifact,
            permits: Semaphore::new(0),
            idle: Mutex::new(Vec::with_capacity(settings.size as usize)),
            settings,
            log,
            waiting: AtomicUsize::new(0),
            discarded: AtomicU64::new(0),
            largest_memory: AtomicUsize::new(0),
            missing: watch::Sender::new(0),
            is_slow_to_make: AtomicBool::new(false),
        })
    }

    /// Creates the first instance, and the others in the background.
    ///
    /// # Errors
    ///
    /// The module does not start or rejects its configuration.
    pub(crate) async fn start(
        runtime: Runtime,
        artifact: Artifact,
        settings: PoolSettings,
        log: Arc<GuestLog>,
    ) -> Result<Arc<Self>, StartError> {
        let instances = Self::new(runtime, artifact, settings, log);
        let first = instances.make_ready().await?;
        match instances.settings.isolation {
            // Created only to prove that the module starts.
            Isolation::Request => {
                drop(first);
                instances.permits.add_permits(instances.settings.size as usize);
            }
            Isolation::Pooled => {
                instances.put(first);
                instances.fill();
            }
        }
        Ok(instances)
    }

    /// Waits until each instance was created, or failed once and is being retried.
    pub(crate) async fn warm(&self) {
        // The sender lives as long as `self`.
        let _ = self.missing.subscribe().wait_for(|missing| *missing == 0).await;
    }

    /// Ends all waiting and retrying.
    pub(crate) fn close(&self) {
        self.permits.close();
    }

    pub(crate) fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    pub(crate) fn artifact(&self) -> &Artifact {
        &self.artifact
    }

    pub(crate) fn settings(&self) -> &PoolSettings {
        &self.settings
    }

    pub(crate) fn available(&self) -> usize {
        self.permits.available_permits()
    }

    pub(crate) fn waiting(&self) -> usize {
        self.waiting.load(Relaxed)
    }

    pub(crate) fn discarded(&self) -> u64 {
        self.discarded.load(Relaxed)
    }

    pub(crate) fn largest_memory(&self) -> usize {
        let idle = self.idle().iter().map(|instance| instance.memory_size()).max().unwrap_or(0);
        self.largest_memory.fetch_max(idle, Relaxed).max(idle)
    }

    pub(crate) fn observe_memory(&self, instance: &Instance) {
        self.largest_memory.fetch_max(instance.memory_size(), Relaxed);
    }

    /// Whether instances must be created on the slow lane.
    pub(crate) fn is_slow_to_make(&self) -> bool {
        self.is_slow_to_make.load(Relaxed)
    }

    pub(super) fn idle(&self) -> MutexGuard<'_, Idle> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes an idle instance, for which the caller has a permit, if instances are reused.
    pub(crate) fn take_idle(&self) -> Option<Box<Instance>> {
        match self.settings.isolation {
            Isolation::Pooled => self.idle().pop(),
            Isolation::Request => None,
        }
    }

    /// Takes a permit if one is free.
    pub(crate) fn try_acquire(&self) -> bool {
        self.permits.try_acquire().is_ok_and(|permit| {
            permit.forget();
            true
        })
    }

    /// Waits for a permit.
    ///
    /// # Errors
    ///
    /// None is free before `deadline`, or too many calls are waiting.
    pub(crate) async fn acquire(&self, deadline: Instant) -> Result<(), Failure> {
        struct Waiting<'a>(&'a AtomicUsize);

        impl Drop for Waiting<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Relaxed);
            }
        }

        let before = self.waiting.fetch_add(1, Relaxed);
        let _waiting = Waiting(&self.waiting);
        if before >= MAX_WAITING {
            return Err(Failure::new(
                FailureKind::Overloaded,
                format!("{MAX_WAITING} calls are already waiting for an instance: raise `--pool-size`"),
            ));
        }
        match tokio::time::timeout_at(deadline.into(), self.permits.acquire()).await {
            Ok(Ok(permit)) if Instant::now() < deadline => {
                permit.forget();
                Ok(())
            }
            _ => Err(Failure::new(FailureKind::Overloaded, "no instance was free before the deadline: raise `--pool-size`")),
        }
    }

    /// Gives a permit back.
    pub(crate) fn release(&self) {
        self.permits.add_permits(1);
    }

    /// Makes an instance available for calls.
    pub(crate) fn put(&self, instance: Box<Instance>) {
        self.idle().push(instance);
        self.release();
    }

    /// Drops an instance and creates a replacement, however long that takes.
    pub(crate) fn discard(self: &Arc<Self>, instance: Option<Box<Instance>>) {
        self.discarded.fetch_add(1, Relaxed);
        let instances = Arc::clone(self);
        self.home.spawn(async move {
            drop(instance);
            instances.retry(Duration::ZERO).await;
        });
    }

    /// Creates an instance before `deadline` and configures it. The inner error is the module's
    /// reason for rejecting its configuration.
    ///
    /// # Errors
    ///
    /// The step that failed, and why.
    pub(crate) async fn make(
        &self,
        correlation_id: &Arc<str>,
        deadline: Instant,
    ) -> Result<Result<Box<Instance>, String>, (StartStep, Failure)> {
        let limits = InstanceLimits { memory: self.settings.max_memory, output: self.settings.max_output };
        let made = Instance::new(&self.artifact, limits, Arc::clone(&self.log), Arc::clone(correlation_id), deadline).await?;
        let mut instance = Box::new(made);
        let Some(config) = self.settings.config.as_ref().filter(|_| self.artifact.hooks().contains(Hook::Configure)) else {
            return Ok(Ok(instance));
        };
        let interface = &self.artifact.interface;
        let configured = instance.call(interface.configuration(config), Arc::clone(correlation_id), deadline).await;
        match configured.and_then(|()| interface.configured(instance.exchange())) {
            Ok(None) => {
                instance.exchange_mut().shrink();
                Ok(Ok(instance))
            }
            Ok(Some(reason)) => Ok(Err(reason)),
            Err(failure) => Err((StartStep::Configure, failure)),
        }
    }

    /// Creates an instance off the request path.
    pub(super) async fn make_ready(self: &Arc<Self>) -> Result<Box<Instance>, StartError> {
        let instances = Arc::clone(self);
        let limit = self.settings.start_timeout;
        let mut making = Box::pin(async move {
            let _running = instances.runtime.ticker().running();
            instances.make(&Arc::from(""), Instant::now() + limit).await
        });
        let first = if self.is_slow_to_make() { Poll::Pending } else { self.measured_slice(making.as_mut()).await };
        let made = match first {
            Poll::Ready(made) => Ok(made),
            Poll::Pending => (&mut self.runtime.slow_lane().spawn(making).0).await,
        };
        let path = || self.artifact.path.clone();
        match made {
            Ok(Ok(Ok(instance))) => Ok(instance),
            Ok(Ok(Err(reason))) => Err(StartError::Rejected { path: path(), reason }),
            Ok(Err((step, failure))) => {
                let failure = step_failed(step, failure, format_args!("within {} ms: raise `--start-timeout-ms`", limit.as_millis()));
                Err(StartError::Start { path: path(), failure })
            }
            Err(error) => {
                Err(StartError::Start { path: path(), failure: Failure::new(FailureKind::Trap, format!("internal error: {error}")) })
            }
        }
    }

    /// Polls the creation of an instance once. Its duration decides whether further instances may
    /// be created on their caller's task.
    pub(super) async fn measured_slice<F: Future>(&self, mut making: Pin<&mut F>) -> Poll<F::Output> {
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

    /// Creates the instances after the first in the background, as many at once as the slow lane
    /// has threads: they run there if they take long, and more would only slow each other down.
    fn fill(self: &Arc<Self>) {
        let missing = self.settings.size - 1;
        self.missing.send_replace(missing);
        let left = Arc::new(AtomicU32::new(missing));
        for _ in 0..missing.min(self.runtime.slow_lane().threads() as u32) {
            let (instances, left) = (Arc::clone(self), Arc::clone(&left));
            self.home.spawn(async move {
                while left.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)).is_ok() && !instances.permits.is_closed() {
                    let _attempt = FirstAttempt(&instances.missing);
                    match instances.make_ready().await {
                        Ok(instance) => instances.put(instance),
                        Err(error) => {
                            instances.could_not_make(error, MIN_RETRY);
                            // The others must not wait for this one.
                            instances.home.spawn(Arc::clone(&instances).retry(MIN_RETRY));
                        }
                    }
                    // There may be many instances, and other tasks need this thread.
                    tokio::task::yield_now().await;
                }
            });
        }
    }

    fn could_not_make(&self, error: StartError, pause: Duration) {
        self.runtime.count_failed_start();
        let Some(suppressed) = self.log.replacements.admit() else { return };
        let is_slow = matches!(&error, StartError::Start { failure, .. } if failure.is_slow_to_describe());
        let log = move || warn!(suppressed, "cannot create an instance, retrying in {pause:?}: {error}");
        if is_slow {
            tokio::task::spawn_blocking(log);
        } else {
            log();
        }
    }

    /// Creates an instance after `pause`, however often that fails.
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
                    self.could_not_make(error, pause);
                }
            }
        }
    }
}

/// The first attempt to create an instance. Its end is counted whatever the result.
struct FirstAttempt<'a>(&'a watch::Sender<u32>);

impl Drop for FirstAttempt<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|missing| *missing = missing.saturating_sub(1));
    }
}

/// The failure of a step before the first call, with the step's name. `limit` describes the
/// exceeded time limit.
pub(crate) fn step_failed(step: StartStep, failure: Failure, limit: fmt::Arguments<'_>) -> Failure {
    let detail = match (failure.kind, step) {
        (FailureKind::Timeout, _) => format!("{step} did not end {limit}"),
        // Copying segments is part of the same step, and the failure names the cause.
        (_, StartStep::Start) => failure.detail.into(),
        _ => format!("{step}: {}", failure.detail),
    };
    Failure { trace: failure.trace, ..Failure::new(failure.kind, detail) }
}

/// Polls `future` once, which runs its guest code for the first slice.
pub(crate) async fn first_slice<F: Future>(mut future: Pin<&mut F>) -> Poll<F::Output> {
    std::future::poll_fn(|context| Poll::Ready(future.as_mut().poll(context))).await
}
