//! Keys of correlation ids.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::OnceLock;

use foldhash::SharedSeed;
use foldhash::fast::FoldHasher;

/// Hashes ids with a secret, so a client cannot search for two ids with one key. Another process
/// can get the secret and with it the keys.
#[derive(Default)]
pub(crate) struct IdHasher(OnceLock<Seeds>);

struct Seeds {
    secret: [u64; 2],
    shared: SharedSeed,
}

impl Seeds {
    fn new(secret: [u64; 2]) -> Self {
        Self { secret, shared: SharedSeed::from_u64(secret[1]) }
    }

    fn random() -> Self {
        let random = RandomState::new();
        Self::new([0, 1].map(|half: u8| random.hash_one(half)))
    }
}

impl IdHasher {
    fn seeds(&self) -> &Seeds {
        self.0.get_or_init(Seeds::random)
    }

    /// The key of `id`.
    pub(crate) fn key(&self, id: &str) -> u64 {
        let Seeds { secret, shared } = self.seeds();
        let mut hasher = FoldHasher::with_seed(secret[0], shared);
        hasher.write(id.as_bytes());
        hasher.finish()
    }

    pub(crate) fn secret(&self) -> [u64; 2] {
        self.seeds().secret
    }

    /// Hashes with `secret`, if no id was hashed yet. Returns whether it does.
    pub(crate) fn adopt(&self, secret: [u64; 2]) -> bool {
        self.0.get_or_init(|| Seeds::new(secret)).secret == secret
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_depend_on_the_secret() {
        let [one, other, third] = [IdHasher::default(), IdHasher::default(), IdHasher::default()];
        assert_eq!(one.key("a"), one.key("a"));
        assert_ne!(one.key("a"), one.key("b"));
        assert_ne!(one.key("a"), other.key("a"));
        assert!(third.adopt(one.secret()));
        assert_eq!(one.key("a"), third.key("a"));
    }

    #[test]
    fn the_secret_stays_once_it_was_used() {
        let [one, other] = [IdHasher::default(), IdHasher::default()];
        other.key("a");
        assert!(!other.adopt(one.secret()));
        assert!(other.adopt(other.secret()));
    }
}
