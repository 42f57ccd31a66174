//! Tries a module: compiles it and creates instances as a pool does, and measures that.

use std::sync::Arc;
use std::time::{Duration, Instant};

use zentinel_wasm_contract::{Hook, Hooks};

use crate::cache::Cache;
use crate::inspect::{Export, Import};
use crate::module::Module;
use crate::proposals;
use crate::runtime::Runtime;
use crate::sched::instances::{Instances, PoolSettings, StartError};
use crate::sched::pool::compile;

/// Instances that are created to measure a fresh one. Their median does not depend on a single
/// interruption.
const FRESH_INSTANCES: usize = 9;

/// Time after which no more of them are created. A module may take seconds for one.
const FRESH_TIME: Duration = Duration::from_millis(100);

/// What a pool of the module would be like. Whatever comes after an error is unknown.
#[derive(Debug, Default)]
pub struct Trial {
    /// The exports of the module, unless it cannot be compiled.
    pub exports: Vec<Export>,
    /// Its imports, likewise.
    pub imports: Vec<Import>,
    /// The proposals beyond WebAssembly 1.0 that it uses, likewise, by their public names.
    pub proposals: Vec<&'static str>,
    /// Its hooks.
    pub hooks: Hooks,
    /// Whether it has a configuration and does not export the hook for it.
    pub ignores_config: bool,
    /// How long it took to compile or load the code, and whether that came from the cache.
    pub compiled: Option<Compiled>,
    /// What its instances are like.
    pub started: Option<Started>,
    /// Why it cannot be served, if so.
    pub error: Option<StartError>,
}

/// How a module was compiled.
#[derive(Clone, Copy, Debug)]
pub struct Compiled {
    /// How long it took.
    pub time: Duration,
    /// Whether the code was in the cache, so nothing was compiled.
    pub from_cache: bool,
}

/// What the instances of a module are like.
#[derive(Clone, Copy, Debug)]
pub struct Started {
    /// How long the first instance took until it was configured.
    pub first: Duration,
    /// How long another one takes: the median of a few.
    pub fresh: Duration,
    /// Linear memory of an instance before `on_configure`, in bytes.
    pub memory_at_start: usize,
    /// Linear memory of an instance that is ready, in bytes.
    pub memory: usize,
}

impl Trial {
    /// Tries `module` with the settings of a pool. Checks and limits are those of
    /// [`Pool::start`](crate::Pool::start).
    pub async fn run(runtime: &Runtime, module: &Arc<Module>, settings: PoolSettings, cache: Option<&Cache>) -> Self {
        let mut trial = Self::default();
        trial.error = trial.fill(runtime, module, settings, cache).await.err();
        trial
    }

    async fn fill(
        &mut self,
        runtime: &Runtime,
        module: &Arc<Module>,
        settings: PoolSettings,
        cache: Option<&Cache>,
    ) -> Result<(), StartError> {
        let before = Instant::now();
        let compiled = compile(runtime, module, &settings, cache).await;
        let time = before.elapsed();
        // There are some as soon as the code exists, even if they are wrong.
        (self.exports, self.imports) = module.exports_and_imports();
        let artifact = compiled?;
        self.compiled = Some(Compiled { time, from_cache: artifact.from_cache });
        self.hooks = artifact.hooks();
        self.ignores_config = settings.config.is_some() && !self.hooks.contains(Hook::Configure);
        let tried = Arc::clone(module);
        let used = runtime.run_blocking(move || proposals::used(&tried.bytes)).await;
        self.proposals = used.map_err(|panicked| module.error(format!("the validator {panicked}: please report this")))?;

        let instances = Instances::new(runtime.clone(), artifact, settings, Arc::clone(&module.log));
        let before = Instant::now();
        let instance = instances.make_ready().await?;
        let first = before.elapsed();
        let (memory_at_start, memory) = (instance.memory_at_start(), instance.memory_size());
        drop(instance);
        let mut times = Vec::with_capacity(FRESH_INSTANCES);
        let begin = Instant::now();
        while times.is_empty() || (times.len() < FRESH_INSTANCES && begin.elapsed() < FRESH_TIME) {
            let before = Instant::now();
            drop(instances.make_ready().await?);
            times.push(before.elapsed());
        }
        times.sort_unstable();
        self.started = Some(Started { first, fresh: times[times.len() / 2], memory_at_start, memory });
        Ok(())
    }
}
