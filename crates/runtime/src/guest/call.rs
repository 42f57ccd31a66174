//! Events on their way to a guest, and what is remembered of them for later hooks.

use zentinel_wasm_contract::{Event, HeaderCase, Hook};
use zentinel_wasm_guest_json::input;

use super::buffers;

/// An event, as one module should see it.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    /// The event.
    pub event: &'a Event<'a>,
    /// What is remembered of earlier events of its request.
    pub context: Option<&'a RequestContext>,
    /// The case of header names.
    pub header_case: HeaderCase,
    /// Largest body, in bytes.
    pub max_body: usize,
}

/// What is remembered of a request for its later hooks, in the form of the module's kind.
#[derive(Clone, Debug)]
pub enum RequestContext {
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

impl RequestContext {
    /// Its fields, to be carried to another process.
    pub fn fields(&self) -> [&[u8]; 3] {
        match self {
            Self::Json(input::Context { request, brief, response }) => [request, brief, response],
            #[cfg(test)]
            Self::Verdict => [&[]; 3],
        }
    }

    /// The context with these [fields](Self::fields).
    pub fn from_fields([request, brief, response]: [Box<[u8]>; 3]) -> Self {
        Self::Json(input::Context { request, brief, response })
    }

    /// Its memory, in bytes.
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

/// The input of the guest.
#[derive(Debug)]
pub(crate) enum Payload {
    /// A JSON object.
    Json(Vec<u8>),
    #[cfg(test)]
    Verdict,
}

impl Call {
    /// Takes the input out, and leaves an empty one.
    pub fn take(&mut self) -> Self {
        Self { hook: self.hook, payload: std::mem::replace(&mut self.payload, Payload::Json(Vec::new())) }
    }

    /// A call of `hook` with a JSON object.
    pub fn json(hook: Hook, input: Vec<u8>) -> Self {
        Self { hook, payload: Payload::Json(input) }
    }

    /// Keeps the call's buffer for other calls, if the module is not called after all.
    pub fn recycle(self) {
        match self.payload {
            Payload::Json(input) => buffers::keep(input),
            #[cfg(test)]
            Payload::Verdict => {}
        }
    }
}
