//! A JSON reader that does not copy, and a writer that does not build a tree.
//!
//! The reader validates a document once and returns slices of it. It does not recurse, so no input
//! can overflow the module's stack, and it allocates only for strings that contain an escape.

use std::borrow::Cow;
use std::fmt;

/// Invalid JSON: what was expected, and at which byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Error {
    expected: &'static str,
    at: usize,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "invalid JSON: expected {} at byte {}", self.expected, self.at)
    }
}

impl std::error::Error for Error {}

/// A value of a validated document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Value<'a>(&'a str);

impl<'a> Value<'a> {
    /// Validates `text` as a single JSON value.
    ///
    /// # Errors
    ///
    /// Fails if `text` is invalid JSON or if something follows the value.
    pub fn parse(text: &'a str) -> Result<Self, Error> {
        let mut scanner = Scanner { text, at: 0 };
        let value = scanner.value()?;
        scanner.end()?;
        Ok(value)
    }

    /// The JSON of the value, as it is in the document.
    pub const fn as_json(self) -> &'a str {
        self.0
    }

    /// Whether the value is `null`.
    pub fn is_null(self) -> bool {
        self.0 == "null"
    }

    /// The text of a string, borrowed unless it contains an escape.
    pub fn as_str(self) -> Option<Cow<'a, str>> {
        Some(unescape(self.0.strip_prefix('"')?.strip_suffix('"')?))
    }

    /// A boolean.
    pub fn as_bool(self) -> Option<bool> {
        match self.0 {
            "true" => Some(true),
            "false" => Some(false),
            _ => None,
        }
    }

    /// A non-negative integer below 2^64 in any notation (`200`, `2e2`, `200.0`).
    pub fn as_u64(self) -> Option<u64> {
        whole_number(self.0)
    }

    /// A number, rounded to the nearest float.
    pub fn as_f64(self) -> Option<f64> {
        matches!(self.0.as_bytes().first()?, b'-' | b'0'..=b'9').then(|| self.0.parse().ok())?
    }

    /// The members of an object in document order. Other values have none.
    pub fn members(self) -> Members<'a> {
        let at = if self.0.starts_with('{') { 1 } else { self.0.len() };
        Members(Scanner { text: self.0, at })
    }

    /// The elements of an array. Other values have none.
    pub fn elements(self) -> Elements<'a> {
        let at = if self.0.starts_with('[') { 1 } else { self.0.len() };
        Elements(Scanner { text: self.0, at })
    }

    /// The last member of an object with this name.
    pub fn get(self, name: &str) -> Option<Value<'a>> {
        self.members().filter(|(key, _)| key.is(name)).last().map(|(_, value)| value)
    }
}

/// The name of an object member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key<'a>(&'a str);

impl<'a> Key<'a> {
    /// The name, borrowed unless it contains an escape.
    pub fn as_str(self) -> Cow<'a, str> {
        unescape(self.0)
    }

    /// Whether the name equals `name`.
    pub fn is(self, name: &str) -> bool {
        self.matches(name, |key, name| key == name)
    }

    /// Whether the name equals `name`, ignoring ASCII case.
    pub fn is_ignoring_case(self, name: &str) -> bool {
        self.matches(name, str::eq_ignore_ascii_case)
    }

    fn matches(self, name: &str, equal: fn(&str, &str) -> bool) -> bool {
        // An escape is longer than the character that it encodes.
        if self.0.len() > name.len() && self.0.contains('\\') { equal(&unescape(self.0), name) } else { equal(self.0, name) }
    }
}

/// The members of an object. See [`Value::members`].
#[derive(Clone, Debug)]
pub struct Members<'a>(Scanner<'a>);

impl<'a> Iterator for Members<'a> {
    type Item = (Key<'a>, Value<'a>);

    fn next(&mut self) -> Option<Self::Item> {
        let Self(scanner) = self;
        scanner.skip_whitespace();
        if scanner.peek() == Some(b',') {
            scanner.at += 1;
        }
        let key = scanner.key().ok()?;
        let value = scanner.value().ok()?;
        Some((key, value))
    }
}

/// The elements of an array. See [`Value::elements`].
#[derive(Clone, Debug)]
pub struct Elements<'a>(Scanner<'a>);

impl<'a> Iterator for Elements<'a> {
    type Item = Value<'a>;

    fn next(&mut self) -> Option<Self::Item> {
        let Self(scanner) = self;
        scanner.skip_whitespace();
        if scanner.peek() == Some(b',') {
            scanner.at += 1;
        }
        scanner.value().ok()
    }
}

/// Validates `text` as a single object and calls `member` for each of its members.
pub(crate) fn read_object<'a>(text: &'a str, mut member: impl FnMut(Key<'a>, Value<'a>)) -> Result<(), Error> {
    let mut scanner = Scanner { text, at: 0 };
    scanner.skip_whitespace();
    scanner.take(b'{', "an object")?;
    scanner.skip_whitespace();
    if scanner.peek() == Some(b'}') {
        scanner.at += 1;
        return scanner.end();
    }
    loop {
        let key = scanner.key()?;
        let value = scanner.value()?;
        member(key, value);
        scanner.skip_whitespace();
        match scanner.peek() {
            Some(b',') => scanner.at += 1,
            Some(b'}') => {
                scanner.at += 1;
                return scanner.end();
            }
            _ => return Err(scanner.expected("`,` or `}`")),
        }
    }
}

#[derive(Clone, Debug)]
struct Scanner<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Scanner<'a> {
    fn expected(&self, expected: &'static str) -> Error {
        Error { expected, at: self.at }
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn skip_whitespace(&mut self) {
        while let Some(b' ' | b'\n' | b'\r' | b'\t') = self.peek() {
            self.at += 1;
        }
    }

    fn take(&mut self, byte: u8, expected: &'static str) -> Result<(), Error> {
        if self.peek() != Some(byte) {
            return Err(self.expected(expected));
        }
        self.at += 1;
        Ok(())
    }

    fn end(&mut self) -> Result<(), Error> {
        self.skip_whitespace();
        if self.at == self.text.len() { Ok(()) } else { Err(self.expected("the end")) }
    }

    /// Reads a member name and the colon after it.
    fn key(&mut self) -> Result<Key<'a>, Error> {
        self.skip_whitespace();
        let from = self.at + 1;
        self.string()?;
        let key = self.text.get(from..self.at - 1).unwrap_or_default();
        self.skip_whitespace();
        self.take(b':', "`:`")?;
        Ok(Key(key))
    }

    /// Reads the next value, including all nested values.
    fn value(&mut self) -> Result<Value<'a>, Error> {
        self.skip_whitespace();
        let from = self.at;
        match self.peek() {
            Some(b'"') => self.string()?,
            Some(b'{' | b'[') => self.container()?,
            _ => self.scalar()?,
        }
        Ok(Value(self.text.get(from..self.at).unwrap_or_default()))
    }

    /// Skips an object or array of any depth, without recursion.
    fn container(&mut self) -> Result<(), Error> {
        let mut nesting = Nesting::default();
        loop {
            self.skip_whitespace();
            let closed = match self.peek() {
                Some(b'"') => self.string().map(|()| true)?,
                Some(b'{') => self.open(b'}')?,
                Some(b'[') => self.open(b']')?,
                _ => self.scalar().map(|()| true)?,
            };
            if !closed {
                let object = self.text.as_bytes().get(self.at - 1) == Some(&b'{');
                nesting.push(object);
                if object {
                    self.key()?;
                }
                continue;
            }
            // After a value, each enclosing container continues or ends.
            loop {
                let Some(object) = nesting.innermost() else { return Ok(()) };
                self.skip_whitespace();
                match (self.peek(), object) {
                    (Some(b','), _) => {
                        self.at += 1;
                        if object {
                            self.key()?;
                        }
                        break;
                    }
                    (Some(b'}'), true) | (Some(b']'), false) => {
                        self.at += 1;
                        nesting.pop();
                    }
                    (_, true) => return Err(self.expected("`,` or `}`")),
                    (_, false) => return Err(self.expected("`,` or `]`")),
                }
            }
        }
    }

    /// Enters an object or array. Returns true if it was empty and has been closed.
    fn open(&mut self, close: u8) -> Result<bool, Error> {
        self.at += 1;
        let inside = self.at;
        self.skip_whitespace();
        let empty = self.peek() == Some(close);
        if empty {
            self.at += 1;
        } else {
            self.at = inside;
        }
        Ok(empty)
    }

    /// Skips a string, including the quotes.
    fn string(&mut self) -> Result<(), Error> {
        self.take(b'"', "a string")?;
        let bytes = self.text.as_bytes();
        loop {
            match first_special(bytes, self.at) {
                Some((at, b'"')) => {
                    self.at = at + 1;
                    return Ok(());
                }
                Some((at, b'\\')) => {
                    self.at = at + 1;
                    match self.peek() {
                        Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => self.at += 1,
                        Some(b'u') => {
                            let digits = bytes.get(at + 2..at + 6).unwrap_or_default();
                            if digits.len() < 4 || !digits.iter().all(u8::is_ascii_hexdigit) {
                                return Err(self.expected("four hexadecimal digits"));
                            }
                            self.at = at + 6;
                        }
                        _ => return Err(self.expected("an escape")),
                    }
                }
                Some((at, _)) => {
                    self.at = at;
                    return Err(self.expected("no control character"));
                }
                None => {
                    self.at = bytes.len();
                    return Err(self.expected("`\"`"));
                }
            }
        }
    }

    /// Skips a number, true, false or null.
    fn scalar(&mut self) -> Result<(), Error> {
        for literal in ["true", "false", "null"] {
            if self.text.as_bytes().get(self.at..).is_some_and(|rest| rest.starts_with(literal.as_bytes())) {
                self.at += literal.len();
                return Ok(());
            }
        }
        if self.peek() == Some(b'-') {
            self.at += 1;
        }
        match self.peek() {
            Some(b'0') => self.at += 1,
            Some(b'1'..=b'9') => self.digits()?,
            _ => return Err(self.expected("a value")),
        }
        if self.peek() == Some(b'.') {
            self.at += 1;
            self.digits()?;
        }
        if let Some(b'e' | b'E') = self.peek() {
            self.at += 1;
            if let Some(b'+' | b'-') = self.peek() {
                self.at += 1;
            }
            self.digits()?;
        }
        Ok(())
    }

    fn digits(&mut self) -> Result<(), Error> {
        let from = self.at;
        while let Some(b'0'..=b'9') = self.peek() {
            self.at += 1;
        }
        if self.at == from { Err(self.expected("a digit")) } else { Ok(()) }
    }
}

/// The stack of open containers, one bit per level: 64 levels need no heap allocation.
#[derive(Default)]
struct Nesting {
    depth: usize,
    innermost: u64,
    outer: Vec<u64>,
}

impl Nesting {
    fn push(&mut self, object: bool) {
        if self.depth > 0 && self.depth.is_multiple_of(64) {
            self.outer.push(self.innermost);
        }
        self.innermost = self.innermost << 1 | u64::from(object);
        self.depth += 1;
    }

    /// Whether the innermost container is an object.
    fn innermost(&self) -> Option<bool> {
        (self.depth > 0).then_some(self.innermost & 1 == 1)
    }

    fn pop(&mut self) {
        self.depth -= 1;
        self.innermost >>= 1;
        if self.depth > 0
            && self.depth.is_multiple_of(64)
            && let Some(outer) = self.outer.pop()
        {
            self.innermost = outer;
        }
    }
}

/// Finds the first special byte of a string from `at` on: `"`, `\` or a control character.
///
/// Checks eight bytes at a time, because such bytes are rare in the strings of a request.
fn first_special(bytes: &[u8], mut at: usize) -> Option<(usize, u8)> {
    const ONES: u64 = u64::from_le_bytes([0x01; 8]);
    const HIGHS: u64 = u64::from_le_bytes([0x80; 8]);
    const QUOTES: u64 = u64::from_le_bytes([b'"'; 8]);
    const BACKSLASHES: u64 = u64::from_le_bytes([b'\\'; 8]);

    // The lowest set high bit marks the first zero byte. Higher bits may be wrong, due to a borrow.
    let zeros = |word: u64| word.wrapping_sub(ONES) & !word & HIGHS;
    while let Some(chunk) = bytes.get(at..).and_then(<[u8]>::first_chunk::<8>) {
        let word = u64::from_le_bytes(*chunk);
        let controls = word.wrapping_sub(ONES * 0x20) & !word & HIGHS;
        let found = controls | zeros(word ^ QUOTES) | zeros(word ^ BACKSLASHES);
        if found != 0 {
            let offset = (found.trailing_zeros() / 8) as usize;
            return Some((at + offset, chunk[offset]));
        }
        at += 8;
    }
    let rest = bytes.get(at..)?;
    let offset = rest.iter().position(|&byte| byte < 0x20 || byte == b'"' || byte == b'\\')?;
    Some((at + offset, rest[offset]))
}

/// Decodes the content of a string. An unpaired surrogate becomes U+FFFD.
fn unescape(raw: &str) -> Cow<'_, str> {
    if !raw.contains('\\') {
        return Cow::Borrowed(raw);
    }
    let mut text = String::with_capacity(raw.len());
    let mut rest = raw;
    while let Some((plain, escape)) = rest.split_once('\\') {
        text.push_str(plain);
        let Some(&kind) = escape.as_bytes().first() else { break };
        rest = escape.get(1..).unwrap_or_default();
        text.push(match kind {
            b'b' => '\u{8}',
            b'f' => '\u{c}',
            b'n' => '\n',
            b'r' => '\r',
            b't' => '\t',
            b'u' => {
                let (character, after) = code_point(rest);
                rest = after;
                character
            }
            other => char::from(other),
        });
    }
    text.push_str(rest);
    Cow::Owned(text)
}

/// Decodes the character after `\u`. Returns it with the rest of the string.
fn code_point(digits: &str) -> (char, &str) {
    let unit = |digits: &str| digits.get(..4).and_then(|digits| u32::from_str_radix(digits, 16).ok());
    let after = digits.get(4..).unwrap_or_default();
    let Some(first) = unit(digits) else { return (char::REPLACEMENT_CHARACTER, after) };
    if let Some(character) = char::from_u32(first) {
        return (character, after);
    }
    let second = after.strip_prefix("\\u");
    if let (0xd800..=0xdbff, Some(low)) = (first, second)
        && let Some(second @ 0xdc00..=0xdfff) = unit(low)
        && let Some(character) = char::from_u32(0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00))
    {
        return (character, low.get(4..).unwrap_or_default());
    }
    (char::REPLACEMENT_CHARACTER, after)
}

/// The value of a JSON number that is an integer and fits.
fn whole_number(number: &str) -> Option<u64> {
    let (mantissa, exponent) = match number.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, Some(exponent)),
        None => (number, None),
    };
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    if !whole.bytes().all(|byte| byte.is_ascii_digit()) || whole.is_empty() {
        return None;
    }
    let fraction = fraction.trim_end_matches('0');
    let digits = || whole.bytes().chain(fraction.bytes()).map(|digit| u64::from(digit - b'0'));
    if digits().all(|digit| digit == 0) {
        return Some(0);
    }
    let exponent: i64 = exponent.map_or(Some(0), |exponent| exponent.parse().ok())?;
    let shift = exponent.checked_sub(i64::try_from(fraction.len()).ok()?)?;
    let keep = usize::try_from(i64::try_from(whole.len() + fraction.len()).ok()?.checked_add(shift.min(0))?).ok()?;
    if digits().skip(keep).any(|digit| digit != 0) {
        return None;
    }
    let mut value = digits().take(keep).try_fold(0_u64, |value, digit| value.checked_mul(10)?.checked_add(digit))?;
    for _ in 0..shift.max(0) {
        value = value.checked_mul(10)?;
    }
    Some(value)
}

/// Appends `value` as a JSON string.
pub(crate) fn write_string(out: &mut Vec<u8>, value: &str) {
    out.reserve(value.len() + 2);
    out.push(b'"');
    let bytes = value.as_bytes();
    let mut from = 0;
    while let Some((at, byte)) = first_special(bytes, from) {
        out.extend_from_slice(&bytes[from..at]);
        match byte {
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'\t' => out.extend_from_slice(b"\\t"),
            b'"' | b'\\' => out.extend_from_slice(&[b'\\', byte]),
            control => {
                const HEX: &[u8; 16] = b"0123456789abcdef";
                let digits = [HEX[usize::from(control >> 4)], HEX[usize::from(control & 15)]];
                out.extend_from_slice(b"\\u00");
                out.extend_from_slice(&digits);
            }
        }
        from = at + 1;
    }
    out.extend_from_slice(&bytes[from..]);
    out.push(b'"');
}

/// Appends `"name":`, preceded by a comma unless it is the first member. `name` must not need
/// escapes.
pub(crate) fn write_key(out: &mut Vec<u8>, name: &str) {
    write_separator(out);
    out.push(b'"');
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b"\":");
}

/// Appends a comma, unless an object or array was just opened.
pub(crate) fn write_separator(out: &mut Vec<u8>) {
    if !matches!(out.last(), None | Some(b'{' | b'[')) {
        out.push(b',');
    }
}

/// Appends an integer.
pub(crate) fn write_number(out: &mut Vec<u8>, mut value: u64) {
    let mut digits = [0; 20];
    let mut from = digits.len();
    loop {
        from -= 1;
        digits[from] = b'0' + (value % 10) as u8;
        value /= 10;
        if value == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[from..]);
}

/// Appends a score from 0 to 1 with at most six decimals. That is precise enough, and does not link
/// the code that formats arbitrary floats.
pub(crate) fn write_score(out: &mut Vec<u8>, score: f64) {
    // The cast saturates, and turns NaN into zero.
    let millionths = (score * 1e6 + 0.5) as u64;
    if millionths >= 1_000_000 {
        out.push(b'1');
        return;
    }
    out.push(b'0');
    if millionths > 0 {
        out.push(b'.');
        let mut rest = millionths;
        let mut unit = 100_000;
        while rest > 0 {
            out.push(b'0' + (rest / unit) as u8);
            rest %= unit;
            unit /= 10;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text(json: &str) -> String {
        Value::parse(json).unwrap().as_str().unwrap().into_owned()
    }

    fn same(value: Value<'_>, expected: &serde_json::Value) -> bool {
        match expected {
            serde_json::Value::Null => value.is_null(),
            serde_json::Value::Bool(expected) => value.as_bool() == Some(*expected),
            serde_json::Value::Number(expected) => match expected.as_u64() {
                Some(expected) => value.as_u64() == Some(expected),
                None => value.as_f64() == expected.as_f64(),
            },
            serde_json::Value::String(expected) => value.as_str().as_deref() == Some(expected),
            serde_json::Value::Array(expected) => {
                value.elements().count() == expected.len() && value.elements().zip(expected).all(|(value, expected)| same(value, expected))
            }
            serde_json::Value::Object(expected) => {
                value.members().count() == expected.len()
                    && value.members().all(|(key, value)| expected.get(&*key.as_str()).is_some_and(|e| same(value, e)))
            }
        }
    }

    fn json() -> impl Strategy<Value = serde_json::Value> {
        let leaf = prop_oneof![
            Just(serde_json::Value::Null),
            any::<bool>().prop_map(Into::into),
            any::<u64>().prop_map(Into::into),
            any::<i64>().prop_map(Into::into),
            any::<String>().prop_map(Into::into),
        ];
        leaf.prop_recursive(6, 64, 8, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..8).prop_map(Into::into),
                prop::collection::btree_map(any::<String>(), inner, 0..8)
                    .prop_map(|members| serde_json::Value::Object(members.into_iter().collect())),
            ]
        })
    }

    mod documents {
        use super::*;

        #[test]
        fn rejects_invalid_json() {
            for json in [
                "",
                " ",
                "{",
                "}",
                "[",
                "]",
                "{]",
                "[}",
                "{,}",
                "[,]",
                "[1,]",
                "{\"a\":1,}",
                "{\"a\"}",
                "{\"a\":}",
                "{a:1}",
                "[1 2]",
                "nul",
                "tru",
                "01",
                "-",
                "1.",
                ".5",
                "1e",
                "1e+",
                "+1",
                "0x1",
                "NaN",
                "\"",
                "\"\\\"",
                "\"\\x\"",
                "\"\\u12\"",
                "\"\\u12g4\"",
                "\"\n\"",
                "\"a\u{0}b\"",
                "1 1",
                "{} x",
                "[[[[",
                "{\"a\":{\"b\":[}]}",
                "\u{feff}1",
            ] {
                assert!(Value::parse(json).is_err(), "{json:?} was accepted");
            }
        }

        #[test]
        fn errors_name_the_position() {
            let error = Value::parse("{\"a\" 1}").unwrap_err();
            assert_eq!(error.to_string(), "invalid JSON: expected `:` at byte 5");
        }

        #[test]
        fn accepts_a_million_levels_without_overflowing_the_stack() {
            let levels = 1_000_000;
            let arrays = "[".repeat(levels) + &"]".repeat(levels);
            assert!(Value::parse(&arrays).is_ok());
            let objects = "{\"a\":".repeat(levels) + "1" + &"}".repeat(levels);
            assert!(Value::parse(&objects).is_ok());
            assert!(Value::parse(&arrays[..arrays.len() - 1]).is_err());
            let crossed = "[".repeat(64) + "{\"a\":" + &"[".repeat(64) + &"]".repeat(64) + "}" + &"]".repeat(64);
            assert!(Value::parse(&crossed).is_ok());
            let crossed = crossed.replace('}', "]");
            assert!(Value::parse(&crossed).is_err());
        }

        #[test]
        fn get_returns_the_last_member_of_a_name() {
            let value = Value::parse(r#"{"a":1,"b":2,"\u0061":3}"#).unwrap();
            assert_eq!(value.get("a").unwrap().as_u64(), Some(3));
            assert_eq!(value.get("b").unwrap().as_u64(), Some(2));
            assert_eq!(value.get("c"), None);
        }

        proptest! {
            #[test]
            fn agrees_with_serde_json(value in json()) {
                let compact = value.to_string();
                prop_assert!(same(Value::parse(&compact).unwrap(), &value));
                let pretty = serde_json::to_string_pretty(&value).unwrap();
                prop_assert!(same(Value::parse(&pretty).unwrap(), &value));
            }

            #[test]
            fn rejects_the_damaged_documents_that_serde_json_rejects(value in json(), cut in any::<prop::sample::Index>(), with in "[\"\\\\,:{}0-9a-z\\[\\]]?") {
                let mut text = value.to_string();
                let mut at = cut.index(text.len());
                while !text.is_char_boundary(at) {
                    at -= 1;
                }
                let end = at + text[at..].chars().next().map_or(0, char::len_utf8);
                text.replace_range(at..end, &with);
                // `IgnoredAny` accepts numbers beyond f64, which an `e` among the digits makes:
                // they are valid JSON.
                let accepted = serde_json::from_str::<serde::de::IgnoredAny>(&text).is_ok();
                prop_assert_eq!(Value::parse(&text).is_ok(), accepted, "{}", text);
            }

            #[test]
            fn never_panics(text in any::<String>()) {
                let _ = Value::parse(&text);
            }
        }
    }

    mod strings {
        use super::*;

        #[test]
        fn decodes_every_escape() {
            assert_eq!(text(r#""\" \\ \/ \b \f \n \r \t \u0041""#), "\" \\ / \u{8} \u{c} \n \r \t A");
            assert_eq!(text(r#""\u00e9\uD83D\ude00\u20ac""#), "é😀€");
            assert_eq!(text(r#""\\u0041""#), "\\u0041");
            assert_eq!(text(r#""\/\u0061dmin""#), "/admin");
            assert_eq!(text(r#""\u0000""#), "\0");
        }

        #[test]
        fn replaces_unpaired_surrogates() {
            assert_eq!(text(r#""\ud83d""#), "\u{fffd}");
            assert_eq!(text(r#""\ude00x""#), "\u{fffd}x");
            assert_eq!(text(r#""\ud83dx""#), "\u{fffd}x");
            assert_eq!(text(r#""\ud83d\u0041""#), "\u{fffd}A");
            assert_eq!(text(r#""\ud83d\ud83d\ude00""#), "\u{fffd}😀");
            assert_eq!(text(r#""\ud83d\n""#), "\u{fffd}\n");
        }

        #[test]
        fn borrows_strings_without_escapes() {
            let value = Value::parse("\"größer\"").unwrap();
            assert!(matches!(value.as_str(), Some(Cow::Borrowed("größer"))));
        }

        proptest! {
            #[test]
            fn reads_back_written_strings(value in any::<String>()) {
                let mut out = Vec::new();
                write_string(&mut out, &value);
                prop_assert_eq!(serde_json::from_slice::<String>(&out).unwrap(), value);
            }
        }
    }

    mod numbers {
        use super::*;

        #[test]
        fn reads_integers_in_any_notation() {
            let number = |json: &str| Value::parse(json).unwrap().as_u64();
            for (json, expected) in [
                ("0", Some(0)),
                ("-0", None),
                ("200", Some(200)),
                ("2e2", Some(200)),
                ("2.5E+1", Some(25)),
                ("200.0", Some(200)),
                ("2000e-1", Some(200)),
                ("0e999999999999999999999", Some(0)),
                ("0.5", None),
                ("1e-1", None),
                ("-1", None),
                ("18446744073709551615", Some(u64::MAX)),
                ("18446744073709551616", None),
                ("1e400", None),
                ("1e-400", None),
                ("1e99999999999999999999", None),
            ] {
                assert_eq!(number(json), expected, "{json}");
            }
            assert_eq!(Value::parse("-2.5e-1").unwrap().as_f64(), Some(-0.25));
            assert_eq!(Value::parse("\"1\"").unwrap().as_f64(), None);
        }

        #[test]
        fn writes_scores_with_at_most_six_decimals() {
            for (score, expected) in [
                (0.0, "0"),
                (1.0, "1"),
                (0.95, "0.95"),
                (0.5, "0.5"),
                (1.0 / 3.0, "0.333333"),
                (0.000_001, "0.000001"),
                (0.999_999_9, "1"),
                (7.0, "1"),
                (-1.0, "0"),
                (f64::NAN, "0"),
            ] {
                let mut out = Vec::new();
                write_score(&mut out, score);
                assert_eq!(String::from_utf8(out).unwrap(), expected, "{score}");
            }
        }
    }
}
