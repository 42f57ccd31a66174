//! Kinds of guests. This is the only place where they differ: a kind checks a module's exports,
//! writes an event in the form that its guests take, calls them, and reads their answers. The pool,
//! the deadlines and the host functions are the same for all.
//!
//! ```text
//! Interface::of(module)                at load, once a module
//! Interface::bind(instance)            once an instance
//! Interface::prepare(view) -> Call     once an event, without an instance
//! Functions::call(store, call)         once an event, on an instance
//! Interface::answer(exchange)          once an event, borrowing from the instance
//! ```
//!
//! Kinds are told apart by enums: a call costs no allocation and no dynamic dispatch for it.

mod adapter;
pub(crate) mod buffers;
pub(crate) mod exchange;
mod json;
#[cfg(test)]
pub(crate) mod verdict;

use std::sync::Arc;

use wasmtime::{Engine, Module, Result, Store};
use zentinel_wasm_contract::event::{RequestHeaders, ResponseHeaders};
use zentinel_wasm_contract::{Answer, Event, Failure, HeaderCase, Hook, Hooks};
use zentinel_wasm_guest_json::input;

use crate::host::state::HostState;
use exchange::Exchange;
use json::{JsonFunctions, JsonInterface};

/// An event, as one module is to see it.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    /// The event.
    pub event: &'a Event<'a>,
    /// What is remembered of its request's earlier events.
    pub context: Option<&'a Context>,
    /// How header names are written.
    pub header_case: HeaderCase,
    /// Largest body, in bytes.
    pub max_body: usize,
}

/// What is remembered of a request for its later hooks, in the form of the module's kind.
#[derive(Clone, Debug)]
pub enum Context {
    /// For the JSON interface.
    Json(input::Context),
    #[cfg(test)]
    #[allow(missing_docs, reason = "only tests have this kind")]
    Verdict,
}

/// What is remembered of a response for `on_response_body`.
#[derive(Debug)]
pub enum ResponseContext {
    /// For the JSON interface.
    Json(Box<[u8]>),
    #[cfg(test)]
    #[allow(missing_docs, reason = "only tests have this kind")]
    Verdict,
}

impl Context {
    /// Memory that it holds, in bytes.
    pub fn size(&self) -> usize {
        match self {
            Self::Json(context) => context.size(),
            #[cfg(test)]
            Self::Verdict => 0,
        }
    }

    /// Adds the request's response.
    pub fn set_response(&mut self, response: ResponseContext) {
        match (self, response) {
            (Self::Json(context), ResponseContext::Json(response)) => context.response = response,
            #[cfg(test)]
            _ => {}
        }
    }
}

/// An event that is ready for a module.
#[derive(Debug)]
pub struct Call {
    pub(crate) hook: Hook,
    pub(crate) payload: Payload,
}

/// What the guest is handed.
#[derive(Debug)]
pub(crate) enum Payload {
    /// A JSON object.
    Json(Vec<u8>),
    #[cfg(test)]
    Verdict,
}

impl Call {
    /// A call of `hook` with a JSON object that is written already.
    pub fn json(hook: Hook, input: Vec<u8>) -> Self {
        Self { hook, payload: Payload::Json(input) }
    }

    /// Keeps the call's buffer for another one, if the module is not called after all.
    pub fn recycle(self) {
        match self.payload {
            Payload::Json(input) => buffers::keep(input),
            #[cfg(test)]
            Payload::Verdict => {}
        }
    }
}

/// How the modules of one kind are called; one module's exports among it.
pub(crate) enum Interface {
    Json(JsonInterface),
    #[cfg(test)]
    Verdict(verdict::VerdictInterface),
}

impl Interface {
    /// Finds the module's kind and checks its exports. Problems go to `problems`, for the module's
    /// author; there are some whenever the result is `None`.
    pub(crate) fn of(engine: &Engine, module: &Module, max_memory: usize, problems: &mut Vec<String>) -> Option<Self> {
        #[cfg(test)]
        if let Some(interface) = verdict::VerdictInterface::of(module) {
            return Some(Self::Verdict(interface));
        }
        JsonInterface::of(engine, module, max_memory, problems).map(Self::Json)
    }

    /// The hooks that the module takes.
    pub(crate) fn hooks(&self) -> Hooks {
        match self {
            Self::Json(interface) => interface.hooks(),
            #[cfg(test)]
            Self::Verdict(_) => verdict::HOOKS.into_iter().collect(),
        }
    }

    /// An exchange for an instance.
    pub(crate) fn exchange(&self) -> Exchange {
        match self {
            Self::Json(_) => Exchange::default(),
            #[cfg(test)]
            Self::Verdict(_) => Exchange::Verdict(0),
        }
    }

    /// The functions of an instance.
    pub(crate) async fn bind(&self, store: &mut Store<HostState>, instance: &wasmtime::Instance) -> Result<Functions> {
        match self {
            Self::Json(interface) => interface.bind(store, instance).await.map(Functions::Json),
            #[cfg(test)]
            Self::Verdict(interface) => interface.bind(store, instance).map(Functions::Verdict),
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

    /// What later hooks get to see of a request, whose call was prepared.
    pub(crate) fn request_context(&self, event: &RequestHeaders<'_>, call: &Call) -> Context {
        match (self, &call.payload) {
            (Self::Json(_), Payload::Json(input)) => Context::Json(input::context(event, input)),
            #[cfg(test)]
            _ => Context::Verdict,
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

    /// The call that hands the module its configuration.
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
    pub(crate) fn configured(&self, exchange: &Exchange) -> Result<Option<String>, Failure> {
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
    pub(crate) fn answer<'a>(&self, exchange: &'a Exchange) -> Result<Answer<'a>, Failure> {
        match self {
            Self::Json(_) => json::answer(exchange.json()),
            #[cfg(test)]
            Self::Verdict(_) => verdict::answer(exchange),
        }
    }
}

/// The functions of one instance.
pub(crate) enum Functions {
    Json(JsonFunctions),
    #[cfg(test)]
    Verdict(verdict::VerdictFunction),
}

impl Functions {
    /// Calls the guest. A failure of the host's own is left in the store's state, as for any trap.
    ///
    /// # Errors
    ///
    /// The guest has trapped, or what cannot even be tried.
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
