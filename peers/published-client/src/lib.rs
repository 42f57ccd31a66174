//! Shared code for the tests of the published client: the built agent as a child process, modules
//! with configurable answers, and events.
//!
//! `ZENTINEL_WASM_AGENT` names the agent's binary; `ZENTINEL_WASM_SECURITY` and `ZENTINEL_WASM_BOT`
//! name the product page's two modules. `cargo xtask test` builds all three and sets them.

pub mod agent;
pub mod events;
pub mod module;
