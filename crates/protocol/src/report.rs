//! What both transports report alike.

use zentinel_wasm_contract::report::HealthState;

/// The protocol's number of a health state.
pub(crate) const fn state_number(state: &HealthState) -> i32 {
    match state {
        HealthState::Healthy => 1,
        HealthState::Degraded(_) => 2,
        HealthState::Draining => 3,
    }
}
