//! The gRPC address and its connections.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use tracing::{debug, info};
use zentinel_wasm_bounds::log_limited;
use zentinel_wasm_engine::Agent;
use zentinel_wasm_protocol::{Stage, Timeouts, grpc};

use super::accept::{ConnectionContext, Endpoint, serve_endpoint, tcp_listener};
use super::tls::ReloadableTls;

/// A bound address.
pub struct GrpcServer(GrpcEndpoint);

impl GrpcServer {
    /// Binds `address`. Without `tls`, connections are not encrypted.
    ///
    /// # Errors
    ///
    /// The system cannot bind the address.
    pub async fn bind(address: SocketAddr, tls: Option<ReloadableTls>) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(address).await.with_context(|| format!("cannot serve `--grpc-address {address}`"))?;
        Ok(Self(GrpcEndpoint { listener, tls }))
    }

    /// The listener that another process has bound.
    ///
    /// # Errors
    ///
    /// The system does not accept the listener.
    pub(crate) fn adopt(listener: OwnedFd, tls: Option<ReloadableTls>) -> io::Result<Self> {
        Ok(Self(GrpcEndpoint { listener: tcp_listener(listener)?, tls }))
    }

    /// A duplicate of the listener.
    pub(crate) fn listener(&self) -> io::Result<OwnedFd> {
        Ok(rustix::io::fcntl_dupfd_cloexec(&self.0.listener, 0)?)
    }

    /// The bound address, with the port that the system has chosen if the given one was 0.
    ///
    /// # Errors
    ///
    /// The system does not return the address.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.listener.local_addr()
    }

    /// Serves connections until the agent drains, and then until they have ended.
    pub async fn serve(self, agent: Arc<Agent>, stage: watch::Receiver<Stage>, timeouts: Timeouts) {
        if let Ok(address) = self.local_addr() {
            info!(tls = self.0.tls.is_some(), "serving gRPC on {address}");
        }
        serve_endpoint(self.0, ConnectionContext { agent, stage, timeouts }).await;
    }
}

struct GrpcEndpoint {
    listener: TcpListener,
    tls: Option<ReloadableTls>,
}

impl Endpoint for GrpcEndpoint {
    const CONNECTION: &str = "a gRPC connection";

    /// A proxy opens four per agent. Fewer than on the Unix socket, because each may hold a few
    /// messages of the largest size.
    const MAX_CONNECTIONS: usize = 256;

    type Stream = TcpStream;

    /// HTTP/2 connections are drained instead.
    type Paused = Infallible;

    async fn accept(&mut self) -> io::Result<TcpStream> {
        self.listener.accept().await.map(|(stream, _)| stream)
    }

    fn serve(&self, stream: TcpStream, context: ConnectionContext) -> impl Future<Output = Option<Infallible>> + Send + 'static {
        let tls = self.tls.as_ref().map(ReloadableTls::acceptor);
        async move {
            match serve_connection(stream, tls, context).await {
                Ok(()) => debug!("a gRPC connection has ended"),
                Err(error) => log_limited!(warn, "closed a gRPC connection: {error:#}"),
            }
            None
        }
    }

    fn resume(&self, paused: Infallible, _: ConnectionContext) -> impl Future<Output = Option<Infallible>> + Send + 'static {
        std::future::ready(Some(paused))
    }

    async fn close(self) {
        drop(self.listener);
    }
}

async fn serve_connection(stream: TcpStream, tls: Option<TlsAcceptor>, context: ConnectionContext) -> anyhow::Result<()> {
    let ConnectionContext { agent, stage, timeouts } = context;
    // Answers are small, and the proxy waits for them.
    stream.set_nodelay(true)?;
    let Some(tls) = tls else { return Ok(grpc::serve(stream, agent, stage, &timeouts).await?) };
    let stream = match tokio::time::timeout(timeouts.handshake, tls.accept(stream)).await {
        Ok(accepted) => accepted.context("the TLS handshake failed")?,
        Err(_) => bail!("no TLS handshake within {:?}", timeouts.handshake),
    };
    Ok(grpc::serve(stream, agent, stage, &timeouts).await?)
}
