//! A fast reader for the events of every request, in compact JSON as the proxy writes it.
//!
//! It accepts a subset of JSON with the same result as serde_json, else returns `None`, and
//! serde_json decodes the event. So what is valid, and what an error reads like, is decided in one
//! place.

use memchr::memchr2;
use zentinel_wasm_contract::event::{BodyChunk, Data, HeaderValues, Headers, Metadata, RequestHeaders, ResponseHeaders};
use zentinel_wasm_contract::{MAX_ENTRIES, Text};

/// Reads request headers.
pub(crate) fn request_headers(text: &str) -> Option<RequestHeaders<'_>> {
    let (mut metadata, mut method, mut uri, mut headers) = (None, None, None, None);
    Reader::whole(text, |reader, name| match name {
        "metadata" => once(&mut metadata, reader.metadata()),
        "method" => once(&mut method, reader.string()),
        "uri" => once(&mut uri, reader.string()),
        "headers" => once(&mut headers, reader.headers()),
        _ => reader.skip(),
    })?;
    Some(RequestHeaders { metadata: metadata?, method: method?, uri: uri?, headers: headers? })
}

/// Reads response headers.
pub(crate) fn response_headers(text: &str) -> Option<ResponseHeaders<'_>> {
    let (mut correlation_id, mut status, mut headers) = (None, None, None);
    Reader::whole(text, |reader, name| match name {
        "correlation_id" => once(&mut correlation_id, reader.string()),
        "status" => once(&mut status, reader.number()),
        "headers" => once(&mut headers, reader.headers()),
        _ => reader.skip(),
    })?;
    Some(ResponseHeaders { correlation_id: correlation_id?, status: status?, headers: headers? })
}

/// Reads a body chunk.
pub(crate) fn body_chunk(text: &str) -> Option<BodyChunk<'_>> {
    let (mut correlation_id, mut data, mut is_last, mut chunk_index) = (None, None, None, None);
    let (mut total_size, mut bytes_received, mut bytes_sent) = (None, None, None);
    Reader::whole(text, |reader, name| match name {
        "correlation_id" => once(&mut correlation_id, reader.string()),
        "data" => once(&mut data, reader.string()),
        "is_last" => once(&mut is_last, reader.boolean()),
        "chunk_index" => once(&mut chunk_index, reader.number()),
        "total_size" => once(&mut total_size, reader.optional(Reader::number)),
        "bytes_received" => once(&mut bytes_received, reader.optional(Reader::number)),
        "bytes_sent" => once(&mut bytes_sent, reader.optional(Reader::number)),
        _ => reader.skip(),
    })?;
    Some(BodyChunk {
        correlation_id: correlation_id?,
        data: Data::Base64(data?),
        is_last: is_last?,
        total_size: total_size.flatten(),
        chunk_index: chunk_index.unwrap_or(0),
        bytes_received: bytes_received.flatten(),
        bytes_sent: bytes_sent.flatten(),
    })
}

/// Sets a field, or returns `None` if it is set already.
fn once<T>(field: &mut Option<T>, value: Option<T>) -> Option<()> {
    match field {
        Some(_) => None,
        None => {
            *field = Some(value?);
            Some(())
        }
    }
}

/// Position of the first quote or backslash.
#[inline]
fn string_end(bytes: &[u8]) -> Option<usize> {
    /// Words that are searched here. Most strings are not longer, and `memchr2` costs more than the
    /// search of so few.
    const SHORT: usize = 4;
    const ONES: u64 = u64::from_le_bytes([0x01; 8]);
    const HIGHS: u64 = u64::from_le_bytes([0x80; 8]);

    // Sets the high bit of each zero byte. A borrow may set that of a byte above the first zero,
    // never of one below it.
    let zeros = |word: u64| word.wrapping_sub(ONES) & !word & HIGHS;
    let (words, _) = bytes.as_chunks::<8>();
    for (at, word) in words.iter().take(SHORT).enumerate() {
        let word = u64::from_le_bytes(*word);
        let marks = zeros(word ^ (ONES * 0x22)) | zeros(word ^ (ONES * 0x5c));
        if marks != 0 {
            return Some(8 * at + (marks.trailing_zeros() / 8) as usize);
        }
    }
    let searched = 8 * words.len().min(SHORT);
    memchr2(b'"', b'\\', &bytes[searched..]).map(|at| searched + at)
}

/// A position in a text without control characters. Each method reads one item from there, or
/// returns `None`.
struct Reader<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Reader<'a> {
    /// Reads a text that is one object. `field` reads the value of each field.
    fn whole(text: &'a str, field: impl FnMut(&mut Self, &str) -> Option<()>) -> Option<()> {
        // Checked for the whole text at once, which compiles to vector instructions, and not again
        // for each string.
        let controls = text.as_bytes().iter().fold(0, |controls, byte| controls | u8::from(*byte < 0x20));
        if controls != 0 {
            return None;
        }
        let mut reader = Self { text, at: 0 };
        reader.object(field)?;
        (reader.at == text.len()).then_some(())
    }

    fn rest(&self) -> &'a [u8] {
        &self.text.as_bytes()[self.at..]
    }

    fn next(&mut self) -> Option<u8> {
        let next = *self.rest().first()?;
        self.at += 1;
        Some(next)
    }

    fn take(&mut self, literal: &[u8]) -> Option<()> {
        if self.rest().starts_with(literal) {
            self.at += literal.len();
            Some(())
        } else {
            None
        }
    }

    /// Reads an object. `field` reads the value of each field.
    #[inline]
    fn object(&mut self, mut field: impl FnMut(&mut Self, &str) -> Option<()>) -> Option<()> {
        self.pairs(|reader, name| field(reader, &name))
    }

    #[inline]
    fn pairs(&mut self, mut pair: impl FnMut(&mut Self, Text<'a>) -> Option<()>) -> Option<()> {
        self.take(b"{")?;
        if self.take(b"}").is_some() {
            return Some(());
        }
        loop {
            let name = self.string()?;
            self.take(b":")?;
            pair(self, name)?;
            match self.next()? {
                b',' => {}
                b'}' => return Some(()),
                _ => return None,
            }
        }
    }

    #[inline]
    fn string(&mut self) -> Option<Text<'a>> {
        self.take(b"\"")?;
        let start = self.at;
        let end = start + string_end(self.rest())?;
        if self.text.as_bytes()[end] == b'\\' {
            return self.escaped(start, end);
        }
        self.at = end + 1;
        Some(Text::borrowed(&self.text[start..end]))
    }

    /// Reads a string that starts at `start` and has its first backslash at `at`.
    fn escaped(&mut self, start: usize, at: usize) -> Option<Text<'a>> {
        let bytes = self.text.as_bytes();
        let mut at = at;
        while bytes[at] == b'\\' {
            at += 2;
            at += memchr2(b'"', b'\\', bytes.get(at..)?)?;
        }
        self.at = at + 1;
        // With its quotes.
        serde_json::from_str::<String>(&self.text[start - 1..=at]).ok().map(Text::from)
    }

    fn number<T: TryFrom<u64>>(&mut self) -> Option<T> {
        let digits = self.rest().iter().take_while(|byte| byte.is_ascii_digit()).count();
        let number = &self.text[self.at..self.at + digits];
        if number.len() > 1 && number.starts_with('0') {
            return None;
        }
        self.at += digits;
        // The value must end here: serde_json reads fractions and exponents.
        matches!(self.rest().first(), Some(b',' | b'}')).then_some(())?;
        T::try_from(number.parse().ok()?).ok()
    }

    fn boolean(&mut self) -> Option<bool> {
        if self.take(b"true").is_some() { Some(true) } else { self.take(b"false").map(|()| false) }
    }

    fn optional<T>(&mut self, value: impl FnOnce(&mut Self) -> Option<T>) -> Option<Option<T>> {
        if self.take(b"null").is_some() { Some(None) } else { value(self).map(Some) }
    }

    /// Skips the value of an unknown field.
    fn skip(&mut self) -> Option<()> {
        match self.rest().first()? {
            b'"' => self.string().map(drop),
            b't' | b'f' => self.boolean().map(drop),
            b'n' => self.take(b"null"),
            // Known proxies write no arrays or objects in other fields.
            _ => self.number::<u64>().map(drop),
        }
    }

    fn metadata(&mut self) -> Option<Metadata<'a>> {
        let (mut correlation_id, mut client_ip, mut client_port) = (None, None, None);
        let (mut request_id, mut server_name, mut protocol, mut tls_version) = (None, None, None, None);
        let (mut route_id, mut upstream_id, mut timestamp, mut traceparent) = (None, None, None, None);
        self.object(|reader, name| match name {
            "correlation_id" => once(&mut correlation_id, reader.string()),
            "request_id" => once(&mut request_id, reader.optional(Self::string)),
            "client_ip" => once(&mut client_ip, reader.string()),
            "client_port" => once(&mut client_port, reader.number()),
            "server_name" => once(&mut server_name, reader.optional(Self::string)),
            "protocol" => once(&mut protocol, reader.optional(Self::string)),
            "tls_version" => once(&mut tls_version, reader.optional(Self::string)),
            "route_id" => once(&mut route_id, reader.optional(Self::string)),
            "upstream_id" => once(&mut upstream_id, reader.optional(Self::string)),
            "timestamp" => once(&mut timestamp, reader.optional(Self::string)),
            "traceparent" => once(&mut traceparent, reader.optional(Self::string)),
            _ => reader.skip(),
        })?;
        Some(Metadata {
            correlation_id: correlation_id?,
            request_id: request_id.flatten(),
            client_ip: client_ip.unwrap_or_default(),
            client_port: client_port.unwrap_or(0),
            server_name: server_name.flatten(),
            protocol: protocol.flatten(),
            tls_version: tls_version.flatten(),
            route_id: route_id.flatten(),
            upstream_id: upstream_id.flatten(),
            timestamp: timestamp.flatten(),
            traceparent: traceparent.flatten(),
        })
    }

    fn headers(&mut self) -> Option<Headers<'a>> {
        // Most requests have 10 to 20.
        let mut headers = Vec::with_capacity(16);
        let mut entries = 0;
        self.pairs(|reader, name| {
            let values = reader.values(MAX_ENTRIES - entries)?;
            entries += values.as_slice().len().max(1);
            headers.push((name, values));
            Some(())
        })?;
        Some(Headers(headers))
    }

    /// Reads an array of at most `most` strings. An empty array counts as one.
    fn values(&mut self, most: usize) -> Option<HeaderValues<'a>> {
        if most == 0 {
            return None;
        }
        self.take(b"[")?;
        if self.take(b"]").is_some() {
            return Some(HeaderValues::Many(Vec::new()));
        }
        let mut values = HeaderValues::One(self.string()?);
        loop {
            match self.next()? {
                b',' if values.as_slice().len() < most => values.push(self.string()?),
                b']' => return Some(values),
                _ => return None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    /// Request headers with these values; `None` becomes null.
    fn request(strings: &[String; 4], optional: Option<&String>, number: u32) -> String {
        let [id, uri, name, value] = strings;
        json!({
            "metadata": {"correlation_id": id, "request_id": optional, "client_ip": value, "client_port": number, "server_name": optional,
                         "protocol": optional, "tls_version": null, "tls_cipher": null, "route_id": optional, "upstream_id": null,
                         "timestamp": "2026-01-01T00:00:00Z", "traceparent": optional},
            "method": "GET", "uri": uri, "headers": {name: [value], "none": [], "a": [id, uri]}, "correlation_id": id,
        })
        .to_string()
    }

    /// What serde_json reads, and what this reader reads.
    fn both<'a, T: serde::Deserialize<'a> + std::fmt::Debug>(
        text: &'a str,
        read: fn(&'a str) -> Option<T>,
    ) -> (Option<String>, Option<String>) {
        let print = |event: T| format!("{event:?}");
        (serde_json::from_str(text).ok().map(print), read(text).map(print))
    }

    #[test]
    fn reads_the_events_of_the_proxy() {
        assert!(request_headers(&request(&["c", "/", "host", "h"].map(String::from), None, 0)).is_some());
        assert!(response_headers(r#"{"correlation_id":"c","status":200,"headers":{"a":["\"1\"","2"]}}"#).is_some());
        let chunk = r#"{"correlation_id":"c","data":"aGk=","is_last":true,"total_size":null,"chunk_index":0,"bytes_received":2}"#;
        assert_eq!(body_chunk(chunk).unwrap().bytes_received, Some(2));
    }

    #[test]
    fn leaves_other_json_to_serde_json() {
        for text in [
            r#"{"correlation_id":"c","status":200,"status":200,"headers":{}}"#,
            r#"{"correlation_id":"c","status":0200,"headers":{}}"#,
            r#"{"correlation_id":"c","status":2e2,"headers":{}}"#,
            r#"{"correlation_id":"c","status":70000,"headers":{}}"#,
            r#"{"correlation_id":"c", "status":200,"headers":{}}"#,
            r#"{"correlation_id":"c","status":200,"headers":{}} "#,
            r#"{"correlation_id":"c","status":200,"headers":{},}"#,
            r#"{"correlation_id":"\ud800","status":200,"headers":{}}"#,
            r#"{"correlation_id":"c\","status":200,"headers":{}}"#,
            r#"{"correlation_id":"c","status":200}"#,
            "{\"correlation_id\":\"\t\",\"status\":200,\"headers\":{}}",
            "",
        ] {
            assert!(response_headers(text).is_none(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn reads_events_like_serde_json(
            strings in any::<[String; 4]>(), optional in any::<Option<String>>(), number in any::<u32>()
        ) {
            let text = request(&strings, optional.as_ref(), number);
            let (expected, read) = both::<RequestHeaders<'_>>(&text, request_headers);
            prop_assert!(read.is_some());
            prop_assert_eq!(read, expected);
        }

        #[test]
        fn reads_damaged_events_like_serde_json_or_not_at_all(
            strings in any::<[String; 4]>(), at in any::<prop::sample::Index>(), with in "[\\x00-\\x7f]{0,3}", cut in 0..4_usize
        ) {
            let request = request(&strings, None, 7);
            let response = json!({"correlation_id": strings[0], "status": 200, "headers": {&strings[1]: [&strings[2]]}}).to_string();
            let chunk = json!({"correlation_id": strings[0], "data": "aGk=", "is_last": true, "total_size": 2, "chunk_index": 0}).to_string();
            for text in [request, response, chunk] {
                let mut bytes = text.into_bytes();
                let start = at.index(bytes.len());
                let end = (start + cut).min(bytes.len());
                bytes.splice(start..end, with.bytes());
                let Ok(text) = String::from_utf8(bytes) else { continue };
                let pairs = [
                    both::<RequestHeaders<'_>>(&text, request_headers),
                    both::<ResponseHeaders<'_>>(&text, response_headers),
                    both::<BodyChunk<'_>>(&text, body_chunk),
                ];
                for (expected, read) in pairs {
                    prop_assert!(read.is_none() || read == expected, "{text}: {read:?}, not {expected:?}");
                }
            }
        }
    }
}
