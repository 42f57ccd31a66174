//! Checked slices of a guest's linear memory. Pointers and lengths come from the guest, so any
//! value is possible.

/// `len` bytes of `memory` at `ptr`, or `None` if any of them is out of bounds.
pub(crate) fn slice(memory: &[u8], ptr: i32, len: u32) -> Option<&[u8]> {
    let start = ptr.cast_unsigned() as usize;
    memory.get(start..start.checked_add(len as usize)?)
}

/// The same bytes for writing.
pub(crate) fn slice_mut(memory: &mut [u8], ptr: i32, len: u32) -> Option<&mut [u8]> {
    let start = ptr.cast_unsigned() as usize;
    memory.get_mut(start..start.checked_add(len as usize)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_stay_in_bounds() {
        let memory = [0; 16];
        assert!(slice(&memory, 0, 16).is_some());
        assert!(slice(&memory, 16, 0).is_some());
        for (ptr, len) in [(0, 17), (16, 1), (-1, 1), (8, u32::MAX), (-1, u32::MAX)] {
            assert!(slice(&memory, ptr, len).is_none(), "{ptr} {len}");
        }
    }
}
