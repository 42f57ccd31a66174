//! Runs the fuzz targets on their seeds and on damaged copies of them, the same ones every time.

#[allow(unreachable_pub)]
#[path = "../fuzz/src/modules.rs"]
mod modules;
#[allow(unreachable_pub)]
#[path = "../fuzz/src/readers.rs"]
mod readers;
#[allow(unreachable_pub)]
#[path = "../fuzz/src/uri.rs"]
mod uri;

use std::path::Path;

/// Runs a target on its seeds, and on `copies` damaged copies of each.
fn replay(name: &str, copies: u64, target: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(name);
    let mut seeds: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    seeds.sort();
    assert!(!seeds.is_empty());
    for seed in seeds {
        let whole = std::fs::read(&seed).unwrap();
        target(&whole);
        for copy in 0..copies {
            let damaged = damage(&whole, copy);
            let survived = std::panic::catch_unwind(|| target(&damaged));
            assert!(survived.is_ok(), "copy {copy} of {}: {}", seed.display(), damaged.escape_ascii());
        }
    }
}

/// A copy with some bytes changed, removed or doubled, which depend on the number of the copy.
fn damage(seed: &[u8], copy: u64) -> Vec<u8> {
    // SplitMix64 (<https://prng.di.unimi.it/splitmix64.c>). Any numbers do, if they are the same
    // everywhere.
    let mut state = copy;
    let mut random = |below: usize| {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ z >> 31) % below.max(1) as u64) as usize
    };
    let mut bytes = seed.to_vec();
    for _ in 0..=random(4) {
        let at = random(bytes.len());
        match random(5) {
            0 if !bytes.is_empty() => bytes[at] = random(256) as u8,
            1 if !bytes.is_empty() => bytes[at] ^= 1 << random(8),
            2 if !bytes.is_empty() => drop(bytes.drain(at..(at + 1 + random(8)).min(bytes.len()))),
            3 => {
                let end = (at + random(16)).min(bytes.len());
                let doubled = bytes[at..end].to_vec();
                bytes.splice(at..at, doubled);
            }
            _ => bytes.truncate(at),
        }
    }
    bytes
}

#[test]
fn no_frames_panic() {
    replay("frames", 3000, readers::frames);
}

#[test]
fn no_grpc_message_panics() {
    replay("messages", 1000, readers::messages);
}

#[test]
fn answers_are_rejected_or_delivered() {
    replay("answers", 3000, readers::answers);
}

#[test]
fn modules_are_rejected_or_end_in_time() {
    replay("modules", 20, modules::modules);
}

#[test]
fn header_names_become_valid_json() {
    replay("headers", 3000, readers::headers);
}
