//! Code points that span two chunks.

use serde::{Deserialize, Serialize};

/// The first bytes of a code point that its chunk cuts off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Tail {
    bytes: [u8; 3],
    len: u8,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct NotText;

impl Tail {
    fn new(bytes: &[u8]) -> Self {
        let mut tail = Self { bytes: [0; 3], len: bytes.len() as u8 };
        tail.bytes[..bytes.len()].copy_from_slice(bytes);
        tail
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len).min(self.bytes.len())]
    }

    pub(super) fn is_empty(self) -> bool {
        self.len == 0
    }

    /// Returns the tail after `chunk`.
    pub(super) fn after(self, chunk: &[u8]) -> Result<Self, NotText> {
        /// A code point has up to four bytes.
        const LONGEST: usize = 4;

        let mut rest = chunk;
        if !self.is_empty() {
            let mut shared = self.bytes().to_vec();
            loop {
                let Some((first, others)) = rest.split_first() else { return Ok(Self::new(&shared)) };
                shared.push(*first);
                rest = others;
                match std::str::from_utf8(&shared) {
                    Ok(_) => break,
                    Err(error) if error.error_len().is_none() && shared.len() < LONGEST => {}
                    Err(_) => return Err(NotText),
                }
            }
        }
        match std::str::from_utf8(rest) {
            Ok(_) => Ok(Self::default()),
            Err(error) if error.error_len().is_none() => Ok(Self::new(&rest[error.valid_up_to()..])),
            Err(_) => Err(NotText),
        }
    }
}
