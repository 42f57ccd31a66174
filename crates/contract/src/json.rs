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
    let mut start = 0;
    while let Some(offset) = first_special(&bytes[start..]) {
        let at = start + offset;
        out.extend_from_slice(&bytes[start..at]);
        match bytes[at] {
            b'"' => out.extend_from_slice(b"\\\""),
            b'\\' => out.extend_from_slice(b"\\\\"),
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'\t' => out.extend_from_slice(b"\\t"),
            control => {
                const HEX: &[u8; 16] = b"0123456789abcdef";
                out.extend_from_slice(b"\\u00");
                out.push(HEX[usize::from(control >> 4)]);
                out.push(HEX[usize::from(control & 15)]);
            }
        }
        start = at + 1;
    }
    out.extend_from_slice(&bytes[start..]);
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

/// Where the first byte stands that JSON strings must escape: `"`, `\` or a control character.
///
/// Eight bytes at a time: most strings of a request hold none.
fn first_special(bytes: &[u8]) -> Option<usize> {
    const ONES: u64 = u64::from_ne_bytes([0x01; 8]);
    const HIGHS: u64 = u64::from_ne_bytes([0x80; 8]);
    let special = |byte: u8| byte < 0x20 || byte == b'"' || byte == b'\\';

    let mut chunks = bytes.chunks_exact(8);
    let mut at = 0;
    for chunk in &mut chunks {
        let word = u64::from_ne_bytes(chunk.try_into().unwrap_or_default());
        let has_zero = |word: u64| word.wrapping_sub(ONES) & !word & HIGHS;
        let control = word.wrapping_sub(ONES * 0x20) & !word & HIGHS;
        let quote = has_zero(word ^ (ONES * u64::from(b'"')));
        let backslash = has_zero(word ^ (ONES * u64::from(b'\\')));
        if control | quote | backslash != 0 {
            return chunk.iter().position(|&byte| special(byte)).map(|offset| at + offset);
        }
        at += 8;
    }
    chunks.remainder().iter().position(|&byte| special(byte)).map(|offset| at + offset)
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
