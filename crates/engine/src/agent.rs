//! The agent itself: from an event to its answer, and from new settings or a new module to the instances that serve.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use serde_json::Value;
use tokio::sync::watch;
use tracing::{error, info, warn};
use zentinel_wasm_bounds::{LARGE, RateLimit, log_limited, run_blocking_if_large};
use zentinel_wasm_contract::event::{BodyChunk, Data, RequestHeaders};
use zentinel_wasm_contract::report::{self, Reports};
use zentinel_wasm_contract::{
    Answer, Arrival, BodyAction, BodyMutation, Capabilities, Decision, Encode, Event, Failure, FailureKind, Handler, Hook, Text,
    WebsocketDecision,
};
use zentinel_wasm_guest_json::{answer, input};
use zentinel_wasm_runtime::{Cache, Lease, Module, Pool, Request, Runtime, StartError};

use crate::bodies::{self, Body, Length};
use crate::breaker::Breaker;
use crate::collect::{self, Bodies, Rescue, Step};
use crate::context::{Contexts, Remembered};
use crate::inputs;
use crate::metrics::Metrics;
use crate::settings::Settings;

/// A refusal that takes no longer surely ends its request. After a longer time the proxy may have given up the call and let the request through; its timeout is
/// not known here, but is hardly ever shorter than this.
const PROMPT: Duration = Duration::from_millis(10);

/// Time that the proxy waits until its configuration is applied. An instance that takes longer to start may
/// only do so before the proxy connects.
const PROXY_CONFIG_TIMEOUT: Duration = Duration::from_secs(5);

/// Time that a reload waits for the instances after the first, so that the pool which takes over is as large as the
/// one before. Far more than they need, unless the module is as slow to start as it may be.
const WARM_TIMEOUT: Duration = Duration::from_secs(30);

/// The same for a configuration, within the time that the proxy waits for its answer, of which the first instance
/// has had its part already.
const CONFIG_WARM_TIMEOUT: Duration = Duration::from_secs(2);

/// Time for applying a proxy's configuration: compiling the module on a slow machine, starting its instances, and waiting for others that are
/// being applied. The proxy itself gives up after 5 s, and finds what was compiled in the cache when it comes back.
const APPLY_TIMEOUT: Duration = Duration::from_secs(60);

/// One module with the settings under which it serves.
struct Generation {
    module: Arc<Module>,
    pool: Pool,
    settings: Settings,
    breaker: Breaker,
}

/// Decides about events, and can be given another module or other settings meanwhile.
pub struct Agent {
    runtime: Runtime,
    cache: Option<Cache>,
    current: ArcSwap<Generation>,
    /// Held while a new generation is made, so that changes come one after another.
    configured: tokio::sync::Mutex<Configured>,
    contexts: Contexts,
    bodies: Bodies,
    metrics: Metrics,
    limits: Vec<RateLimit>,
    state: Mutex<State>,
    /// Instances that pools of earlier generations have discarded. Held while generations are swapped, so that no count is seen on both sides.
    discarded_before: Mutex<u64>,
    reports: watch::Sender<Arc<Reports>>,
}

/// Why a reload has changed nothing.
#[derive(Debug, thiserror::Error)]
pub enum ReloadError {
    /// The module cannot be served.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The proxy's configuration cannot be applied to it.
    #[error("{0}")]
    Settings(String),
}

/// Where the settings that serve come from.
struct Configured {
    /// The settings of the command line and of the files that it names.
    base: Settings,
    /// What the proxy has configured last, which lies on top of them.
    proxy: Value,
}

#[derive(Default)]
struct State {
    draining: bool,
    reload_failure: Option<String>,
    /// Why the socket cannot be reached.
    socket_lost: Option<String>,
}

impl Agent {
    /// Loads the module and makes its first instance. The others follow in the background.
    ///
    /// # Errors
    ///
    /// The module cannot be served: one message with everything that is wrong.
    pub async fn start(
        runtime: Runtime,
        module: Arc<Module>,
        settings: Settings,
        cache: Option<Cache>,
        metrics: Metrics,
    ) -> Result<Arc<Self>, StartError> {
        if settings.start_timeout > PROXY_CONFIG_TIMEOUT {
            warn!(
                "`--start-timeout-ms` is {}, but the proxy waits {} ms for its configuration to be applied: a slower start then fails there",
                settings.start_timeout.as_millis(),
                PROXY_CONFIG_TIMEOUT.as_millis()
            );
        }
        let generation = Generation::make(&runtime, module, settings.clone(), cache.as_ref()).await?;
        metrics.serving(generation.digest());
        info!(module = generation.digest(), pool_size = settings.pool_size, "the module `{}` serves", generation.module.path());
        let agent = Self {
            runtime,
            cache,
            current: ArcSwap::from_pointee(generation),
            configured: tokio::sync::Mutex::new(Configured { base: settings, proxy: Value::Null }),
            contexts: Contexts::new(),
            bodies: Bodies::new(),
            metrics,
            limits: FailureKind::ALL.iter().map(|_| RateLimit::per_log_line()).collect(),
            state: Mutex::new(State::default()),
            discarded_before: Mutex::new(0),
            reports: watch::Sender::new(Arc::new(Reports::default())),
        };
        let agent = Arc::new(agent);
        agent.publish();
        Ok(agent)
    }

    /// Serves `module`, with what `on_configure` gets if that lies in a file of its own, from now on. Events in flight end on the old
    /// module.
    ///
    /// # Errors
    ///
    /// The module cannot be served. Nothing changes then.
    pub async fn reload(&self, mut module: Arc<Module>, module_config: Option<Arc<[u8]>>) -> Result<(), ReloadError> {
        let mut configured = self.configured.lock().await;
        let current = self.current.load_full();
        if module.digest() == current.module.digest() {
            // It was compiled already.
            module = Arc::clone(&current.module);
        }
        let base = configured.base.clone().with_module_config(module_config);
        let settings = base.with_proxy_config(&configured.proxy).map_err(ReloadError::Settings)?;
        let generation = Generation::make(&self.runtime, module, settings, self.cache.as_ref()).await?;
        generation.warm(WARM_TIMEOUT).await;
        // Nothing fails from here on.
        self.install(generation);
        configured.base = base;
        Ok(())
    }

    /// Counts a reload of everything that the agent is made of. After one that has failed health is degraded until another succeeds.
    pub fn reloaded(&self, failure: Option<String>) {
        self.metrics.reloaded(failure.is_none());
        self.state().reload_failure = failure;
        self.publish();
    }

    async fn apply(&self, config: Value) -> Result<(), String> {
        let mut configured = self.configured.lock().await;
        let settings = configured.base.with_proxy_config(&config)?;
        let current = self.current.load_full();
        if settings != current.settings {
            let generation =
                current.with_settings(&self.runtime, settings, self.cache.as_ref()).await.map_err(|error| error.to_string())?;
            if !generation.pool.is_same(&current.pool) {
                generation.warm(CONFIG_WARM_TIMEOUT).await;
            }
            log_limited!(
                info,
                pool_size = generation.settings.pool_size,
                fail_open = generation.settings.fail_open,
                "the proxy's configuration is applied"
            );
            self.install(generation);
            self.metrics.reloaded(true);
            // A reload that has failed stays so: these are new settings for the old module.
            self.publish();
        }
        configured.proxy = config;
        Ok(())
    }

    fn install(&self, generation: Generation) {
        log_limited!(info, module = generation.digest(), "the module `{}` serves", generation.module.path());
        self.metrics.serving(generation.digest());
        let mut discarded_before = self.discarded_before();
        let old = self.current.swap(Arc::new(generation));
        // Where the pool is kept, so is its count.
        if !old.pool.is_same(&self.current.load().pool) {
            *discarded_before += old.pool.stats().discarded;
        }
    }

    fn discarded_before(&self) -> std::sync::MutexGuard<'_, u64> {
        self.discarded_before.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says from now on that the agent is draining. Requests that still arrive are still decided.
    pub fn drain(&self) {
        if !std::mem::replace(&mut self.state().draining, true) {
            self.publish();
        }
    }

    /// Says that nobody can connect to the socket, and why, or that it is there again.
    pub fn socket_lost(&self, reason: Option<String>) {
        let changed = {
            let mut state = self.state();
            let changed = state.socket_lost != reason;
            state.socket_lost = reason;
            changed
        };
        if changed {
            self.publish();
        }
    }

    /// Agent health.
    pub fn health(&self) -> report::HealthState {
        let state = self.state();
        if state.draining {
            return report::HealthState::Draining;
        }
        let circuit_open = self.current.load().breaker.is_open().then_some("the module fails every call and is left alone");
        let problems = [state.socket_lost.as_deref(), state.reload_failure.as_deref(), circuit_open];
        let problems: Vec<_> = problems.into_iter().flatten().collect();
        if problems.is_empty() { report::HealthState::Healthy } else { report::HealthState::Degraded(problems.join("; ")) }
    }

    /// Whether the module decides about requests right now.
    fn decides(&self) -> bool {
        !self.state().draining && !self.current.load().breaker.is_open()
    }

    /// Whether it does, and can be asked at its socket.
    pub fn is_ready(&self) -> bool {
        self.decides() && self.state().socket_lost.is_none()
    }

    /// The agent's metrics, up to date.
    pub fn metrics(&self) -> &Metrics {
        let discarded_before = self.discarded_before();
        let generation = self.current.load();
        let stats = generation.pool.stats();
        self.metrics.observe(stats, *discarded_before + stats.discarded, generation.breaker.is_open());
        self.metrics.instances(stats.largest_memory, self.runtime.failed_starts());
        &self.metrics
    }

    /// Hands health and metrics to every connection.
    pub fn publish(&self) {
        let timestamp_ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64;
        let metrics = self.metrics();
        let health = report::Health {
            state: self.health(),
            // A connection that hears it needs no socket.
            ready: self.decides(),
            in_flight: metrics.in_flight.get() as u32,
            waiting: self.current.load().pool.stats().waiting as u32,
            answered: metrics.requests.get(),
            // Not for what they are, but because there was nobody to decide.
            rejected: metrics.errors(FailureKind::Overloaded) + metrics.errors(FailureKind::CircuitOpen),
            timed_out: metrics.errors(FailureKind::Timeout),
            latency: metrics.recent_latency(Instant::now()),
            connections: metrics.connections(),
        };
        let metrics = metrics.report();
        self.reports.send_replace(Arc::new(Reports { timestamp_ms, health, metrics }));
        self.bodies.sweep();
    }

    /// What the module is handed for `event`, or None when it takes no such event.
    fn input(
        &self,
        generation: &Generation,
        event: &Event<'_>,
        arrived: Instant,
        arrival: Arrival,
        id: &Arc<str>,
    ) -> Result<Option<Prepared>, Failure> {
        let hooks = generation.pool.hooks();
        let settings = &generation.settings;
        let (case, limit) = (settings.header_case, settings.max_body);
        let wanted = hooks.contains(event.hook());
        let has_later_hooks = generation.has_later_hooks();
        let mut out = inputs::take();
        let mut traceparent = None;
        let mut number = None;
        let mut body = Body::None;
        match event {
            Event::RequestHeaders(event) => {
                if wanted || has_later_hooks {
                    input::request(&mut out, event, case);
                }
                traceparent = event.metadata.traceparent.as_deref().map(Arc::from);
                if has_later_hooks {
                    let takes_body = hooks.contains(Hook::RequestBody);
                    let length = if takes_body { Length::of(event) } else { Length::Unknown };
                    let remembered = Remembered::new(Arc::clone(id), input::context(event, &out), traceparent.clone(), length);
                    let begun = self.contexts.begin(remembered, takes_body && may_have_body(event), arrived);
                    number = Some(begun.number);
                    // The same collision is counted once, wherever it shows.
                    if begun.collides && arrival == Arrival::Alone {
                        self.metrics.id_collisions.inc();
                    }
                }
            }
            Event::RequestBody(chunk) => {
                let known = if wanted {
                    self.contexts.get_for_body(id, chunk.is_last, arrived)
                } else {
                    has_later_hooks.then(|| self.contexts.get(id, arrived)).flatten()
                };
                if wanted {
                    body = Body::request(chunk, known.as_ref().map_or(Length::Unknown, |known| known.length));
                    input::request_body(&mut out, chunk, known.as_ref().map(|known| &known.context), limit)?;
                }
                number = known.as_ref().map(|known| known.number());
                traceparent = known.and_then(|known| known.traceparent.clone());
            }
            Event::ResponseHeaders(event) => {
                let known = has_later_hooks.then(|| self.contexts.get(id, arrived)).flatten();
                if wanted {
                    input::response(&mut out, event, known.as_ref().map(|known| &known.context), case);
                }
                traceparent = known.and_then(|known| known.traceparent.clone());
                if is_interim(event.status) {
                    // The response is still to come.
                } else if hooks.contains(Hook::ResponseBody) {
                    self.contexts.respond(id, input::response_context(event, case));
                } else if has_later_hooks {
                    self.contexts.end(id, arrived);
                }
            }
            Event::ResponseBody(chunk) if wanted => {
                let known = self.contexts.get(id, arrived);
                if chunk.is_last {
                    self.contexts.end(id, arrived);
                }
                body = Body::response(chunk);
                input::response_body(&mut out, chunk, known.as_ref().map(|known| &known.context), limit)?;
                traceparent = known.and_then(|known| known.traceparent.clone());
            }
            Event::WebsocketFrame(frame) if wanted => input::websocket_frame(&mut out, frame, limit)?,
            Event::GuardrailInspect(event) if wanted => input::guardrail_inspect(&mut out, event, limit)?,
            Event::RequestComplete(event) if wanted => input::request_complete(&mut out, event),
            // What the module does not take ends no request: another of its id may have begun since the last event that the module takes.
            Event::ResponseBody(_) | Event::WebsocketFrame(_) | Event::GuardrailInspect(_) | Event::RequestComplete(_) => {}
        }
        if !wanted {
            inputs::keep(out);
            return Ok(None);
        }
        Ok(Some(Prepared { input: out, body, whole: None, traceparent, number }))
    }

    /// Whether a chunk of a request's body is one for [`Self::collect`]: the module is to see the body whole, or a part of it is held already.
    fn collects<E: Encode>(&self, generation: &Generation, chunk: &BodyChunk<'_>, encode: &E) -> bool {
        let wanted = generation.settings.collect_request_body && generation.pool.hooks().contains(Hook::RequestBody);
        wanted || encode.connection().is_some_and(|connection| self.bodies.knows(connection, &chunk.correlation_id))
    }

    /// What becomes of a chunk of a body that is collected.
    fn collect<E: Encode>(
        &self,
        generation: &Generation,
        event: &Event<'_>,
        chunk: &BodyChunk<'_>,
        arrived: Instant,
        arrival: Arrival,
        encode: &E,
    ) -> Result<Input, Failed> {
        let id = &*chunk.correlation_id;
        let Some(connection) = encode.connection() else {
            if chunk.is_last && chunk.chunk_index == 0 {
                return Ok(self.input(generation, event, arrived, arrival, encode.correlation_id())?.into());
            }
            let detail = "`--collect-request-body` needs the Unix socket, because gRPC has no field for the body that is put back";
            return Err(Failure::new(FailureKind::BodyNotCollected, detail).into());
        };
        let known = self.contexts.get_for_body(id, chunk.is_last, arrived);
        let number = known.as_ref().map(|known| known.number());
        let length = known.as_ref().map_or(Length::Unknown, |known| known.length);
        let traceparent = known.as_ref().and_then(|known| known.traceparent.clone());
        let failed = |failure, rescue| Failed { failure, rescue, more: !chunk.is_last, traceparent: traceparent.clone(), number };
        let bytes = match input::bytes(&chunk.data, usize::MAX) {
            Ok(bytes) => bytes.into_owned(),
            Err(error) => {
                self.bodies.cancelled(connection, id);
                return Err(failed(error.into(), Rescue::Refuse));
            }
        };
        let step = self.bodies.take(collect::Chunk {
            connection,
            id,
            number,
            length,
            bytes,
            index: chunk.chunk_index,
            is_last: chunk.is_last,
            received: chunk.bytes_received,
            buffered: bodies::is_buffered(chunk),
            limit: generation.settings.max_body,
            fail_open: generation.settings.fail_open,
        });
        let step = step.map_err(|lost| failed(lost.failure, lost.rescue))?;
        if step == Step::Alone {
            return Ok(self.input(generation, event, arrived, arrival, encode.correlation_id())?.into());
        }
        let more = !chunk.is_last;
        let whole = match step {
            Step::Whole(whole) => whole,
            Step::Alone | Step::Hold => return Ok(Input::Known(changed(Some(BodyAction::Drop), more))),
            Step::Pass => return Ok(Input::Known(passing(changed(None, more)))),
            Step::Forward(text) => return Ok(Input::Known(passing(changed(Some(BodyAction::Replace(text.into())), more)))),
        };
        if !generation.pool.hooks().contains(Hook::RequestBody) {
            // Another module serves since the body began.
            return Ok(Input::Known(changed(Some(BodyAction::Replace(whole.into())), more)));
        }
        let size = whole.len() as u64;
        let event = BodyChunk {
            correlation_id: Text::borrowed(id),
            data: Data::Raw(&whole),
            is_last: true,
            total_size: Some(size),
            chunk_index: 0,
            bytes_received: Some(size),
            bytes_sent: None,
        };
        let mut out = inputs::take();
        let context = known.as_ref().map(|known| &known.context);
        let written = run_blocking_if_large(whole.len(), || input::request_body(&mut out, &event, context, generation.settings.max_body));
        let whole = Arc::new(whole);
        if let Err(error) = written {
            return Err(failed(error.into(), Rescue::Replace(whole)));
        }
        let body = Body::Request { size, is_last: true, applied: true, length };
        Ok(Input::Call(Prepared { input: out, body, whole: Some(whole), traceparent, number }))
    }

    fn fail<E: Encode>(&self, generation: &Generation, hook: Hook, failed: &Failed, arrived: Instant, encode: &E) -> E::Encoded {
        let failure = &failed.failure;
        let answer = match &failed.rescue {
            _ if !generation.settings.fail_open => None,
            Rescue::Pass => Some(module_error(failure.kind, true, hook)),
            Rescue::Replace(bytes) => {
                let action = BodyAction::Replace(bytes.as_slice().into());
                Some(Answer { request_body_mutation: Some(action.into()), ..module_error(failure.kind, true, hook) })
            }
            Rescue::Refuse => None,
        };
        let allowed = answer.and_then(|mut answer| {
            answer.needs_more = failed.more;
            // What is given back may have no room in an answer.
            encode.encode(&answer).ok()
        });
        self.metrics.error(failure.kind);
        if let Some(suppressed) = self.limits[failure.kind as usize].admit() {
            let mode = if allowed.is_some() { "allowed" } else { "blocked" };
            error!(
                correlation_id = &**encode.correlation_id(),
                hook = hook.export(),
                kind = failure.kind.code(),
                module = generation.digest(),
                traceparent = failed.traceparent.as_deref(),
                suppressed,
                "module error, {mode}: {}",
                failure.detail
            );
        }
        if let Some(allowed) = allowed {
            self.metrics.fail_open.inc();
            return allowed;
        }
        self.metrics.blocked.inc();
        if let Some(number) = failed.number
            && arrived.elapsed() < PROMPT
        {
            self.contexts.refused(encode.correlation_id(), number);
        }
        // The answer is made here, of constants: every transport can carry it.
        encode.encode(&module_error(failure.kind, false, hook)).unwrap_or_else(|failure| unreachable!("{failure}"))
    }
}

/// What an event comes to.
#[expect(
    clippy::large_enum_variant,
    reason = "it is moved once, and a box would cost an allocation for each event that the module does not take"
)]
enum Input {
    /// The module is called.
    Call(Prepared),
    /// The answer is known without it.
    Known(Answer<'static>),
}

impl From<Option<Prepared>> for Input {
    fn from(prepared: Option<Prepared>) -> Self {
        prepared.map_or_else(|| Self::Known(Answer::default()), Self::Call)
    }
}

/// A module error, and what can still be done for its event.
struct Failed {
    failure: Failure,
    rescue: Rescue,
    /// More of the body is to be seen.
    more: bool,
    traceparent: Option<Arc<str>>,
    /// The request's, as long as it may be refused.
    number: Option<u64>,
}

impl From<Failure> for Failed {
    fn from(failure: Failure) -> Self {
        Self { failure, rescue: Rescue::Pass, more: false, traceparent: None, number: None }
    }
}

/// Allows a chunk of a request's body, changed or as it is.
fn changed(action: Option<BodyAction<'static>>, needs_more: bool) -> Answer<'static> {
    Answer { request_body_mutation: action.map(BodyMutation::from), needs_more, ..Answer::default() }
}

/// The same for what the module does not see, because an error has been allowed.
fn passing(mut answer: Answer<'static>) -> Answer<'static> {
    answer.audit.tags.push(Text::borrowed("fail-open"));
    answer
}

struct Prepared {
    input: Vec<u8>,
    body: Body,
    /// The body that was collected, which the answer puts back.
    whole: Option<Arc<Vec<u8>>>,
    traceparent: Option<Arc<str>>,
    /// The request's, as long as it may be refused.
    number: Option<u64>,
}

impl Generation {
    async fn make(runtime: &Runtime, module: Arc<Module>, settings: Settings, cache: Option<&Cache>) -> Result<Self, StartError> {
        let pool = Pool::start(runtime, &module, settings.pool(), cache).await?;
        Ok(Self { module, pool, settings, breaker: Breaker::new() })
    }

    /// The same module under other settings. Its instances are kept where the settings do not concern them.
    async fn with_settings(&self, runtime: &Runtime, settings: Settings, cache: Option<&Cache>) -> Result<Self, StartError> {
        let module = Arc::clone(&self.module);
        if settings.pool() == self.settings.pool() {
            return Ok(Self { module, pool: self.pool.clone(), settings, breaker: Breaker::new() });
        }
        Self::make(runtime, module, settings, cache).await
    }

    /// Waits until all instances are made, at most for `limit`: those that are missing then follow while it serves.
    async fn warm(&self, limit: Duration) {
        let _ = tokio::time::timeout(limit, self.pool.warm()).await;
    }

    fn digest(&self) -> &str {
        self.module.digest()
    }

    /// Whether the module has hooks that are told of an earlier event of their request.
    fn has_later_hooks(&self) -> bool {
        self.pool.hooks().contains_any(&[Hook::RequestBody, Hook::ResponseHeaders, Hook::ResponseBody])
    }
}

/// Whether a body may follow. HTTP/1.1 announces each (RFC 9112, 6.3), but HTTP/2 need not, and the event does not say which of them it was; only
/// methods that rarely have a body are then taken to have none.
fn may_have_body(event: &RequestHeaders<'_>) -> bool {
    if event.headers.get("transfer-encoding").is_some() {
        return true;
    }
    match event.headers.get("content-length") {
        Some(lengths) => lengths.iter().any(|length| length.trim() != "0"),
        None => !matches!(&*event.method, "GET" | "HEAD" | "OPTIONS" | "DELETE" | "TRACE" | "CONNECT"),
    }
}

/// Whether another response will follow (RFC 9110, 15.2).
const fn is_interim(status: u16) -> bool {
    /// Switching Protocols: nothing but the new protocol follows.
    const SWITCHING: u16 = 101;

    status / 100 == 1 && status != SWITCHING
}

/// The answer to an event for which the module has none.
fn module_error(kind: FailureKind, fail_open: bool, hook: Hook) -> Answer<'static> {
    /// The server met a condition that prevented it from fulfilling the request (RFC 6455, 7.4.1).
    const INTERNAL: u16 = 1011;

    let mut answer = Answer::default();
    answer.audit.tags.push(Text::borrowed("wasm-error"));
    answer.audit.reason_codes.push(Text::borrowed(kind.code()));
    if fail_open {
        answer.audit.tags.push(Text::borrowed("fail-open"));
        return answer;
    }
    answer.decision = Decision::Block { status: 500, body: None, headers: Vec::new() };
    if hook == Hook::WebsocketFrame {
        answer.websocket_decision = Some(WebsocketDecision::Close { code: INTERNAL, reason: Text::borrowed("wasm-error") });
    }
    answer
}

impl Handler for Agent {
    fn capabilities(&self) -> Capabilities {
        let generation = self.current.load();
        Capabilities { hooks: generation.pool.hooks(), max_body: generation.settings.max_body }
    }

    fn handle<E: Encode>(
        self: &Arc<Self>,
        event: &Event<'_>,
        arrival: Arrival,
        encode: E,
    ) -> impl Future<Output = E::Encoded> + Send + 'static {
        let arrived = Instant::now();
        let agent = Arc::clone(self);
        let generation = self.current.load_full();
        let hook = event.hook();
        if arrival == Arrival::Superseding {
            self.metrics.id_collisions.inc();
            if generation.has_later_hooks() {
                // The answer that is not sent may be the refusal of another request, which the proxy may let through without it.
                self.contexts.unanswered(encode.correlation_id(), arrived);
            }
            if let Some(connection) = encode.connection() {
                // The answer that is not sent may be the one that holds a chunk.
                self.bodies.cancelled(connection, encode.correlation_id());
            }
        }
        let input = match event {
            Event::RequestBody(chunk) if self.collects(&generation, chunk, &encode) => {
                self.collect(&generation, event, chunk, arrived, arrival, &encode)
            }
            _ => self.input(&generation, event, arrived, arrival, encode.correlation_id()).map(Input::from).map_err(Failed::from),
        };
        self.metrics.requests.inc();
        async move {
            let mut prepared = match input {
                Ok(Input::Call(prepared)) => prepared,
                Ok(Input::Known(answer)) => match encode.encode(&answer) {
                    Ok(encoded) => return encoded,
                    // What is put back has no room in a frame.
                    Err(failure) => {
                        let failed = Failed { rescue: Rescue::Refuse, ..Failed::from(failure) };
                        return agent.fail(&generation, hook, &failed, arrived, &encode);
                    }
                },
                Err(failed) => return agent.fail(&generation, hook, &failed, arrived, &encode),
            };
            agent.metrics.in_flight.inc();
            let _in_flight = InFlight(&agent.metrics);
            let outcome = agent.decide(&generation, hook, &mut prepared, arrived, &encode).await;
            agent.metrics.called(hook, arrived.elapsed());
            match outcome {
                Ok(encoded) => {
                    if generation.breaker.succeeded() {
                        info!(module = generation.digest(), "the module answers again");
                        agent.publish();
                    }
                    encoded
                }
                Err(failure) => {
                    if generation.breaker.failed(failure.kind) {
                        warn!(
                            module = generation.digest(),
                            "the module fails every call and is left alone; it is tried again every second"
                        );
                        agent.publish();
                    }
                    let Prepared { whole, traceparent, number, .. } = prepared;
                    let rescue = whole.map_or(Rescue::Pass, Rescue::Replace);
                    agent.fail(&generation, hook, &Failed { failure, rescue, more: false, traceparent, number }, arrived, &encode)
                }
            }
        }
    }

    fn reject<E: Encode>(self: &Arc<Self>, hook: Hook, failure: Failure, encode: E) -> E::Encoded {
        self.metrics.requests.inc();
        let (generation, now) = (self.current.load_full(), Instant::now());
        if hook == Hook::RequestHeaders && generation.has_later_hooks() {
            // Failing open, the request goes on.
            self.contexts.begin_unknown(encode.correlation_id(), now);
        }
        let mut failed = Failed::from(failure);
        if let Some(connection) = encode.connection()
            && self.bodies.knows(connection, encode.correlation_id())
        {
            // It may have been a part of the body.
            self.bodies.cancelled(connection, encode.correlation_id());
            failed.rescue = Rescue::Refuse;
        }
        self.fail(&generation, hook, &failed, now, &encode)
    }

    fn cancelled(&self, connection: u64, correlation_id: &str) {
        self.bodies.cancelled(connection, correlation_id);
    }

    fn disconnected(&self, connection: u64) {
        self.bodies.disconnected(connection);
    }

    fn awaits_more(&self, connection: u64) -> bool {
        self.bodies.holds(connection)
    }

    fn configure(self: &Arc<Self>, config: Value) -> impl Future<Output = Result<(), String>> + Send + 'static {
        let agent = Arc::clone(self);
        async move {
            let result = tokio::time::timeout(APPLY_TIMEOUT, agent.apply(config)).await;
            let result = result.unwrap_or_else(|_| Err(format!("it was not applied within {APPLY_TIMEOUT:?}")));
            if let Err(reason) = &result {
                agent.metrics.reloaded(false);
                log_limited!(warn, "the proxy's configuration is rejected: {reason}");
            }
            result
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

impl Agent {
    /// Calls the module and writes its answer.
    async fn decide<E: Encode>(
        &self,
        generation: &Generation,
        hook: Hook,
        prepared: &mut Prepared,
        arrived: Instant,
        encode: &E,
    ) -> Result<E::Encoded, Failure> {
        if !generation.breaker.admits() {
            return Err(Failure::new(FailureKind::CircuitOpen, "the module has failed every call for a while"));
        }
        let deadline = arrived + generation.settings.timeout;
        let input = std::mem::take(&mut prepared.input);
        let request = Request { hook, input, deadline, correlation_id: Arc::clone(encode.correlation_id()) };
        let mut lease = generation.pool.clone().call(request).await?;
        let whole = prepared.whole.clone();
        let size = lease.output().len() + whole.as_ref().map_or(0, |whole| whole.len());
        let read = if size < LARGE {
            Read::new(&lease, hook, prepared.body, whole.as_deref(), encode)?
        } else {
            // Neither the deadline nor the slow lane is for what the host does with an answer; the other events of the connection are not to wait for it.
            let (body, encode) = (prepared.body, encode.clone());
            let reading = tokio::task::spawn_blocking(move || (Read::new(&lease, hook, body, whole.as_deref(), &encode), lease));
            let read;
            (read, lease) = reading.await.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()));
            read?
        };
        if read.blocks {
            self.metrics.blocked.inc();
        }
        if read.loses_routing_metadata {
            self.metrics.routing_metadata_lost.inc();
        }
        inputs::keep(lease.take_input());
        lease.accept();
        if let Some(number) = prepared.number
            && read.refuses
            && arrived.elapsed() < PROMPT
        {
            self.contexts.refused(encode.correlation_id(), number);
        }
        Ok(read.encoded)
    }
}

/// What an answer comes to.
struct Read<T> {
    encoded: T,
    blocks: bool,
    /// The request has surely ended.
    refuses: bool,
    loses_routing_metadata: bool,
}

impl<T> Read<T> {
    fn new<E: Encode<Encoded = T>>(lease: &Lease, hook: Hook, body: Body, whole: Option<&Vec<u8>>, encode: &E) -> Result<Self, Failure> {
        let mut answer = answer::read(lease.output())?;
        bodies::settle(&mut answer, hook, body)?;
        if let Some(whole) = whole {
            bodies::put_back(&mut answer, whole);
        }
        let blocks = matches!(answer.decision, Decision::Block { .. });
        // Zentinel 0.6.45 lets a request through that it shall challenge.
        let refuses = (blocks || matches!(answer.decision, Decision::Redirect { .. })) && !answer.needs_more;
        let loses_routing_metadata = encode.loses_routing_metadata(&answer);
        Ok(Self { encoded: encode.encode(&answer)?, blocks, refuses, loses_routing_metadata })
    }
}
