//! What a URI reference is, written down a second time: independent of the code that makes URLs.

/// Whether a text has only what the grammar of a URI reference allows (RFC 3986, appendix A): its
/// characters, whole escapes, brackets only in a host, and at most one fragment.
pub fn is_uri_reference(url: &str) -> bool {
    let bytes = url.as_bytes();
    let host = url.find("//").map_or(0..0, |slashes| {
        let end = url[slashes + 2..].find(['/', '?', '#']).map_or(url.len(), |end| slashes + 2 + end);
        slashes + 2..end
    });
    let characters = bytes.iter().enumerate().all(|(at, byte)| match byte {
        b'%' => bytes.len() > at + 2 && bytes[at + 1..at + 3].iter().all(u8::is_ascii_hexdigit),
        b'[' | b']' => host.contains(&at),
        _ => byte.is_ascii_alphanumeric() || b"-._~:/?#@!$&'()*+,;=".contains(byte),
    });
    characters && bytes.iter().filter(|&&byte| byte == b'#').count() <= 1
}
