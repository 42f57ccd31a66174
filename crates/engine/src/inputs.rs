//! Buffers for what modules are handed.
//!
//! Each thread keeps those of its last calls: their sizes are the sizes of the calls to come, and memory that was just used is in the caches.

use std::cell::RefCell;

/// Buffers that a thread keeps: a connection prepares so many calls before it runs the first.
const MAX_KEPT: usize = 32;

/// Largest buffer that is kept, in bytes: far beyond most requests without bodies.
const MAX_SIZE: usize = 16 << 10;

/// Room in a new buffer, in bytes: a request of some twelve headers.
const ROOM: usize = 2048;

thread_local! {
    static KEPT: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// An empty buffer.
pub(crate) fn take() -> Vec<u8> {
    KEPT.with_borrow_mut(Vec::pop).unwrap_or_else(|| Vec::with_capacity(ROOM))
}

/// Keeps a buffer for the next call.
pub(crate) fn keep(mut buffer: Vec<u8>) {
    if buffer.capacity() == 0 || buffer.capacity() > MAX_SIZE {
        return;
    }
    buffer.clear();
    KEPT.with_borrow_mut(|kept| {
        if kept.len() < MAX_KEPT {
            kept.push(buffer);
        }
    });
}

#[cfg(test)]
mod tests {
    #[test]
    fn kept_buffers_are_empty_and_few() {
        for _ in 0..100 {
            super::keep(b"said to another module".to_vec());
        }
        super::keep(Vec::with_capacity(super::MAX_SIZE + 1));
        let kept = super::KEPT.with_borrow(Vec::len);
        assert_eq!(kept, super::MAX_KEPT);
        for _ in 0..kept {
            let buffer = super::take();
            assert!(buffer.is_empty() && buffer.capacity() <= super::MAX_SIZE);
        }
    }
}
