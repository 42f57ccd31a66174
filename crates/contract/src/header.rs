//! Header names and values: how they are written for modules, and which may leave the agent.

/// How header names are written for a module.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HeaderCase {
    /// `User-Agent`, like browsers and RFCs. The default, so a module can look names up the way
    /// people write them.
    #[default]
    Canonical,
    /// As received. The proxy sends all names in lower case.
    Lower,
}

/// Names whose usual spelling does not just capitalise each word, with their lower-case form.
const SPECIAL_NAMES: &[(&str, &str)] = &[
    ("a-im", "A-IM"),
    ("alpn", "ALPN"),
    ("content-dpr", "Content-DPR"),
    ("content-md5", "Content-MD5"),
    ("ct", "CT"),
    ("dav", "DAV"),
    ("dnt", "DNT"),
    ("dpop", "DPoP"),
    ("dpr", "DPR"),
    ("ect", "ECT"),
    ("etag", "ETag"),
    ("expect-ct", "Expect-CT"),
    ("http2-settings", "HTTP2-Settings"),
    ("im", "IM"),
    ("mime-version", "MIME-Version"),
    ("nel", "NEL"),
    ("p3p", "P3P"),
    ("rtt", "RTT"),
    ("sec-ch-dpr", "Sec-CH-DPR"),
    ("sec-gpc", "Sec-GPC"),
    ("sec-websocket-accept", "Sec-WebSocket-Accept"),
    ("sec-websocket-extensions", "Sec-WebSocket-Extensions"),
    ("sec-websocket-key", "Sec-WebSocket-Key"),
    ("sec-websocket-protocol", "Sec-WebSocket-Protocol"),
    ("sec-websocket-version", "Sec-WebSocket-Version"),
    ("sec-ch-ua-wow64", "Sec-CH-UA-WoW64"),
    ("slug", "SLUG"),
    ("soapaction", "SOAPAction"),
    ("sourcemap", "SourceMap"),
    ("tcn", "TCN"),
    ("te", "TE"),
    ("www-authenticate", "WWW-Authenticate"),
    ("x-dns-prefetch-control", "X-DNS-Prefetch-Control"),
    ("x-ua-compatible", "X-UA-Compatible"),
    ("x-xss-protection", "X-XSS-Protection"),
];

/// Prefix of client hints (<https://wicg.github.io/ua-client-hints/>). What follows it is
/// capitalised word by word.
const CLIENT_HINT: (&str, &str) = ("sec-ch-", "Sec-CH-");

/// Appends `name` in the spelling of `case`, without quotes.
///
/// A name that is not a token (RFC 9110, 5.6.2) is appended as received, escaped for JSON.
pub fn write_name(out: &mut Vec<u8>, name: &str, case: HeaderCase) {
    if case == HeaderCase::Canonical && write_canonical(out, name) {
        return;
    }
    if is_token(name) {
        out.extend_from_slice(name.as_bytes());
    } else {
        crate::json::escaped(out, name);
    }
}

/// Appends the canonical spelling. False if `name` is not a token; nothing is appended then.
fn write_canonical(out: &mut Vec<u8>, name: &str) -> bool {
    let at = out.len();
    if !write_words(out, name) {
        out.truncate(at);
        if name.is_empty() || !write_bytes(out, name) {
            out.truncate(at);
            return false;
        }
    }
    let written = &mut out[at..];
    if may_be_special(written) {
        respell(written, name);
    }
    true
}

/// Capitalises 8 bytes at a time. False if the name is empty, or contains anything but lower-case
/// letters, digits and hyphens.
fn write_words(out: &mut Vec<u8>, name: &str) -> bool {
    let mut start = true;
    let (words, rest) = name.as_bytes().as_chunks::<8>();
    for word in words {
        let Some(written) = capitalized(u64::from_le_bytes(*word), start) else { return false };
        out.extend_from_slice(&written.to_le_bytes());
        start = word[7] == b'-';
    }
    if !rest.is_empty() {
        let mut word = [b'-'; 8];
        word[..rest.len()].copy_from_slice(rest);
        let Some(written) = capitalized(u64::from_le_bytes(word), start) else { return false };
        out.extend_from_slice(&written.to_le_bytes()[..rest.len()]);
    }
    !name.is_empty()
}

/// Capitalises 8 bytes of a name; `start` is whether the first begins a word. None if any byte is
/// not a lower-case letter, digit or hyphen.
#[inline]
fn capitalized(word: u64, start: bool) -> Option<u64> {
    const ONES: u64 = u64::from_le_bytes([0x01; 8]);
    const HIGHS: u64 = u64::from_le_bytes([0x80; 8]);

    if word & HIGHS != 0 {
        return None;
    }
    // Marks the high bit of each byte that is `byte` or above.
    let from = |byte: u8| (word + ONES * u64::from(0x80 - byte)) & HIGHS;
    let letters = from(b'a') & !from(b'z' + 1);
    let digits = from(b'0') & !from(b'9' + 1);
    let hyphens = from(b'-') & !from(b'-' + 1);
    if letters | digits | hyphens != HIGHS {
        return None;
    }
    let starts = (hyphens << 8) | if start { 0x80 } else { 0 };
    // A letter differs from its capital by 0x20.
    Some(word ^ ((letters & starts) >> 2))
}

/// Capitalises byte by byte. False if the name is not a token.
fn write_bytes(out: &mut Vec<u8>, name: &str) -> bool {
    let mut start = true;
    let mut token = true;
    out.extend(name.bytes().map(|byte| {
        token &= TOKEN[usize::from(byte)];
        let cased = if start { byte.to_ascii_uppercase() } else { byte.to_ascii_lowercase() };
        start = byte == b'-';
        cased
    }));
    token
}

/// Whether a name may have a special spelling, because its first letter and length are those of
/// one. Most names need no search then.
fn may_be_special(written: &[u8]) -> bool {
    /// For each first letter, the lengths of the special names that begin with it.
    const LENGTHS: [u32; 26] = {
        let mut lengths = [0; 26];
        let mut at = 0;
        while at < SPECIAL_NAMES.len() {
            let name = SPECIAL_NAMES[at].0.as_bytes();
            lengths[(name[0] - b'a') as usize] |= 1 << name.len();
            at += 1;
        }
        lengths
    };
    let lengths = written.first().and_then(|first| LENGTHS.get(usize::from(first.wrapping_sub(b'A')))).copied().unwrap_or(0);
    (written.len() < 32 && lengths & (1 << written.len()) != 0) || written.starts_with(b"Sec-Ch-")
}

fn respell(written: &mut [u8], name: &str) {
    if let Some((_, special)) = SPECIAL_NAMES.iter().find(|(lower, _)| lower.len() == name.len() && lower.eq_ignore_ascii_case(name)) {
        written.copy_from_slice(special.as_bytes());
        return;
    }
    let (prefix, spelling) = CLIENT_HINT;
    if name.len() > prefix.len() && name.as_bytes()[..prefix.len()].eq_ignore_ascii_case(prefix.as_bytes()) {
        written[..prefix.len()].copy_from_slice(spelling.as_bytes());
        // `Sec-CH-UA` and everything below it.
        if written[prefix.len()..].eq_ignore_ascii_case(b"ua") || written[prefix.len()..].starts_with(b"Ua-") {
            written[prefix.len() + 1] = b'A';
        }
    }
}

/// Whether `name` is a token (RFC 9110, 5.6.2), as every header name must be.
pub fn is_token(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| TOKEN[usize::from(byte)])
}

/// The bytes of a token.
const TOKEN: [bool; 256] = {
    let mut table = [false; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = (byte as u8).is_ascii_alphanumeric();
        byte += 1;
    }
    let others = b"!#$%&'*+-.^_`|~";
    let mut at = 0;
    while at < others.len() {
        table[others[at] as usize] = true;
        at += 1;
    }
    table
};

/// Whether `value` may be part of a header or a log line: no control characters except tab.
///
/// Stricter than "no CR, LF or NUL" (RFC 9110, 5.5), because the other control characters have no
/// legitimate use there either.
pub fn is_value(value: &str) -> bool {
    value.bytes().all(|byte| (byte >= 0x20 && byte != 0x7f) || byte == b'\t')
}

/// The same as [`is_value`], for constants.
pub(crate) const fn is_static_value(value: &str) -> bool {
    let bytes = value.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        if (bytes[at] < 0x20 && bytes[at] != b'\t') || bytes[at] == 0x7f {
            return false;
        }
        at += 1;
    }
    true
}

/// Names of headers that frame a message or apply to a single connection (RFC 9112, 6; RFC 9110,
/// 7.6.1). Only the proxy may write them: with them, a module could make the next hop wait for a
/// body that never comes, or read one request as two.
const FRAMING: [&str; 9] =
    ["connection", "content-length", "http2-settings", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"];

/// Whether a header of this name frames its message or applies to a single connection.
///
/// An underscore counts as a hyphen, because servers that pass headers as variables (RFC 3875,
/// 4.1.18) do not distinguish them.
pub fn is_framing(name: &str) -> bool {
    let same = |known: u8, byte: u8| known == if byte == b'_' { b'-' } else { byte.to_ascii_lowercase() };
    FRAMING.iter().any(|framing| framing.len() == name.len() && framing.bytes().zip(name.bytes()).all(|(known, byte)| same(known, byte)))
}

/// Whether `value` may be the value of a `Host` header: a name or an address, optionally with a
/// port.
///
/// Stricter than RFC 3986, 3.2.2, which allows commas and escapes, because next hops interpret
/// those differently.
pub fn is_host(value: &str) -> bool {
    let (host, port) = match value.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((address, port)) if address.parse::<std::net::Ipv6Addr>().is_ok() => ("address", port),
            _ => return false,
        },
        None => value.split_at(value.find(':').unwrap_or(value.len())),
    };
    let is_port = |port: &str| port.bytes().all(|byte| byte.is_ascii_digit()) && port.parse::<u16>().is_ok();
    !host.is_empty()
        && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte))
        && (port.is_empty() || port.strip_prefix(':').is_some_and(is_port))
}

/// What separates the values of a header in one line.
pub fn separator(name: &str) -> &'static str {
    if name.eq_ignore_ascii_case("cookie") { "; " } else { ", " }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    mod spelling {
        use super::*;

        fn canonical(name: &str) -> String {
            let mut out = Vec::new();
            write_name(&mut out, name, HeaderCase::Canonical);
            String::from_utf8(out).unwrap()
        }

        #[test]
        fn spells_names_like_browsers_and_rfcs() {
            for expected in [
                "User-Agent",
                "Content-Type",
                "Host",
                "X-Forwarded-For",
                "ETag",
                "WWW-Authenticate",
                "TE",
                "DNT",
                "X-XSS-Protection",
                "Sec-CH-UA",
                "Sec-CH-UA-Platform",
                "Sec-CH-Prefers-Color-Scheme",
                "Sec-Fetch-Mode",
                "Sec-WebSocket-Key",
                "Accept",
                "X-Request-Id",
                "Sec-GPC",
                "MIME-Version",
            ] {
                assert_eq!(canonical(&expected.to_ascii_lowercase()), expected);
                assert_eq!(canonical(&expected.to_ascii_uppercase()), expected);
            }
        }

        #[test]
        fn every_special_name_is_reachable() {
            for (lower, spelling) in SPECIAL_NAMES {
                assert_eq!(canonical(lower), *spelling);
            }
        }

        #[test]
        fn lower_keeps_names_as_received() {
            let mut out = Vec::new();
            write_name(&mut out, "user-agent", HeaderCase::Lower);
            assert_eq!(out, b"user-agent");
        }

        proptest! {
            #[test]
            fn capitalises_words_like_bytes(name in "[a-z0-9-]{1,40}") {
                let (mut words, mut bytes) = (Vec::new(), Vec::new());
                prop_assert!(write_words(&mut words, &name) && write_bytes(&mut bytes, &name));
                prop_assert_eq!(words, bytes);
            }

            #[test]
            fn leaves_unusual_names_to_the_slow_path(name in "[a-z-]{0,9}[^a-z0-9-][a-z-]{0,9}") {
                prop_assert!(!write_words(&mut Vec::new(), &name));
            }

            #[test]
            fn changes_only_the_case(name in "[!#-'*+.^-z|~-]{1,40}") {
                prop_assert!(canonical(&name).eq_ignore_ascii_case(&name));
            }

            #[test]
            fn writes_any_name_safely_inside_json(name in any::<String>()) {
                let quoted = format!("\"{}\"", canonical(&name));
                prop_assert!(serde_json::from_str::<String>(&quoted).unwrap().eq_ignore_ascii_case(&name));
            }
        }
    }

    mod rules {
        use super::*;

        #[test]
        fn recognises_framing_headers_in_any_case() {
            for name in [
                "Content-Length",
                "TRANSFER-ENCODING",
                "te",
                "Trailer",
                "HTTP2-Settings",
                "Keep-Alive",
                "Proxy-Connection",
                "Upgrade",
                "content_length",
                "Transfer_Encoding",
            ] {
                assert!(is_framing(name), "{name}");
            }
            for name in ["Content-Type", "Content-Encoding", "Host", "Trailers", "Tea", "Upgrade-Insecure-Requests", ""] {
                assert!(!is_framing(name), "{name}");
            }
        }

        #[test]
        fn a_host_is_a_name_or_an_address() {
            for host in ["a", "shop.example", "my_shop-1.example:8443", "192.0.2.1:80", "[2001:db8::1]", "[::1]:80"] {
                assert!(is_host(host), "{host}");
            }
            for host in [
                "", ":80", "a:", "a:b", "a:80:80", "a:65536", "a:+1", "a b", "a,b", "a/b", "a@b", "[::1", "[a]", "[::1]80", "::1",
                "\u{e9}", "a\tb",
            ] {
                assert!(!is_host(host), "{host:?}");
            }
        }
    }
}
