//! Buffers for the input of calls.
//!
//! Each thread keeps the buffers of its last calls, because the next calls need about the same
//! sizes, and recently used memory is in the CPU's caches.

use std::cell::RefCell;

/// Buffers that a thread keeps: a connection prepares this many calls before it runs the first.
const MAX_KEPT: usize = 32;

/// Largest buffer that is kept, in bytes: far more than most requests without bodies need.
const MAX_SIZE: usize = 16 << 10;

/// Capacity of a new buffer, in bytes: a request of about twelve headers.
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
    fn keeps_few_buffers_and_empties_them() {
        for _ in 0..100 {
            super::keep(b"input of another module".to_vec());
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
