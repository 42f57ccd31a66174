//! Kinds of guests. They differ only here: a kind checks a module's exports, writes an event in the
//! form that its guests expect, calls them, and reads their answers. The pool, the deadlines and
//! the host functions are the same for all kinds.
//!
//! ```text
//! GuestInterface::of(module)              once per module, at load
//! GuestInterface::bind(instance)          once per instance
//! GuestInterface::prepare(view) -> Call   once per event, without an instance
//! GuestFunctions::call(store, call)       once per event, on an instance
//! GuestInterface::answer(exchange)        once per event, borrowing from the instance
//! ```
//!
//! Kinds are variants of enums, so a call costs no allocation and no dynamic dispatch.

mod adapter;
pub(crate) mod buffers;
mod call;
pub(crate) mod exchange;
mod json;
#[cfg(test)]
pub(crate) mod verdict;

use std::sync::Arc;

pub use call::{Call, RequestContext, ResponseContext, View};

use wasmtime::{Engine, Module, Result, Store};
use zentinel_wasm_contract::event::{RequestHeaders, ResponseHeaders};
use zentinel_wasm_contract::{Answer, Failure, HeaderCase, Hook, Hooks};
use zentinel_wasm_guest_json::input;

use crate::host::state::HostState;
use call::Payload;
use exchange::GuestExchange;
use json::{JsonFunctions, JsonInterface};

/// The exports of one module, and how modules of its kind are called.
pub(crate) enum GuestInterface {
    Json(JsonInterface),
    #[cfg(test)]
    Verdict(verdict::VerdictInterface),
}

impl GuestInterface {
    /// Finds the module's kind and checks its exports. Adds problems to `problems`, for the
    /// module's author; there is at least one if the result is `None`.
    pub(crate) fn of(engine: &Engine, module: &Module, max_memory: usize, problems: &mut Vec<String>) -> Option<Self> {
        #[cfg(test)]
        if let Some(interface) = verdict::VerdictInterface::of(module) {
            return Some(Self::Verdict(interface));
        }
        JsonInterface::of(engine, module, max_memory, problems).map(Self::Json)
    }

    /// The hooks that the module exports.
    pub(crate) fn hooks(&self) -> Hooks {
        match self {
            Self::Json(interface) => interface.hooks(),
            #[cfg(test)]
            Self::Verdict(_) => verdict::HOOKS.into_iter().collect(),
        }
    }

    /// Creates the exchange of an instance.
    pub(crate) fn exchange(&self) -> GuestExchange {
        match self {
            Self::Json(_) => GuestExchange::default(),
            #[cfg(test)]
            Self::Verdict(_) => GuestExchange::Verdict(0),
        }
    }

    /// Binds the functions of an instance.
    pub(crate) async fn bind(&self, store: &mut Store<HostState>, instance: &wasmtime::Instance) -> Result<GuestFunctions> {
        match self {
            Self::Json(interface) => interface.bind(store, instance).await.map(GuestFunctions::Json),
            #[cfg(test)]
            Self::Verdict(interface) => interface.bind(store, instance).map(GuestFunctions::Verdict),
        }
    }

    /// Writes an event for the module.
    ///
    /// # Errors
    ///
    /// The body is over the limit or invalid base64.
    pub(crate) fn prepare(&self, view: &View<'_>) -> Result<Call, Failure> {
        let payload = match self {
            Self::Json(_) => Payload::Json(json::prepare(view)?),
            #[cfg(test)]
            Self::Verdict(_) => Payload::Verdict,
        };
        Ok(Call { hook: view.event.hook(), payload })
    }

    /// What later hooks get to see of a request. `call` is its prepared call.
    pub(crate) fn request_context(&self, event: &RequestHeaders<'_>, call: &Call) -> RequestContext {
        match (self, &call.payload) {
            (Self::Json(_), Payload::Json(input)) => RequestContext::Json(input::context(event, input)),
            #[cfg(test)]
            _ => RequestContext::Verdict,
        }
    }

    /// What `on_response_body` gets to see of a response.
    pub(crate) fn response_context(&self, event: &ResponseHeaders<'_>, case: HeaderCase) -> ResponseContext {
        match self {
            Self::Json(_) => ResponseContext::Json(input::response_context(event, case)),
            #[cfg(test)]
            Self::Verdict(_) => ResponseContext::Verdict,
        }
    }

    /// The call that passes the configuration to the module.
    pub(crate) fn configuration(&self, config: &Arc<[u8]>) -> Call {
        match self {
            Self::Json(_) => Call::json(Hook::Configure, config.to_vec()),
            #[cfg(test)]
            Self::Verdict(_) => Call { hook: Hook::Configure, payload: Payload::Verdict },
        }
    }

    /// Why the module rejects its configuration, if it does.
    ///
    /// # Errors
    ///
    /// Its answer is invalid.
    pub(crate) fn configured(&self, exchange: &GuestExchange) -> Result<Option<String>, Failure> {
        match self {
            Self::Json(_) => json::configured(exchange.json()),
            #[cfg(test)]
            Self::Verdict(_) => Ok(None),
        }
    }

    /// Reads the answer of the last call.
    ///
    /// # Errors
    ///
    /// It breaks a rule of the contract.
    pub(crate) fn answer<'a>(&self, exchange: &'a GuestExchange) -> Result<Answer<'a>, Failure> {
        match self {
            Self::Json(_) => json::answer(exchange.json()),
            #[cfg(test)]
            Self::Verdict(_) => verdict::answer(exchange),
        }
    }
}

/// The functions of one instance.
#[cfg_attr(test, expect(clippy::large_enum_variant, reason = "only tests have a small variant"))]
pub(crate) enum GuestFunctions {
    Json(JsonFunctions),
    #[cfg(test)]
    Verdict(verdict::VerdictFunction),
}

impl GuestFunctions {
    /// Calls the guest. If a host function ended the call, the reason is in the store's state.
    ///
    /// # Errors
    ///
    /// The guest trapped, or the call is impossible.
    pub(crate) async fn call(&self, store: &mut Store<HostState>, call: Call) -> Result<()> {
        match (self, call.payload) {
            (Self::Json(functions), Payload::Json(input)) => functions.call(store, call.hook, input).await,
            #[cfg(test)]
            (Self::Verdict(function), _) => function.call(store).await,
            #[cfg(test)]
            (Self::Json(_), Payload::Verdict) => unreachable!("the call was prepared for another module"),
        }
    }
}
