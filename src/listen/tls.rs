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

    pub(super) fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(self.0.current.load_full())
    }
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
    let key = files::read(&files.key, MAX_TLS_FILE).with_context(key_context)?;
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
    let pem = files::read(path, MAX_TLS_FILE).with_context(context)?;
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(&pem).collect::<Result<_, _>>().with_context(context)?;
    if certificates.is_empty() {
        bail!("cannot read certificates from `{option} {shown}`: there are none in it");
    }
    Ok(certificates)
}
