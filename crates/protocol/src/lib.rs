//! The agent's side of the Zentinel agent protocol, version 2.
//!
//! * [`socket::serve`] and [`grpc::serve`] each serve one connection of a proxy. They decode
//!   events, run all events of a connection concurrently, and write the answers.
//! * A [`Handler`](zentinel_wasm_contract::Handler) decides. It receives an event that borrows from
//!   the received bytes and writes its answer through the transport's encoder, [`SocketEncoder`]
//!   for the socket.
//! * [`Stage`] is how far the agent has shut down: connections end when they are idle.
//! * [`Timeouts`] bound how long a client may keep the agent waiting.
//!
//! A handler that allows every event, and a client that agrees on the protocol with it:
//!
//! ```
//! use std::sync::Arc;
//!
//! use serde_json::{Value, json};
//! use tokio::io::{AsyncReadExt, AsyncWriteExt};
//! use tokio::net::UnixStream;
//! use tokio::sync::watch;
//! use zentinel_wasm_contract::report::Reports;
//! use zentinel_wasm_contract::{Answer, Arrival, Capabilities, Encode, Event, Failure, Handler, Hook};
//! use zentinel_wasm_protocol::socket::{self, frame};
//! use zentinel_wasm_protocol::{Stage, Timeouts};
//!
//! struct AllowAll(watch::Sender<Arc<Reports>>);
//!
//! impl Handler for AllowAll {
//!     fn capabilities(&self) -> Capabilities {
//!         Capabilities { hooks: [Hook::RequestHeaders].into_iter().collect(), max_body: 1 << 20 }
//!     }
//!
//!     fn handle<E: Encode>(
//!         self: &Arc<Self>,
//!         _: &Event<'_>,
//!         _: Arrival,
//!         encode: E,
//!     ) -> impl Future<Output = E::Encoded> + Send + 'static {
//!         std::future::ready(encode.encode(&Answer::default()).unwrap())
//!     }
//!
//!     fn reject<E: Encode>(self: &Arc<Self>, _: Hook, _: Failure, encode: E) -> E::Encoded {
//!         encode.encode(&Answer::default()).unwrap()
//!     }
//!
//!     fn configure(
//!         self: &Arc<Self>,
//!         _: Value,
//!     ) -> impl Future<Output = Result<(), String>> + Send + 'static {
//!         std::future::ready(Ok(()))
//!     }
//!
//!     fn reports(&self) -> watch::Receiver<Arc<Reports>> {
//!         self.0.subscribe()
//!     }
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let (mut client, server) = UnixStream::pair()?;
//! let stage = watch::Sender::new(Stage::Serving);
//! let handler = Arc::new(AllowAll(watch::Sender::default()));
//! let served = tokio::spawn(socket::serve(server, handler, stage.subscribe(), &Timeouts::default()));
//!
//! let request = json!({"supported_versions": [2], "proxy_id": "proxy", "proxy_version": "0.6.54"});
//! let mut framed = Vec::new();
//! frame::append(&mut framed, frame::kind::HANDSHAKE_REQUEST, |out| out.extend(request.to_string().bytes()));
//! client.write_all(&framed).await?;
//!
//! let mut header = [0; frame::HEADER];
//! client.read_exact(&mut header).await?;
//! assert_eq!(header[4], frame::kind::HANDSHAKE_RESPONSE);
//!
//! // The connection is idle, so it ends as soon as the agent closes.
//! stage.send_replace(Stage::Closing);
//! served.await??;
//! # Ok(())
//! # }
//! ```
//!
//! [`SocketEncoder`]: socket::SocketEncoder

#![forbid(unsafe_code)]
#![deny(missing_docs)]
#![deny(clippy::print_stderr, clippy::print_stdout)]

#[cfg(test)]
mod allow_all;
mod config;
pub mod grpc;
mod guardrail;
mod handshake;
mod limits;
mod phase;
mod proxy;
mod report;
mod session;
pub mod socket;
mod stage;

pub use limits::{MAX_FRAME, Timeouts};
pub use phase::Phase;
pub use proxy::Proxy;
pub use stage::Stage;
