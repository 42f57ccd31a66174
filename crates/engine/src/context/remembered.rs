//! What is remembered of one request, and for how long.

use std::sync::Arc;
use std::time::Duration;

use zentinel_wasm_runtime::RequestContext;

use crate::bodies::Length;

/// How long an id is remembered after its last event. No request that a proxy still cares for is silent for so long.
pub(super) const REMEMBERED: Duration = Duration::from_secs(3600);

/// How long a context is kept after its request's last event. Upstreams that take longer are rare, and get no context.
pub(super) const KEPT: Duration = Duration::from_secs(300);

pub(super) const KEPT_SECONDS: u32 = KEPT.as_secs() as u32;
pub(super) const REMEMBERED_SECONDS: u32 = REMEMBERED.as_secs() as u32;

/// What a context takes beside its bytes: the structures, and what the allocator adds to each of its six pieces.
pub(super) const OVERHEAD: usize = size_of::<Remembered>() + 6 * 24;

/// What of a request its later hooks are told, and the logs of them.
#[derive(Debug)]
pub(crate) struct Remembered {
    pub(crate) context: RequestContext,
    pub(crate) traceparent: Option<Arc<str>>,
    /// Whether the upstream knows how long the request's body is.
    pub(crate) length: Length,
    pub(super) id: Arc<str>,
    /// Tells it from other requests of its id.
    pub(super) number: u64,
}

impl Remembered {
    pub(crate) fn new(id: Arc<str>, context: RequestContext, traceparent: Option<Arc<str>>, length: Length) -> Self {
        Self { context, traceparent, length, id, number: 0 }
    }

    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// Memory that it holds, in bytes.
    pub(super) fn size(&self) -> usize {
        self.context.size() + self.id.len() + self.traceparent.as_ref().map_or(0, |text| text.len()) + OVERHEAD
    }
}
