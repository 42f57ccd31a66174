//! Decides about a proxy's events by a Wasm module. It knows neither sockets nor signals: whoever
//! has an event hands it to the agent and gets the answer in the form that it asks for.
//!
//! * [`Agent`] takes events through [`Handler`](zentinel_wasm_contract::Handler) and answers them;
//! * [`Settings`] are how the module is run, from the command line and from the proxy;
//! * [`Metrics`] is what the agent counts.
//!
//! The way of an event: `prepare` looks up what `context` remembers of its request, or puts its
//! body together in `collect`; `policy` calls the module; `reply` reads the answer, and `bodies`
//! checks that the proxy applies it. `generation` swaps the policy.

#![forbid(unsafe_code)]
#![deny(missing_docs)]
// They panic when standard error or output cannot be written.
#![deny(clippy::print_stderr, clippy::print_stdout)]

mod agent;
mod bodies;
mod breaker;
mod collect;
mod context;
mod generation;
mod health;
mod metrics;
mod policy;
mod prepare;
mod reply;
mod settings;

pub use agent::Agent;
pub use generation::ReloadError;
pub use metrics::Metrics;
pub use settings::{SettingLimits, Settings, checked_module_config};
