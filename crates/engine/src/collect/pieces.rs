//! The bytes of a body that are held.

/// The proxy's buffer for sending a body again when an upstream connection fails, in bytes.
pub(super) const REPLAYED: usize = 64 << 10;

/// Chunks are joined into pieces of up to this size, in bytes, so that small ones cost no memory of their own.
pub(super) const PIECE: usize = 64 << 10;

/// The bytes of a body in order.
#[derive(Default)]
pub(super) struct Pieces {
    pub(super) list: Vec<Vec<u8>>,
    /// Bytes in all.
    pub(super) len: usize,
    /// Memory in all.
    pub(super) capacity: usize,
}

impl Pieces {
    /// Appends bytes and returns by how much memory that is more.
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

    /// Leaves out the last bytes, which are in the last piece.
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

    /// Whether the proxy may have sent these bytes a second time.
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

    pub(super) fn join(mut self) -> Vec<u8> {
        if self.list.len() == 1 { self.list.remove(0) } else { self.list.concat() }
    }
}
