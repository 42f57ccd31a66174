//! The modules that a soak runs.

/// A module and how it misbehaves.
pub(super) struct Subject {
    pub(super) name: &'static str,
    /// Its file in `fixtures/hostile`. The good one receives no requests to misbehave.
    pub(super) fixture: &'static str,
    /// One request in this many makes it misbehave; 0 for none.
    pub(super) one_in: u64,
    /// Reason codes of the module errors that misbehaviour may cause.
    pub(super) codes: &'static [&'static str],
    /// Misbehaviours between two reloads that may succeed. Any further one must be stopped.
    pub(super) harmless: u64,
}

/// At the default rate, one looping request in 1000 keeps one of the four instances busy for a
/// sixth of the time. Each instance has memory for 15 leaks of 4 MB.
pub(super) const SUBJECTS: [Subject; 4] = [
    Subject { name: "good", fixture: "trap-unreachable", one_in: 0, codes: &[], harmless: 0 },
    Subject { name: "leaking", fixture: "grow-memory-leaking", one_in: 200, codes: &["WASM_MEMORY_LIMIT"], harmless: 4 * 15 },
    Subject { name: "looping", fixture: "loop", one_in: 1000, codes: &["WASM_TIMEOUT"], harmless: 0 },
    Subject { name: "panicking", fixture: "trap-unreachable", one_in: 100, codes: &["WASM_TRAP"], harmless: 0 },
];
