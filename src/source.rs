//! The files that the agent reads at start and again on each reload.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, anyhow};
use tokio_rustls::rustls::ServerConfig;
use zentinel_wasm_engine::{Agent, Observer, ReloadError};
use zentinel_wasm_engine::{SettingLimits, Settings, checked_module_config};
use zentinel_wasm_runtime::{Cache, Module, Runtime, StartError};

use crate::listen::tls::ReloadableTls;
use crate::{decisions, files, logging};

/// Paths of the files, and what the command line requires of them.
#[derive(Clone)]
pub struct Source {
    /// The module.
    pub module: PathBuf,
    /// The SHA-256 that the module must have.
    pub sha256: Option<String>,
    /// The input of `on_configure`, if it is in a file.
    pub module_config: Option<PathBuf>,
    /// Certificate, key and client CA of the gRPC address.
    pub tls: Option<ReloadableTls>,
}

/// The contents of the files, checked as far as that is possible without running the module.
struct Contents {
    module: Arc<Module>,
    module_config: Option<Arc<[u8]>>,
    tls: Option<Arc<ServerConfig>>,
}

impl Source {
    /// All files, in the order in which they are read.
    pub fn files(&self) -> Vec<PathBuf> {
        let mut files = vec![self.module.clone()];
        files.extend(self.module_config.clone());
        if let Some(tls) = &self.tls {
            files.extend(tls.files().paths().map(Path::to_owned));
        }
        files
    }

    /// Starts an agent from the files. `settings` are those of the command line, and `observers`
    /// are given the outcome of every event.
    ///
    /// # Errors
    ///
    /// A file cannot be used. The message lists everything that is wrong with it.
    pub async fn start(
        &self,
        runtime: Runtime,
        settings: Settings,
        cache: Option<Cache>,
        observers: Vec<Arc<dyn Observer>>,
    ) -> anyhow::Result<Arc<Agent>> {
        let Contents { module, module_config, tls } = self.read().await?;
        let settings = settings.with_module_config(module_config);
        let metrics = logging::metrics().with(decisions::dropped());
        let agent =
            Agent::start(runtime, module, settings, cache, metrics, observers).await.map_err(|error| self.name_config_file(error))?;
        self.install(tls);
        Ok(agent)
    }

    /// Reads all files again and serves their contents from now on. Events that are in flight
    /// finish on the old module, and connections keep the TLS configuration that they began with.
    ///
    /// # Errors
    ///
    /// A file cannot be used. Nothing changes then, and health is degraded until a reload succeeds.
    pub async fn reload(&self, agent: &Agent) -> anyhow::Result<()> {
        let result = self.reload_into(agent).await;
        agent.reloaded(result.as_ref().err().map(|error| format!("{error:#}")));
        result
    }

    async fn reload_into(&self, agent: &Agent) -> anyhow::Result<()> {
        let Contents { module, module_config, tls } = self.read().await?;
        agent.reload(module, module_config).await.map_err(|error| match error {
            ReloadError::Start(error) => self.name_config_file(error),
            error @ ReloadError::Settings(_) => error.into(),
        })?;
        self.install(tls);
        Ok(())
    }

    /// Reads all files, on a blocking thread.
    async fn read(&self) -> anyhow::Result<Contents> {
        let source = self.clone();
        tokio::task::spawn_blocking(move || source.read_blocking()).await?
    }

    fn read_blocking(&self) -> anyhow::Result<Contents> {
        let module = Module::read(&self.module, self.sha256.as_deref())?;
        let module_config = self.module_config.as_deref().map(read_module_config).transpose()?;
        let tls = self.tls.as_ref().map(ReloadableTls::read).transpose()?;
        Ok(Contents { module: Arc::new(module), module_config, tls })
    }

    /// Adds the configuration file to `error` if the module has rejected its configuration. The
    /// error itself names only the module.
    fn name_config_file(&self, error: StartError) -> anyhow::Error {
        match (&self.module_config, &error) {
            (Some(file), StartError::Rejected { .. }) => {
                anyhow::Error::from(error).context(format!("cannot use `--module-config @{}`", file.display()))
            }
            _ => error.into(),
        }
    }

    fn install(&self, config: Option<Arc<ServerConfig>>) {
        if let Some((tls, config)) = self.tls.as_ref().zip(config) {
            tls.install(config);
        }
    }
}

fn read_module_config(path: &Path) -> anyhow::Result<Arc<[u8]>> {
    let context = || format!("cannot use `--module-config @{}`", path.display());
    let json = files::read(path, SettingLimits::MODULE_CONFIG as u64).with_context(context)?;
    checked_module_config(&json).map_err(|error| anyhow!(error)).with_context(context)
}
