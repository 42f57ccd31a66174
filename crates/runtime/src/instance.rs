//! One instance of a module.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use wasmtime::Store;
use zentinel_wasm_contract::{Failure, FailureKind, Hook};

use crate::artifact::Artifact;
use crate::guest::exchange::GuestExchange;
use crate::guest::{Call, GuestFunctions};
use crate::host::guest_log::GuestLog;
use crate::host::state::{HostState, InstanceLimits};
use crate::trace::Tracer;

/// A step that an instance runs before it serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StartStep {
    Start,
    Initialize,
    Configure,
}

impl fmt::Display for StartStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Start => f.write_str("its start function"),
            Self::Initialize => f.write_str("`_initialize`"),
            Self::Configure => write!(f, "`{}`", Hook::Configure),
        }
    }
}

/// An instance that is ready to be called.
pub(crate) struct Instance {
    store: Store<HostState>,
    functions: GuestFunctions,
    /// Linear memory before the first call, in bytes.
    memory_at_start: usize,
    tracer: Arc<Tracer>,
}

impl Instance {
    /// Creates an instance and runs its start function and `_initialize`, all before `deadline`.
    ///
    /// # Errors
    ///
    /// The step that failed, and why.
    pub(crate) async fn new(
        artifact: &Artifact,
        limits: InstanceLimits,
        log: Arc<GuestLog>,
        correlation_id: Arc<str>,
        deadline: Instant,
    ) -> Result<Self, (StartStep, Failure)> {
        let mut store = Store::new(&artifact.engine, HostState::new(Some(log), limits, artifact.interface.exchange()));
        store.limiter(|state| state);
        store.epoch_deadline_callback(|mut context| context.data_mut().tick());
        store.set_epoch_deadline(1);
        store.data_mut().begin(correlation_id, deadline);
        let mut step = StartStep::Start;
        match link(&mut store, artifact, &mut step).await {
            Ok(functions) => {
                let mut instance = Self { store, functions, memory_at_start: 0, tracer: Arc::clone(&artifact.tracer) };
                instance.memory_at_start = instance.memory_size();
                Ok(instance)
            }
            Err(error) => Err((step, failure(&mut store, &error, &artifact.tracer))),
        }
    }

    /// Calls the guest. [`exchange`](Self::exchange) holds its answer afterwards.
    ///
    /// # Errors
    ///
    /// Every module error that a call can end in.
    pub(crate) async fn call(&mut self, call: Call, correlation_id: Arc<str>, deadline: Instant) -> Result<(), Failure> {
        self.store.data_mut().begin(correlation_id, deadline);
        self.store.set_epoch_deadline(1);
        let result = self.functions.call(&mut self.store, call).await;
        self.store.data_mut().flush_streams();
        result.map_err(|error| failure(&mut self.store, &error, &self.tracer))
    }

    /// The input and the answer of the last call.
    pub(crate) fn exchange(&self) -> &GuestExchange {
        &self.store.data().exchange
    }

    pub(crate) fn exchange_mut(&mut self) -> &mut GuestExchange {
        &mut self.store.data_mut().exchange
    }

    /// Linear memory before the first call, in bytes.
    pub(crate) fn memory_at_start(&self) -> usize {
        self.memory_at_start
    }

    /// Linear memory in use, in bytes.
    pub(crate) fn memory_size(&self) -> usize {
        self.store.data().memory.map_or(0, |memory| memory.data_size(&self.store))
    }
}

async fn link(store: &mut Store<HostState>, artifact: &Artifact, step: &mut StartStep) -> wasmtime::Result<GuestFunctions> {
    let instance = artifact.guest.instantiate_async(&mut *store).await?;
    store.data_mut().memory = instance.get_memory(&mut *store, "memory");
    if let Some(initialize) = &artifact.initialize
        && let Some(initialize) = instance.get_module_export(&mut *store, initialize).and_then(wasmtime::Extern::into_func)
    {
        *step = StartStep::Initialize;
        initialize.typed::<(), ()>(&*store)?.call_async(&mut *store, ()).await?;
    }
    artifact.interface.bind(store, &instance).await
}

/// The module error that corresponds to an error of wasmtime.
fn failure(store: &mut Store<HostState>, error: &wasmtime::Error, tracer: &Tracer) -> Failure {
    let state = store.data_mut();
    state.flush_streams();
    let failure = state.take_failure().unwrap_or_else(|| {
        let cause = error.root_cause();
        if !state.growth_refused {
            return Failure::new(FailureKind::Trap, cause.to_string());
        }
        let limit = state.limits.memory;
        let detail = format!("the module trapped after it was denied more than {limit} bytes of memory: {cause}");
        Failure::new(FailureKind::MemoryLimit, detail)
    });
    Failure { trace: tracer.trace(error).map(Box::new), ..failure }
}
