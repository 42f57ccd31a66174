//! What the agent remembers of one request, and for how long.

use std::sync::Arc;
use std::time::Duration;

use zentinel_wasm_runtime::RequestContext;

use crate::bodies::Length;

/// How long an id is remembered after its last event. Proxies give up on requests that are idle for
/// much less.
pub(super) const REMEMBERED: Duration = Duration::from_secs(3600);

/// How long a context is kept after its request's last event. Upstreams that take longer are rare;
/// their hooks get no context.
pub(super) const KEPT: Duration = Duration::from_secs(300);

pub(super) const KEPT_SECONDS: u32 = KEPT.as_secs() as u32;
pub(super) const REMEMBERED_SECONDS: u32 = REMEMBERED.as_secs() as u32;

/// Memory of a context in addition to its bytes: the structures, and the allocator's overhead for
/// each of its six pieces.
const OVERHEAD: usize = size_of::<Remembered>() + 6 * 24;

/// What later hooks of a request, and their log lines, get to see of it.
#[derive(Debug)]
pub(crate) struct Remembered {
    pub(crate) context: RequestContext,
    pub(crate) traceparent: Option<Arc<str>>,
    /// What the upstream knows about the length of the request's body.
    pub(crate) length: Length,
    pub(super) id: Arc<str>,
    /// Distinguishes it from other requests with its id.
    pub(super) number: u64,
}

impl Remembered {
    pub(crate) fn new(id: Arc<str>, context: RequestContext, traceparent: Option<Arc<str>>, length: Length) -> Self {
        Self { context, traceparent, length, id, number: 0 }
    }

    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// Its memory, in bytes.
    pub(super) fn size(&self) -> usize {
        self.context.size() + self.id.len() + self.traceparent.as_ref().map_or(0, |text| text.len()) + OVERHEAD
    }
}
