//! A reader of debug information that stops after a number of reads.
//!
//! Debug information is a program for its reader, and a hostile one may make it run for hours or
//! take all memory. Whatever it makes a library do, the library reads.

use std::borrow::Cow;
use std::cell::Cell;

use addr2line::gimli::{EndianSlice, Error, LittleEndian, Reader, ReaderOffsetId, Result};

/// Bytes that are searched in about the time of a read.
const SEARCHED_PER_READ: usize = 16;

/// A part of a section. All parts share what is left to read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Metered<'a> {
    slice: EndianSlice<'a, LittleEndian>,
    left: &'a Cell<u64>,
}

impl<'a> Metered<'a> {
    pub(super) fn new(bytes: &'a [u8], left: &'a Cell<u64>) -> Self {
        Self { slice: EndianSlice::new(bytes, LittleEndian), left }
    }

    fn spend(&self, reads: usize) -> Result<()> {
        let left = self.left.get().checked_sub(reads as u64);
        // Nothing is left from now on.
        self.left.set(left.unwrap_or(0));
        left.map(|_| ()).ok_or(Error::UnexpectedEof(self.slice.offset_id()))
    }
}

impl Reader for Metered<'_> {
    type Endian = LittleEndian;
    type Offset = usize;

    fn endian(&self) -> LittleEndian {
        LittleEndian
    }

    fn len(&self) -> usize {
        self.slice.len()
    }

    fn empty(&mut self) {
        self.slice.empty();
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        self.slice.truncate(len)
    }

    fn offset_from(&self, base: &Self) -> usize {
        self.slice.offset_from(base.slice)
    }

    fn offset_id(&self) -> ReaderOffsetId {
        self.slice.offset_id()
    }

    fn lookup_offset_id(&self, id: ReaderOffsetId) -> Option<usize> {
        self.slice.lookup_offset_id(id)
    }

    fn find(&self, byte: u8) -> Result<usize> {
        let at = Reader::find(&self.slice, byte)?;
        self.spend(1 + at / SEARCHED_PER_READ)?;
        Ok(at)
    }

    fn skip(&mut self, len: usize) -> Result<()> {
        self.spend(1)?;
        self.slice.skip(len)
    }

    fn split(&mut self, len: usize) -> Result<Self> {
        self.spend(1)?;
        Ok(Self { slice: self.slice.split(len)?, ..*self })
    }

    fn to_slice(&self) -> Result<Cow<'_, [u8]>> {
        self.spend(self.len())?;
        self.slice.to_slice()
    }

    fn to_string(&self) -> Result<Cow<'_, str>> {
        self.spend(self.len())?;
        Reader::to_string(&self.slice)
    }

    // Callers copy the text.
    fn to_string_lossy(&self) -> Result<Cow<'_, str>> {
        self.spend(self.len())?;
        Reader::to_string_lossy(&self.slice)
    }

    fn read_slice(&mut self, buf: &mut [u8]) -> Result<()> {
        self.spend(1)?;
        Reader::read_slice(&mut self.slice, buf)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stops_for_good() {
        let left = Cell::new(3);
        let mut reader = Metered::new(&[0; 100], &left);
        assert_eq!(reader.read_u8(), Ok(0));
        let mut part = reader.split(50).unwrap();
        assert_eq!(part.read_u32(), Ok(0));
        assert!(part.read_u8().is_err() && reader.read_u8().is_err() && reader.skip(1).is_err() && reader.find(0).is_err());
    }

    #[test]
    fn copied_text_counts_by_its_length() {
        let left = Cell::new(150);
        let reader = Metered::new(&[b'x'; 100], &left);
        assert_eq!(Reader::to_string(&reader).unwrap().len(), 100);
        assert!(Reader::to_string_lossy(&reader).is_err());
    }
}
