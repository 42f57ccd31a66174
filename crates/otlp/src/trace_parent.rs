//! The trace context of a request (W3C Trace Context, level 2, section 3.2).

/// Length of version 00, which later versions begin with.
const LENGTH: usize = 55;

/// The trace that a request belongs to, and the span in it that caused the event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceParent {
    /// Id of the trace.
    pub trace_id: [u8; 16],
    /// Id of the span.
    pub span_id: [u8; 8],
    /// Whether the caller records the trace.
    pub sampled: bool,
}

impl TraceParent {
    /// Reads a `traceparent`, or returns `None` if it is invalid. A client may have written it.
    pub fn parse(text: &str) -> Option<Self> {
        let bytes = text.as_bytes();
        let (known, more) = bytes.split_at_checked(LENGTH)?;
        let [version, trace_id, span_id, flags] = [0..2, 3..35, 36..52, 53..55].map(|range| &known[range]);
        if [2, 35, 52].into_iter().any(|at| known[at] != b'-') {
            return None;
        }
        let [version] = hexadecimal(version)?;
        match version {
            0 if !more.is_empty() => return None,
            255 => return None,
            // A later version may append fields.
            _ if !more.is_empty() && more[0] != b'-' => return None,
            _ => {}
        }
        let (trace_id, span_id, [flags]) = (hexadecimal(trace_id)?, hexadecimal(span_id)?, hexadecimal(flags)?);
        if trace_id == [0; 16] || span_id == [0; 8] {
            return None;
        }
        Some(Self { trace_id, span_id, sampled: flags & 1 == 1 })
    }
}

/// Reads lower-case hexadecimal digits.
fn hexadecimal<const N: usize>(digits: &[u8]) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        for digit in pair {
            let value = match digit {
                b'0'..=b'9' => digit - b'0',
                b'a'..=b'f' => digit - b'a' + 10,
                _ => return None,
            };
            *byte = *byte << 4 | value;
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const VALID: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn reads_ids_and_the_sampled_flag() {
        let parent = TraceParent::parse(VALID).unwrap();
        assert_eq!(u128::from_be_bytes(parent.trace_id), 0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c);
        assert_eq!(u64::from_be_bytes(parent.span_id), 0xb7ad_6b71_6920_3331);
        let sampled = |flags: &str| TraceParent::parse(&VALID.replace("-01", flags)).unwrap().sampled;
        assert!(parent.sampled && sampled("-03") && sampled("-ff"));
        assert!(!sampled("-00") && !sampled("-02"));
    }

    #[test]
    fn reads_later_versions_with_more_fields() {
        let later = VALID.replacen("00-", "01-", 1);
        assert_eq!(TraceParent::parse(&later), TraceParent::parse(VALID));
        assert_eq!(TraceParent::parse(&format!("{later}-more")), TraceParent::parse(VALID));
        assert_eq!(TraceParent::parse(&format!("{later}more")), None);
    }

    #[test]
    fn rejects_invalid_ones() {
        for invalid in [
            "",
            "00",
            &VALID[..54],
            &format!("{VALID}-"),
            &format!("{VALID} "),
            &VALID.to_uppercase(),
            &VALID.replacen("00-", "ff-", 1),
            &VALID.replace('-', "_"),
            &VALID.replace('f', "g"),
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0af7651916cd43dd8448eb211c8031-9c-b7ad6b7169203331-01",
            // Not cut within a character.
            &"\u{e9}".repeat(40),
            &"\u{20ac}".repeat(40),
        ] {
            assert_eq!(TraceParent::parse(invalid), None, "{invalid}");
        }
    }
}
