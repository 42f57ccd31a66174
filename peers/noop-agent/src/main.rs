//! An agent that allows everything, on the published crate's servers: the cost that every agent on
//! them has. Measurements of `zentinel-wasm-agent` are given as ratios to it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use async_trait::async_trait;
use clap::Parser;
use zentinel_agent_protocol::v2::{AgentCapabilities, AgentFeatures, AgentHandlerV2, GrpcAgentServerV2, UdsAgentServerV2};
use zentinel_agent_protocol::{AgentProtocolError, EventType};

/// Serve an agent that allows everything over the Unix socket, gRPC, or both
#[derive(Parser)]
#[command(version)]
#[group(required = true, multiple = true)]
struct Options {
    /// Unix socket to serve; replaces an existing file
    #[arg(long)]
    socket: Option<PathBuf>,
    /// Address to serve gRPC on
    #[arg(long)]
    grpc_address: Option<SocketAddr>,
}

/// Gives the trait's default answer, allow without changes, to every event.
struct Noop;

#[async_trait]
impl AgentHandlerV2 for Noop {
    fn capabilities(&self) -> AgentCapabilities {
        [EventType::RequestHeaders, EventType::RequestBodyChunk, EventType::ResponseHeaders, EventType::ResponseBodyChunk]
            .into_iter()
            .fold(AgentCapabilities::new("noop-agent", "No-op agent", env!("CARGO_PKG_VERSION")), AgentCapabilities::with_event)
            .with_features(AgentFeatures::full())
    }
}

async fn serve(options: Options) -> Result<(), AgentProtocolError> {
    let socket = async {
        match options.socket {
            Some(path) => UdsAgentServerV2::new("noop-agent", path, Box::new(Noop)).run().await,
            None => Ok(()),
        }
    };
    let grpc = async {
        match options.grpc_address {
            Some(address) => GrpcAgentServerV2::new("noop-agent", Box::new(Noop)).run(address).await,
            None => Ok(()),
        }
    };
    tokio::try_join!(socket, grpc).map(|_| ())
}

// The runtime of the crate's own examples: one worker per core.
#[tokio::main]
async fn main() -> ExitCode {
    match serve(Options::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("noop-agent: cannot serve: {error}");
            ExitCode::FAILURE
        }
    }
}
