//! An agent's decision, and the expected one.

/// What an agent decided, in as much detail as the load checks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Decided {
    Allow,
    Block(u16),
    Other,
}

/// What an agent should decide.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Expected {
    Allow,
    Block(u16),
    Any,
}

impl Expected {
    pub(crate) fn met_by(self, decided: Decided) -> bool {
        match self {
            Self::Allow => decided == Decided::Allow,
            Self::Block(status) => decided == Decided::Block(status),
            Self::Any => true,
        }
    }
}
