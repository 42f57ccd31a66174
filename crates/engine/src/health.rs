//! Agent health: what is wrong beside the module.

use zentinel_wasm_contract::report::HealthState;

/// What health depends on beside the policy.
#[derive(Default)]
pub(crate) struct Conditions {
    pub(crate) draining: bool,
    /// Why the last reload has failed.
    pub(crate) reload_failure: Option<String>,
    /// Why no client can connect.
    pub(crate) unreachable: Option<String>,
}

impl Conditions {
    /// The health of an agent whose module's circuit is open or closed.
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
