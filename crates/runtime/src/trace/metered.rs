//! A reader of debug information that stops after a number of reads, a time, or at a depth.
//!
//! Debug information is a program for its reader, and a hostile one may make it run for hours or
//! take all memory. What takes memory, a library reads. It may do much between two reads, for
//! example if an abbreviation has thousands of attributes without a value, so time counts too; and
//! it calls itself, so the stack counts.

use std::borrow::Cow;
use std::cell::Cell;
use std::time::Duration;

use addr2line::gimli::{EndianSlice, Error, LittleEndian, Reader, ReaderOffsetId, Result};

use crate::budget::thread_cpu_time;

/// Bytes that are searched in about the time of a read.
const SEARCHED_PER_READ: usize = 16;

/// Reads between two looks at the clock.
const READS_PER_LOOK: u64 = 64;

/// Most stack that a library may take. It calls itself for each level of inlined functions, and a
/// thread has 2 MiB.
const MAX_STACK: usize = 512 << 10;

/// What may be read, by all readers together.
#[derive(Debug)]
pub(super) struct Budget {
    left: Cell<u64>,
    /// Where the stack was at the beginning.
    stack: usize,
    /// CPU time of this thread.
    until: Duration,
    is_late: Cell<bool>,
}

impl Budget {
    /// So many reads within a CPU time of this thread that begins now.
    pub(super) fn new(reads: u64, time: Duration) -> Self {
        Self { left: Cell::new(reads), stack: stack(), until: thread_cpu_time() + time, is_late: Cell::new(false) }
    }

    /// Whether reading was stopped because it took too long.
    pub(super) fn is_late(&self) -> bool {
        self.is_late.get()
    }

    /// Whether there was enough left. If not, there is nothing from now on.
    fn spend(&self, reads: u64) -> bool {
        let left = self.left.get();
        let after = left.checked_sub(reads);
        let looks = left / READS_PER_LOOK != after.unwrap_or(0) / READS_PER_LOOK;
        if looks && thread_cpu_time() >= self.until {
            self.is_late.set(true);
            self.left.set(0);
            return false;
        }
        let after = after.filter(|_| self.stack.abs_diff(stack()) <= MAX_STACK);
        self.left.set(after.unwrap_or(0));
        after.is_some()
    }
}

/// About where the stack of this thread ends.
#[inline(never)]
fn stack() -> usize {
    let here = 0_u8;
    std::ptr::from_ref(std::hint::black_box(&here)).addr()
}

/// A part of a section. All parts share a budget.
#[derive(Clone, Copy, Debug)]
pub(super) struct Metered<'a> {
    slice: EndianSlice<'a, LittleEndian>,
    budget: &'a Budget,
}

impl<'a> Metered<'a> {
    pub(super) fn new(bytes: &'a [u8], budget: &'a Budget) -> Self {
        Self { slice: EndianSlice::new(bytes, LittleEndian), budget }
    }

    fn spend(&self, reads: usize) -> Result<()> {
        if self.budget.spend(reads as u64) { Ok(()) } else { Err(Error::UnexpectedEof(self.slice.offset_id())) }
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
        let found = Reader::find(&self.slice, byte);
        // A search in vain goes to the end, and its error may be ignored.
        let searched = *found.as_ref().unwrap_or(&self.len());
        self.spend(1 + searched / SEARCHED_PER_READ)?;
        found
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

    const LONG: Duration = Duration::from_secs(3600);

    #[test]
    fn stops_for_good() {
        let budget = Budget::new(3, LONG);
        let mut reader = Metered::new(&[0; 100], &budget);
        assert_eq!(reader.read_u8(), Ok(0));
        let mut part = reader.split(50).unwrap();
        assert_eq!(part.read_u32(), Ok(0));
        assert!(part.read_u8().is_err() && reader.read_u8().is_err() && reader.skip(1).is_err() && reader.find(0).is_err());
    }

    #[test]
    fn copied_text_counts_by_its_length() {
        let budget = Budget::new(150, LONG);
        let reader = Metered::new(&[b'x'; 100], &budget);
        assert_eq!(Reader::to_string(&reader).unwrap().len(), 100);
        assert!(Reader::to_string_lossy(&reader).is_err());
    }
    #[test]
    fn searches_in_vain_count() {
        let budget = Budget::new(13, LONG);
        let mut reader = Metered::new(&[b'x'; 100], &budget);
        assert!(reader.find(0).is_err());
        assert!(reader.read_u8().is_ok() && reader.find(0).is_err() && reader.read_u8().is_err());
    }

    #[test]
    fn the_stack_counts() {
        fn read_deeply(reader: &mut Metered<'_>) -> usize {
            let frame = std::hint::black_box([0_u8; 1024]);
            let deeper = if reader.read_u8().is_ok() { 1 + read_deeply(reader) } else { 0 };
            deeper + usize::from(frame[0])
        }
        let budget = Budget::new(10_000, LONG);
        let depth = read_deeply(&mut Metered::new(&[0; 10_000], &budget));
        assert!((10..MAX_STACK / 1024).contains(&depth), "{depth}");
    }

    #[test]
    fn time_counts() {
        for (time, is_late) in [(Duration::ZERO, true), (LONG, false)] {
            let budget = Budget::new(1000, time);
            let mut reader = Metered::new(&[0; 500], &budget);
            let read = (0..500).take_while(|_| reader.read_u8().is_ok()).count() as u64;
            assert_eq!((read <= READS_PER_LOOK, budget.is_late()), (is_late, is_late));
        }
    }
}
