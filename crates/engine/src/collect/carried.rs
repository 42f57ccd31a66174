//! Bodies on their way to another process.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::body::{PartialBody, Progress};
use super::pieces::Pieces;
use super::store::PartialBodies;
use super::tail::Tail;

/// The bodies of some connections, with the bytes that are held of them.
#[derive(Serialize, Deserialize)]
pub(crate) struct CarriedBodies {
    /// The secret of the keys.
    secret: [u64; 2],
    bodies: Vec<CarriedBody>,
}

#[derive(Serialize, Deserialize)]
struct CarriedBody {
    /// Position of its connection.
    connection: usize,
    key: u64,
    number: Option<u64>,
    next: u32,
    received: u64,
    age: Duration,
    idle: Duration,
    progress: CarriedProgress,
}

#[derive(Serialize, Deserialize)]
enum CarriedProgress {
    Held(Vec<u8>, Tail),
    Passing(Tail),
    Broken,
    Ended(usize),
}

impl CarriedBodies {
    pub(super) fn of(store: &PartialBodies, connections: &[u64], now: Instant) -> Self {
        let carried = |((connection, key), body): (&(u64, u64), &PartialBody)| {
            let connection = connections.iter().position(|number| number == connection)?;
            Some(CarriedBody {
                connection,
                key: *key,
                number: body.number,
                next: body.next,
                received: body.received,
                age: now.saturating_duration_since(body.began),
                idle: now.saturating_duration_since(body.touched),
                progress: match &body.state {
                    Progress::Held(pieces, tail) => CarriedProgress::Held(pieces.copied(), *tail),
                    Progress::Passing(tail) => CarriedProgress::Passing(*tail),
                    Progress::Broken => CarriedProgress::Broken,
                    Progress::Ended(size) => CarriedProgress::Ended(*size),
                },
            })
        };
        Self { secret: store.hasher.secret(), bodies: store.bodies.iter().filter_map(carried).collect() }
    }

    /// Adds the bodies to a store. Returns whether that is possible: only if all bodies in it come
    /// from the same process.
    pub(super) fn fill(self, store: &mut PartialBodies, connections: &[u64], now: Instant) -> bool {
        if !store.hasher.adopt(self.secret) {
            return false;
        }
        for carried in self.bodies {
            let Some(connection) = connections.get(carried.connection) else { continue };
            let state = match carried.progress {
                CarriedProgress::Held(bytes, tail) => {
                    let mut pieces = Pieces::default();
                    store.bytes += pieces.push(bytes);
                    Progress::Held(pieces, tail)
                }
                CarriedProgress::Passing(tail) => Progress::Passing(tail),
                CarriedProgress::Broken => Progress::Broken,
                CarriedProgress::Ended(size) => Progress::Ended(size),
            };
            let before = |age| now.checked_sub(age).unwrap_or(now);
            let body = PartialBody {
                number: carried.number,
                next: carried.next,
                received: carried.received,
                state,
                began: before(carried.age),
                touched: before(carried.idle),
            };
            store.bodies.insert((*connection, carried.key), body);
        }
        true
    }
}
