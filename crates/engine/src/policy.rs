//! One module and the settings under which it serves.

use std::sync::Arc;
use std::time::{Duration, Instant};

use zentinel_wasm_contract::{Event, Failure, FailureKind, Hook};
use zentinel_wasm_runtime::{Cache, Call, CallTimes, Lease, Module, Pool, RequestContext, Runtime, StartError, View};

use crate::breaker::Breakers;
use crate::settings::Settings;

/// A module, its instances, and the settings under which it serves.
pub(crate) struct Policy {
    pub(crate) module: Arc<Module>,
    pub(crate) pool: Pool,
    pub(crate) settings: Settings,
    pub(crate) breakers: Breakers,
}

impl Policy {
    /// Compiles the module and creates its first instance.
    ///
    /// # Errors
    ///
    /// The module cannot be served.
    pub(crate) async fn make(
        runtime: &Runtime,
        module: Arc<Module>,
        settings: Settings,
        cache: Option<&Cache>,
    ) -> Result<Self, StartError> {
        let pool = Pool::start(runtime, &module, settings.pool(), cache).await?;
        Ok(Self::new(module, pool, settings))
    }

    fn new(module: Arc<Module>, pool: Pool, settings: Settings) -> Self {
        Self { module, pool, breakers: Breakers::new(settings.breaker), settings }
    }

    /// The same module under other settings. It keeps its instances unless the settings concern
    /// them.
    ///
    /// # Errors
    ///
    /// As for [`make`](Self::make).
    pub(crate) async fn with_settings(&self, runtime: &Runtime, settings: Settings, cache: Option<&Cache>) -> Result<Self, StartError> {
        let module = Arc::clone(&self.module);
        if settings.pool() == self.settings.pool() {
            return Ok(Self::new(module, self.pool.clone(), settings));
        }
        Self::make(runtime, module, settings, cache).await
    }

    /// Waits for `limit` at most until all instances exist. Missing ones are created while it
    /// serves.
    pub(crate) async fn warm(&self, limit: Duration) {
        let _ = tokio::time::timeout(limit, self.pool.warm()).await;
    }

    /// The module's SHA-256.
    pub(crate) fn digest(&self) -> &str {
        self.module.digest()
    }

    /// Whether the module exports `hook`.
    pub(crate) fn takes(&self, hook: Hook) -> bool {
        self.pool.hooks().contains(hook)
    }

    /// Whether the module has hooks that get to see an earlier event of their request.
    pub(crate) fn has_later_hooks(&self) -> bool {
        self.pool.hooks().contains_any(&[Hook::RequestBody, Hook::ResponseHeaders, Hook::ResponseBody])
    }

    /// Writes an event for the module.
    ///
    /// # Errors
    ///
    /// The body is over the limit or invalid base64.
    pub(crate) fn prepare(&self, event: &Event<'_>, context: Option<&RequestContext>) -> Result<Call, Failure> {
        let Settings { header_case, max_body, .. } = self.settings;
        self.pool.prepare(&View { event, context, header_case, max_body })
    }

    /// Calls `hook`, unless its circuit is open. The deadline counts from `arrived`. Measures
    /// the call into `times`, if given.
    ///
    /// # Errors
    ///
    /// Every module error that a call can end in.
    pub(crate) fn call<'a>(
        &self,
        hook: Hook,
        call: Call,
        correlation_id: Arc<str>,
        arrived: Instant,
        times: Option<&'a mut CallTimes>,
    ) -> Result<impl Future<Output = Result<Lease, Failure>> + use<'a>, Failure> {
        if !self.breakers.admits(hook) {
            return Err(Failure::new(FailureKind::CircuitOpen, "circuit open: every call of this hook fails"));
        }
        Ok(self.pool.clone().call_timed(call, correlation_id, arrived + self.settings.timeout, times))
    }
}
