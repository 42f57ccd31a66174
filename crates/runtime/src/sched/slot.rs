//! The right to one instance for one call.

use std::sync::Arc;
use std::time::Instant;

use tracing::debug;
use zentinel_wasm_contract::{Answer, Failure, FailureKind};

use crate::guest::Call;
use crate::instance::Instance;
use crate::sched::instances::{Instances, Isolation, step_failed};

/// The right to one instance. Dropping it returns the right; the instance is discarded and
/// replaced, unless [`Lease::accept`] has returned it to the pool.
pub(crate) struct Slot {
    instances: Arc<Instances>,
    instance: Option<Box<Instance>>,
    /// The instance is back in the pool.
    settled: bool,
}

impl Slot {
    /// Waits for a permit and takes an idle instance, if instances are reused.
    ///
    /// # Errors
    ///
    /// None was free before `deadline`, or too many calls are waiting.
    pub(crate) async fn acquire(instances: &Arc<Instances>, deadline: Instant) -> Result<Self, Failure> {
        if !instances.try_acquire() {
            // Boxed, like creating an instance in `run`, because rare cases must not make every
            // call's future large.
            Box::pin(instances.acquire(deadline)).await?;
        }
        let instance = instances.take_idle();
        Ok(Self { instances: Arc::clone(instances), instance, settled: false })
    }

    /// Whether the instance must still be created.
    pub(crate) fn is_empty(&self) -> bool {
        self.instance.is_none()
    }

    /// Creates the instance, if needed, and calls it.
    ///
    /// # Errors
    ///
    /// Every module error that a call can end in.
    pub(crate) async fn run(mut self, call: Call, correlation_id: Arc<str>, deadline: Instant) -> Result<Lease, Failure> {
        let _running = self.instances.runtime().ticker().running();
        if self.instance.is_none() {
            let made = Box::pin(self.instances.make(&correlation_id, deadline)).await;
            let limit = format_args!("before the call's deadline: raise `--timeout-ms`");
            let made = made.map_err(|(step, failure)| step_failed(step, failure, limit))?;
            let made = made.map_err(|reason| Failure::new(FailureKind::Trap, format!("it rejects its configuration: {reason}")))?;
            self.instance = Some(made);
        }
        let Some(instance) = &mut self.instance else {
            return Err(Failure::new(FailureKind::Overloaded, "no instance was free"));
        };
        instance.call(call, correlation_id, deadline).await?;
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
            self.instances.observe_memory(instance);
        }
        match self.instances.settings().isolation {
            Isolation::Request => {
                drop(instance);
                self.instances.release();
            }
            Isolation::Pooled => {
                debug!("discarding an instance");
                self.instances.discard(instance);
            }
        }
    }
}

/// An instance after its call. It is discarded unless it is [accepted](Self::accept), because an
/// instance with an invalid answer may have a corrupted memory.
pub struct Lease(Slot);

impl Lease {
    /// The bytes of the module's answer. Empty if it has no opinion.
    pub fn output(&self) -> &[u8] {
        self.0.instance.as_ref().map(|instance| instance.exchange().output()).unwrap_or_default()
    }

    /// Reads the module's answer.
    ///
    /// # Errors
    ///
    /// It breaks a rule of the contract.
    pub fn answer(&self) -> Result<Answer<'_>, Failure> {
        match &self.0.instance {
            Some(instance) => self.0.instances.artifact().interface.answer(instance.exchange()),
            None => Ok(Answer::default()),
        }
    }

    /// Returns the instance to the pool, because its answer was valid.
    pub fn accept(mut self) {
        let Some(mut instance) = self.0.instance.take() else { return };
        instance.exchange_mut().recycle_input();
        match self.0.instances.settings().isolation {
            Isolation::Pooled => {
                instance.exchange_mut().shrink();
                self.0.instances.put(instance);
                self.0.settled = true;
            }
            // Dropped with the slot.
            Isolation::Request => self.0.instance = Some(instance),
        }
    }
}
