//! The input and the answer of one call. Each kind of guest has its own type.

use super::buffers;

/// Largest buffer for answers that an instance keeps between calls, in bytes: far more than most
/// answers need, and little compared with an instance's memory.
pub(crate) const MAX_KEPT_OUTPUT: usize = 64 << 10;

/// The exchange of one instance.
pub(crate) enum GuestExchange {
    Json(JsonExchange),
    #[cfg(test)]
    Verdict(i32),
}

impl Default for GuestExchange {
    fn default() -> Self {
        Self::Json(JsonExchange::default())
    }
}

/// The buffers of the JSON interface.
#[derive(Default)]
pub(crate) struct JsonExchange {
    /// The object for the hook.
    pub(crate) input: Vec<u8>,
    /// The object that the hook returned.
    pub(crate) output: Vec<u8>,
}

impl GuestExchange {
    /// The guest's answer, for kinds whose answers are bytes.
    pub(crate) fn output(&self) -> &[u8] {
        match self {
            Self::Json(exchange) => &exchange.output,
            #[cfg(test)]
            Self::Verdict(_) => &[],
        }
    }

    /// Keeps the buffer of the last call's input for other calls on this thread.
    pub(crate) fn recycle_input(&mut self) {
        match self {
            Self::Json(exchange) => buffers::keep(std::mem::take(&mut exchange.input)),
            #[cfg(test)]
            Self::Verdict(_) => {}
        }
    }

    /// Frees large buffers of the last call: an idle instance must hold little memory.
    pub(crate) fn shrink(&mut self) {
        match self {
            Self::Json(exchange) => {
                exchange.input = Vec::new();
                if exchange.output.capacity() > MAX_KEPT_OUTPUT {
                    exchange.output = Vec::new();
                }
            }
            #[cfg(test)]
            Self::Verdict(_) => {}
        }
    }

    /// The buffers of the JSON interface.
    pub(crate) fn json(&self) -> &JsonExchange {
        match self {
            Self::Json(exchange) => exchange,
            #[cfg(test)]
            Self::Verdict(_) => unreachable!("the guest is of another kind"),
        }
    }

    /// The buffers of the JSON interface, for writing.
    pub(crate) fn json_mut(&mut self) -> &mut JsonExchange {
        match self {
            Self::Json(exchange) => exchange,
            #[cfg(test)]
            Self::Verdict(_) => unreachable!("the guest is of another kind"),
        }
    }
}
