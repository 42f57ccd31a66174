//! Agent health: what is wrong, and whether events are still decided.

use zentinel_wasm_contract::report::HealthState;
use zentinel_wasm_contract::{Hook, Hooks};

use crate::breaker::Breakers;

/// Rejections that health reports at once. Agents are not shared by more proxies whose
/// configurations differ.
const MAX_REJECTIONS: usize = 4;

/// Conditions other than the policy that health depends on.
#[derive(Default)]
pub(crate) struct Conditions {
    pub(crate) draining: bool,
    /// Why the last reload failed, if it did.
    pub(crate) reload_failure: Option<String>,
    /// Configurations of proxies that were rejected since the last one that was accepted.
    pub(crate) rejections: Rejections,
    /// Why no client can connect, if so.
    pub(crate) unreachable: Option<String>,
}

impl Conditions {
    /// The agent's health.
    pub(crate) fn health(&self, breakers: &Breakers) -> HealthState {
        if self.draining {
            return HealthState::Draining;
        }
        let reload = self.reload_failure.as_ref().map(|reason| format!("reload failed: {reason}"));
        let rejections = self.rejections.0.iter().map(Rejection::message);
        let problems = self.unreachable.clone().into_iter().chain(reload).chain(rejections).chain(circuit_open(breakers.open()));
        let problems: Vec<_> = problems.collect();
        if problems.is_empty() { HealthState::Healthy } else { HealthState::Degraded(problems.join("; ")) }
    }

    /// Why the module does not decide about requests right now, if so.
    ///
    /// That is so while any hook that a request or its response goes through fails. The others
    /// concern no request: frames of a WebSocket, texts for a guardrail, the end of a request.
    pub(crate) fn undecided(&self, breakers: &Breakers) -> Option<String> {
        if self.draining {
            return Some("draining".into());
        }
        circuit_open(breakers.failing().iter().filter(|hook| Hook::HANDLERS.contains(hook)).collect())
    }

    /// Why the agent should get no requests right now, if so.
    pub(crate) fn not_ready(&self, breakers: &Breakers) -> Option<String> {
        let reasons = self.undecided(breakers).into_iter().chain(self.unreachable.clone());
        reasons.reduce(|reasons, reason| reasons + "; " + &reason)
    }
}

/// The open circuits, for people.
fn circuit_open(hooks: Hooks) -> Option<String> {
    let names: Vec<_> = hooks.iter().map(Hook::export).collect();
    (!names.is_empty()).then(|| format!("circuit open for {}: every call fails; probing once a second", names.join(", ")))
}

/// Why a proxy's configuration was rejected.
#[derive(Debug)]
pub(crate) struct Rejection {
    pub(crate) reason: String,
    /// Whether another module might accept the configuration.
    pub(crate) depends_on_module: bool,
}

impl Rejection {
    /// One line for people.
    pub(crate) fn message(&self) -> String {
        format!("rejected the proxy's configuration: {}", self.reason)
    }
}

/// The last different rejections, the latest at the end.
///
/// A proxy sends its configuration on each of its connections, and again whenever it reconnects.
#[derive(Default)]
pub(crate) struct Rejections(Vec<Rejection>);

impl Rejections {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds a rejection. False if it is known already.
    pub(crate) fn add(&mut self, rejection: Rejection) -> bool {
        if self.0.iter().any(|known| known.reason == rejection.reason) {
            return false;
        }
        if self.0.len() == MAX_REJECTIONS {
            self.0.remove(0);
        }
        self.0.push(rejection);
        true
    }

    /// A configuration was accepted. True if that changes anything.
    pub(crate) fn accepted(&mut self) -> bool {
        !std::mem::take(&mut self.0).is_empty()
    }

    /// Another module serves, which may accept what the last one has rejected.
    pub(crate) fn module_reloaded(&mut self) {
        self.0.retain(|rejection| !rejection.depends_on_module);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use zentinel_wasm_breaker::BreakerLimits;
    use zentinel_wasm_contract::FailureKind;

    fn breakers(failed: &[Hook], idle: Duration) -> Breakers {
        let breakers = Breakers::new(BreakerLimits { failures: 1, window: Duration::ZERO, probe_interval: Duration::ZERO, idle });
        for &hook in failed {
            assert!(breakers.failed(hook, FailureKind::Trap));
        }
        breakers
    }

    fn rejection(reason: &str, depends_on_module: bool) -> Rejection {
        Rejection { reason: reason.into(), depends_on_module }
    }

    #[test]
    fn lists_everything_that_is_wrong() {
        let mut conditions = Conditions::default();
        assert_eq!(conditions.health(&breakers(&[], Duration::MAX)), HealthState::Healthy);
        conditions.unreachable = Some("no socket".into());
        conditions.reload_failure = Some("no module".into());
        conditions.rejections.add(rejection("bad key", false));
        let broken = breakers(&[Hook::ResponseHeaders, Hook::RequestHeaders], Duration::MAX);
        let circuit = "circuit open for on_request_headers, on_response_headers: every call fails; probing once a second";
        let all = format!("no socket; reload failed: no module; rejected the proxy's configuration: bad key; {circuit}");
        assert_eq!(conditions.health(&broken), HealthState::Degraded(all));
        assert_eq!(conditions.not_ready(&broken), Some(format!("{circuit}; no socket")));
        conditions.draining = true;
        assert_eq!(conditions.health(&broken), HealthState::Draining);
        assert_eq!(conditions.not_ready(&broken), Some("draining; no socket".into()));
    }

    #[test]
    fn readiness_depends_on_the_hooks_of_requests() {
        let conditions = Conditions::default();
        for hook in Hook::ALL {
            let broken = breakers(&[hook], Duration::MAX);
            assert!(matches!(conditions.health(&broken), HealthState::Degraded(reason) if reason.contains(hook.export())));
            assert_eq!(conditions.undecided(&broken).is_some(), Hook::HANDLERS.contains(&hook), "{hook}");
        }
    }

    #[test]
    fn ready_again_without_calls() {
        let broken = breakers(&[Hook::RequestHeaders], Duration::ZERO);
        assert_eq!(Conditions::default().not_ready(&broken), None);
        assert!(matches!(Conditions::default().health(&broken), HealthState::Degraded(_)));
    }

    #[test]
    fn rejections_are_bounded_and_different() {
        let mut rejections = Rejections::default();
        for round in 0..3 {
            for number in 0..MAX_REJECTIONS {
                assert_eq!(rejections.add(rejection(&number.to_string(), false)), round == 0);
            }
        }
        assert!(rejections.add(rejection("another", false)));
        let reasons: Vec<_> = rejections.0.iter().map(|rejection| rejection.reason.as_str()).collect();
        assert_eq!(reasons, ["1", "2", "3", "another"]);
    }

    #[test]
    fn rejections_end_with_an_accepted_configuration_or_another_module() {
        let mut rejections = Rejections::default();
        assert!(!rejections.accepted());
        rejections.add(rejection("unknown key", false));
        rejections.add(rejection("the module refuses", true));
        rejections.module_reloaded();
        assert!(!rejections.add(rejection("unknown key", false)) && rejections.add(rejection("the module refuses", true)));
        assert!(rejections.accepted() && rejections.is_empty());
    }
}
