//! The held bytes of a body.

/// The proxy's buffer for resending a body after an upstream connection failed, in bytes.
const REPLAYED: usize = 64 << 10;

/// Size up to which chunks are joined into pieces, in bytes, so small chunks need no allocation
/// each.
pub(super) const PIECE: usize = 64 << 10;

/// The bytes of a body, in order.
#[derive(Default)]
pub(super) struct Pieces {
    list: Vec<Vec<u8>>,
    /// Bytes in total.
    pub(super) len: usize,
    /// Memory in total.
    pub(super) capacity: usize,
}

impl Pieces {
    /// Appends bytes. Returns the number of bytes of memory added.
    pub(super) fn push(&mut self, bytes: Vec<u8>) -> usize {
        let before = self.capacity;
        self.len += bytes.len();
        match self.list.last_mut() {
            Some(last) if last.len() + bytes.len() <= PIECE => {
                self.capacity -= last.capacity();
                last.extend_from_slice(&bytes);
                self.capacity += last.capacity();
            }
            _ => {
                self.capacity += bytes.capacity();
                self.list.push(bytes);
            }
        }
        self.capacity - before
    }

    /// Removes the last `count` bytes.
    pub(super) fn cut(&mut self, count: usize) {
        let mut count = count;
        while count > 0
            && let Some(last) = self.list.last_mut()
        {
            let cut = count.min(last.len());
            last.truncate(last.len() - cut);
            count -= cut;
            if last.is_empty() {
                self.list.pop();
            }
        }
    }

    /// Whether `bytes` may be a repetition of the whole body.
    pub(super) fn equal(&self, bytes: &[u8]) -> bool {
        let mut rest = bytes;
        !bytes.is_empty()
            && bytes.len() == self.len
            && self.len <= REPLAYED
            && self.list.iter().all(|piece| match rest.split_at_checked(piece.len()) {
                Some((first, others)) => {
                    rest = others;
                    first == piece
                }
                None => false,
            })
    }

    /// The bytes, copied.
    pub(super) fn copied(&self) -> Vec<u8> {
        self.list.concat()
    }

    pub(super) fn join(mut self) -> Vec<u8> {
        if self.list.len() == 1 { self.list.remove(0) } else { self.list.concat() }
    }
}
