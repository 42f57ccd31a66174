//! The shutdown stage.

/// Shutdown stage of the agent. Each connection watches it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// The agent serves.
    #[default]
    Serving,
    /// Connections on the Unix socket pause: they take no more events, and end with their state
    /// when those in flight are answered, so another process can serve them. gRPC connections
    /// drain.
    Pausing,
    /// Connections end as soon as they are idle.
    Draining,
    /// Connections read no more events, and end when those in flight are answered.
    Closing,
}
