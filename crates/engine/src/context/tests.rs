//! Requests that end, share an id, are idle, or exceed the bounds.

use std::time::Duration;

use zentinel_wasm_guest_json::input;
use zentinel_wasm_runtime::RequestContext;

use super::remembered::{KEPT, REMEMBERED};
use super::table::{IdState, Index, MAX_BYTES};
use super::*;
use crate::bodies::Length;

fn about(id: &str, uri: &str) -> Remembered {
    Remembered::new(
        id.into(),
        RequestContext::Json(input::Context { request: uri.as_bytes().into(), ..input::Context::default() }),
        None,
        Length::Open,
    )
}

fn text(known: Option<Arc<Remembered>>) -> Option<String> {
    known.map(|known| {
        let RequestContext::Json(context) = &known.context;
        String::from_utf8(context.request.to_vec()).unwrap()
    })
}

/// The context that a response hook gets.
fn uri(store: &Contexts, id: &str, now: Instant) -> Option<String> {
    text(store.get(id, now))
}

fn store() -> (Contexts, Instant) {
    let store = Contexts::new();
    let started = store.started;
    (store, started)
}

/// Checks the invariants between operations.
fn check(inner: &IdTable) {
    let mut seen = 0;
    let mut bytes = 0;
    for state in IdState::ALL {
        let mut at = inner.entries[state as usize].next;
        let mut before = state as Index;
        while at != state as Index {
            let entry = &inner.entries[at as usize];
            assert_eq!((entry.state, entry.prev), (state, before));
            assert_eq!(entry.remembered.is_some(), state == IdState::Known);
            assert_eq!(inner.find(entry.key), Some(at));
            bytes += entry.remembered.as_ref().map_or(0, |remembered| remembered.size());
            seen += 1;
            (before, at) = (at, entry.next);
        }
        assert_eq!(inner.entries[state as usize].prev, before);
    }
    assert_eq!((inner.len, inner.bytes), (seen, bytes));
    assert!(inner.len <= MAX_IDS && inner.bytes <= MAX_BYTES);
    assert!(inner.entries.len() <= MAX_IDS + IdState::ALL.len(), "the slab has grown beyond what was reserved");
}

/// All operations in any order, on few ids so that states meet.
#[test]
fn lists_and_sums_agree_after_any_operations() {
    let (store, mut now) = store();
    let mut seed = 1_u64;
    let mut random = |bound: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % bound
    };
    let large = "x".repeat(MAX_BYTES / 10);
    for _ in 0..30_000 {
        let id = random(50).to_string();
        match random(11) {
            0..3 => {
                let uri = if random(20) == 0 { &*large } else { "/" };
                store.begin(about(&id, uri), random(2) == 0, now);
            }
            3 => drop(store.get(&id, now)),
            4 => drop(store.get_for_body(&id, random(2) == 0, now)),
            5 => store.respond(&id, ResponseContext::Json(vec![0; random(1000) as usize].into())),
            6 => store.end(&id, now),
            7 => store.refused(&id, random(30_000)),
            8 => store.begin_unknown(&id, now),
            9 => store.unanswered(&id, now),
            _ => now += Duration::from_secs(random(2) * random(400)),
        }
        check(&store.lock());
    }
}

mod requests {
    use super::*;

    #[test]
    fn are_known_until_they_end() {
        let (store, now) = store();
        store.begin(about("a", "/1"), false, now);
        assert_eq!(uri(&store, "a", now).as_deref(), Some("/1"));
        assert_eq!(uri(&store, "b", now), None);
        store.end("a", now);
        assert_eq!(uri(&store, "a", now), None);
        store.begin(about("a", "/2"), false, now);
        assert_eq!(uri(&store, "a", now).as_deref(), Some("/2"));
    }

    #[test]
    fn leave_nothing_behind() {
        let (store, now) = store();
        store.begin(about("long", "/"), false, now);
        for at in 0..10_000 {
            let id = at.to_string();
            store.begin(about(&id, "/"), false, now);
            store.end(&id, now);
        }
        let inner = store.lock();
        assert_eq!((inner.len, inner.entries.len()), (1, IdState::ALL.len() + 2));
        check(&inner);
    }
}

mod shared_ids {
    use super::*;

    #[test]
    fn get_no_context() {
        let (store, now) = store();
        assert!(!store.begin(about("a", "/1"), false, now).collides);
        assert!(store.begin(about("a", "/2"), false, now).collides);
        assert_eq!(uri(&store, "a", now), None);
        // One of them ends and the other is still live, but it is unknown which.
        store.end("a", now);
        assert!(store.begin(about("a", "/3"), false, now).collides);
        assert_eq!(uri(&store, "a", now), None);
        assert_eq!(store.lock().bytes, 0);
    }

    #[test]
    fn include_undecodable_requests() {
        let (store, now) = store();
        store.begin_unknown("a", now);
        assert!(store.begin(about("a", "/1"), false, now).collides);
        store.begin(about("b", "/1"), false, now);
        store.begin_unknown("b", now);
        assert_eq!((uri(&store, "a", now), uri(&store, "b", now)), (None, None));
        check(&store.lock());
    }
}

mod bodies {
    use super::*;

    #[test]
    fn keep_the_id_reserved_while_in_flight() {
        let (store, now) = store();
        store.begin(about("a", "/1"), true, now);
        store.end("a", now);
        assert!(store.begin(about("a", "/2"), false, now).collides);
        assert_eq!(uri(&store, "a", now), None);
    }

    #[test]
    fn free_the_id_if_they_end_last() {
        let (store, now) = store();
        store.begin(about("a", "/1"), true, now);
        store.end("a", now);
        assert!(store.get_for_body("a", false, now).is_none());
        assert_eq!(store.lock().len, 1);
        assert!(store.get_for_body("a", true, now).is_none());
        assert_eq!(store.lock().len, 0);
        store.begin(about("a", "/2"), true, now);
        assert_eq!(text(store.get_for_body("a", true, now)).as_deref(), Some("/2"));
    }

    #[test]
    fn may_end_while_a_call_holds_the_context() {
        let (store, now) = store();
        store.begin(about("a", "/1"), true, now);
        let call = store.get("a", now);
        store.get_for_body("a", true, now);
        drop(call);
        store.end("a", now);
        store.begin(about("a", "/2"), false, now);
        assert_eq!(uri(&store, "a", now).as_deref(), Some("/2"));
    }

    /// As next a proxy that sends no body events.
    #[test]
    fn that_never_come_take_no_context_from_response_hooks() {
        let (store, now) = store();
        let ids: Vec<_> = (0..4 * MAX_IDS).map(|at| at.to_string()).collect();
        for id in &ids {
            assert!(!store.begin(about(id, "/"), true, now).collides);
            assert!(uri(&store, id, now).is_some());
            store.end(id, now);
        }
        check(&store.lock());
    }

    /// The body of an ended request arrives after its id was evicted and used again.
    #[test]
    fn arriving_late_get_no_context_and_end_no_request() {
        let (store, now) = store();
        store.begin(about("late", "/1"), true, now);
        store.end("late", now);
        for at in 0..2 * MAX_IDS {
            let id = at.to_string();
            store.begin(about(&id, "/"), true, now);
            store.end(&id, now);
        }
        assert!(!store.begin(about("late", "/2"), true, now).collides, "it was evicted");
        assert_eq!(uri(&store, "late", now).as_deref(), Some("/2"));
        assert!(store.get_for_body("late", true, now).is_none(), "that may be the body of /1");
        store.end("late", now);
        // The body of /2 has not arrived yet.
        store.begin(about("late", "/3"), true, now);
        assert_eq!(uri(&store, "late", now), None);
        assert!(store.get_for_body("late", true, now).is_none());
        // Bodies of other requests get their contexts.
        let known = (0..1000).map(|at| format!("new-{at}")).filter(|id| {
            store.begin(about(id, "/new"), true, now);
            store.get_for_body(id, true, now).is_some()
        });
        assert!(known.count() > 980);
    }
}

mod refusals {
    use super::*;

    #[test]
    fn end_only_their_own_request() {
        let (store, now) = store();
        let first = store.begin(about("a", "/1"), false, now).number;
        store.end("a", now);
        let second = store.begin(about("a", "/2"), true, now).number;
        store.refused("a", first);
        assert_eq!(uri(&store, "a", now).as_deref(), Some("/2"));
        store.refused("a", second);
        assert_eq!(store.lock().len, 0);
        check(&store.lock());
        // If two share an id, neither is forgotten.
        store.begin(about("a", "/3"), false, now);
        let fourth = store.begin(about("a", "/4"), false, now).number;
        store.refused("a", fourth);
        store.begin(about("a", "/5"), false, now);
        assert_eq!(uri(&store, "a", now), None);
    }

    #[test]
    fn that_were_not_sent_reserve_the_id_again() {
        let (store, now) = store();
        let first = store.begin(about("a", "/1"), false, now).number;
        store.refused("a", first);
        store.unanswered("a", now);
        assert!(store.begin(about("a", "/2"), false, now).collides);
        assert_eq!(uri(&store, "a", now), None);
        // A remembered one keeps its context: the unanswered event may be its own.
        store.begin(about("b", "/1"), false, now);
        store.unanswered("b", now);
        assert_eq!(uri(&store, "b", now).as_deref(), Some("/1"));
        // Idle for so long, it would be forgotten when the next one begins.
        let later = now + REMEMBERED + Duration::from_secs(1);
        store.unanswered("a", later);
        assert!(store.begin(about("a", "/3"), false, later).collides);
        check(&store.lock());
    }
}

mod idle {
    use super::*;

    #[test]
    fn contexts_expire_long_before_ids() {
        let (store, now) = store();
        store.begin(about("a", "/1"), false, now);
        let later = now + KEPT + Duration::from_secs(1);
        store.begin(about("b", "/b"), false, later);
        assert_eq!(uri(&store, "a", later), None);
        store.begin(about("a", "/2"), false, later);
        assert_eq!(uri(&store, "a", later), None);
        let much_later = later + REMEMBERED + Duration::from_secs(1);
        store.begin(about("a", "/3"), false, much_later);
        assert_eq!(uri(&store, "a", much_later).as_deref(), Some("/3"));
    }

    #[test]
    fn ids_expire_while_another_is_busy() {
        let (store, mut now) = store();
        for id in 0..100 {
            store.begin(about(&id.to_string(), "/"), id % 2 == 0, now);
            if id % 4 == 0 {
                store.end(&id.to_string(), now);
            }
        }
        // The first is always in use.
        let end = now + 2 * REMEMBERED;
        while now < end {
            now += KEPT / 2;
            for _ in 0..50 {
                store.begin(about("0", "/"), false, now);
            }
        }
        assert_eq!(store.lock().len, 1);
    }
}

mod bounds {
    use super::*;

    #[test]
    fn hold_for_memory_and_ids_stay_reserved() {
        let (store, now) = store();
        let large = "x".repeat(1 << 20);
        for at in 0..100 {
            store.begin(about(&at.to_string(), &large), false, now);
            assert!(store.lock().bytes <= MAX_BYTES);
        }
        assert_eq!(uri(&store, "0", now), None);
        store.begin(about("0", "/new"), false, now);
        assert_eq!(uri(&store, "0", now), None);
        assert!(uri(&store, "99", now).is_some());
        // A context that leaves no room for others is not stored.
        store.begin(about("huge", &"x".repeat(MAX_BYTES)), false, now);
        assert_eq!(uri(&store, "huge", now), None);
        check(&store.lock());
    }

    #[test]
    fn ids_without_context_do_not_prevent_eviction() {
        let (store, now) = store();
        for at in 0..10_000 {
            store.begin(about(&at.to_string(), "/"), false, now);
            store.begin(about(&at.to_string(), "/"), false, now);
        }
        let large = "x".repeat(MAX_BYTES / 2 - 1000);
        for id in ["a", "b", "c", "d", "e", "f"] {
            store.begin(about(id, &large), false, now);
            assert!(uri(&store, id, now).is_some(), "{id}");
        }
        check(&store.lock());
    }

    /// A client can fill the store with small contexts and then send one that replaces all of them.
    #[test]
    fn a_request_evicts_only_a_few_contexts() {
        let (store, now) = store();
        for at in 0..10_000 {
            store.begin(about(&at.to_string(), &"x".repeat(1000)), false, now);
        }
        store.begin(about("large", &"x".repeat(MAX_BYTES / 2)), false, now);
        assert_eq!(uri(&store, "large", now), None);
        let known = (0..10_000).filter(|at| uri(&store, &at.to_string(), now).is_some()).count();
        assert!(known >= 9900, "{known}");
        check(&store.lock());
    }

    #[test]
    fn include_responses() {
        let (store, now) = store();
        for at in 0..100 {
            store.begin(about(&at.to_string(), "/"), false, now);
        }
        for at in 0..100 {
            store.respond(&at.to_string(), ResponseContext::Json(vec![0; 1 << 20].into()));
            check(&store.lock());
        }
    }

    /// A request whose response never comes stays remembered after its eviction.
    #[test]
    fn evicted_ids_stay_reserved() {
        let (store, now) = store();
        let id = |at: usize| at.to_string();
        for at in 0..2 * MAX_IDS {
            store.begin(about(&id(at), "/"), false, now);
        }
        check(&store.lock());
        // The earlier half, both in the slab and in the filter.
        for at in (0..MAX_IDS).step_by(100) {
            store.begin(about(&id(at), "/other"), false, now);
            assert_eq!(uri(&store, &id(at), now), None, "{at}");
        }
        let known = (0..1000).map(|at| format!("new-{at}")).filter(|id| {
            store.begin(about(id, "/new"), false, now);
            uri(&store, id, now).as_deref() == Some("/new")
        });
        assert!(known.count() > 990);
        // They are remembered for one to two hours.
        let hour = now + REMEMBERED - Duration::from_secs(1);
        store.begin(about(&id(1), "/other"), false, hour);
        assert_eq!(uri(&store, &id(1), hour), None);
        let later = now + 2 * REMEMBERED + Duration::from_secs(2);
        store.begin(about(&id(2), "/later"), false, later);
        assert_eq!(uri(&store, &id(2), later).as_deref(), Some("/later"));
    }
}

mod carried {
    use super::*;

    /// The contexts of the next process, and the time of both.
    fn carry(store: &Contexts, now: Instant) -> (Contexts, Instant) {
        let carried = serde_json::to_string(&store.carry(now)).unwrap();
        let next = Contexts::new();
        assert!(next.adopt(serde_json::from_str(&carried).unwrap()));
        check(&next.lock());
        let now = next.started;
        (next, now)
    }

    #[test]
    fn contexts_are_known_to_the_next_process() {
        let (store, now) = store();
        let first = store.begin(about("a", "/a"), true, now);
        let (next, now) = carry(&store, now + KEPT);
        assert_eq!(uri(&next, "a", now).as_deref(), Some("/a"));
        let second = next.begin(about("b", "/b"), false, now);
        assert!(second.number > first.number);
        next.end("a", now);
        assert_eq!(next.lock().len, 2, "its body is still open");
    }

    #[test]
    fn shared_ids_have_no_context_there_either() {
        let (store, now) = store();
        store.begin(about("a", "/1"), false, now);
        store.begin(about("a", "/2"), false, now);
        store.begin(about("b", "/3"), false, now);
        let (next, now) = carry(&store, now);
        assert_eq!(uri(&next, "a", now), None);
        assert!(next.begin(about("b", "/4"), false, now).collides);
        assert_eq!(uri(&next, "b", now), None);
    }

    #[test]
    fn evicted_ids_have_no_context_there_either() {
        let (store, now) = store();
        for at in 0..MAX_IDS + 10 {
            store.begin(about(&at.to_string(), "/old"), false, now);
        }
        let (next, now) = carry(&store, now);
        for at in 0..10 {
            let id = at.to_string();
            next.begin(about(&id, "/new"), false, now);
            assert_eq!(uri(&next, &id, now), None, "the request of the old process may still get its response");
        }
        next.begin(about("another", "/new"), false, now);
        assert_eq!(uri(&next, "another", now).as_deref(), Some("/new"));
    }

    #[test]
    fn they_expire_as_if_nothing_had_happened() {
        let (store, now) = store();
        store.begin(about("a", "/a"), false, now);
        let (next, now) = carry(&store, now + KEPT / 2);
        let (next, now) = carry(&next, now + KEPT / 2);
        assert_eq!(uri(&next, "a", now + Duration::from_secs(2)), None);
    }
}
