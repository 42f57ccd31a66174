//! Which event an answer belongs to.

use zentinel_wasm_contract::{Event, Hook};

/// What the encoding of an answer depends on in its event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Phase {
    /// Hook of the event.
    pub hook: Hook,
    /// Chunk index of a body event; 0 for other events.
    pub chunk_index: u32,
}

impl Phase {
    /// Phase of `event`.
    pub const fn of(event: &Event<'_>) -> Self {
        let chunk_index = match event {
            Event::RequestBody(chunk) | Event::ResponseBody(chunk) => chunk.chunk_index,
            _ => 0,
        };
        Self { hook: event.hook(), chunk_index }
    }

    /// Whether the proxy reads another field than the decision.
    pub(crate) const fn has_own_verdict(self) -> bool {
        matches!(self.hook, Hook::WebsocketFrame | Hook::GuardrailInspect)
    }
}
