//! What a client may take of the agent: time, memory, and its share of a thread.

use std::time::Duration;

use zentinel_wasm_bounds::LARGE;

/// How long the agent waits for a client. An idle connection is never closed.
///
/// The defaults are those of the agent. Tests serve with shorter ones, so that they need not wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// Time that a client has to send its handshake, and then to take the answer to it: 10 s. The
    /// proxy does both at once. What the agent does in between has limits of its own. Over gRPC,
    /// time to the first call as well.
    pub handshake: Duration,
    /// Time from the first byte of a frame or message to its last, and time that a client may take
    /// no answer while one is waiting for it: 30 s.
    pub stall: Duration,
    /// How long a connection of a draining agent must be quiet before it is closed: 100 ms. Events
    /// that were on their way have arrived then.
    pub quiet: Duration,
    /// How often a silent gRPC client is asked whether it is still there: every 60 s.
    pub keep_alive: Duration,
    /// Time that it has to answer: 20 s.
    pub keep_alive_reply: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(10),
            stall: Duration::from_secs(30),
            quiet: Duration::from_millis(100),
            keep_alive: Duration::from_secs(60),
            keep_alive_reply: Duration::from_secs(20),
        }
    }
}

/// Largest frame, type byte included, in bytes: the limit of the protocol.
pub const MAX_FRAME: usize = 16 << 20;

/// Events that one connection may have under way: what the proxy allows itself, and as much again.
pub(crate) const MAX_IN_FLIGHT: usize = 200;

/// Events that are run before their answers are written. More save system calls, fewer let the first answers out sooner.
pub(crate) const BATCH: usize = 32;

/// After this long the rest of a batch waits until the others on this thread had their turn.
pub(crate) const SLOW_BATCH: Duration = Duration::from_millis(1);

/// Work after which others on this thread get their turn, in bytes of frames: they are read within a few milliseconds, whatever they are.
pub(crate) const MAX_WORK: usize = LARGE;

/// What a frame adds to the work besides its bytes. A thousand short ones take about as long.
pub(crate) const FRAME_WORK: usize = 256;

/// Answers that wait for a client to read before no more events are read from it or run, in bytes.
pub(crate) const MAX_UNSENT: usize = 1 << 20;

/// Longest correlation id that is answered, in bytes. A proxy takes it from a header, and those are shorter; an answer with a longer one may not fit
/// into a frame.
pub(crate) const MAX_ID: usize = 64 << 10;

/// Why an event with a longer one is not answered.
pub(crate) const TOO_LONG_ID: &str = "correlation id longer than 64 KiB";
