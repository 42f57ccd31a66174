//! Ids of spans and traces.

/// The distance between two states.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// Makes ids that are distinct with high probability. They are no secrets.
pub(crate) struct Ids {
    state: u64,
    /// Where this process began.
    seed: u64,
}

impl Ids {
    /// Begins anywhere.
    pub(crate) fn new() -> Self {
        // Fails only on systems that the agent does not run on; ids are then those of another run.
        let seed = getrandom::u64().unwrap_or(1);
        Self { state: seed, seed }
    }

    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(STEP);
        mixed(self.state)
    }

    pub(crate) fn span(&mut self) -> [u8; 8] {
        self.next().to_be_bytes()
    }

    pub(crate) fn trace(&mut self) -> [u8; 16] {
        (u128::from(self.next()) << 64 | u128::from(self.next())).to_be_bytes()
    }

    /// The id of the trace of a request, always the same for the same number.
    pub(crate) fn trace_of(&self, request: u64) -> [u8; 16] {
        let low = mixed(self.seed.wrapping_add(request.wrapping_mul(STEP)));
        (u128::from(self.seed.max(1)) << 64 | u128::from(low)).to_be_bytes()
    }
}

/// SplitMix64: each of its 2⁶⁴ states gives another number.
const fn mixed(state: u64) -> u64 {
    let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    let mixed = mixed ^ (mixed >> 31);
    // All zeros is an invalid id.
    if mixed == 0 { 1 } else { mixed }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn are_distinct_also_between_processes() {
        let mut seen = HashSet::new();
        for mut ids in [Ids::new(), Ids::new()] {
            assert!((0..10_000).all(|_| seen.insert(ids.span())));
            assert_ne!(ids.trace(), ids.trace());
        }
    }
}
