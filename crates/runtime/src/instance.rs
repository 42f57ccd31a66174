//! One instance of a module, and what happens during a call of it.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use wasmtime::{Caller, Extern, Linker, Memory, ResourceLimiter, Store, TypedFunc, UpdateDeadline, WasmBacktrace};
use zentinel_wasm_contract::{Failure, FailureKind, Hook};

use crate::engine::MAX_TABLE_ELEMENTS;
use crate::host::assemblyscript::Timers;
use crate::host::guest_log::{GuestLog, Level, LineBuffer};
use crate::host::{slice, slice_mut};
use crate::module::Compiled;

/// CPU time that a call may use on the task that asked for it before it moves to the slow lane. Ordinary calls take microseconds; this is what a
/// looping module can hold up at most, beside the tick at which it is found.
const FIRST_SLICE: Duration = Duration::from_micros(250);

/// Largest buffer for answers that an instance keeps between calls, in bytes: far beyond most
/// answers, and little beside an instance's memory.
pub(crate) const MAX_KEPT_OUTPUT: usize = 64 << 10;

/// Frames of a backtrace that are told.
const FRAMES: usize = 6;

/// What an instance may use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Linear memory, in bytes.
    pub(crate) memory: usize,
    /// Answer of one call, in bytes.
    pub(crate) output: usize,
}

/// What belongs to an instance on the host's side.
pub(crate) struct State {
    log: Option<Arc<GuestLog>>,
    limits: Limits,
    memory: Option<Memory>,
    input: Vec<u8>,
    output: Vec<u8>,
    correlation_id: Arc<str>,
    deadline: Instant,
    slice: Slice,
    /// CPU time, roughly, that host functions have used since the guest's own code was looked at.
    hosted: Duration,
    /// Growth was refused during this call.
    refused: bool,
    failure: Option<Failure>,
    stdout: LineBuffer,
    stderr: LineBuffer,
    /// What AssemblyScript's `console.time` has started in this call.
    pub(crate) timers: Timers,
}

/// How far a call has come with its CPU time, looked at by each tick.
#[derive(Clone, Copy)]
enum Slice {
    /// No tick has passed.
    Fresh,
    /// The first tick found the thread at this CPU time.
    Since(Duration),
    /// The call has left the thread once, and takes turns with others.
    Slow,
}

/// CPU time of this thread. Wall time would also count the time in which the machine ran somebody else.
pub(crate) fn thread_cpu_time() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32)
}

impl State {
    /// A state for looking at a linker's functions only.
    pub(crate) fn probe() -> Self {
        Self::new(None, Limits { memory: 0, output: 0 })
    }

    fn new(log: Option<Arc<GuestLog>>, limits: Limits) -> Self {
        Self {
            log,
            limits,
            memory: None,
            input: Vec::new(),
            output: Vec::new(),
            correlation_id: Arc::from(""),
            deadline: Instant::now(),
            slice: Slice::Fresh,
            hosted: Duration::ZERO,
            refused: false,
            failure: None,
            stdout: LineBuffer::default(),
            stderr: LineBuffer::default(),
            timers: Timers::default(),
        }
    }

    fn begin(&mut self, correlation_id: Arc<str>, deadline: Instant) {
        self.correlation_id = correlation_id;
        self.deadline = deadline;
        self.slice = Slice::Fresh;
        self.hosted = Duration::ZERO;
        self.refused = false;
        self.failure = None;
        self.output.clear();
        self.timers.clear();
    }

    /// Ends the call with a module error, when the returned error reaches wasmtime.
    pub(crate) fn fail(&mut self, kind: FailureKind, detail: impl Into<String>) -> wasmtime::Error {
        let failure = self.failure.get_or_insert_with(|| Failure::new(kind, detail));
        wasmtime::Error::msg(failure.detail.clone())
    }

    /// Ends a call that has outlived its deadline.
    pub(crate) fn check_deadline(&mut self) -> wasmtime::Result<()> {
        if Instant::now() < self.deadline { Ok(()) } else { Err(self.fail(FailureKind::Timeout, "it did not end before its deadline")) }
    }

    /// Called by host functions for what takes about `cost` of CPU time: ends a call that has outlived its deadline, and gives way once the
    /// call has used its slice. Ticks see to the guest's own code; between two calls of host functions there may be none that they look at.
    pub(crate) async fn spend(caller: &mut Caller<'_, Self>, cost: Duration) -> wasmtime::Result<()> {
        let state = caller.data_mut();
        state.check_deadline()?;
        state.hosted += cost;
        if state.hosted >= FIRST_SLICE {
            state.leave();
            tokio::task::yield_now().await;
            caller.data_mut().check_deadline()?;
        }
        Ok(())
    }

    /// The call is about to leave the thread, which it may do for the slow lane: what it has used there is not to be compared with another thread's.
    pub(crate) fn leave(&mut self) {
        self.slice = Slice::Slow;
        self.hosted = Duration::ZERO;
    }

    /// When the call has to end.
    pub(crate) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// The memory of the guest that called, with the state beside it.
    pub(crate) fn memory<'a>(caller: &'a mut Caller<'_, Self>) -> wasmtime::Result<(&'a mut [u8], &'a mut Self)> {
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

    /// Logs a line of the guest, and tells what CPU time that took, roughly.
    pub(crate) fn log(&self, level: Level, line: &[u8]) -> Duration {
        self.log.as_ref().map_or(Duration::ZERO, |log| log.line(level, &self.correlation_id, line))
    }

    /// Takes what the guest writes to its standard output or standard error, and tells the same.
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

    fn flush_streams(&mut self) {
        let Some(log) = &self.log else { return };
        let id = &self.correlation_id;
        self.stdout.flush(|line| _ = log.line(Level::Info, id, line));
        self.stderr.flush(|line| _ = log.line(Level::Warn, id, line));
    }

    /// What becomes of a call that a tick has found running.
    fn tick(&mut self) -> wasmtime::Result<UpdateDeadline> {
        self.check_deadline()?;
        self.hosted = Duration::ZERO;
        match self.slice {
            Slice::Fresh => {
                self.slice = Slice::Since(thread_cpu_time());
                Ok(UpdateDeadline::Continue(1))
            }
            Slice::Since(then) if thread_cpu_time().saturating_sub(then) < FIRST_SLICE => Ok(UpdateDeadline::Continue(1)),
            Slice::Since(_) | Slice::Slow => {
                self.leave();
                Ok(UpdateDeadline::Yield(1))
            }
        }
    }
}

impl ResourceLimiter for State {
    fn memory_growing(&mut self, _current: usize, desired: usize, _maximum: Option<usize>) -> wasmtime::Result<bool> {
        let allowed = desired <= self.limits.memory;
        self.refused |= !allowed;
        Ok(allowed)
    }

    fn table_growing(&mut self, _current: usize, desired: usize, _maximum: Option<usize>) -> wasmtime::Result<bool> {
        let allowed = desired <= MAX_TABLE_ELEMENTS;
        self.refused |= !allowed;
        Ok(allowed)
    }
}

/// What an instance runs before it serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Start,
    Initialize,
    Configure,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Start => f.write_str("its start function"),
            Self::Initialize => f.write_str("`_initialize`"),
            Self::Configure => write!(f, "`{}`", Hook::Configure),
        }
    }
}

/// A module that is ready to be called.
pub(crate) struct Instance {
    store: Store<State>,
    hooks: [Option<TypedFunc<i32, ()>>; Hook::ALL.len()],
}

impl Instance {
    /// Makes an instance: start function, `_initialize`, all before `deadline`. A failure comes with the step that failed.
    pub(crate) async fn new(
        compiled: &Compiled,
        limits: Limits,
        log: Arc<GuestLog>,
        correlation_id: Arc<str>,
        deadline: Instant,
    ) -> Result<Self, (Step, Failure)> {
        let mut store = Store::new(&compiled.engine, State::new(Some(log), limits));
        store.limiter(|state| state);
        store.epoch_deadline_callback(|mut context| context.data_mut().tick());
        store.set_epoch_deadline(1);
        store.data_mut().begin(correlation_id, deadline);
        let mut instance = Self { store, hooks: Default::default() };
        let mut step = Step::Start;
        match instance.link(compiled, &mut step).await {
            Ok(()) => Ok(instance),
            Err(error) => Err((step, instance.failure(&error))),
        }
    }

    async fn link(&mut self, compiled: &Compiled, step: &mut Step) -> wasmtime::Result<()> {
        let store = &mut self.store;
        let guest = compiled.guest.instantiate_async(&mut *store).await?;
        let exports = &compiled.exports;
        let export = |store: &mut Store<State>, at| {
            guest.get_module_export(&mut *store, at).ok_or_else(|| wasmtime::Error::msg("an export has vanished"))
        };
        let memory = export(store, &exports.memory)?.into_memory();
        store.data_mut().memory = memory;
        if let Some(initialize) = &exports.initialize
            && let Some(initialize) = export(store, initialize)?.into_func()
        {
            *step = Step::Initialize;
            initialize.typed::<(), ()>(&*store)?.call_async(&mut *store, ()).await?;
        }

        let put = compiled.adapter_linker.get(&mut *store, "", "put")?;
        let take = compiled.adapter_linker.get(&mut *store, "", "take")?;
        let mut imports = vec![export(store, &exports.alloc)?, export(store, &exports.dealloc)?, put, take];
        for (_, at) in &exports.hooks {
            imports.push(export(store, at)?);
        }
        let adapter = wasmtime::Instance::new_async(&mut *store, &compiled.adapter, &imports).await?;
        for (hook, _) in &exports.hooks {
            self.hooks[*hook as usize] = Some(adapter.get_typed_func(&mut *store, hook.export())?);
        }
        Ok(())
    }

    /// Calls a hook with `input`. Afterwards [`output`](Self::output) is its answer, if there was no failure.
    pub(crate) async fn call(&mut self, hook: Hook, input: Vec<u8>, correlation_id: Arc<str>, deadline: Instant) -> Result<(), Failure> {
        let Some(function) = &self.hooks[hook as usize] else {
            return Err(Failure::new(FailureKind::Trap, format!("the module does not export `{hook}`")));
        };
        let Ok(len) = i32::try_from(input.len()) else {
            return Err(Failure::new(FailureKind::BodyLimit, format!("the input of `{hook}` has {} bytes", input.len())));
        };
        let state = self.store.data_mut();
        state.begin(correlation_id, deadline);
        state.input = input;
        self.store.set_epoch_deadline(1);
        let result = function.call_async(&mut self.store, len).await;
        self.store.data_mut().flush_streams();
        result.map_err(|error| self.failure(&error))
    }

    /// The answer of the last call.
    pub(crate) fn output(&self) -> &[u8] {
        &self.store.data().output
    }

    /// Takes the buffer of the last call's input, for the next one.
    pub(crate) fn take_input(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.store.data_mut().input)
    }

    /// Gives back what the last call has left on the host's side, beyond what most calls need: an
    /// instance that waits is to hold little.
    pub(crate) fn tidy(&mut self) {
        let state = self.store.data_mut();
        state.input = Vec::new();
        if state.output.capacity() > MAX_KEPT_OUTPUT {
            state.output = Vec::new();
        }
    }

    /// Room that is kept for the next answer, in bytes.
    #[cfg(test)]
    pub(crate) fn kept_output(&self) -> usize {
        self.store.data().output.capacity()
    }

    /// Linear memory in use, in bytes.
    pub(crate) fn memory_size(&self) -> usize {
        self.store.data().memory.map_or(0, |memory| memory.data_size(&self.store))
    }

    fn failure(&mut self, error: &wasmtime::Error) -> Failure {
        let state = self.store.data_mut();
        state.flush_streams();
        if let Some(failure) = state.failure.take() {
            return failure;
        }
        let mut detail = error.root_cause().to_string();
        if let Some(backtrace) = error.downcast_ref::<WasmBacktrace>() {
            let names: Vec<_> = backtrace.frames().iter().filter_map(|frame| frame.func_name()).take(FRAMES).collect();
            if !names.is_empty() {
                detail = format!("{detail} in {}", names.join(" < "));
            }
        }
        if state.refused {
            let limit = state.limits.memory;
            return Failure::new(
                FailureKind::MemoryLimit,
                format!("it was refused more than {limit} bytes of memory and trapped: {detail}"),
            );
        }
        Failure::new(FailureKind::Trap, detail)
    }
}

/// Defines what the adapter imports of the host.
pub(crate) fn define_adapter(linker: &mut Linker<State>) -> wasmtime::Result<()> {
    linker.func_wrap("", "put", put)?;
    linker.func_wrap("", "take", take)?;
    Ok(())
}

/// Writes the input where `alloc` said.
fn put(mut caller: Caller<'_, State>, ptr: i32) -> wasmtime::Result<()> {
    let (memory, state) = State::memory(&mut caller)?;
    let input = &state.input;
    if ptr != 0
        && let Some(target) = slice_mut(memory, ptr, input.len() as u32)
    {
        target.copy_from_slice(input);
        return Ok(());
    }
    let (len, kind) = (input.len(), if state.refused { FailureKind::MemoryLimit } else { FailureKind::AllocFailed });
    Err(state.fail(kind, format!("`alloc({len})` returned {}, where the module has no such memory", ptr.cast_unsigned())))
}

/// Reads the result from where the hook said. A length of 0 is "no opinion".
fn take(mut caller: Caller<'_, State>, packed: i64) -> wasmtime::Result<()> {
    let (memory, state) = State::memory(&mut caller)?;
    let packed = packed.cast_unsigned();
    let (ptr, len) = ((packed >> 32) as u32, packed as u32);
    if len == 0 {
        return Ok(());
    }
    if len as usize > state.limits.output {
        let limit = state.limits.output;
        return Err(
            state.fail(FailureKind::OutputLimit, format!("its answer has {len} bytes, the limit is {limit}: raise `--max-output-bytes`"))
        );
    }
    match slice(memory, ptr.cast_signed(), len) {
        Some(result) if ptr != 0 => {
            state.output.extend_from_slice(result);
            Ok(())
        }
        _ => Err(state.fail(FailureKind::InvalidResult, format!("its answer is said to be {len} bytes at {ptr}, outside its memory"))),
    }
}
