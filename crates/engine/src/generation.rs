//! Which policy serves, and how it is replaced.
//!
//! A policy with a new module or new settings is prepared off the request path and swapped in by
//! one pointer. Calls in flight keep the policy with which they began.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::{ArcSwap, Guard};
use serde_json::Value;
use zentinel_wasm_runtime::{Cache, Module, Runtime, StartError};

use crate::policy::Policy;
use crate::settings::Settings;

/// Time that a reload waits for the instances after the first, so the new pool is as large as the
/// old one. Far more than they need, unless the module starts as slowly as it may.
const WARM_TIMEOUT: Duration = Duration::from_secs(30);

/// The same for the proxy's configuration, within the 5 s that the proxy waits for the answer. The
/// first instance has already used a part of them.
const CONFIG_WARM_TIMEOUT: Duration = Duration::from_secs(2);

/// Why a module or a configuration was rejected. Nothing has changed then.
#[derive(Debug, thiserror::Error)]
pub enum ReloadError {
    /// The module cannot be served.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The proxy's configuration is invalid, whatever the module.
    #[error("{0}")]
    Settings(String),
}

/// The policy that serves, and what is needed to make the next one.
pub(crate) struct Generations {
    pub(crate) runtime: Runtime,
    cache: Option<Cache>,
    current: ArcSwap<Policy>,
    /// Held while a policy is made, so changes are sequential.
    sources: tokio::sync::Mutex<SettingsSources>,
    /// The proxy's last configuration, which goes on top of the base settings. Changed only while
    /// `sources` is held.
    proxy_config: Mutex<Value>,
    /// Instances that pools of earlier generations have discarded. Held during a swap, so no count
    /// is seen on both sides.
    discarded_before: Mutex<u64>,
}

/// The sources of the current settings.
struct SettingsSources {
    /// The settings of the command line and of the files that it names.
    base: Settings,
}

impl Generations {
    /// Makes the first policy.
    ///
    /// # Errors
    ///
    /// The module cannot be served.
    pub(crate) async fn start(runtime: Runtime, module: Arc<Module>, settings: Settings, cache: Option<Cache>) -> Result<Self, StartError> {
        let policy = Policy::make(&runtime, module, settings.clone(), cache.as_ref()).await?;
        Ok(Self {
            runtime,
            cache,
            current: ArcSwap::from_pointee(policy),
            sources: tokio::sync::Mutex::new(SettingsSources { base: settings }),
            proxy_config: Mutex::default(),
            discarded_before: Mutex::new(0),
        })
    }

    /// The policy that serves, for a short access.
    pub(crate) fn current(&self) -> Guard<Arc<Policy>> {
        self.current.load()
    }

    /// The policy that serves, for a call.
    pub(crate) fn current_owned(&self) -> Arc<Policy> {
        self.current.load_full()
    }

    /// Makes a policy of `module` and serves it. `installing` runs once nothing can fail any more,
    /// before the policy serves.
    ///
    /// # Errors
    ///
    /// The module cannot be served. Nothing changes then.
    pub(crate) async fn reload(
        &self,
        mut module: Arc<Module>,
        module_config: Option<Arc<[u8]>>,
        installing: impl FnOnce(&Policy),
    ) -> Result<(), ReloadError> {
        let mut sources = self.sources.lock().await;
        let current = self.current.load_full();
        if module.digest() == current.module.digest() {
            // This one is compiled already.
            module = Arc::clone(&current.module);
        }
        let base = sources.base.clone().with_module_config(module_config);
        let settings = base.with_proxy_config(&self.proxy_config()).map_err(ReloadError::Settings)?;
        let policy = Policy::make(&self.runtime, module, settings, self.cache.as_ref()).await?;
        policy.warm(WARM_TIMEOUT).await;
        installing(&policy);
        self.install(policy);
        sources.base = base;
        Ok(())
    }

    /// Applies a proxy's configuration. Returns whether another policy serves now; `installing` is
    /// as for [`reload`](Self::reload).
    ///
    /// # Errors
    ///
    /// The configuration is invalid, or the module cannot be served under it. Nothing changes then.
    pub(crate) async fn apply(&self, config: Value, installing: impl FnOnce(&Policy)) -> Result<bool, ReloadError> {
        let sources = self.sources.lock().await;
        let settings = sources.base.with_proxy_config(&config).map_err(ReloadError::Settings)?;
        let current = self.current.load_full();
        let changes = settings != current.settings;
        if changes {
            let policy = current.with_settings(&self.runtime, settings, self.cache.as_ref()).await?;
            if !policy.pool.is_same(&current.pool) {
                policy.warm(CONFIG_WARM_TIMEOUT).await;
            }
            installing(&policy);
            self.install(policy);
        }
        *self.proxy_config.lock().unwrap_or_else(PoisonError::into_inner) = config;
        Ok(changes)
    }

    /// The proxy's last configuration; null if there was none.
    pub(crate) fn proxy_config(&self) -> Value {
        self.proxy_config.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn install(&self, policy: Policy) {
        let mut discarded_before = self.discarded_before();
        let old = self.current.swap(Arc::new(policy));
        // A pool that is kept keeps its count.
        if !old.pool.is_same(&self.current.load().pool) {
            *discarded_before += old.pool.discarded();
        }
    }

    /// Calls `look` with the policy that serves and the number of instances that earlier pools have
    /// discarded, without a swap in between.
    pub(crate) fn observe<T>(&self, look: impl FnOnce(&Policy, u64) -> T) -> T {
        let discarded_before = self.discarded_before();
        look(&self.current.load(), *discarded_before)
    }

    fn discarded_before(&self) -> MutexGuard<'_, u64> {
        self.discarded_before.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
