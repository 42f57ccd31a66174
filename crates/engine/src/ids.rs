//! Keys of correlation ids.

use std::hash::{BuildHasher, DefaultHasher, Hasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Hashes ids with a secret, so a client cannot search for two ids with one key. Another process
/// can get the secret and with it the keys.
pub(crate) struct IdHasher([AtomicU64; 2]);

impl Default for IdHasher {
    fn default() -> Self {
        let random = RandomState::new();
        Self([0, 1].map(|half: u8| AtomicU64::new(random.hash_one(half))))
    }
}

impl IdHasher {
    /// The key of `id`.
    pub(crate) fn key(&self, id: &str) -> u64 {
        let mut hasher = DefaultHasher::new();
        for half in self.secret() {
            hasher.write_u64(half);
        }
        hasher.write(id.as_bytes());
        hasher.finish()
    }

    pub(crate) fn secret(&self) -> [u64; 2] {
        self.0.each_ref().map(|half| half.load(Relaxed))
    }

    /// Hashes with `secret` from now on.
    pub(crate) fn adopt(&self, secret: [u64; 2]) {
        for (half, value) in self.0.iter().zip(secret) {
            half.store(value, Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_depend_on_the_secret() {
        let [one, other] = [IdHasher::default(), IdHasher::default()];
        assert_eq!(one.key("a"), one.key("a"));
        assert_ne!(one.key("a"), one.key("b"));
        assert_ne!(one.key("a"), other.key("a"));
        other.adopt(one.secret());
        assert_eq!(one.key("a"), other.key("a"));
    }
}
