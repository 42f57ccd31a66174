//! The agent: from an event to its answer.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::Value;
use tokio::sync::watch;
use tracing::{error, info, warn};
use zentinel_wasm_bounds::{LARGE, RateLimit, log_limited};
use zentinel_wasm_contract::report::{self, HealthState, Reports};
use zentinel_wasm_contract::{Answer, Arrival, BodyAction, Capabilities, Encode, Event, Failure, FailureKind, Handler, Hook};
use zentinel_wasm_runtime::{Cache, Module, Runtime, StartError};

use crate::carried::{LiveRequests, OtherHash};
use crate::collect::Rescue;
use crate::generation::{Generations, ReloadError};
use crate::health::{Conditions, Rejection};
use crate::metrics::Metrics;
use crate::outcome::{AnswerSummary, DecisionKind, Observer, Outcome, RequestLine};
use crate::policy::Policy;
use crate::prepare::{Failed, IncomingEvent, Origin, Prepared, PreparedCall, Requests, is_followed};
use crate::reply::{FAIL_OPEN, Reply, module_error};
use crate::settings::Settings;

/// Time for applying a proxy's configuration: compiling the module on a slow machine, starting its
/// instances, and waiting for other configurations. The proxy itself gives up after 5 s, and finds
/// the compiled module in the cache when it comes back.
const APPLY_TIMEOUT: Duration = Duration::from_secs(60);

/// Decides about events by a module. Module and settings can be replaced at any time.
pub struct Agent {
    generations: Generations,
    requests: Requests,
    metrics: Metrics,
    /// For the log lines of module errors, by kind.
    error_limits: Vec<RateLimit>,
    conditions: Mutex<Conditions>,
    reports: watch::Sender<Arc<Reports>>,
    observers: Vec<Arc<dyn Observer>>,
}

/// An event that is being answered.
struct Task<'a, E> {
    policy: &'a Policy,
    hook: Hook,
    arrived: Instant,
    origin: &'a Origin,
    encode: &'a E,
}

impl Agent {
    /// Compiles the module and creates its first instance. The others follow in the background.
    /// `observers` are given the outcome of every event.
    ///
    /// # Errors
    ///
    /// The module cannot be served: one message with all problems.
    pub async fn start(
        runtime: Runtime,
        module: Arc<Module>,
        settings: Settings,
        cache: Option<Cache>,
        metrics: Metrics,
        observers: Vec<Arc<dyn Observer>>,
    ) -> Result<Arc<Self>, StartError> {
        for warning in settings.warnings() {
            warn!("{warning}");
        }
        let generations = Generations::start(runtime, module, settings, cache).await?;
        let policy = generations.current_owned();
        metrics.serving(policy.digest());
        info!(module = policy.digest(), pool_size = policy.settings.pool_size, "serving the module `{}`", policy.module.path());
        let agent = Arc::new(Self {
            generations,
            requests: Requests::new(metrics.id_collisions.clone()),
            metrics,
            error_limits: FailureKind::ALL.iter().map(|_| RateLimit::per_log_line()).collect(),
            conditions: Mutex::default(),
            reports: watch::Sender::new(Arc::new(Reports::default())),
            observers,
        });
        agent.publish();
        Ok(agent)
    }

    /// Serves `module` from now on. `module_config` replaces the module's configuration, if given.
    /// Events in flight finish on the old module.
    ///
    /// # Errors
    ///
    /// The module cannot be served. Nothing changes then.
    pub async fn reload(&self, module: Arc<Module>, module_config: Option<Arc<[u8]>>) -> Result<(), ReloadError> {
        self.generations.reload(module, module_config, |policy| self.installing(policy)).await
    }

    /// Records a reload of all files. After a failed one, health is degraded until another
    /// succeeds.
    pub fn reloaded(&self, failure: Option<String>) {
        {
            let mut conditions = self.conditions();
            self.metrics.reloaded(failure.is_none());
            self.metrics.last_reload_successful.set(i64::from(failure.is_none()));
            if failure.is_none() {
                conditions.rejections.module_reloaded();
                self.metrics.config_rejected.set(i64::from(!conditions.rejections.is_empty()));
            }
            conditions.reload_failure = failure;
        }
        self.publish();
    }

    async fn apply(&self, config: Value) -> Result<(), ReloadError> {
        let installing = |policy: &Policy| {
            let Settings { pool_size, fail_open, .. } = policy.settings;
            log_limited!(info, pool_size, fail_open, "applied the proxy's configuration");
            self.installing(policy);
        };
        if self.generations.apply(config, installing).await? {
            self.metrics.reloaded(true);
            // A failed reload stays failed, because these are new settings for the old module.
            self.publish();
        }
        Ok(())
    }

    /// Records that a proxy's configuration was accepted, even if it changed nothing.
    fn accepted(&self) {
        let accepted = {
            let mut conditions = self.conditions();
            self.metrics.config_rejected.set(0);
            conditions.rejections.accepted()
        };
        if accepted {
            log_limited!(info, "accepted the proxy's configuration after a rejected one");
            self.publish();
        }
    }

    /// Records that a proxy's configuration was rejected. The proxy tries it again and again, so
    /// only the first time of many is logged and counted.
    fn rejected(&self, rejection: Rejection) {
        let message = rejection.message();
        let is_new = {
            let mut conditions = self.conditions();
            let is_new = conditions.rejections.add(rejection);
            if is_new {
                self.metrics.config_rejected.set(1);
                self.metrics.reloaded(false);
            }
            is_new
        };
        if is_new {
            log_limited!(warn, "{message}");
            self.publish();
        }
    }

    fn installing(&self, policy: &Policy) {
        log_limited!(info, module = policy.digest(), "serving the module `{}`", policy.module.path());
        self.metrics.serving(policy.digest());
    }

    fn conditions(&self) -> MutexGuard<'_, Conditions> {
        self.conditions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reports from now on that the agent is draining. Requests that still arrive are still
    /// decided.
    pub fn drain(&self) {
        if !std::mem::replace(&mut self.conditions().draining, true) {
            self.publish();
        }
    }

    /// The proxy's last configuration; null if there was none.
    pub fn proxy_config(&self) -> Value {
        self.generations.proxy_config()
    }

    /// What another process needs to go on with the connections of these numbers, which are paused,
    /// and with requests whose events come on any connection, if `with_contexts`.
    pub fn carry(&self, connections: &[u64], with_contexts: bool) -> LiveRequests {
        self.requests.carry(connections, with_contexts)
    }

    /// Goes on where another process was, with connections that correspond to those of
    /// [`carry`](Self::carry). The contexts must be adopted before the first event.
    ///
    /// # Errors
    ///
    /// Nothing can be adopted.
    pub fn adopt(&self, carried: LiveRequests, connections: &[u64]) -> Result<(), OtherHash> {
        self.requests.adopt(carried, connections)
    }

    /// Reports from now on that no client can connect, and why, or that clients can again.
    pub fn set_unreachable(&self, reason: Option<String>) {
        let changed = {
            let mut conditions = self.conditions();
            let changed = conditions.unreachable != reason;
            conditions.unreachable = reason;
            changed
        };
        if changed {
            self.publish();
        }
    }

    /// Agent health.
    pub fn health(&self) -> HealthState {
        self.conditions().health(&self.generations.current().breakers)
    }

    /// Why the module does not decide about requests right now or clients cannot connect, if so.
    pub fn not_ready(&self) -> Option<String> {
        self.conditions().not_ready(&self.generations.current().breakers)
    }

    /// The agent's metrics, up to date.
    pub fn metrics(&self) -> &Metrics {
        self.generations.observe(|policy, discarded_before| {
            let stats = policy.pool.stats();
            self.metrics.observe(stats, discarded_before + stats.discarded);
            self.metrics.policy(policy.breakers.open(), policy.settings.timeout);
            self.metrics.instances(stats.largest_memory, self.generations.runtime.failed_starts());
        });
        &self.metrics
    }

    /// Counts a connection until the guard is dropped.
    pub fn connected(&self) -> impl Drop + Send + use<> {
        self.metrics.connected()
    }

    /// Sends health and metrics to every connection.
    pub fn publish(&self) {
        let timestamp_ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64;
        let metrics = self.metrics();
        let health = report::Health {
            state: self.health(),
            // A client that gets this report is connected already.
            ready: self.conditions().undecided(&self.generations.current().breakers).is_none(),
            in_flight: metrics.in_flight.get() as u32,
            waiting: self.generations.current().pool.waiting() as u32,
            answered: metrics.requests.get(),
            // Rejected because nothing could decide, not because of their content.
            rejected: metrics.errors(FailureKind::Overloaded) + metrics.errors(FailureKind::CircuitOpen),
            timed_out: metrics.errors(FailureKind::Timeout),
            latency: metrics.recent_latency(Instant::now()),
            connections: metrics.connections(),
        };
        let metrics = metrics.report();
        self.reports.send_replace(Arc::new(Reports { timestamp_ms, health, metrics }));
        self.requests.sweep();
    }

    /// Calls the module and encodes its answer.
    async fn decide<E: Encode>(
        &self,
        task: &Task<'_, E>,
        prepared: &mut PreparedCall,
        outcome: Option<&mut Outcome>,
    ) -> Result<E::Encoded, Failed> {
        let result = self.call(task, prepared, outcome).await;
        let Task { policy, arrived, .. } = *task;
        let subject = &mut prepared.subject;
        self.metrics.called(subject.hook, arrived.elapsed());
        match result {
            Ok(reply) => {
                if policy.breakers.succeeded(subject.hook) {
                    info!(
                        module = policy.digest(),
                        hook = subject.hook.export(),
                        "circuit closed for {}: the hook answers again",
                        subject.hook
                    );
                    self.publish();
                }
                if reply.refuses {
                    self.requests.refused(subject.hook, task.encode.correlation_id(), task.origin.number, arrived);
                }
                Ok(reply.encoded)
            }
            Err(failure) => {
                if policy.breakers.failed(subject.hook, failure.kind) {
                    warn!(
                        module = policy.digest(),
                        hook = subject.hook.export(),
                        "circuit open for {}: every call fails; probing once a second",
                        subject.hook
                    );
                    self.publish();
                }
                let rescue = subject.whole.take().map_or(Rescue::Pass, Rescue::Replace);
                Err(Failed { failure, rescue, needs_more: false })
            }
        }
    }

    async fn call<E: Encode>(
        &self,
        task: &Task<'_, E>,
        prepared: &mut PreparedCall,
        mut outcome: Option<&mut Outcome>,
    ) -> Result<Reply<E::Encoded>, Failure> {
        let PreparedCall { call, subject } = prepared;
        let Task { policy, arrived, encode, .. } = *task;
        let times = outcome.as_deref_mut().map(|outcome| &mut outcome.times);
        let mut lease = policy.call(subject.hook, call.take(), Arc::clone(encode.correlation_id()), arrived, times)?.await?;
        let size = lease.output().len() + subject.whole.as_ref().map_or(0, |whole| whole.len());
        let is_observed = outcome.is_some();
        let mut reply = if size < LARGE {
            Reply::new(&lease, subject, encode, &self.metrics.rule_hits, is_observed)?
        } else {
            // On another thread, because neither the deadline nor the slow lane applies to the
            // host's work on an answer, and it would delay other events of the connection.
            let (subject, encode, rule_hits) = (subject.clone(), encode.clone(), Arc::clone(&self.metrics.rule_hits));
            let reading = tokio::task::spawn_blocking(move || (Reply::new(&lease, &subject, &encode, &rule_hits, is_observed), lease));
            let reply;
            (reply, lease) = reading.await.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()));
            reply?
        };
        if let (Some(outcome), Some(summary)) = (outcome, reply.summary.take()) {
            outcome.answer = *summary;
        }
        self.metrics.decided(subject.hook, reply.decision);
        if reply.loses_routing_metadata {
            self.metrics.routing_metadata_lost.inc();
        }
        lease.accept();
        Ok(reply)
    }

    /// Encodes an answer for which the module was not called.
    fn answer<E: Encode>(&self, task: &Task<'_, E>, answer: &Answer<'_>, outcome: Option<&mut Outcome>) -> Result<E::Encoded, Failed> {
        // The returned body may be too large for a frame.
        let encoded = task.encode.encode(answer).map_err(|failure| Failed { rescue: Rescue::Refuse, ..Failed::from(failure) })?;
        self.metrics.decided(task.hook, DecisionKind::of(answer, task.hook));
        if let Some(outcome) = outcome {
            outcome.answer = AnswerSummary::of(answer, task.hook);
            outcome.fail_open = answer.audit.tags.contains(&FAIL_OPEN);
        }
        Ok(encoded)
    }

    /// Answers an event for which the module has no answer, by the failure mode.
    fn fail<E: Encode>(&self, task: &Task<'_, E>, failed: &Failed, outcome: Option<&mut Outcome>) -> E::Encoded {
        let Task { policy, hook, arrived, origin, encode } = *task;
        let failure = &failed.failure;
        let answer = match &failed.rescue {
            _ if !policy.settings.fail_open => None,
            Rescue::Pass => Some(module_error(failure.kind, true, hook)),
            Rescue::Replace(bytes) => {
                let action = BodyAction::Replace(bytes.as_slice().into());
                Some(Answer { request_body_mutation: Some(action.into()), ..module_error(failure.kind, true, hook) })
            }
            Rescue::Refuse => None,
        };
        let allowed = answer.and_then(|mut answer| {
            answer.needs_more = failed.needs_more;
            // The returned body may be too large for an answer.
            encode.encode(&answer).ok()
        });
        self.metrics.error(failure.kind);
        if let Some(suppressed) = self.error_limits[failure.kind as usize].admit() {
            let mode = if allowed.is_some() { "allowed" } else { "blocked" };
            let (failure, id, traceparent) = (failure.clone(), Arc::clone(encode.correlation_id()), origin.traceparent.clone());
            let (module, is_slow) = (Arc::clone(&policy.module), failure.is_slow_to_describe());
            let is_late = matches!(failure.kind, FailureKind::Timeout | FailureKind::Overloaded);
            let deadline_ms = is_late.then_some(policy.settings.timeout.as_millis() as u64);
            let log = move || {
                error!(
                    correlation_id = &*id,
                    hook = hook.export(),
                    kind = failure.kind.code(),
                    module = module.digest(),
                    traceparent = traceparent.as_deref(),
                    deadline_ms,
                    suppressed,
                    "module error, {mode}: {}",
                    failure.description()
                );
            };
            if is_slow {
                // The answer does not wait for it.
                tokio::task::spawn_blocking(log);
            } else {
                log();
            }
        }
        if let Some(outcome) = outcome {
            outcome.answer = AnswerSummary::of(&module_error(failure.kind, allowed.is_some(), hook), hook);
            outcome.answer.needs_more = allowed.is_some() && failed.needs_more;
            (outcome.error, outcome.fail_open) = (Some(failure.kind), allowed.is_some());
        }
        if let Some(allowed) = allowed {
            self.metrics.fail_open.inc();
            self.metrics.decided(hook, DecisionKind::Allow);
            return allowed;
        }
        self.metrics.decided(hook, DecisionKind::Block);
        self.requests.refused(hook, encode.correlation_id(), origin.number, arrived);
        // The answer consists of constants, which every transport can carry.
        encode.encode(&module_error(failure.kind, false, hook)).unwrap_or_else(|failure| unreachable!("{failure}"))
    }

    /// The outcome of an event that has just arrived, if anybody observes events.
    fn begin_outcome(&self, policy: &Policy, hook: Hook, correlation_id: &str) -> Option<Box<Outcome>> {
        (!self.observers.is_empty()).then(|| Box::new(Outcome::begin(correlation_id, hook, policy.takes(hook), policy.digest())))
    }

    /// Hands a complete outcome to the observers.
    fn observed(&self, mut outcome: Box<Outcome>, origin: Origin, arrived: Instant) {
        let refuses = outcome.answer.decision != DecisionKind::Allow && !outcome.answer.needs_more;
        outcome.is_last |= origin.number.is_none() || origin.collides || refuses;
        (outcome.request, outcome.traceparent, outcome.duration) = (origin.number, origin.traceparent, arrived.elapsed());
        let outcome = Arc::new(*outcome);
        for observer in &self.observers {
            observer.observe(&outcome);
        }
    }
}

impl Handler for Agent {
    fn capabilities(&self) -> Capabilities {
        let policy = self.generations.current();
        Capabilities { hooks: policy.pool.hooks(), max_body: policy.settings.max_body }
    }

    fn handle<E: Encode>(
        self: &Arc<Self>,
        event: &Event<'_>,
        arrival: Arrival,
        encode: E,
    ) -> impl Future<Output = E::Encoded> + Send + 'static {
        let at = Instant::now();
        let agent = Arc::clone(self);
        let policy = self.generations.current_owned();
        let hook = event.hook();
        if arrival == Arrival::Superseding {
            self.requests.superseded(&policy, at, &encode);
        }
        let mut outcome = self.begin_outcome(&policy, hook, encode.correlation_id());
        if let Some(outcome) = &mut outcome {
            outcome.request_line = RequestLine::of(event);
            outcome.is_last = !is_followed(&policy, event);
        }
        let mut origin = Origin::default();
        let is_observed = outcome.is_some();
        let incoming = IncomingEvent { policy: &policy, event, at, arrival, encode: &encode, is_observed };
        let prepared = self.requests.prepare(&incoming, &mut origin);
        self.metrics.requests.inc();
        // Encoded here, because the future would grow by the size of an answer.
        let mut prepared = match prepared {
            Ok(Prepared::Call(call)) => Ok(call),
            Ok(Prepared::Known(answer)) => {
                let task = Task { policy: &policy, hook, arrived: at, origin: &origin, encode: &encode };
                Err(self.answer(&task, &answer, outcome.as_deref_mut()))
            }
            Err(failed) => Err(Err(failed)),
        };
        async move {
            let task = Task { policy: &policy, hook, arrived: at, origin: &origin, encode: &encode };
            let result = match prepared {
                // Not moved, because the future would hold it twice.
                Ok(ref mut call) => {
                    agent.metrics.in_flight.inc();
                    let _in_flight = InFlight(&agent.metrics);
                    agent.decide(&task, call, outcome.as_deref_mut()).await
                }
                Err(result) => result,
            };
            let encoded = result.unwrap_or_else(|failed| agent.fail(&task, &failed, outcome.as_deref_mut()));
            if let Some(outcome) = outcome {
                agent.observed(outcome, origin, at);
            }
            encoded
        }
    }

    fn reject<E: Encode>(self: &Arc<Self>, hook: Hook, failure: Failure, encode: E) -> E::Encoded {
        self.metrics.requests.inc();
        let (policy, now) = (self.generations.current_owned(), Instant::now());
        let mut outcome = self.begin_outcome(&policy, hook, encode.correlation_id());
        let rescue = self.requests.undecodable(&policy, hook, now, &encode);
        let origin = Origin::default();
        let task = Task { policy: &policy, hook, arrived: now, origin: &origin, encode: &encode };
        let encoded = self.fail(&task, &Failed { rescue, ..Failed::from(failure) }, outcome.as_deref_mut());
        if let Some(outcome) = outcome {
            self.observed(outcome, origin, now);
        }
        encoded
    }

    fn cancelled(&self, connection: u64, correlation_id: &str) {
        self.requests.cancelled(connection, correlation_id);
    }

    fn disconnected(&self, connection: u64) {
        self.requests.disconnected(connection);
    }

    fn awaits_more(&self, connection: u64) -> bool {
        self.requests.holds(connection)
    }

    fn configure(self: &Arc<Self>, config: Value) -> impl Future<Output = Result<(), String>> + Send + 'static {
        let agent = Arc::clone(self);
        async move {
            let result = tokio::time::timeout(APPLY_TIMEOUT, agent.apply(config)).await;
            let (reason, depends_on_module) = match result {
                Ok(Ok(())) => {
                    agent.accepted();
                    return Ok(());
                }
                Ok(Err(error)) => (error.to_string(), matches!(error, ReloadError::Start(_))),
                Err(_) => (format!("not applied within {APPLY_TIMEOUT:?}"), true),
            };
            agent.rejected(Rejection { reason: reason.clone(), depends_on_module });
            Err(reason)
        }
    }

    fn reports(&self) -> watch::Receiver<Arc<Reports>> {
        self.reports.subscribe()
    }
}

struct InFlight<'a>(&'a Metrics);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.in_flight.dec();
    }
}
