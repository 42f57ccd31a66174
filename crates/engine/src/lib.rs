//! Decides about a proxy's events by a Wasm module. Knows neither sockets nor signals.
//!
//! * [`Agent`]: takes events through [`Handler`](zentinel_wasm_contract::Handler) and answers them
//!   through [`Encode`](zentinel_wasm_contract::Encode), which a transport implements;
//! * [`Settings`]: how the module is run, from the command line and from the proxy;
//! * [`Metrics`]: what the agent counts;
//! * [`Observer`]: is given the [`Outcome`] of every event.
//!
//! ```
//! use std::sync::Arc;
//! use std::time::Duration;
//!
//! use zentinel_wasm_contract::{Answer, Arrival, Decision, Encode, Event, Failure, Handler, HeaderCase};
//! use zentinel_wasm_engine::{Agent, BreakerLimits, Metrics, Settings};
//! use zentinel_wasm_runtime::{Isolation, Module, Runtime};
//!
//! /// A transport that returns answers unchanged.
//! #[derive(Clone)]
//! struct Unchanged(Arc<str>);
//!
//! impl Encode for Unchanged {
//!     type Encoded = Answer<'static>;
//!
//!     fn correlation_id(&self) -> &Arc<str> {
//!         &self.0
//!     }
//!
//!     fn encode(&self, answer: &Answer<'_>) -> Result<Answer<'static>, Failure> {
//!         Ok(answer.clone().into_owned())
//!     }
//! }
//!
//! # #[tokio::main]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // A module that blocks every request.
//! let wat = r#"(module
//!     (memory (export "memory") 1)
//!     (data (i32.const 64) "{\"decision\":\"block\"}")
//!     (func (export "alloc") (param i32) (result i32) i32.const 1024)
//!     (func (export "dealloc") (param i32 i32))
//!     (func (export "on_request_headers") (param i32 i32) (result i64) i64.const 0x40_00000014))"#;
//! let module = Arc::new(Module::from_bytes("block.wasm", wat::parse_str(wat)?, None)?);
//! let settings = Settings {
//!     pool_size: 1,
//!     fail_open: false,
//!     timeout: Duration::from_secs(5),
//!     max_memory_mb: 1,
//!     isolation: Isolation::Pooled,
//!     module_config: None,
//!     max_body: 1 << 20,
//!     collect_request_body: false,
//!     max_output: 4096,
//!     header_case: HeaderCase::Canonical,
//!     start_timeout: Duration::from_secs(5),
//!     breaker: BreakerLimits::default(),
//! };
//! let agent = Agent::start(Runtime::start()?, module, settings, None, Metrics::new(), Vec::new()).await?;
//!
//! let event = Event::RequestHeaders(serde_json::from_str(
//!     r#"{"metadata": {"correlation_id": "1"}, "method": "GET", "uri": "/", "headers": {}}"#,
//! )?);
//! let answer = agent.handle(&event, Arrival::Alone, Unchanged(Arc::from("1"))).await;
//! assert!(matches!(answer.decision, Decision::Block(_)));
//! # Ok(())
//! # }
//! ```
//!
//! The way of an event: `prepare` looks up what `context` remembers of its request, or collects its
//! body in `collect`; `policy` calls the module; `reply` reads the answer, and `bodies` checks that
//! the proxy applies its changes to a body. `generation` swaps the policy.

#![forbid(unsafe_code)]
#![deny(missing_docs)]
// Printing panics if standard error or output cannot be written.
#![deny(clippy::print_stderr, clippy::print_stdout)]

mod agent;
mod bodies;
mod breaker;
mod carried;
mod collect;
mod context;
mod generation;
mod health;
mod ids;
mod metrics;
mod outcome;
mod policy;
mod prepare;
mod reply;
mod settings;

pub use agent::Agent;
pub use carried::{LiveRequests, OtherHash};
pub use generation::ReloadError;
pub use metrics::Metrics;
pub use outcome::{AnswerSummary, DecisionKind, Observer, Outcome, RequestLine};
pub use settings::{SettingLimits, Settings, checked_module_config};
pub use zentinel_wasm_breaker::BreakerLimits;
