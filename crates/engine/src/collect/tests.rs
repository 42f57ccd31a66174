//! Bodies that arrive in chunks, and those that cannot be collected.

use std::time::Duration;

use zentinel_wasm_contract::FailureKind;

use super::pieces::PIECE;
use super::store::{IDLE, LONGEST, MAX_BODIES, MAX_BYTES, REMEMBERED};
use super::*;
use crate::bodies::Length;

const LIMIT: usize = 1 << 20;

fn store() -> BodyCollector {
    BodyCollector::new()
}

/// A chunk of a body without an announced length, after `before` bytes.
fn chunk<'a>(id: &'a str, index: u32, before: u64, bytes: &[u8], is_last: bool) -> RequestChunk<'a> {
    RequestChunk {
        connection: 1,
        id,
        number: None,
        length: Length::Open,
        bytes: bytes.to_vec(),
        index,
        is_last,
        received: Some(before + bytes.len() as u64),
        buffered: false,
        limit: LIMIT,
        fail_open: false,
    }
}

#[track_caller]
fn take(bodies: &BodyCollector, chunk: RequestChunk<'_>) -> Result<Collected, (FailureKind, Rescue)> {
    bodies.take(chunk).map_err(|lost| (lost.failure.kind, lost.rescue))
}

fn bytes(bodies: &BodyCollector) -> usize {
    bodies.lock().bytes
}

const LOST: Result<Collected, (FailureKind, Rescue)> = Err((FailureKind::BodyNotCollected, Rescue::Refuse));

mod chunks {
    use super::*;

    #[test]
    fn become_the_whole_body() {
        let bodies = store();
        assert_eq!(take(&bodies, chunk("a", 0, 0, b"one ", false)), Ok(Collected::Held));
        assert_eq!(take(&bodies, chunk("a", 1, 4, b"two ", false)), Ok(Collected::Held));
        assert!(bodies.holds(1) && !bodies.holds(2) && bytes(&bodies) > 0);
        assert_eq!(take(&bodies, chunk("a", 2, 8, b"", true)), Ok(Collected::Whole(b"one two ".to_vec())));
        assert!(!bodies.holds(1) && bytes(&bodies) == 0);
    }

    #[test]
    fn that_are_the_whole_body_are_not_held() {
        let bodies = store();
        assert_eq!(take(&bodies, chunk("a", 0, 0, b"\xff", true)), Ok(Collected::Alone));
        // The same body resent, or the next body with the same id.
        assert_eq!(take(&bodies, chunk("a", 1, 1, b"\xff", true)), Ok(Collected::Alone));
        assert_eq!(take(&bodies, chunk("a", 0, 0, b"x", true)), Ok(Collected::Alone));
        assert_eq!(take(&bodies, RequestChunk { buffered: true, ..chunk("b", 0, 0, b"x", true) }), Ok(Collected::Alone));
    }

    #[test]
    fn keep_their_order_whatever_their_size() {
        let bodies = store();
        let sent: Vec<u8> = (0..400_000_u32).map(|at| b'a' + (at % 23) as u8).collect();
        let (mut before, mut index) = (0, 0);
        for size in [1, PIECE, 3, PIECE - 1, 2, PIECE + 1].into_iter().cycle() {
            let is_last = before + size >= sent.len();
            let part = &sent[before..(before + size).min(sent.len())];
            let step = take(&bodies, chunk("a", index, before as u64, part, is_last)).unwrap();
            (before, index) = (before + part.len(), index + 1);
            if is_last {
                assert_eq!(step, Collected::Whole(sent));
                break;
            }
            assert_eq!(step, Collected::Held);
            assert!(bytes(&bodies) >= before, "{} of {before}", bytes(&bodies));
        }
        assert_eq!(bytes(&bodies), 0);
    }

    #[test]
    fn out_of_order_are_rejected() {
        for (index, before) in [(2, 3), (1, 2), (1, 4), (0, 3)] {
            let bodies = store();
            assert_eq!(take(&bodies, chunk("a", 0, 0, b"one", false)), Ok(Collected::Held));
            assert_eq!(take(&bodies, chunk("a", index, before, b"two", true)), LOST, "{index} {before}");
        }
        assert_eq!(take(&store(), chunk("a", 1, 3, b"two", true)), LOST);
    }
}

mod text {
    use super::*;

    #[test]
    fn may_be_cut_within_code_points() {
        let text = "aé€😀z";
        for at in 0..=text.len() {
            for then in at..=text.len() {
                let bodies = store();
                let parts = [&text.as_bytes()[..at], &text.as_bytes()[at..then], &text.as_bytes()[then..]];
                assert_eq!(take(&bodies, chunk("a", 0, 0, parts[0], false)), Ok(Collected::Held), "{at}");
                assert_eq!(take(&bodies, chunk("a", 1, at as u64, parts[1], false)), Ok(Collected::Held), "{at} {then}");
                assert_eq!(take(&bodies, chunk("a", 2, then as u64, parts[2], true)), Ok(Collected::Whole(text.into())));
            }
        }
    }

    #[test]
    fn is_required_once_bytes_are_held() {
        for (first, second, is_last) in
            [(&b"a"[..], &b"\xff"[..], false), (b"a\xe2", b"a", false), (b"a\xe2\x82", b"", true), (b"a", b"\xc3", true)]
        {
            for fail_open in [false, true] {
                let bodies = store();
                assert_eq!(take(&bodies, RequestChunk { fail_open, ..chunk("a", 0, 0, first, false) }), Ok(Collected::Held));
                let second = RequestChunk { fail_open, ..chunk("a", 1, first.len() as u64, second, is_last) };
                assert_eq!(take(&bodies, second), LOST);
                assert_eq!(bytes(&bodies), 0);
            }
        }
        let bodies = store();
        let first = take(&bodies, RequestChunk { fail_open: true, ..chunk("a", 0, 0, b"\xff", false) });
        assert_eq!(first, Err((FailureKind::BodyNotCollected, Rescue::Pass)));
        // No byte of it is held, so the rest passes.
        assert_eq!(take(&bodies, chunk("a", 1, 1, b"\xff", false)), Ok(Collected::Pass));
        assert_eq!(take(&bodies, chunk("a", 2, 2, b"\xff", true)), Ok(Collected::Pass));
    }
}

mod ids {
    use super::*;

    #[test]
    fn shared_by_live_bodies_reject_both() {
        let bodies = store();
        assert_eq!(take(&bodies, chunk("a", 0, 0, b"one", false)), Ok(Collected::Held));
        assert_eq!(take(&bodies, chunk("a", 0, 0, b"two", false)), LOST);
        assert_eq!(bytes(&bodies), 0);
        // Whichever of them continues, and a third one too, because its next chunk could be one of
        // the first.
        assert_eq!(take(&bodies, chunk("a", 1, 3, b"...", false)), LOST);
        assert_eq!(take(&bodies, chunk("a", 0, 0, b"six", false)), LOST);
        assert_eq!(take(&bodies, chunk("a", 0, 0, b"six", true)), LOST);
        // Others are not affected.
        assert_eq!(take(&bodies, chunk("b", 0, 0, b"one", false)), Ok(Collected::Held));
        assert_eq!(take(&bodies, RequestChunk { connection: 2, ..chunk("a", 0, 0, b"one", false) }), Ok(Collected::Held));
    }

    #[test]
    fn may_be_reused_by_a_later_request() {
        let bodies = store();
        let of = |number, chunk| RequestChunk { number: Some(number), ..chunk };
        assert_eq!(take(&bodies, of(1, chunk("a", 0, 0, b"one", false))), Ok(Collected::Held));
        assert_eq!(take(&bodies, of(2, chunk("a", 1, 3, b"two", false))), LOST);
        assert_eq!(take(&bodies, of(2, chunk("a", 0, 0, b"two", false))), Ok(Collected::Held));
        assert_eq!(take(&bodies, of(1, chunk("a", 1, 3, b"one", true))), LOST);
    }
}

mod completeness {
    use super::*;

    #[test]
    fn requires_the_announced_length() {
        for (announced, is_last) in [(5, false), (7, true), (5, true)] {
            let bodies = store();
            let of = |chunk| RequestChunk { length: Length::Announced(Some(announced)), ..chunk };
            assert_eq!(take(&bodies, of(chunk("a", 0, 0, b"one", false))), Ok(Collected::Held));
            assert_eq!(take(&bodies, of(chunk("a", 1, 3, b"two", is_last))), LOST, "{announced}");
        }
    }

    #[test]
    fn detects_a_body_that_is_sent_twice() {
        let bodies = store();
        assert_eq!(take(&bodies, chunk("a", 0, 0, b"one", false)), Ok(Collected::Held));
        assert_eq!(take(&bodies, chunk("a", 1, 3, b"one", false)), LOST);
        // After its end it is resent as one chunk.
        assert_eq!(take(&bodies, chunk("b", 0, 0, b"one", false)), Ok(Collected::Held));
        assert_eq!(take(&bodies, chunk("b", 1, 3, b"two", true)), Ok(Collected::Whole(b"onetwo".to_vec())));
        assert_eq!(take(&bodies, chunk("b", 2, 6, b"onetwo", true)), Ok(Collected::Alone));
        assert_eq!(take(&bodies, chunk("b", 3, 12, b"two", true)), LOST);
    }

    #[test]
    fn requires_streaming_from_the_start() {
        let bodies = store();
        let part = RequestChunk { buffered: true, ..chunk("a", 0, 0, b"one", false) };
        assert_eq!(take(&bodies, part), Err((FailureKind::BodyNotCollected, Rescue::Pass)));
        let middle = chunk("b", 0, 4096, b"two", false);
        assert_eq!(take(&bodies, middle), Err((FailureKind::BodyNotCollected, Rescue::Pass)));
    }
}

mod bounds {
    use super::*;

    #[test]
    fn return_a_body_over_the_limit_with_fail_open() {
        let rest = vec![b'x'; LIMIT];
        let of = |fail_open, chunk| RequestChunk { fail_open, ..chunk };
        let bodies = store();
        assert_eq!(take(&bodies, of(false, chunk("a", 0, 0, b"one", false))), Ok(Collected::Held));
        let refused = take(&bodies, of(false, chunk("a", 1, 3, &rest, false)));
        assert_eq!(refused, Err((FailureKind::BodyLimit, Rescue::Refuse)));
        assert_eq!(take(&bodies, of(false, chunk("a", 2, 3 + LIMIT as u64, b"x", true))), LOST);

        // A code point is cut at the end of the chunk that exceeds the limit, and at the end of the
        // next.
        let large = [&rest[..], b"\xf0"].concat();
        let after = 3 + large.len() as u64;
        assert_eq!(take(&bodies, of(true, chunk("b", 0, 0, b"one", false))), Ok(Collected::Held));
        let given = Rescue::Replace([b"one", &rest[..]].concat().into());
        assert_eq!(take(&bodies, of(true, chunk("b", 1, 3, &large, false))), Err((FailureKind::BodyLimit, given)));
        assert_eq!(bytes(&bodies), 0);
        assert_eq!(take(&bodies, of(true, chunk("b", 2, after, b"\x9f", false))), Ok(Collected::Forward(Vec::new())));
        let smile = take(&bodies, of(true, chunk("b", 3, after + 1, b"\x98\x80!\xc3", false)));
        assert_eq!(smile, Ok(Collected::Forward("😀!".into())));
        assert_eq!(take(&bodies, of(true, chunk("b", 4, after + 5, b"\xa9", false))), Ok(Collected::Forward("é".into())));
        assert_eq!(take(&bodies, of(true, chunk("b", 5, after + 6, b"\xff", false))), Ok(Collected::Pass));
        assert_eq!(take(&bodies, of(true, chunk("b", 6, after + 7, b"", true))), Ok(Collected::Pass));

        let announced = RequestChunk { length: Length::Announced(Some(LIMIT as u64 + 1)), ..chunk("c", 0, 0, b"one", false) };
        assert_eq!(take(&bodies, announced), Err((FailureKind::BodyLimit, Rescue::Pass)));
    }

    #[test]
    fn hold_for_memory_and_evict_idle_bodies() {
        let bodies = store();
        let now = Instant::now();
        let large = vec![b'x'; LIMIT];
        let mut taken = 0;
        let full = loop {
            let id = format!("{taken}");
            match bodies.take_at(RequestChunk { fail_open: true, ..chunk(&id, 0, 0, &large, false) }, now) {
                Ok(_) => taken += 1,
                Err(lost) => break lost,
            }
        };
        assert_eq!((full.failure.kind, full.rescue), (FailureKind::Overloaded, Rescue::Pass));
        assert!(taken > 100 && bytes(&bodies) <= MAX_BYTES, "{taken}");
        // Bodies that are still being sent are not evicted.
        let later = now + IDLE + Duration::from_secs(1);
        bodies.take_at(chunk("0", 1, LIMIT as u64, b"", false), later).unwrap();
        bodies.take_at(chunk("new", 0, 0, &large, false), later).unwrap();
        assert_eq!(bytes(&bodies), 2 * LIMIT);
        assert!(bodies.take_at(chunk("1", 1, LIMIT as u64, b"", true), later).is_err());
        let whole = bodies.take_at(chunk("0", 2, LIMIT as u64, b"", true), later);
        assert_eq!(whole.unwrap(), Collected::Whole(large));
    }

    #[test]
    fn hold_for_the_number_of_bodies() {
        let bodies = store();
        let now = Instant::now();
        for at in 0..MAX_BODIES {
            bodies.take_at(chunk(&at.to_string(), 0, 0, b"x", false), now).unwrap();
        }
        let lost = bodies.take_at(chunk("more", 0, 0, b"x", false), now).unwrap_err();
        assert_eq!((lost.failure.kind, lost.rescue), (FailureKind::Overloaded, Rescue::Refuse));
        let later = now + KEPT + Duration::from_secs(1);
        bodies.take_at(chunk("more", 0, 0, b"x", false), later).unwrap();
        assert!(bodies.lock().bodies.len() < MAX_BODIES);
    }
}

mod lifetime {
    use super::*;

    #[test]
    fn ends_with_the_connection_or_a_cancel() {
        let bodies = store();
        for (connection, id) in [(1, "a"), (1, "b"), (2, "a")] {
            assert_eq!(take(&bodies, RequestChunk { connection, ..chunk(id, 0, 0, b"one", false) }), Ok(Collected::Held));
        }
        let all = bytes(&bodies);
        bodies.cancelled(1, "a");
        assert_eq!(bytes(&bodies), all / 3 * 2);
        assert_eq!(take(&bodies, chunk("a", 1, 3, b"two", true)), LOST);
        bodies.disconnected(1);
        assert!(!bodies.knows(1, "b") && bodies.knows(2, "a"));
        assert_eq!(bytes(&bodies), all / 3);
        bodies.disconnected(2);
        assert!(bodies.is_empty() && bytes(&bodies) == 0);
    }

    #[test]
    fn of_idle_and_slow_bodies_is_bounded() {
        let bodies = store();
        let now = Instant::now();
        let sweep = |now| bodies.change(|inner| inner.sweep(KEPT, now));
        bodies.take_at(chunk("silent", 0, 0, b"one", false), now).unwrap();
        bodies.take_at(chunk("slow", 0, 0, b"one", false), now).unwrap();
        let (mut at, mut index) = (now, 1);
        while at.duration_since(now) <= LONGEST {
            at += KEPT / 2;
            let goes_on = bodies.take_at(chunk("slow", index, 3 + u64::from(index) - 1, b"x", false), at);
            assert_eq!(goes_on.is_ok(), at.duration_since(now) <= LONGEST + KEPT, "{index}");
            sweep(at);
            index += 1;
        }
        assert_eq!(bytes(&bodies), 0);
        assert!(bodies.take_at(chunk("silent", 1, 3, b"two", true), at).is_err());
        assert!(bodies.take_at(chunk("slow", index, 3 + u64::from(index) - 1, b"x", true), at).is_err());
        sweep(at + REMEMBERED);
        assert!(bodies.knows(1, "slow"));
        sweep(at + REMEMBERED + Duration::from_secs(1));
        assert!(bodies.is_empty());
    }
}

mod carried {
    use super::*;

    /// The bodies of the next process, in which connection 1 has the number 7.
    fn carry(bodies: &BodyCollector) -> BodyCollector {
        let carried = serde_json::to_string(&bodies.carry(&[0, 1])).unwrap();
        let next = store();
        assert!(next.adopt(serde_json::from_str(&carried).unwrap(), &[6, 7]));
        next
    }

    fn on_7(chunk: RequestChunk<'_>) -> RequestChunk<'_> {
        RequestChunk { connection: 7, ..chunk }
    }

    #[test]
    fn a_body_continues_in_the_next_process() {
        let bodies = store();
        assert_eq!(take(&bodies, chunk("a", 0, 0, "first \u{e9}".as_bytes().split_last().unwrap().1, false)), Ok(Collected::Held));
        let next = carry(&bodies);
        assert!(bytes(&next) >= 7, "its memory counts");
        assert!(next.holds(7));
        let last = chunk("a", 1, 7, b"\xa9 second", true);
        assert_eq!(take(&next, on_7(last)), Ok(Collected::Whole("first \u{e9} second".into())));
        assert_eq!(bytes(&next), 0);
    }

    #[test]
    fn a_rejected_body_stays_rejected() {
        let bodies = store();
        assert_eq!(take(&bodies, chunk("a", 0, 0, b"a", false)), Ok(Collected::Held));
        assert_eq!(take(&bodies, chunk("a", 0, 0, b"b", false)), LOST);
        let next = carry(&bodies);
        assert_eq!(take(&next, on_7(chunk("a", 1, 1, b"c", true))), LOST);
    }

    #[test]
    fn other_connections_have_no_part_of_it() {
        let bodies = store();
        let other = RequestChunk { connection: 2, ..chunk("a", 0, 0, b"a", false) };
        assert_eq!(take(&bodies, other), Ok(Collected::Held));
        assert!(carry(&bodies).is_empty());
    }
}
