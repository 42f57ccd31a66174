//! The modules that a soak runs.

/// A module and how it misbehaves.
pub(super) struct Subject {
    pub(super) name: &'static str,
    /// Its file in `fixtures/hostile`; the good one is never asked to misbehave.
    pub(super) fixture: &'static str,
    /// One request in so many makes it misbehave; none with 0.
    pub(super) one_in: u64,
    /// Codes of the module errors that may come of it.
    pub(super) codes: &'static [&'static str],
    /// Misbehaviours that may be answered well between two reloads. One more must be stopped.
    pub(super) harmless: u64,
}

/// One looping request in a thousand keeps one of the four instances busy for a sixth of the time at the usual rate. Each of them has room for 15
/// leaks of 4 MB.
pub(super) const SUBJECTS: [Subject; 4] = [
    Subject { name: "good", fixture: "trap-unreachable", one_in: 0, codes: &[], harmless: 0 },
    Subject { name: "leaking", fixture: "grow-memory-leaking", one_in: 200, codes: &["WASM_MEMORY_LIMIT"], harmless: 4 * 15 },
    Subject { name: "looping", fixture: "loop", one_in: 1000, codes: &["WASM_TIMEOUT"], harmless: 0 },
    Subject { name: "panicking", fixture: "trap-unreachable", one_in: 100, codes: &["WASM_TRAP"], harmless: 0 },
];
