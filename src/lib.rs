//! The Zentinel WebAssembly agent: everything of the binary except its `main`.
//!
//! * [`cli::Invocation`] reads the command line, [`cli::Cli`] has the options of serving;
//! * [`source::Source`] reads the files that they name, and starts an agent from them;
//! * [`listen`] accepts connections on the Unix socket, the gRPC address and the HTTP address for
//!   operators. The protocol crate hands their events to the engine crate;
//! * [`lifecycle::Lifecycle`] serves until a signal ends the agent, and reloads the files when they
//!   change;
//! * [`commands`] has what the binary does besides serving;
//! * [`takeover`] hands over to another process;
//! * [`otlp::OtlpOptions`] starts the export of spans and metrics;
//! * [`logging::Log`] writes to standard error without blocking, and
//!   [`decisions::DecisionLog`] a line for each request.
//!
//! An agent can also be served in-process, for example with shorter timeouts in tests:
//!
//! ```no_run
//! # async fn example() -> anyhow::Result<()> {
//! use clap::Parser as _;
//! use tokio::sync::watch;
//! use zentinel_agent_wasm::cli::Cli;
//! use zentinel_agent_wasm::listen::unix::SocketServer;
//! use zentinel_wasm_protocol::{Stage, Timeouts};
//! use zentinel_wasm_runtime::Runtime;
//!
//! let cli = Cli::try_parse_from(["agent", "--module", "policy.wasm", "--socket", "agent.sock"])?;
//! let server = SocketServer::bind(&cli.socket, cli.socket_mode)?;
//! let agent = cli.source(None).start(Runtime::start()?, cli.settings(), None, Vec::new()).await?;
//! let stage = watch::Sender::new(Stage::Serving);
//! let served = tokio::spawn(server.serve(agent, stage.subscribe(), Timeouts::default())?);
//! // Stops accepting connections. The server ends once its connections have ended.
//! stage.send_replace(Stage::Draining);
//! served.await?;
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]
#![deny(missing_docs)]
// The macros panic when standard error or output cannot be written.
#![deny(clippy::print_stderr, clippy::print_stdout)]

pub mod cache;
pub mod cli;
pub mod commands;
pub mod decisions;
mod files;
pub mod lifecycle;
pub mod listen;
pub mod logging;
pub mod otlp;
pub mod process;
mod reload;
pub mod signals;
pub mod source;
mod systemd;
pub mod takeover;
mod tasks;
pub mod watch;
