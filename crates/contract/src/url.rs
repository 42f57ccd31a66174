//! Encodes the URLs that clients are sent to, as RFC 3986 requires them in a `Location`.

use std::net::Ipv6Addr;

use crate::text::Text;

/// Why a text cannot be encoded as a URL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UrlError {
    /// It contains control characters. They are never meant to be in a URL, and encoding them would
    /// only hide a mistake.
    ControlCharacter,
    /// The host contains brackets, but is not an IPv6 address (RFC 3986, 3.2.2).
    Host,
    /// The port is not a number (RFC 3986, 3.2.3).
    Port,
}

impl UrlError {
    /// What is wrong, as a predicate: the caller names the URL before it.
    pub const fn reason(self) -> &'static str {
        match self {
            Self::ControlCharacter => "contains control characters",
            Self::Host => "has an invalid IPv6 address as its host",
            Self::Port => "has an invalid port",
        }
    }
}

/// Percent-encodes what a URI reference must not contain: spaces, non-ASCII characters as UTF-8,
/// `"<>\^` and the like, a `%` that begins no escape, brackets outside of an IPv6 host, and every
/// `#` but the first. Escapes and reserved characters are kept. Spaces around the URL are removed,
/// as by browsers. A URL that needs no change is not copied.
///
/// # Errors
///
/// The URL contains control characters, or its host or port is invalid.
pub fn encoded(url: Text<'_>) -> Result<Text<'_>, UrlError> {
    if url.bytes().any(|byte| byte.is_ascii_control()) {
        return Err(UrlError::ControlCharacter);
    }
    let trimmed = url.trim_matches(' ');
    let parts = Parts::of(trimmed);
    check_authority(parts.authority)?;
    if trimmed.len() == url.len() && parts.are_encoded() {
        return Ok(url);
    }
    Ok(Text::from(parts.encode()))
}

/// A URI reference, split as in RFC 3986, appendix B. Each part keeps its delimiter.
struct Parts<'a> {
    /// With its colon.
    scheme: &'a str,
    /// With its slashes.
    authority: &'a str,
    path: &'a str,
    /// With its question mark.
    query: &'a str,
    /// With its number sign.
    fragment: &'a str,
}

impl<'a> Parts<'a> {
    fn of(url: &'a str) -> Self {
        let (rest, fragment) = url.split_at(url.find('#').unwrap_or(url.len()));
        let (rest, query) = rest.split_at(rest.find('?').unwrap_or(rest.len()));
        let (scheme, rest) = rest.split_at(scheme_len(rest));
        let (authority, path) = match rest.strip_prefix("//") {
            Some(after) => rest.split_at(2 + after.find('/').unwrap_or(after.len())),
            None => ("", rest),
        };
        Self { scheme, authority, path, query, fragment }
    }

    /// The parts with the rule for each. A scheme needs none, because it was matched by its
    /// grammar.
    fn with_rules(&self) -> [(&'a str, Rule); 5] {
        // Without a scheme, a colon in the first segment would make one (RFC 3986, 4.2).
        let first_segment =
            if self.scheme.is_empty() && self.authority.is_empty() { self.path.find('/').unwrap_or(self.path.len()) } else { 0 };
        let (first_segment, path) = self.path.split_at(first_segment);
        [
            (self.authority, Rule::Authority { userinfo: self.authority.rfind('@').unwrap_or(0) }),
            (first_segment, Rule::FirstSegment),
            (path, Rule::Path),
            (self.query, Rule::Query),
            (self.fragment, Rule::Fragment),
        ]
    }

    fn are_encoded(&self) -> bool {
        self.with_rules().into_iter().all(|(part, rule)| (0..part.len()).all(|at| rule.allows(part.as_bytes(), at)))
    }

    fn encode(&self) -> String {
        const HEX: &[u8; 16] = b"0123456789ABCDEF";

        let mut out = String::with_capacity(2 * self.path.len() + 2 * self.query.len() + 64);
        out.push_str(self.scheme);
        for (part, rule) in self.with_rules() {
            for (at, &byte) in part.as_bytes().iter().enumerate() {
                if rule.allows(part.as_bytes(), at) {
                    out.push(char::from(byte));
                } else {
                    out.extend(['%', char::from(HEX[usize::from(byte >> 4)]), char::from(HEX[usize::from(byte & 15)])]);
                }
            }
        }
        out
    }
}

/// Length of the scheme with its colon; 0 if there is none.
fn scheme_len(url: &str) -> usize {
    let Some(colon) = url.find(':') else { return 0 };
    let scheme = &url.as_bytes()[..colon];
    let rest = |byte: &u8| byte.is_ascii_alphanumeric() || b"+-.".contains(byte);
    if scheme.first().is_some_and(u8::is_ascii_alphabetic) && scheme.iter().all(rest) { colon + 1 } else { 0 }
}

/// What a part of a URL may contain besides unreserved characters, escapes and sub-delimiters.
#[derive(Clone, Copy)]
enum Rule {
    /// The user information ends at the last `@`, whose place is `userinfo`.
    Authority {
        userinfo: usize,
    },
    FirstSegment,
    Path,
    Query,
    Fragment,
}

impl Rule {
    fn allows(self, part: &[u8], at: usize) -> bool {
        let byte = part[at];
        match byte {
            b'%' => matches!(part.get(at + 1..at + 3), Some([high, low]) if high.is_ascii_hexdigit() && low.is_ascii_hexdigit()),
            b'-' | b'.' | b'_' | b'~' | b'!' | b'$' | b'&' | b'\'' | b'(' | b')' | b'*' | b'+' | b',' | b';' | b'=' => true,
            _ if byte.is_ascii_alphanumeric() => true,
            _ => match self {
                Self::Authority { userinfo } => match byte {
                    b'/' => at < 2,
                    b'@' => at == userinfo,
                    // The address was checked as a whole.
                    b'[' | b']' => at > userinfo,
                    b':' => true,
                    _ => false,
                },
                Self::FirstSegment => byte == b'@',
                Self::Path => matches!(byte, b':' | b'@' | b'/'),
                Self::Query => matches!(byte, b':' | b'@' | b'/' | b'?'),
                Self::Fragment => matches!(byte, b':' | b'@' | b'/' | b'?') || byte == b'#' && at == 0,
            },
        }
    }
}

/// Checks what encoding cannot repair.
fn check_authority(authority: &str) -> Result<(), UrlError> {
    let Some(authority) = authority.strip_prefix("//") else { return Ok(()) };
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let port = match host.strip_prefix('[') {
        Some(address) => {
            let Some((address, port)) = address.split_once(']') else { return Err(UrlError::Host) };
            if address.parse::<Ipv6Addr>().is_err() {
                return Err(UrlError::Host);
            }
            port
        }
        None if host.contains(['[', ']']) => return Err(UrlError::Host),
        None => host.find(':').map_or("", |colon| &host[colon..]),
    };
    match port.strip_prefix(':') {
        None if port.is_empty() => Ok(()),
        Some(digits) if digits.bytes().all(|byte| byte.is_ascii_digit()) => Ok(()),
        _ => Err(UrlError::Port),
    }
}

#[cfg(test)]
#[allow(unreachable_pub)]
#[path = "../../../fuzz/src/uri.rs"]
mod uri;

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use super::uri::is_uri_reference;
    use super::*;
    use proptest::prelude::*;

    fn of(url: &str) -> String {
        encoded(url.into()).unwrap().to_string()
    }

    #[test]
    fn keeps_what_is_allowed() {
        for url in [
            "/",
            "/login?next=%2Fcart&a=b#top",
            "?q",
            "#x",
            "https://user:pw@shop.example:8443/a:b@c/;d=1,2/(e)*!$'+~_.-?a/b?c:d@e#f/g?h",
            "https://[2001:db8::1]:443/",
            "//cdn.example/x",
            "mailto:a@b.example",
            "https://shop.example",
            "a/b:c",
            "https://%C3%A9.example/",
        ] {
            let kept = encoded(url.into()).unwrap();
            assert_eq!(kept.as_str(), url);
            assert!(matches!(kept.0, Cow::Borrowed(_)), "{url} is not copied");
        }
    }

    #[test]
    fn encodes_what_is_not_allowed() {
        for (url, expected) in [
            ("/caf\u{e9} x", "/caf%C3%A9%20x"),
            ("/a\"<>\\^`{|}b", "/a%22%3C%3E%5C%5E%60%7B%7C%7Db"),
            ("/100%", "/100%25"),
            ("/%4", "/%254"),
            ("/%zz%41", "/%25zz%41"),
            ("/?a[]=1&b=[2]", "/?a%5B%5D=1&b=%5B2%5D"),
            ("/a#b#c", "/a#b%23c"),
            ("/\\evil.example", "/%5Cevil.example"),
            ("  /login ", "/login"),
            ("\u{a0}javascript:x", "%C2%A0javascript%3Ax"),
            ("1a:b", "1a%3Ab"),
            (":b", "%3Ab"),
            ("https://a@b@shop.example/", "https://a%40b@shop.example/"),
            ("https://caf\u{e9}.example/", "https://caf%C3%A9.example/"),
            ("https://shop.example\\@evil.example/", "https://shop.example%5C@evil.example/"),
            ("https://u[1]@shop.example/[x]", "https://u%5B1%5D@shop.example/%5Bx%5D"),
        ] {
            assert_eq!(of(url), expected);
        }
    }

    #[test]
    fn rejects_what_encoding_cannot_repair() {
        for (url, expected) in [
            ("/a\nb", UrlError::ControlCharacter),
            ("/a\u{7f}b", UrlError::ControlCharacter),
            ("https://[::1/", UrlError::Host),
            ("https://[example]/", UrlError::Host),
            ("https://a[b]/", UrlError::Host),
            ("https://[::1]x/", UrlError::Port),
            ("https://shop.example:http/", UrlError::Port),
            ("https://::1/", UrlError::Port),
        ] {
            assert_eq!(encoded(url.into()).unwrap_err(), expected, "{url}");
        }
    }

    proptest! {
        #[test]
        fn makes_uri_references_that_need_no_more_encoding(url in "[ -~\u{e9}]{0,12}|(https?:)?//[a-z@:\\[\\]0-9%]{0,8}[ -~]{0,12}") {
            if let Ok(once) = encoded(url.as_str().into()) {
                prop_assert!(is_uri_reference(&once), "{once}");
                prop_assert_eq!(&encoded(once.as_str().into()).unwrap(), &once);
            }
        }

        #[test]
        fn decodes_to_the_original_text(path in "/[a-z \u{e9}\"<>^`{|}\\\\]{0,12}") {
            // `//` would begin an authority.
            prop_assume!(!path.starts_with("//"));
            let once = of(&path);
            let mut decoded = Vec::new();
            let mut bytes = once.bytes();
            while let Some(byte) = bytes.next() {
                let escape = |bytes: &mut std::str::Bytes<'_>| {
                    u8::from_str_radix(&[bytes.next().unwrap(), bytes.next().unwrap()].map(char::from).iter().collect::<String>(), 16).unwrap()
                };
                decoded.push(if byte == b'%' { escape(&mut bytes) } else { byte });
            }
            prop_assert_eq!(String::from_utf8(decoded).unwrap(), path.trim_matches(' '));
        }
    }
}
