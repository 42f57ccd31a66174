//! The clock of the deadlines: a thread that advances the engines' epochs while calls are running.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, Thread};
use std::time::Duration;

use wasmtime::{Engine, EngineWeak};

/// Time between two ticks: the granularity of slices and deadlines. Only calls that run during a
/// tick are interrupted, so shorter ticks would cost more without a gain; with longer ones a
/// looping module would noticeably block its worker.
pub(crate) const TICK: Duration = Duration::from_micros(500);

/// Ticks without a call after which the thread sleeps until the next call. Waking it costs the call
/// some microseconds, about as much as a tick. So the thread stays awake through the pauses of a
/// busy agent, and sleeps between the calls of an agent with a hundred per second.
const IDLE_TICKS: u32 = 4;

pub(crate) struct Ticker {
    state: Arc<TickerState>,
    thread: Thread,
}

#[derive(Default)]
struct TickerState {
    engines: Mutex<Vec<EngineWeak>>,
    started: AtomicU64,
    ended: AtomicU64,
    asleep: AtomicBool,
    stopped: AtomicBool,
}

impl Ticker {
    pub(crate) fn start() -> std::io::Result<Self> {
        let state = Arc::new(TickerState::default());
        let thread = thread::Builder::new().name("wasm-ticker".into()).spawn({
            let state = Arc::clone(&state);
            move || state.run()
        })?;
        Ok(Self { state, thread: thread.thread().clone() })
    }

    /// Advances the epoch of `engine` from now on, as long as it lives.
    pub(crate) fn watch(&self, engine: &Engine) {
        self.state.engines.lock().unwrap_or_else(PoisonError::into_inner).push(engine.weak());
    }

    /// Ticks until the guard is dropped, for a running call.
    pub(crate) fn running(&self) -> RunningCall {
        self.state.started.fetch_add(1, SeqCst);
        if self.state.asleep.load(SeqCst) {
            self.thread.unpark();
        }
        RunningCall(Arc::clone(&self.state))
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.state.stopped.store(true, SeqCst);
        self.thread.unpark();
    }
}

pub(crate) struct RunningCall(Arc<TickerState>);

impl Drop for RunningCall {
    fn drop(&mut self) {
        self.0.ended.fetch_add(1, SeqCst);
    }
}

impl TickerState {
    fn run(&self) {
        let mut seen = 0;
        let mut idle_ticks = 0;
        while !self.stopped.load(SeqCst) {
            thread::sleep(TICK);
            self.engines.lock().unwrap_or_else(PoisonError::into_inner).retain(|engine| match engine.upgrade() {
                Some(engine) => {
                    engine.increment_epoch();
                    true
                }
                None => false,
            });
            let started = self.started.load(SeqCst);
            let quiet = started == seen && started == self.ended.load(SeqCst);
            seen = started;
            idle_ticks = if quiet { idle_ticks + 1 } else { 0 };
            if idle_ticks >= IDLE_TICKS {
                self.sleep(seen);
                idle_ticks = 0;
            }
        }
    }

    fn sleep(&self, seen: u64) {
        self.asleep.store(true, SeqCst);
        // A call that started before the flag was set has not woken this thread.
        while self.started.load(SeqCst) == seen && !self.stopped.load(SeqCst) {
            thread::park();
        }
        self.asleep.store(false, SeqCst);
    }
}
