//! The functions that a module may export to take part in a request.

use std::fmt;

/// An exported function `(ptr: i32, len: i32) -> i64` of a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Hook {
    /// `on_request_headers`: the request line and headers are known.
    RequestHeaders,
    /// `on_request_body`: a chunk of the request body has arrived.
    RequestBody,
    /// `on_response_headers`: the status and headers of the response are known.
    ResponseHeaders,
    /// `on_response_body`: a chunk of the response body has arrived.
    ResponseBody,
    /// `on_websocket_frame`: a frame of an upgraded connection has arrived.
    WebsocketFrame,
    /// `on_guardrail_inspect`: inspect a text for prompt injection or personal data.
    GuardrailInspect,
    /// `on_request_complete`: the request is complete; nothing is left to decide.
    RequestComplete,
    /// `on_configure`: the module's configuration, before the instance takes events.
    Configure,
}

impl Hook {
    /// Every hook, in the order of a request.
    pub const ALL: [Self; 8] = [
        Self::RequestHeaders,
        Self::RequestBody,
        Self::ResponseHeaders,
        Self::ResponseBody,
        Self::WebsocketFrame,
        Self::GuardrailInspect,
        Self::RequestComplete,
        Self::Configure,
    ];

    /// The hooks of which a module must export at least one.
    pub const HANDLERS: [Self; 4] = [Self::RequestHeaders, Self::RequestBody, Self::ResponseHeaders, Self::ResponseBody];

    /// The name of the export.
    pub const fn export(self) -> &'static str {
        match self {
            Self::RequestHeaders => "on_request_headers",
            Self::RequestBody => "on_request_body",
            Self::ResponseHeaders => "on_response_headers",
            Self::ResponseBody => "on_response_body",
            Self::WebsocketFrame => "on_websocket_frame",
            Self::GuardrailInspect => "on_guardrail_inspect",
            Self::RequestComplete => "on_request_complete",
            Self::Configure => "on_configure",
        }
    }
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.export())
    }
}

/// A set of hooks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hooks(u8);

impl Hooks {
    /// Whether `hook` is in the set.
    pub const fn contains(self, hook: Hook) -> bool {
        self.0 & (1 << hook as u8) != 0
    }

    /// Whether any of `hooks` is in the set.
    pub fn contains_any(self, hooks: &[Hook]) -> bool {
        hooks.iter().any(|&hook| self.contains(hook))
    }

    /// The hooks in the set, in the order of a request.
    pub fn iter(self) -> impl Iterator<Item = Hook> {
        Hook::ALL.into_iter().filter(move |&hook| self.contains(hook))
    }
}

impl FromIterator<Hook> for Hooks {
    fn from_iter<I: IntoIterator<Item = Hook>>(hooks: I) -> Self {
        Self(hooks.into_iter().fold(0, |set, hook| set | (1 << hook as u8)))
    }
}
