//! The gRPC address: who may connect, and what becomes of connections.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tracing::{debug, info};
use zentinel_wasm_bounds::log_limited;
use zentinel_wasm_protocol::{Stage, Timeouts, grpc};

use super::drains;
use super::tls::Tls;
use crate::tasks::note_end;
use zentinel_wasm_engine::agent::Agent;

/// Connections at once. A proxy opens four per agent; what is more is turned away. Each may hold a few messages of the largest size.
const MAX_CONNECTIONS: usize = 256;

/// Pause after the system has refused a connection, for example because it has no file descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

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
