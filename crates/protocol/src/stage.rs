//! How far the agent has come with ending.

/// How far the agent has come with ending.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// It serves.
    #[default]
    Serving,
    /// Connections end as soon as they are quiet.
    Draining,
    /// Connections take no more events and end when those under way are answered.
    Closing,
}
