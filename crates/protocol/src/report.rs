//! What reports have in common on both transports.

use zentinel_wasm_contract::report::HealthState;

/// The number of a health state in the protocol.
pub(crate) const fn state_number(state: &HealthState) -> i32 {
    match state {
        HealthState::Healthy => 1,
        HealthState::Degraded(_) => 2,
        HealthState::Draining => 3,
    }
}
