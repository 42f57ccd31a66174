//! Exports spans and metrics by OTLP over HTTP, in the binary encoding of its messages.
//!
//! * [`SpanQueue`] takes an [`EventSpan`] for each answered event. It is bounded and never waits;
//! * [`Exporter`] sends them and the agent's metrics to an [`Endpoint`], from a thread of its own;
//! * [`TraceParent`] is the trace that a request belongs to.
//!
//! A collector that is dead, slow or silent costs spans, which are counted, and never a request.
//!
//! ```
//! use zentinel_wasm_otlp::{Endpoint, TraceParent};
//!
//! let endpoint: Endpoint = "http://127.0.0.1:4318".parse()?;
//! assert_eq!(endpoint.to_string(), "http://127.0.0.1:4318");
//! let parent = TraceParent::parse("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
//! assert!(parent.is_some_and(|parent| parent.sampled));
//! # Ok::<(), zentinel_wasm_otlp::InvalidOption>(())
//! ```

#![forbid(unsafe_code)]
#![deny(missing_docs)]
// Printing panics if standard error or output cannot be written.
#![deny(clippy::print_stderr, clippy::print_stdout)]

mod client;
mod endpoint;
mod exporter;
mod failures;
mod headers;
mod ids;
mod metrics;
#[doc(hidden)]
pub mod proto;
mod queue;
mod resource;
mod spans;
mod trace_parent;

pub use client::TlsSource;
pub use endpoint::{Endpoint, InvalidOption};
pub use exporter::{Exporter, ExporterConfig, FLUSH_TIMEOUT};
pub use headers::Headers;
pub use queue::{MAX_QUEUED, SpanQueue};
pub use resource::ResourceEnvironment;
pub use spans::EventSpan;
pub use trace_parent::TraceParent;
