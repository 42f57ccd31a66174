//! The gRPC address: who may connect, and what becomes of connections.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use arc_swap::ArcSwap;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};
use tracing::{debug, info};
use zentinel_wasm_bounds::log_limited;
use zentinel_wasm_protocol::{Stage, Timeouts, grpc};

use crate::listener::drains;
use crate::source;
use crate::tasks::note_end;
use zentinel_wasm_engine::agent::Agent;

/// Connections at once. A proxy opens four per agent; what is more is turned away. Each may hold a few messages of the largest size.
const MAX_CONNECTIONS: usize = 256;

/// Pause after the system has refused a connection, for example because it has no file descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The files of a TLS configuration, all PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The agent's certificate, followed by those that lead to its root.
    pub cert: PathBuf,
    /// The key of that certificate.
    pub key: PathBuf,
    /// Roots of the certificates that clients must show. Without it any client may connect.
    pub client_ca: Option<PathBuf>,
}

impl TlsFiles {
    /// Their paths.
    pub(crate) fn paths(&self) -> impl Iterator<Item = &Path> {
        [&self.cert, &self.key].into_iter().chain(&self.client_ca).map(PathBuf::as_path)
    }
}

/// Largest file of a TLS configuration, in bytes: the roots of all public authorities take a
/// quarter of it.
const MAX_TLS_FILE: u64 = 1 << 20;

/// The TLS configuration of new connections, which a reload replaces. Clones share it.
#[derive(Clone)]
pub struct Tls(Arc<Shared>);

struct Shared {
    files: TlsFiles,
    /// Established connections keep the one that they began with.
    current: ArcSwap<ServerConfig>,
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    ///
    /// A file is not what it should be.
    pub fn open(files: TlsFiles) -> anyhow::Result<Self> {
        let current = ArcSwap::new(server_config(&files)?);
        Ok(Self(Arc::new(Shared { files, current })))
    }

    /// Where it comes from.
    pub(crate) fn files(&self) -> &TlsFiles {
        &self.0.files
    }

    /// Reads the files anew, and changes nothing yet.
    pub(crate) fn read(&self) -> anyhow::Result<Arc<ServerConfig>> {
        server_config(&self.0.files)
    }

    /// Uses `config` for connections from now on.
    pub(crate) fn install(&self, config: Arc<ServerConfig>) {
        self.0.current.store(config);
    }

    fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(self.0.current.load_full())
    }
}

/// A bound address.
pub struct Listener {
    listener: TcpListener,
    tls: Option<Tls>,
}

impl Listener {
    /// Binds the address.
    ///
    /// # Errors
    ///
    /// The system refuses the address.
    pub async fn bind(address: SocketAddr, tls: Option<Tls>) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(address).await.with_context(|| format!("cannot serve `--grpc-address {address}`"))?;
        Ok(Self { listener, tls })
    }

    /// Serves connections until the agent drains, and then until they have ended.
    pub async fn serve(self, agent: Arc<Agent>, mut stage: watch::Receiver<Stage>) {
        let Self { listener, tls } = self;
        if let Ok(address) = listener.local_addr() {
            info!(tls = tls.is_some(), "serving gRPC on {address}");
        }
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut connections = JoinSet::new();
        loop {
            let stream = tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => stream,
                    Err(error) => {
                        log_limited!(warn, "cannot accept a gRPC connection: {error}");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                        continue;
                    }
                },
                Some(ended) = connections.join_next() => {
                    note_end("a gRPC connection", ended);
                    continue;
                }
                () = drains(&mut stage) => break,
            };
            let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else {
                log_limited!(warn, "turned a gRPC connection away: there are {MAX_CONNECTIONS} already");
                continue;
            };
            let (agent, stage, tls) = (Arc::clone(&agent), stage.clone(), tls.as_ref().map(Tls::acceptor));
            connections.spawn(async move {
                let _slot = slot;
                let _connected = agent.metrics().connected();
                match connection(stream, tls, agent, stage).await {
                    Ok(()) => debug!("a gRPC connection has ended"),
                    Err(error) => log_limited!(warn, "closed a gRPC connection: {error:#}"),
                }
            });
        }
        // Nobody comes any more; those who are here may finish.
        drop(listener);
        while let Some(ended) = connections.join_next().await {
            note_end("a gRPC connection", ended);
        }
    }
}

async fn connection(stream: TcpStream, tls: Option<TlsAcceptor>, agent: Arc<Agent>, stage: watch::Receiver<Stage>) -> anyhow::Result<()> {
    // An answer is small, and waited for.
    stream.set_nodelay(true)?;
    let timeouts = Timeouts::default();
    let Some(tls) = tls else { return Ok(grpc::serve(stream, agent, stage, &timeouts).await?) };
    let stream = match tokio::time::timeout(timeouts.handshake, tls.accept(stream)).await {
        Ok(accepted) => accepted.context("the TLS handshake failed")?,
        Err(_) => bail!("the client did not finish its TLS handshake within {:?}", timeouts.handshake),
    };
    Ok(grpc::serve(stream, agent, stage, &timeouts).await?)
}

fn server_config(files: &TlsFiles) -> anyhow::Result<Arc<ServerConfig>> {
    // Named here, for a process may have only one, and a dependency that brings another must not decide.
    let provider = Arc::new(ring::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions()?;
    let builder = match &files.client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for root in certificates("--grpc-client-ca", path)? {
                roots.add(root).with_context(|| format!("cannot use `--grpc-client-ca {}`", path.display()))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
            builder.with_client_cert_verifier(verifier.with_context(|| format!("cannot use `--grpc-client-ca {}`", path.display()))?)
        }
    };
    let chain = certificates("--grpc-tls-cert", &files.cert)?;
    let key_context = || format!("cannot read a private key from `--grpc-tls-key {}`", files.key.display());
    let key = source::read(&files.key, MAX_TLS_FILE).with_context(key_context)?;
    let key = PrivateKeyDer::from_pem_slice(&key).with_context(key_context)?;
    let mut config = builder
        .with_single_cert(chain, key)
        .with_context(|| format!("cannot use `--grpc-tls-cert {}` with `--grpc-tls-key {}`", files.cert.display(), files.key.display()))?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

fn certificates(option: &str, path: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let shown = path.display();
    let context = || format!("cannot read certificates from `{option} {shown}`");
    let pem = source::read(path, MAX_TLS_FILE).with_context(context)?;
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(&pem).collect::<Result<_, _>>().with_context(context)?;
    if certificates.is_empty() {
        bail!("cannot read certificates from `{option} {shown}`: there are none in it");
    }
    Ok(certificates)
}
