//! Contexts and ids on their way to another process.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use zentinel_wasm_runtime::RequestContext;

use super::filter::CarriedFilter;
use super::remembered::Remembered;
use super::table::{Entry, IdState, IdTable, Index, MAX_BYTES, MAX_IDS};
use crate::bodies::Length;

/// All ids that are remembered, and their contexts.
#[derive(Serialize, Deserialize)]
pub(crate) struct CarriedContexts {
    /// The secret of the keys.
    pub(super) secret: [u64; 2],
    /// The time, in seconds as in the entries.
    pub(super) now: u32,
    /// Number of requests that have begun.
    begun: u64,
    /// By state, each least recently used first.
    lists: [Vec<CarriedId>; 3],
    /// Evicted ids: of requests that may be live, and of those that have ended.
    filters: [CarriedFilter; 2],
}

#[derive(Serialize, Deserialize)]
struct CarriedId {
    key: u64,
    last_used: u32,
    body_open: bool,
    context: Option<CarriedContext>,
}

#[derive(Serialize, Deserialize)]
struct CarriedContext {
    id: String,
    number: u64,
    traceparent: Option<String>,
    length: Length,
    fields: [Box<[u8]>; 3],
}

impl CarriedContexts {
    pub(super) fn of(table: &IdTable, secret: [u64; 2], now: u32) -> Self {
        let list = |state: IdState| {
            let end = state as Index;
            let next = |at: &Index| Some(table.entries[*at as usize].next).filter(|at| *at != end);
            let first = next(&end);
            std::iter::successors(first, next).map(|at| CarriedId::of(&table.entries[at as usize])).collect()
        };
        Self { secret, now, begun: table.begun, lists: IdState::ALL.map(list), filters: [table.live.carry(), table.bodies.carry()] }
    }

    /// Fills an empty table.
    pub(super) fn fill(self, table: &mut IdTable) {
        let Self { begun, lists, filters: [live, bodies], .. } = self;
        table.begun = begun;
        table.live.adopt(live);
        table.bodies.adopt(bodies);
        for (state, list) in IdState::ALL.into_iter().zip(lists) {
            for CarriedId { key, last_used, body_open, context } in list {
                if table.len == MAX_IDS || table.find(key).is_some() {
                    continue;
                }
                let remembered = context.map(|context| Arc::new(context.into_remembered()));
                let fits = remembered.as_ref().is_some_and(|remembered| table.bytes + remembered.size() <= MAX_BYTES);
                let (state, remembered) = match state {
                    IdState::Known if fits => (state, remembered),
                    IdState::Known | IdState::Withheld => (IdState::Withheld, None),
                    IdState::Ended => (state, None),
                };
                table.insert_as(state, key, remembered, body_open, last_used);
            }
        }
    }
}

impl CarriedId {
    fn of(entry: &Entry) -> Self {
        let Entry { key, last_used, body_open, .. } = *entry;
        Self { key, last_used, body_open, context: entry.remembered.as_deref().map(CarriedContext::of) }
    }
}

impl CarriedContext {
    fn of(remembered: &Remembered) -> Self {
        let Remembered { context, traceparent, length, id, number } = remembered;
        Self {
            id: id.as_ref().to_owned(),
            number: *number,
            traceparent: traceparent.as_deref().map(str::to_owned),
            length: *length,
            fields: context.fields().map(Box::from),
        }
    }

    fn into_remembered(self) -> Remembered {
        Remembered {
            context: RequestContext::from_fields(self.fields),
            traceparent: self.traceparent.map(Arc::from),
            length: self.length,
            id: Arc::from(self.id),
            number: self.number,
        }
    }
}
