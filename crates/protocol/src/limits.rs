//! Bounds on what one client may use: time, memory, and its share of a thread.

use std::time::Duration;

use zentinel_wasm_bounds::LARGE;

/// How long the agent waits for a client. An idle connection is never closed.
///
/// The defaults are the agent's own; tests serve with shorter ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// For a client to send its handshake, and again to read the response. Default: 10 s; a proxy
    /// does both at once. What the agent does in between is not counted, because it has limits of
    /// its own. Over gRPC, also for the first call of a connection.
    pub handshake: Duration,
    /// From the first byte of a frame or message to its last, and for a client to read anything
    /// while an answer is waiting. Default: 30 s.
    pub stall: Duration,
    /// How long a connection must be idle before a draining agent closes it, so events that were
    /// on their way have arrived. Default: 100 ms.
    pub quiet: Duration,
    /// Interval of HTTP/2 pings to a silent gRPC client. Default: 60 s.
    pub keep_alive: Duration,
    /// For a gRPC client to answer such a ping. Default: 20 s.
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

/// Largest frame in bytes, its type byte included: the limit of the protocol.
pub const MAX_FRAME: usize = 16 << 20;

/// Events that one connection may have in flight: twice the limit that the proxy has for itself.
pub(crate) const MAX_IN_FLIGHT: usize = 200;

/// Events that are run before their answers are written. A larger batch saves system calls, a
/// smaller one sends the first answers sooner.
pub(crate) const BATCH: usize = 32;

/// Time after which the rest of a batch waits until the other tasks on this thread had their turn.
pub(crate) const SLOW_BATCH: Duration = Duration::from_millis(1);

/// Work, in bytes of frames, after which the other tasks on this thread get their turn. So many
/// bytes are decoded within a few milliseconds, whatever their content.
pub(crate) const MAX_WORK: usize = LARGE;

/// Work that a frame counts besides its bytes: [`MAX_WORK`] in a thousand short frames takes about
/// as long as in one large frame.
pub(crate) const FRAME_WORK: usize = 256;

/// Answers that may wait for a client to read them, in bytes. Above it, no more events of this
/// client are read or run.
pub(crate) const MAX_UNSENT: usize = 1 << 20;

/// Longest correlation id that is answered, in bytes. A proxy takes it from a header, and headers
/// are shorter; an answer with a longer id may not fit into a frame.
pub(crate) const MAX_ID: usize = 64 << 10;

/// Why an event with a longer id is not answered.
pub(crate) const TOO_LONG_ID: &str = "correlation id longer than 64 KiB";

#[cfg(test)]
mod tests {
    use super::*;

    /// The tests of timeouts use shorter ones.
    #[test]
    fn the_default_timeouts_are_the_documented_ones() {
        let Timeouts { handshake, stall, quiet, keep_alive, keep_alive_reply } = Timeouts::default();
        assert_eq!([handshake, stall, keep_alive, keep_alive_reply].map(|timeout| timeout.as_secs()), [10, 30, 60, 20]);
        assert_eq!(quiet.as_millis(), 100);
    }
}
