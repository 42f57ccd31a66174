//! Agent health: conditions other than the module's.

use zentinel_wasm_contract::report::HealthState;

/// Conditions other than the policy that health depends on.
#[derive(Default)]
pub(crate) struct Conditions {
    pub(crate) draining: bool,
    /// Why the last reload failed, if it did.
    pub(crate) reload_failure: Option<String>,
    /// Why no client can connect, if so.
    pub(crate) unreachable: Option<String>,
}

impl Conditions {
    /// The agent's health, given whether the circuit is open.
    pub(crate) fn health(&self, circuit_open: bool) -> HealthState {
        if self.draining {
            return HealthState::Draining;
        }
        let circuit_open = circuit_open.then_some("circuit open: every call fails; probing once a second");
        let problems = [self.unreachable.as_deref(), self.reload_failure.as_deref(), circuit_open];
        let problems: Vec<_> = problems.into_iter().flatten().collect();
        if problems.is_empty() { HealthState::Healthy } else { HealthState::Degraded(problems.join("; ")) }
    }
}
