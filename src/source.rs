//! The files that the agent reads at start and again on each reload.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, anyhow};
use tokio_rustls::rustls::ServerConfig;
use zentinel_wasm_runtime::{Cache, Module, Runtime, StartError};

use crate::files;
use crate::listen::tls::Tls;
use crate::logging;
use zentinel_wasm_engine::agent::{Agent, ReloadError};
use zentinel_wasm_engine::settings::{Limits, Settings, checked_module_config};

/// The files, and what is known of them beforehand.
#[derive(Clone)]
pub struct Source {
    /// The module.
    pub module: PathBuf,
    /// The SHA-256 that it must have.
    pub sha256: Option<String>,
    /// What `on_configure` is handed, if that lies in a file.
    pub module_config: Option<PathBuf>,
    /// Certificate, key and client CA of the gRPC address.
    pub tls: Option<Tls>,
}

/// What was in the files, all of it checked as far as that is possible without running the module.
pub(crate) struct Contents {
    pub(crate) module: Arc<Module>,
    pub(crate) module_config: Option<Arc<[u8]>>,
    pub(crate) tls: Option<Arc<ServerConfig>>,
}

impl Source {
    /// Every file, in the order in which they are read.
    pub fn files(&self) -> Vec<PathBuf> {
        let mut files = vec![self.module.clone()];
        files.extend(self.module_config.clone());
        if let Some(tls) = &self.tls {
            files.extend(tls.files().paths().map(Path::to_owned));
        }
        files
    }

    /// Reads every file. This blocks.
    ///
    /// # Errors
    ///
    /// One of them cannot be used: its name and why.
    pub(crate) fn read(&self) -> anyhow::Result<Contents> {
        let module = Module::read(&self.module, self.sha256.as_deref())?;
        let module_config = self.module_config.as_deref().map(read_module_config).transpose()?;
        let tls = self.tls.as_ref().map(Tls::read).transpose()?;
        Ok(Contents { module: Arc::new(module), module_config, tls })
    }

    /// Reads every file, off the async workers.
    ///
    /// # Errors
    ///
    /// As for [`read`](Self::read).
    pub(crate) async fn read_blocking(&self) -> anyhow::Result<Contents> {
        let source = self.clone();
        tokio::task::spawn_blocking(move || source.read()).await?
    }

    /// Adds to `error` the file that is at fault, when the module has rejected its configuration:
    /// the error names the module's.
    pub(crate) fn blame(&self, error: StartError) -> anyhow::Error {
        match (&self.module_config, &error) {
            (Some(file), StartError::Rejected { .. }) => {
                anyhow::Error::from(error).context(format!("cannot use `--module-config @{}`", file.display()))
            }
            _ => error.into(),
        }
    }

    /// Starts an agent from the files. `settings` are those of the command line.
    ///
    /// # Errors
    ///
    /// One of the files cannot be used: one message with everything that is wrong.
    pub async fn start(&self, runtime: Runtime, settings: Settings, cache: Option<Cache>) -> anyhow::Result<Arc<Agent>> {
        let Contents { module, module_config, tls } = self.read_blocking().await?;
        let settings = settings.with_module_config(module_config);
        let agent = Agent::start(runtime, module, settings, cache, logging::metrics()).await.map_err(|error| self.blame(error))?;
        self.install(tls);
        Ok(agent)
    }

    /// Reads every file again and serves what is in them from now on. What is in flight ends on the
    /// old module, and connections keep the TLS configuration that they began with.
    ///
    /// # Errors
    ///
    /// One of the files cannot be used. Nothing changes then, and health is degraded until a reload
    /// succeeds.
    pub async fn reload(&self, agent: &Agent) -> anyhow::Result<()> {
        let result = self.reload_into(agent).await;
        agent.reloaded(result.as_ref().err().map(|error| format!("{error:#}")));
        result
    }

    async fn reload_into(&self, agent: &Agent) -> anyhow::Result<()> {
        let Contents { module, module_config, tls } = self.read_blocking().await?;
        agent.reload(module, module_config).await.map_err(|error| match error {
            ReloadError::Start(error) => self.blame(error),
            error @ ReloadError::Settings(_) => error.into(),
        })?;
        self.install(tls);
        Ok(())
    }

    fn install(&self, config: Option<Arc<ServerConfig>>) {
        if let Some((tls, config)) = self.tls.as_ref().zip(config) {
            tls.install(config);
        }
    }
}

fn read_module_config(path: &Path) -> anyhow::Result<Arc<[u8]>> {
    let context = || format!("cannot use `--module-config @{}`", path.display());
    let json = files::read(path, Limits::MODULE_CONFIG as u64).with_context(context)?;
    checked_module_config(&json).map_err(|error| anyhow!(error)).with_context(context)
}
