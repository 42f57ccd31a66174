//! Escapes text that is JSON itself, as bodies often are, with a quote every few bytes: 16 bytes at
//! a time, regardless of how many of them are special.
//!
//! All other text is escaped by a library, which is faster if few bytes are special.

/// Text is dense if more than one of this many bytes is special.
const DENSE: usize = 16;

/// Bytes at the start of a text that are examined.
const SAMPLE: usize = 256;

/// Appends `text` as the inside of a JSON string, if it is dense and the processor has the
/// necessary instructions. False if it appends nothing.
pub(crate) fn escape(out: &mut Vec<u8>, text: &[u8]) -> bool {
    let sample = &text[..text.len().min(SAMPLE)];
    let specials = sample.iter().filter(|&&byte| byte < 0x20 || byte == b'"' || byte == b'\\').count();
    specials > sample.len() / DENSE && wide::escape(out, text)
}

#[cfg(not(target_arch = "x86_64"))]
mod wide {
    pub(super) fn escape(_: &mut Vec<u8>, _: &[u8]) -> bool {
        false
    }
}

#[cfg(target_arch = "x86_64")]
mod wide {
    use std::arch::x86_64::{
        __m128i, _mm_and_si128, _mm_cmpeq_epi8, _mm_cvtsi128_si64, _mm_min_epu8, _mm_movemask_epi8, _mm_or_si128, _mm_set_epi64x,
        _mm_set1_epi8, _mm_shuffle_epi8, _mm_unpackhi_epi64, _mm_unpacklo_epi64, _mm_xor_si128,
    };

    /// Bytes that are read at once.
    const WIDTH: usize = 16;
    /// Bytes that are escaped before they are appended.
    const BLOCK: usize = 256;
    /// An escape has at most 6 bytes; 16 are always written, of which fewer may count.
    const ROOM: usize = 6 * BLOCK + WIDTH;

    /// Control characters that are common in text, with the letters of their escapes.
    const NAMES: [(u8, u8); 3] = [(b'\n', b'n'), (b'\r', b'r'), (b'\t', b't')];

    /// For each set of special bytes among 8, the source of each output byte; 8 and above is a
    /// backslash.
    static SPREAD: [[u8; WIDTH]; 256] = {
        let mut spread = [[8; WIDTH]; 256];
        let mut set = 0;
        while set < 256 {
            let (mut from, mut to) = (0, 0);
            while from < 8 {
                to += set >> from & 1;
                spread[set][to] = from as u8;
                from += 1;
                to += 1;
            }
            set += 1;
        }
        spread
    };

    #[allow(unsafe_code)]
    pub(super) fn escape(out: &mut Vec<u8>, text: &[u8]) -> bool {
        let able = std::arch::is_x86_feature_detected!("ssse3") && std::arch::is_x86_feature_detected!("popcnt");
        if able {
            // SAFETY: the processor has the instructions, as just detected. The function requires
            // nothing else.
            unsafe { escape_wide(out, text) }
        }
        able
    }

    #[target_feature(enable = "ssse3,popcnt")]
    fn escape_wide(out: &mut Vec<u8>, text: &[u8]) {
        let mut room = [0; ROOM];
        for block in text.chunks(BLOCK) {
            let (chunks, rest) = block.as_chunks::<WIDTH>();
            let mut len = 0;
            for chunk in chunks {
                len += escape_chunk(&mut room[len..], chunk);
            }
            if !rest.is_empty() {
                let mut chunk = [b' '; WIDTH];
                chunk[..rest.len()].copy_from_slice(rest);
                len += escape_chunk(&mut room[len..], &chunk) - (WIDTH - rest.len());
            }
            out.extend_from_slice(&room[..len]);
        }
    }

    /// Escapes 16 bytes, and returns how many bytes that makes.
    #[target_feature(enable = "ssse3,popcnt")]
    #[inline]
    fn escape_chunk(room: &mut [u8], chunk: &[u8; WIDTH]) -> usize {
        let all = |byte: u8| _mm_set1_epi8(byte.cast_signed());
        let mut bytes = load(chunk);
        let controls = _mm_cmpeq_epi8(_mm_min_epu8(bytes, all(0x1f)), bytes);
        let quoted = _mm_or_si128(_mm_cmpeq_epi8(bytes, all(b'"')), _mm_cmpeq_epi8(bytes, all(b'\\')));
        let specials = _mm_movemask_epi8(_mm_or_si128(controls, quoted));
        if _mm_movemask_epi8(controls) != 0 {
            let mut named = all(0);
            for (control, name) in NAMES {
                let found = _mm_cmpeq_epi8(bytes, all(control));
                named = _mm_or_si128(named, found);
                bytes = _mm_xor_si128(bytes, _mm_and_si128(found, all(control ^ name)));
            }
            if _mm_movemask_epi8(controls) != _mm_movemask_epi8(named) {
                return escape_each(room, chunk);
            }
        }
        let backslashes = all(b'\\');
        let halves = [_mm_unpacklo_epi64(bytes, backslashes), _mm_unpackhi_epi64(bytes, backslashes)];
        let mut len = 0;
        for (half, set) in halves.into_iter().zip(specials.to_le_bytes()) {
            store(&mut room[len..], _mm_shuffle_epi8(half, load(&SPREAD[usize::from(set)])));
            len += 8 + set.count_ones() as usize;
        }
        len
    }

    /// The same, byte by byte, for chunks with other control characters.
    fn escape_each(room: &mut [u8], chunk: &[u8; WIDTH]) -> usize {
        const HEX: &[u8; 16] = b"0123456789abcdef";

        let mut len = 0;
        let mut put = |bytes: &[u8]| {
            room[len..len + bytes.len()].copy_from_slice(bytes);
            len += bytes.len();
        };
        for &byte in chunk {
            match byte {
                b'"' | b'\\' => put(&[b'\\', byte]),
                0..0x20 => put(&[b'\\', b'u', b'0', b'0', HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]]),
                _ => put(&[byte]),
            }
        }
        len
    }

    #[target_feature(enable = "ssse3")]
    #[inline]
    fn load(bytes: &[u8; WIDTH]) -> __m128i {
        let [low, high] = [0, 8].map(|at| i64::from_le_bytes(*bytes[at..].first_chunk().expect("eight of sixteen bytes")));
        _mm_set_epi64x(high, low)
    }

    #[target_feature(enable = "ssse3")]
    #[inline]
    fn store(room: &mut [u8], bytes: __m128i) {
        let room = &mut room[..WIDTH];
        room[..8].copy_from_slice(&_mm_cvtsi128_si64(bytes).to_le_bytes());
        room[8..].copy_from_slice(&_mm_cvtsi128_si64(_mm_unpackhi_epi64(bytes, bytes)).to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn special_bytes_read_back(value in "[\\x00-\\x22\\x5c é\u{7f}a]{0,600}") {
            let mut out = b"\"".to_vec();
            prop_assume!(super::wide::escape(&mut out, value.as_bytes()));
            out.push(b'"');
            prop_assert_eq!(serde_json::from_slice::<String>(&out).unwrap(), value);
        }

        #[test]
        fn json_in_a_string_reads_back(value in "([a-zé]{0,9}[\"\\\\\n]){0,200}") {
            let mut out = b"\"".to_vec();
            prop_assume!(super::wide::escape(&mut out, value.as_bytes()));
            out.push(b'"');
            prop_assert_eq!(serde_json::from_slice::<String>(&out).unwrap(), value);
        }
    }
}
