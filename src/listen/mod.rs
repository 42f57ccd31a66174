//! The addresses that the agent serves: the Unix socket, gRPC, and HTTP for operators.
//!
//! ```no_run
//! # async fn example(agent: std::sync::Arc<zentinel_wasm_engine::Agent>) -> anyhow::Result<()> {
//! use zentinel_agent_wasm::listen::unix::SocketServer;
//! use zentinel_wasm_protocol::{Stage, Timeouts};
//!
//! let stage = tokio::sync::watch::Sender::new(Stage::Serving);
//! let server = SocketServer::bind("/tmp/agent.sock".as_ref(), Some(0o600))?;
//! let served = server.serve(agent, stage.subscribe(), Timeouts::default())?;
//! // Stops accepting connections and ends once those that are open have ended.
//! stage.send_replace(Stage::Draining);
//! served.await;
//! # Ok(())
//! # }
//! ```

mod accept;
pub mod admin;
pub mod grpc;
mod socket_file;
pub mod tls;
pub mod unix;
