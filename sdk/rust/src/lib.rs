//! Write policies for the Zentinel proxy's Wasm agent in Rust.
//!
//! A policy is a function from an event to a [`Decision`]. [`export!`] makes a module of it:
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
//! Build it as a `cdylib` for `wasm32-unknown-unknown`. Nothing in it needs Wasm to be tested: [`testing`] makes events
//! for `cargo test`.
//!
//! * [`Request`], [`RequestBody`], [`Response`], [`ResponseBody`], [`WebsocketFrame`], [`Guardrail`] and [`Completion`]
//!   are what the hooks are given. They borrow from the agent's JSON.
//! * [`Decision`] and [`Inspection`] are what they answer. A hook may also return an [`Option`], where [`None`] means
//!   no opinion, or a [`Result`], whose error the agent logs and treats as a module error.
//! * [`export!`] also takes a configuration type, which the agent's `--module-config` fills.
//! * The macros of the `log` crate, and every panic message, end up in the agent's log.

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

/// Text of an answer: borrowed where it is known at compile time.
pub type Text = std::borrow::Cow<'static, str>;
