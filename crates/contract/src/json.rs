//! Writes JSON by hand, for objects that are written once per request.

use crate::dense;

/// Longest text that is escaped without looking for the fastest way, in bytes: longer than most
/// headers.
const SHORT: usize = 1024;

/// Text that is escaped at once, in bytes. The library reserves space for the worst case, which is
/// six times as much.
const PIECE: usize = 4096;

/// Appends `value` as a JSON string (RFC 8259), quotes included.
pub fn string(out: &mut Vec<u8>, value: &str) {
    if value.len() <= SHORT {
        json_escape_simd::escape_into(value, out);
        return;
    }
    out.push(b'"');
    escaped(out, value);
    out.push(b'"');
}

/// Appends `value` as the inside of a JSON string.
pub fn escaped(out: &mut Vec<u8>, value: &str) {
    let mut rest = value;
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(rest.floor_char_boundary(PIECE));
        if piece.len() <= SHORT || !dense::escape(out, piece.as_bytes()) {
            let start = out.len();
            json_escape_simd::escape_into(piece, out);
            // Remove the quotes.
            out.pop();
            out.remove(start);
        }
        rest = after;
    }
}

/// Appends `"name":`, with a comma before it unless it is the first field of its object.
///
/// `name` must not need escaping. The names of the contract do not.
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

/// Appends a field whose value is a string, if there is one.
pub fn optional_field(out: &mut Vec<u8>, name: &str, value: Option<&str>) {
    if let Some(value) = value {
        field(out, name, value);
    }
}

/// Appends a field whose value prints as JSON, such as a number or a boolean.
pub fn plain_field(out: &mut Vec<u8>, name: &str, value: impl std::fmt::Display) {
    use std::io::Write as _;
    key(out, name);
    // Writing to a vector never fails.
    let _ = write!(out, "{value}");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    #[test]
    fn separates_fields_by_commas() {
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
        fn written_strings_read_back(value in any::<String>(), times in prop::sample::select(vec![1, 1000])) {
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
