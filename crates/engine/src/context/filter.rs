//! A set of ids that were evicted from the table.

use serde::{Deserialize, Serialize};

use super::remembered::REMEMBERED_SECONDS;

/// Blocks of a filter, each allocated when it is first needed: 8 MiB per filter if all are in use.
const BLOCKS: usize = 1 << 10;

/// Bits of a block for the ids of one hour. At a million ids an hour, 1 of 300 other ids is a false
/// positive; at ten million, 1 of 5.
const BLOCK_BITS: usize = 1 << 15;

/// A Bloom filter with two bits per key, in blocks. It has no false negatives for
/// [`REMEMBERED`](super::remembered::REMEMBERED) after a key was inserted, and forgets the key
/// after at most twice that time.
pub(super) struct IdFilter {
    blocks: Box<[Option<Box<FilterBlock>>]>,
    /// When a key was last inserted.
    inserted: Option<u32>,
}

struct FilterBlock {
    /// When `recent` was started.
    since: u32,
    recent: [u64; BLOCK_BITS / 64],
    /// The keys of the period before.
    former: [u64; BLOCK_BITS / 64],
}

/// A filter on its way to another process.
#[derive(Serialize, Deserialize)]
pub(super) struct CarriedFilter {
    inserted: Option<u32>,
    blocks: Vec<CarriedBlock>,
}

#[derive(Serialize, Deserialize)]
struct CarriedBlock {
    at: usize,
    since: u32,
    recent: Vec<u64>,
    former: Vec<u64>,
}

impl FilterBlock {
    const EMPTY: [u64; BLOCK_BITS / 64] = [0; BLOCK_BITS / 64];

    fn turn(&mut self, now: u32) {
        let age = now.saturating_sub(self.since);
        if age > REMEMBERED_SECONDS {
            self.former = if age > 2 * REMEMBERED_SECONDS { Self::EMPTY } else { self.recent };
            self.recent = Self::EMPTY;
            self.since = now;
        }
    }
}

impl IdFilter {
    pub(super) fn new() -> Self {
        Self { blocks: std::iter::repeat_with(|| None).take(BLOCKS).collect(), inserted: None }
    }

    /// The block of a key, and its two bits in the block. They depend on other bits of the key than
    /// its bucket in the table does.
    fn place(key: u64) -> (usize, [(usize, u64); 2]) {
        let bit = |shift: u32| {
            let bit = (key >> shift) as usize % BLOCK_BITS;
            (bit / 64, 1 << (bit % 64))
        };
        ((key >> 54) as usize % BLOCKS, [bit(24), bit(39)])
    }

    /// Returns whether the filter was empty: no key had been inserted for
    /// [`REMEMBERED`](super::remembered::REMEMBERED).
    pub(super) fn insert(&mut self, key: u64, now: u32) -> bool {
        let (block, bits) = Self::place(key);
        let block = self.blocks[block]
            .get_or_insert_with(|| Box::new(FilterBlock { since: now, recent: FilterBlock::EMPTY, former: FilterBlock::EMPTY }));
        block.turn(now);
        for (word, bit) in bits {
            block.recent[word] |= bit;
        }
        let before = self.inserted.replace(now);
        before.is_none_or(|before| now.saturating_sub(before) > REMEMBERED_SECONDS)
    }

    pub(super) fn contains(&mut self, key: u64, now: u32) -> bool {
        if self.inserted.is_none() {
            return false;
        }
        let (block, bits) = Self::place(key);
        let Some(block) = &mut self.blocks[block] else { return false };
        block.turn(now);
        bits.iter().all(|(word, bit)| block.recent[*word] & bit != 0) || bits.iter().all(|(word, bit)| block.former[*word] & bit != 0)
    }

    /// What another process needs to go on.
    pub(super) fn carry(&self) -> CarriedFilter {
        let carried = |(at, block): (usize, &Option<Box<FilterBlock>>)| {
            let FilterBlock { since, recent, former } = block.as_deref()?;
            Some(CarriedBlock { at, since: *since, recent: recent.to_vec(), former: former.to_vec() })
        };
        CarriedFilter { inserted: self.inserted, blocks: self.blocks.iter().enumerate().filter_map(carried).collect() }
    }

    /// Goes on where another process was.
    pub(super) fn adopt(&mut self, carried: CarriedFilter) {
        self.inserted = carried.inserted;
        for CarriedBlock { at, since, recent, former } in carried.blocks {
            if let (Some(block), Ok(recent), Ok(former)) = (self.blocks.get_mut(at), recent.try_into(), former.try_into()) {
                *block = Some(Box::new(FilterBlock { since, recent, former }));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::hash::BuildHasher;

    use hashbrown::DefaultHashBuilder;

    use super::*;

    #[test]
    fn has_no_false_negatives_for_an_hour_and_forgets_within_two() {
        let hasher = DefaultHashBuilder::default();
        let mut filter = IdFilter::new();
        let mut inserted = std::collections::VecDeque::new();
        // Keys are inserted continuously, at an interval that does not divide an hour.
        for step in 0..20_000_u32 {
            let now = step * 7;
            let key = hasher.hash_one(step);
            filter.insert(key, now);
            inserted.push_back((key, now));
            if let Some(&(key, since)) = inserted.front()
                && now - since >= REMEMBERED_SECONDS - 7
            {
                inserted.pop_front();
                assert!(filter.contains(key, now), "{step}");
            }
        }
        let (mut filter, now) = (IdFilter::new(), 1000);
        assert!(filter.insert(1, now));
        assert!(!filter.insert(2, now + REMEMBERED_SECONDS));
        assert!(filter.contains(1, now + REMEMBERED_SECONDS));
        assert!(!filter.contains(1, now + 2 * REMEMBERED_SECONDS + 2));
        assert!(filter.insert(3, now + 3 * REMEMBERED_SECONDS));
    }

    #[test]
    fn has_few_false_positives() {
        let hasher = DefaultHashBuilder::default();
        // Ids are strings. Hashes of consecutive integers are less evenly distributed.
        let key = |at: u32| hasher.hash_one(at.to_string());
        let mut filter = IdFilter::new();
        for at in 0..1_000_000 {
            filter.insert(key(at), 0);
        }
        let wrong = (1_000_000..1_100_000).filter(|at| filter.contains(key(*at), 0)).count();
        assert!(wrong < 1000, "{wrong} of 100000");
    }
}
