//! The TLS configuration of the gRPC address.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, bail};
use arc_swap::ArcSwap;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};

use crate::files;

/// Largest file of a TLS configuration, in bytes: four times what the roots of all public
/// authorities take.
const MAX_TLS_FILE: u64 = 1 << 20;

/// The files of a TLS configuration, all PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The agent's certificate, followed by the intermediate certificates up to its root.
    pub cert: PathBuf,
    /// The private key of that certificate.
    pub key: PathBuf,
    /// Root certificates that verify client certificates. Without it any client may connect.
    pub client_ca: Option<PathBuf>,
}

impl TlsFiles {
    /// Their paths.
    pub(crate) fn paths(&self) -> impl Iterator<Item = &Path> {
        [&self.cert, &self.key].into_iter().chain(&self.client_ca).map(PathBuf::as_path)
    }
}

/// The TLS configuration of new connections, which a reload replaces. Clones share it.
#[derive(Clone)]
pub struct ReloadableTls {
    files: Arc<TlsFiles>,
    /// Established connections keep the configuration that they began with.
    current: Arc<ArcSwap<ServerConfig>>,
}

impl ReloadableTls {
    /// Reads the files.
    ///
    /// # Errors
    ///
    /// A file cannot be read, or does not contain what it should.
    pub fn open(files: TlsFiles) -> anyhow::Result<Self> {
        let current = ArcSwap::new(server_config(&files)?);
        Ok(Self { files: Arc::new(files), current: Arc::new(current) })
    }

    /// The files of the configuration.
    pub(crate) fn files(&self) -> &TlsFiles {
        &self.files
    }

    /// Reads the files again without using them yet.
    pub(crate) fn read(&self) -> anyhow::Result<Arc<ServerConfig>> {
        server_config(&self.files)
    }

    /// Uses `config` for connections from now on.
    pub(crate) fn install(&self, config: Arc<ServerConfig>) {
        self.current.store(config);
    }

    pub(super) fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(self.current.load_full())
    }
}

fn server_config(files: &TlsFiles) -> anyhow::Result<Arc<ServerConfig>> {
    // Named explicitly, because the default is one per process and a dependency could set another.
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
    let key = files::read(&files.key, MAX_TLS_FILE).with_context(key_context)?;
    let key = PrivateKeyDer::from_pem_slice(&key).with_context(key_context)?;
    let mut config = builder
        .with_single_cert(chain, key)
        .with_context(|| format!("cannot use `--grpc-tls-cert {}` with `--grpc-tls-key {}`", files.cert.display(), files.key.display()))?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

/// Reads the certificates of a file that `option` names.
pub(crate) fn certificates(option: &str, path: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let shown = path.display();
    let context = || format!("cannot read certificates from `{option} {shown}`");
    let pem = files::read(path, MAX_TLS_FILE).with_context(context)?;
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(&pem).collect::<Result<_, _>>().with_context(context)?;
    if certificates.is_empty() {
        bail!("cannot read certificates from `{option} {shown}`: the file contains none");
    }
    Ok(certificates)
}
