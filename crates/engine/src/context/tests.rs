//! Requests that end, share an id, are silent, or are more than the store has room for.

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

/// What a response hook is told.
fn uri(store: &Contexts, id: &str, now: Instant) -> Option<String> {
    text(store.get(id, now))
}

fn store() -> (Contexts, Instant) {
    let store = Contexts::new();
    let started = store.started;
    (store, started)
}

/// Checks what holds between any two operations.
fn check(inner: &IdTable) {
    let mut seen = 0;
    let mut bytes = 0;
    for state in IdState::ALL {
        let mut at = inner.entries[state as usize].behind;
        let mut before = state as Index;
        while at != state as Index {
            let entry = &inner.entries[at as usize];
            assert_eq!((entry.state, entry.before), (state, before));
            assert_eq!(entry.remembered.is_some(), state == IdState::Known);
            assert_eq!(inner.find(entry.key), Some(at));
            bytes += entry.remembered.as_ref().map_or(0, |remembered| remembered.size());
            seen += 1;
            (before, at) = (at, entry.behind);
        }
        assert_eq!(inner.entries[state as usize].before, before);
    }
    assert_eq!((inner.len, inner.bytes), (seen, bytes));
    assert!(inner.len <= MAX_IDS && inner.bytes <= MAX_BYTES);
    assert!(inner.entries.len() <= MAX_IDS + IdState::ALL.len(), "the slab has grown beyond what was reserved");
}

#[test]
fn a_request_is_known_until_it_ends() {
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
fn two_live_requests_of_one_id_get_nothing_of_each_other() {
    let (store, now) = store();
    assert!(!store.begin(about("a", "/1"), false, now).collides);
    assert!(store.begin(about("a", "/2"), false, now).collides);
    assert_eq!(uri(&store, "a", now), None);
    // One of them ends, the other is still there: nobody knows which.
    store.end("a", now);
    assert!(store.begin(about("a", "/3"), false, now).collides);
    assert_eq!(uri(&store, "a", now), None);
    assert_eq!(store.lock().bytes, 0);
}

#[test]
fn a_request_whose_body_is_under_way_does_not_lend_its_id() {
    let (store, now) = store();
    store.begin(about("a", "/1"), true, now);
    store.end("a", now);
    assert!(store.begin(about("a", "/2"), false, now).collides);
    assert_eq!(uri(&store, "a", now), None);
}

#[test]
fn a_body_that_ends_after_the_response_frees_the_id() {
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
fn the_end_of_a_body_counts_while_its_call_is_under_way() {
    let (store, now) = store();
    store.begin(about("a", "/1"), true, now);
    let call = store.get("a", now);
    store.get_for_body("a", true, now);
    drop(call);
    store.end("a", now);
    store.begin(about("a", "/2"), false, now);
    assert_eq!(uri(&store, "a", now).as_deref(), Some("/2"));
}

#[test]
fn a_refusal_ends_its_own_request_and_no_newer_one() {
    let (store, now) = store();
    let first = store.begin(about("a", "/1"), false, now).number;
    store.end("a", now);
    let second = store.begin(about("a", "/2"), true, now).number;
    store.refused("a", first);
    assert_eq!(uri(&store, "a", now).as_deref(), Some("/2"));
    store.refused("a", second);
    assert_eq!(store.lock().len, 0);
    check(&store.lock());
    // Of two that share an id, none is forgotten.
    store.begin(about("a", "/3"), false, now);
    let fourth = store.begin(about("a", "/4"), false, now).number;
    store.refused("a", fourth);
    store.begin(about("a", "/5"), false, now);
    assert_eq!(uri(&store, "a", now), None);
}

#[test]
fn a_refusal_that_was_not_sent_reserves_the_id_again() {
    let (store, now) = store();
    let first = store.begin(about("a", "/1"), false, now).number;
    store.refused("a", first);
    store.unanswered("a", now);
    assert!(store.begin(about("a", "/2"), false, now).collides);
    assert_eq!(uri(&store, "a", now), None);
    // One that is remembered keeps its context: the event that was not answered may be its own.
    store.begin(about("b", "/1"), false, now);
    store.unanswered("b", now);
    assert_eq!(uri(&store, "b", now).as_deref(), Some("/1"));
    // Silent for so long, it would be forgotten by the next that begins.
    let later = now + REMEMBERED + Duration::from_secs(1);
    store.unanswered("a", later);
    assert!(store.begin(about("a", "/3"), false, later).collides);
    check(&store.lock());
}

#[test]
fn a_request_of_which_nothing_is_known_shares_its_id_with_no_other() {
    let (store, now) = store();
    store.begin_unknown("a", now);
    assert!(store.begin(about("a", "/1"), false, now).collides);
    store.begin(about("b", "/1"), false, now);
    store.begin_unknown("b", now);
    assert_eq!((uri(&store, "a", now), uri(&store, "b", now)), (None, None));
    check(&store.lock());
}

#[test]
fn silence_takes_the_context_first_and_the_id_much_later() {
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
fn an_id_that_is_never_silent_keeps_no_other_remembered() {
    let (store, mut now) = store();
    for id in 0..100 {
        store.begin(about(&id.to_string(), "/"), id % 2 == 0, now);
        if id % 4 == 0 {
            store.end(&id.to_string(), now);
        }
    }
    // The first is in use all the time.
    let end = now + 2 * REMEMBERED;
    while now < end {
        now += KEPT / 2;
        for _ in 0..50 {
            store.begin(about("0", "/"), false, now);
        }
    }
    assert_eq!(store.lock().len, 1);
}

#[test]
fn memory_is_bounded_and_dropped_contexts_do_not_lend_their_ids() {
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
    // One that leaves no room for others gets none itself.
    store.begin(about("huge", &"x".repeat(MAX_BYTES)), false, now);
    assert_eq!(uri(&store, "huge", now), None);
    check(&store.lock());
}

#[test]
fn ids_without_a_context_are_not_in_the_way_of_those_that_are_dropped() {
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

/// A client may fill the store with small contexts and then send one that takes the place of all.
#[test]
fn no_request_waits_until_many_contexts_are_dropped() {
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
fn the_memory_of_responses_is_bounded_too() {
    let (store, now) = store();
    for at in 0..100 {
        store.begin(about(&at.to_string(), "/"), false, now);
    }
    for at in 0..100 {
        store.respond(&at.to_string(), ResponseContext::Json(vec![0; 1 << 20].into()));
        check(&store.lock());
    }
}

#[test]
fn ended_requests_leave_nothing_behind() {
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

/// A request whose response never comes is remembered, although there is no place for it.
#[test]
fn a_full_store_takes_no_context_from_others_and_lends_no_id() {
    let (store, now) = store();
    let id = |at: usize| at.to_string();
    for at in 0..2 * MAX_IDS {
        store.begin(about(&id(at), "/"), false, now);
    }
    check(&store.lock());
    // All of the earlier half, whether they lie in the slab or in the filter.
    for at in (0..MAX_IDS).step_by(100) {
        store.begin(about(&id(at), "/other"), false, now);
        assert_eq!(uri(&store, &id(at), now), None, "{at}");
    }
    let known = (0..1000).map(|at| format!("new-{at}")).filter(|id| {
        store.begin(about(id, "/new"), false, now);
        uri(&store, id, now).as_deref() == Some("/new")
    });
    assert!(known.count() > 990);
    // They are remembered for an hour at least, and for two at most.
    let hour = now + REMEMBERED - Duration::from_secs(1);
    store.begin(about(&id(1), "/other"), false, hour);
    assert_eq!(uri(&store, &id(1), hour), None);
    let later = now + 2 * REMEMBERED + Duration::from_secs(2);
    store.begin(about(&id(2), "/later"), false, later);
    assert_eq!(uri(&store, &id(2), later).as_deref(), Some("/later"));
}

/// As behind a proxy that sends no body events: response hooks miss nothing.
#[test]
fn bodies_that_never_come_take_no_context_from_response_hooks() {
    let (store, now) = store();
    let ids: Vec<_> = (0..4 * MAX_IDS).map(|at| at.to_string()).collect();
    for id in &ids {
        assert!(!store.begin(about(id, "/"), true, now).collides);
        assert!(uri(&store, id, now).is_some());
        store.end(id, now);
    }
    check(&store.lock());
}

/// The body of an ended request comes late, when its id has been evicted and is in use again.
#[test]
fn a_late_body_gets_no_context_of_a_newer_request_and_ends_none() {
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
    // That of /2 is still to come.
    store.begin(about("late", "/3"), true, now);
    assert_eq!(uri(&store, "late", now), None);
    assert!(store.get_for_body("late", true, now).is_none());
    // Bodies of other requests are known.
    let known = (0..1000).map(|at| format!("new-{at}")).filter(|id| {
        store.begin(about(id, "/new"), true, now);
        store.get_for_body(id, true, now).is_some()
    });
    assert!(known.count() > 980);
}

/// Every operation in any order, on few ids, so that states meet.
#[test]
fn lists_and_sums_agree_whatever_is_done() {
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
