//! Writing JSON by hand, for the objects that are written once per request.

/// Text that is escaped at once, in bytes. The library makes room for the worst, which is six times as much.
const PIECE: usize = 4096;

/// Whether a JSON string must escape this byte.
const fn is_special(byte: u8) -> bool {
    byte < 0x20 || byte == b'"' || byte == b'\\'
}

/// Appends `value` as a JSON string (RFC 8259), quotes included.
pub fn string(out: &mut Vec<u8>, value: &str) {
    if value.len() <= PIECE {
        json_escape_simd::escape_into(value, out);
        return;
    }
    out.push(b'"');
    let mut rest = value;
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(rest.floor_char_boundary(PIECE));
        if dense::is_dense(piece.as_bytes()) {
            dense::escape(out, piece.as_bytes());
        } else {
            escaped(out, piece);
        }
        rest = after;
    }
    out.push(b'"');
}

/// Appends `value` as the inside of a JSON string.
pub fn escaped(out: &mut Vec<u8>, value: &str) {
    let start = out.len();
    string(out, value);
    out.pop();
    out.remove(start);
}

/// Appends `"name":`, with a comma before it unless it is the first field of its object.
///
/// `name` must need no escaping; the names of the contract do not.
pub fn key(out: &mut Vec<u8>, name: &str) {
    if !matches!(out.last(), None | Some(b'{')) {
        out.push(b',');
    }
    out.push(b'"');
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b"\":");
}

/// Appends a field whose value is a string.
pub fn field(out: &mut Vec<u8>, name: &str, value: &str) {
    key(out, name);
    string(out, value);
}

/// Appends a field whose value is a string, when there is one.
pub fn optional_field(out: &mut Vec<u8>, name: &str, value: Option<&str>) {
    if let Some(value) = value {
        field(out, name, value);
    }
}

/// Appends a field whose value is a number, true or false: something that prints as JSON.
pub fn plain_field(out: &mut Vec<u8>, name: &str, value: impl std::fmt::Display) {
    use std::io::Write as _;
    key(out, name);
    // Writing to a vector does not fail.
    let _ = write!(out, "{value}");
}

/// Escapes text that is JSON itself, as bodies often are, with a quote every few bytes.
mod dense {
    use super::is_special;

    /// Text with more than one special byte in so many is dense. The library, which is made for text with few, is faster below.
    const DENSE: usize = 16;
    const BLOCK: usize = 64;
    const WORD: usize = 8;
    /// An escape has two bytes, or six.
    const ROOM: usize = 6 * BLOCK + WORD;

    /// Whether `text` is better escaped here, by the look of its beginning.
    pub(super) fn is_dense(text: &[u8]) -> bool {
        const SAMPLE: usize = 256;

        let sample = &text[..text.len().min(SAMPLE)];
        sample.iter().filter(|&&byte| is_special(byte)).count() > sample.len() / DENSE
    }

    /// Appends `text` as the inside of a JSON string.
    pub(super) fn escape(out: &mut Vec<u8>, text: &[u8]) {
        let mut room = [0; ROOM];
        let mut rest = text;
        // Bytes are copied by the word: one more than the block must be there to be read.
        while let Some(block) = rest.first_chunk::<{ BLOCK + WORD }>() {
            let len = escape_block(&mut room, block);
            out.extend_from_slice(&room[..len]);
            rest = &rest[BLOCK..];
        }
        for part in rest.chunks(BLOCK) {
            let mut block = [b' '; BLOCK + WORD];
            block[..part.len()].copy_from_slice(part);
            let len = escape_block(&mut room, &block) - (BLOCK - part.len());
            out.extend_from_slice(&room[..len]);
        }
    }

    /// Escapes a block, and tells how many bytes that has made.
    fn escape_block(room: &mut [u8; ROOM], block: &[u8; BLOCK + WORD]) -> usize {
        let mut specials = specials(block);
        let (mut from, mut len) = (0, 0);
        loop {
            let to = if specials == 0 { BLOCK } else { specials.trailing_zeros() as usize };
            // Most stretches are shorter than a word.
            let mut copied = 0;
            loop {
                room[len + copied..][..WORD].copy_from_slice(&block[from + copied..][..WORD]);
                copied += WORD;
                if from + copied >= to {
                    break;
                }
            }
            len += to - from;
            if specials == 0 {
                return len;
            }
            specials &= specials - 1;
            room[len] = b'\\';
            len += 1;
            from = match block[to] {
                // It stands for itself, and is copied with what follows.
                b'"' | b'\\' => to,
                control => {
                    len += escape_control(&mut room[len..], control);
                    to + 1
                }
            };
        }
    }

    /// Writes what stands for a control character after the backslash, and tells how many bytes that is.
    fn escape_control(room: &mut [u8], control: u8) -> usize {
        const HEX: &[u8; 16] = b"0123456789abcdef";

        room[0] = match control {
            b'\n' => b'n',
            b'\r' => b'r',
            b'\t' => b't',
            _ => {
                let (high, low) = (HEX[usize::from(control >> 4)], HEX[usize::from(control & 15)]);
                room[..5].copy_from_slice(&[b'u', b'0', b'0', high, low]);
                return 5;
            }
        };
        1
    }

    /// A bit for each byte of the block that must be escaped.
    fn specials(block: &[u8; BLOCK + WORD]) -> u64 {
        const LOWS: u64 = u64::from_le_bytes([0x7f; WORD]);
        const ONES: u64 = u64::from_le_bytes([0x01; WORD]);

        let mut bits = 0;
        for (at, word) in block[..BLOCK].as_chunks::<WORD>().0.iter().enumerate() {
            let word = u64::from_le_bytes(*word);
            // The high bit of each byte that is not zero.
            let nonzero = |word: u64| ((word & LOWS) + LOWS) | word;
            let plain = nonzero(word ^ (ONES * 0x22)) & nonzero(word ^ (ONES * 0x5c)) & nonzero(word & (ONES * 0xe0));
            let marks = (!plain & !LOWS) >> 7;
            // Gathers the lowest bits of the eight bytes in the highest byte.
            bits |= (marks.wrapping_mul(0x0102_0408_1020_4080) >> 56) << (WORD * at);
        }
        bits
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    #[test]
    fn keys_are_separated_by_commas() {
        let mut out = b"{".to_vec();
        super::field(&mut out, "a", "x");
        super::plain_field(&mut out, "b", 2);
        super::optional_field(&mut out, "c", None);
        super::optional_field(&mut out, "d", Some("\u{7f}\u{1}"));
        out.push(b'}');
        assert_eq!(String::from_utf8(out).unwrap(), "{\"a\":\"x\",\"b\":2,\"d\":\"\u{7f}\\u0001\"}");
    }

    proptest! {
        #[test]
        fn dense_text_is_escaped_alike(value in "[\\x00-\\x22\\x5c é]{0,200}") {
            let mut out = b"\"".to_vec();
            super::dense::escape(&mut out, value.as_bytes());
            out.push(b'"');
            prop_assert_eq!(serde_json::from_slice::<String>(&out).unwrap(), value);
        }

        #[test]
        fn what_is_written_reads_back(value in any::<String>(), times in prop::sample::select(vec![1, 1000])) {
            let value = value.repeat(times);
            let mut out = Vec::new();
            super::string(&mut out, &value);
            prop_assert_eq!(&serde_json::from_slice::<String>(&out).unwrap(), &value);
            let mut inside = b"\"".to_vec();
            super::escaped(&mut inside, &value);
            inside.push(b'"');
            prop_assert_eq!(inside, out);
        }
    }
}
