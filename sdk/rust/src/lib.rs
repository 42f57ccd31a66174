//! Write policies for the Zentinel proxy's Wasm agent in Rust.
//!
//! A policy is a function from an event to a [`Decision`]. [`export!`] turns it into a module:
//!
//! ```
//! use zentinel_wasm_sdk::{Decision, Request};
//!
//! fn check(request: &Request<'_>) -> Decision {
//!     if request.uri().contains("/admin") {
//!         return Decision::block(403).body("Forbidden").tag("admin");
//!     }
//!     Decision::allow()
//! }
//!
//! zentinel_wasm_sdk::export! {
//!     on_request_headers: check,
//! }
//! ```
//!
//! Build it as a `cdylib` for `wasm32-unknown-unknown`. Policies can be tested without Wasm:
//! [`testing`] builds events for `cargo test`.
//!
//! * Hooks take a [`Request`], [`RequestBody`], [`Response`], [`ResponseBody`], [`WebsocketFrame`],
//!   [`Guardrail`] or [`Completion`]. These borrow from the agent's JSON.
//! * Hooks return a [`Decision`] or an [`Inspection`]. They may also return an [`Option`], where
//!   [`None`] means no opinion, or a [`Result`], whose error the agent logs and treats as a module
//!   error.
//! * [`export!`] also takes a configuration type, which is read from the agent's `--module-config`.
//! * The macros of the `log` crate and all panic messages go to the agent's log.

#![cfg_attr(not(target_family = "wasm"), forbid(unsafe_code))]

mod answer;
mod base64;
mod decision;
mod event;
mod export;
mod guardrail;
pub mod json;
mod logger;
pub mod testing;

pub use answer::IntoAnswer;
pub use decision::Decision;
pub use event::{
    Completion, Direction, Guardrail, Headers, InspectionKind, Opcode, Request, RequestBody, Response, ResponseBody, WebsocketFrame,
};
pub use guardrail::{Detection, Inspection, Severity};
pub use logger::{Level, log};

#[doc(hidden)]
pub use export::runtime as __runtime;

/// Text in an answer: borrowed if it is known at compile time.
pub type Text = std::borrow::Cow<'static, str>;
