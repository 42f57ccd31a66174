//! The host's state of one instance: limits, time, log, input and answer.

use std::sync::Arc;
use std::time::{Duration, Instant};

use wasmtime::{Caller, Extern, Memory, ResourceLimiter, Result, UpdateDeadline};
use zentinel_wasm_contract::{Failure, FailureKind};

use crate::budget::{CallBudget, DeadlineExceeded, Next};
use crate::engine::MAX_TABLE_ELEMENTS;
use crate::guest::exchange::GuestExchange;
use crate::host::guest_log::{GuestLog, Level, LineBuffer};
use crate::host::timers::Timers;

/// Limits of one instance.
#[derive(Clone, Copy, Debug)]
pub(crate) struct InstanceLimits {
    /// Linear memory, in bytes.
    pub(crate) memory: usize,
    /// Answer of one call, in bytes.
    pub(crate) output: usize,
}

/// The host's state of one instance.
pub(crate) struct HostState {
    log: Option<Arc<GuestLog>>,
    pub(crate) limits: InstanceLimits,
    /// The exported memory, once the instance is complete.
    pub(crate) memory: Option<Memory>,
    pub(crate) exchange: GuestExchange,
    correlation_id: Arc<str>,
    pub(crate) budget: CallBudget,
    /// Growth was refused during this call.
    pub(crate) growth_refused: bool,
    failure: Option<Failure>,
    stdout: LineBuffer,
    stderr: LineBuffer,
    /// Started by AssemblyScript's `console.time` during this call.
    pub(crate) timers: Timers,
}

impl HostState {
    /// The state of a store that runs nothing.
    pub(crate) fn probe() -> Self {
        Self::new(None, InstanceLimits { memory: 0, output: 0 }, GuestExchange::default())
    }

    pub(crate) fn new(log: Option<Arc<GuestLog>>, limits: InstanceLimits, exchange: GuestExchange) -> Self {
        Self {
            log,
            limits,
            memory: None,
            exchange,
            correlation_id: Arc::from(""),
            budget: CallBudget::new(Instant::now()),
            growth_refused: false,
            failure: None,
            stdout: LineBuffer::default(),
            stderr: LineBuffer::default(),
            timers: Timers::default(),
        }
    }

    /// Starts a call.
    pub(crate) fn begin(&mut self, correlation_id: Arc<str>, deadline: Instant) {
        self.correlation_id = correlation_id;
        self.budget = CallBudget::new(deadline);
        self.growth_refused = false;
        self.failure = None;
        self.timers.clear();
    }

    /// Ends the call with a module error once wasmtime gets the returned error.
    pub(crate) fn fail(&mut self, kind: FailureKind, detail: impl Into<String>) -> wasmtime::Error {
        let failure = self.failure.get_or_insert_with(|| Failure::new(kind, detail));
        wasmtime::Error::msg(failure.detail.to_string())
    }

    /// The module error with which a host function has ended the call.
    pub(crate) fn take_failure(&mut self) -> Option<Failure> {
        self.failure.take()
    }

    fn within_deadline<T>(&mut self, result: Result<T, DeadlineExceeded>) -> Result<T> {
        result.map_err(|DeadlineExceeded| self.fail(FailureKind::Timeout, "the call exceeded its deadline"))
    }

    /// Ends a call that is past its deadline.
    pub(crate) fn check_deadline(&mut self) -> Result<()> {
        let checked = self.budget.check();
        self.within_deadline(checked)
    }

    /// Accounts for about `cost` of CPU time in a host function: ends a call that is past its
    /// deadline, and yields once the call has used its slice.
    pub(crate) async fn spend(caller: &mut Caller<'_, Self>, cost: Duration) -> Result<()> {
        let state = caller.data_mut();
        let next = state.budget.spend(cost);
        if state.within_deadline(next)? == Next::Yield {
            tokio::task::yield_now().await;
            caller.data_mut().check_deadline()?;
        }
        Ok(())
    }

    /// A tick has interrupted the guest's code.
    pub(crate) fn tick(&mut self) -> Result<UpdateDeadline> {
        let next = self.budget.tick();
        Ok(match self.within_deadline(next)? {
            Next::Continue => UpdateDeadline::Continue(1),
            Next::Yield => UpdateDeadline::Yield(1),
        })
    }

    /// The calling guest's memory, with the state beside it.
    pub(crate) fn memory<'a>(caller: &'a mut Caller<'_, Self>) -> Result<(&'a mut [u8], &'a mut Self)> {
        let memory = match caller.data().memory {
            Some(memory) => memory,
            // A start function runs before the instance is complete.
            None => match caller.get_export("memory") {
                Some(Extern::Memory(memory)) => memory,
                _ => return Err(caller.data_mut().fail(FailureKind::Trap, "it called a host function but exports no memory")),
            },
        };
        Ok(memory.data_and_store_mut(caller))
    }

    /// Logs a line of the guest. Returns about how much CPU time that took.
    pub(crate) fn log(&self, level: Level, line: &[u8]) -> Duration {
        self.log.as_ref().map_or(Duration::ZERO, |log| log.line(level, &self.correlation_id, line))
    }

    /// Logs the whole lines of what the guest writes to standard output or error. Returns about how
    /// much CPU time that took.
    pub(crate) fn write_stream(&mut self, stderr: bool, bytes: &[u8]) -> Duration {
        let (buffer, level) = if stderr { (&mut self.stderr, Level::Warn) } else { (&mut self.stdout, Level::Info) };
        let (log, id) = (&self.log, &self.correlation_id);
        let mut cost = Duration::ZERO;
        buffer.write(bytes, |line| {
            if let Some(log) = log {
                cost += log.line(level, id, line);
            }
        });
        cost
    }

    /// Logs what is left of both streams without a line end.
    pub(crate) fn flush_streams(&mut self) {
        let Some(log) = &self.log else { return };
        let id = &self.correlation_id;
        self.stdout.flush(|line| _ = log.line(Level::Info, id, line));
        self.stderr.flush(|line| _ = log.line(Level::Warn, id, line));
    }
}

impl ResourceLimiter for HostState {
    fn memory_growing(&mut self, _current: usize, desired: usize, _maximum: Option<usize>) -> Result<bool> {
        let allowed = desired <= self.limits.memory;
        self.growth_refused |= !allowed;
        Ok(allowed)
    }

    fn table_growing(&mut self, _current: usize, desired: usize, _maximum: Option<usize>) -> Result<bool> {
        let allowed = desired <= MAX_TABLE_ELEMENTS;
        self.growth_refused |= !allowed;
        Ok(allowed)
    }
}
