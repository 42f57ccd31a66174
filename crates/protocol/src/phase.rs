//! What an answer depends on besides the decision: the event that it answers.

use zentinel_wasm_contract::{Event, Hook};

/// What an answer must know of its event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Phase {
    /// The hook of the event.
    pub hook: Hook,
    /// The chunk of a body event.
    pub chunk_index: u32,
}

impl Phase {
    /// The phase of `event`.
    pub const fn of(event: &Event<'_>) -> Self {
        let chunk_index = match event {
            Event::RequestBody(chunk) | Event::ResponseBody(chunk) => chunk.chunk_index,
            _ => 0,
        };
        Self { hook: event.hook(), chunk_index }
    }

    /// Whether the proxy looks at something else than the decision.
    pub(crate) const fn says_more(self) -> bool {
        matches!(self.hook, Hook::WebsocketFrame | Hook::GuardrailInspect)
    }
}
