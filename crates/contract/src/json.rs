//! Writing JSON by hand, for the objects that are written once per request.

/// Appends `value` as a JSON string (RFC 8259), quotes included.
pub fn string(out: &mut Vec<u8>, value: &str) {
    out.reserve(value.len() + 2);
    out.push(b'"');
    escaped(out, value);
    out.push(b'"');
}

/// Appends `value` as the inside of a JSON string.
pub fn escaped(out: &mut Vec<u8>, value: &str) {
    let bytes = value.as_bytes();
    // Text of a body is often JSON, with a quote every few bytes.
    out.reserve(bytes.len() + bytes.len() / 4);
    let (mut start, mut at) = (0, 0);
    while at < bytes.len() {
        match first_special(&bytes[at..]) {
            Special::None(len) => at += len,
            Special::At(offset) => {
                at += offset;
                out.extend_from_slice(&bytes[start..at]);
                escape(out, bytes[at]);
                at += 1;
                start = at;
            }
        }
    }
    out.extend_from_slice(&bytes[start..]);
}

fn escape(out: &mut Vec<u8>, byte: u8) {
    match byte {
        b'"' => out.extend_from_slice(b"\\\""),
        b'\\' => out.extend_from_slice(b"\\\\"),
        b'\n' => out.extend_from_slice(b"\\n"),
        b'\r' => out.extend_from_slice(b"\\r"),
        b'\t' => out.extend_from_slice(b"\\t"),
        control => {
            const HEX: &[u8; 16] = b"0123456789abcdef";
            let (high, low) = (HEX[usize::from(control >> 4)], HEX[usize::from(control & 15)]);
            out.extend_from_slice(&[b'\\', b'u', b'0', b'0', high, low]);
        }
    }
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

/// What the beginning of a string holds of bytes that JSON strings must escape: `"`, `\\` and control characters.
enum Special {
    /// None within so many bytes.
    None(usize),
    /// The first one stands there.
    At(usize),
}

/// Looks at the first eight bytes at once, or at what is left one by one.
#[inline]
fn first_special(bytes: &[u8]) -> Special {
    const ONES: u64 = u64::from_le_bytes([0x01; 8]);
    const HIGHS: u64 = u64::from_le_bytes([0x80; 8]);

    let Some(chunk) = bytes.first_chunk::<8>() else {
        let special = |byte: &u8| *byte < 0x20 || *byte == b'"' || *byte == b'\\';
        return bytes.iter().position(special).map_or(Special::None(bytes.len()), Special::At);
    };
    // Each term marks the high bit of bytes that are special. A borrow may mark bytes above the first marked one wrongly, never below it.
    let word = u64::from_le_bytes(*chunk);
    let is_zero = |word: u64| word.wrapping_sub(ONES) & !word & HIGHS;
    let control = word.wrapping_sub(ONES * 0x20) & !word & HIGHS;
    let marks = control | is_zero(word ^ (ONES * 0x22)) | is_zero(word ^ (ONES * 0x5c));
    if marks == 0 { Special::None(8) } else { Special::At((marks.trailing_zeros() / 8) as usize) }
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
        fn what_is_written_reads_back(value in any::<String>()) {
            let mut out = Vec::new();
            super::string(&mut out, &value);
            prop_assert_eq!(serde_json::from_slice::<String>(&out).unwrap(), value);
        }
    }
}
