//! What a module answers, read from its JSON and checked.
//!
//! [`read`] is the only way from a module's bytes to an [`Answer`], so one that exists keeps every rule of the contract: it injects no
//! header, does not change how a message is framed, and names no impossible status and no unknown decision.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use zentinel_wasm_contract::failure::brief;
use zentinel_wasm_contract::text::Object;
use zentinel_wasm_contract::{
    Answer, Audit, BodyAction, BodyMutation, Bounded, Decision, Failure, FailureKind, HeaderOp, Pairs, Text, WebsocketDecision, header, url,
};

/// Why bytes are not an answer: one line for the module's author.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidAnswer(String);

impl fmt::Display for InvalidAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for InvalidAnswer {}

impl From<InvalidAnswer> for Failure {
    fn from(error: InvalidAnswer) -> Self {
        Self::new(FailureKind::InvalidResult, error.to_string())
    }
}

fn invalid<T>(message: impl Into<String>) -> Result<T, InvalidAnswer> {
    Err(InvalidAnswer(message.into()))
}

/// Reads and checks an answer. No bytes at all mean "no opinion": allow unchanged.
///
/// # Errors
///
/// Anything that the contract calls a module error: invalid UTF-8 or JSON, a wrong type, an unknown decision, a value out of range, a header
/// that is none or that only the proxy may write.
pub fn read(bytes: &[u8]) -> Result<Answer<'_>, InvalidAnswer> {
    match bytes {
        b"" | br#"{"decision":"allow"}"# => return Ok(Answer::default()),
        _ => {}
    }
    // Checked as a whole, for serde_json does not look into the strings of fields that it skips.
    let Ok(text) = std::str::from_utf8(bytes) else {
        return invalid("the answer is not valid UTF-8");
    };
    match serde_json::from_str::<Object<Wire<'_>>>(text) {
        Ok(Object(wire)) => wire.check(),
        Err(error) => invalid(brief(&format!("the answer is not what the contract says: {error}"))),
    }
}

/// Reads what `on_configure` answered: nothing, an object without an `error`, or the reason for which the module rejects its configuration.
///
/// # Errors
///
/// The bytes are not JSON, not an object, or `error` is not a string.
pub fn read_configured(bytes: &[u8]) -> Result<Option<String>, InvalidAnswer> {
    #[derive(Deserialize)]
    struct Configured {
        #[serde(default)]
        error: Option<String>,
    }

    if bytes.is_empty() {
        return Ok(None);
    }
    match serde_json::from_slice::<Object<Configured>>(bytes) {
        // It is logged, and handed to the proxy.
        Ok(Object(configured)) => Ok(configured.error.as_deref().map(brief)),
        Err(error) => invalid(brief(&format!("the answer of `on_configure` is not what the contract says: {error}"))),
    }
}

/// The JSON as it came: types are right, values are not checked yet.
#[derive(Default, Deserialize)]
#[serde(default, bound(deserialize = "'de: 'a"))]
struct Wire<'a> {
    decision: Option<Text<'a>>,
    status: Option<u16>,
    body: Option<Text<'a>>,
    add_request_headers: Option<Pairs<'a, Values<'a>>>,
    remove_request_headers: Option<Vec<Text<'a>>>,
    append_request_headers: Option<Pairs<'a, Values<'a>>>,
    add_response_headers: Option<Pairs<'a, Values<'a>>>,
    remove_response_headers: Option<Vec<Text<'a>>>,
    append_response_headers: Option<Pairs<'a, Values<'a>>>,
    tags: Option<Vec<Text<'a>>>,
    rule_ids: Option<Vec<Text<'a>>>,
    confidence: Option<f64>,
    reason_codes: Option<Vec<Text<'a>>>,
    challenge_type: Option<Text<'a>>,
    challenge_params: Option<Pairs<'a, Scalar<'a>>>,
    routing_metadata: Option<Pairs<'a, Text<'a>>>,
    needs_more: Option<bool>,
    request_body_mutation: Option<Object<Mutation<'a>>>,
    response_body_mutation: Option<Object<Mutation<'a>>>,
    websocket_decision: Option<WebsocketWire<'a>>,
    guardrail_response: Option<Bounded<MAX_VERDICT>>,
}

impl<'a> Wire<'a> {
    fn check(self) -> Result<Answer<'a>, InvalidAnswer> {
        let mut response_headers = Vec::new();
        for name in self.remove_response_headers.unwrap_or_default() {
            response_headers.push(HeaderOp::Remove(token("remove_response_headers", name)?));
        }
        let added = self.add_response_headers.unwrap_or_default();
        let appended = self.append_response_headers.unwrap_or_default();
        if appended.0.iter().any(|(name, _)| is_location(name)) {
            return invalid("`append_response_headers` holds `Location`: a response has one; set it with `add_response_headers`");
        }
        let kind = Kind::parse(self.decision.as_deref())?;
        let mut block_headers = Vec::new();
        if let Kind::Block = kind {
            block_headers = joined_headers(added, appended)?;
        } else {
            add_headers("add_response_headers", added, &mut response_headers)?;
            append_headers("append_response_headers", appended, &mut response_headers)?;
        }
        let decision = match kind {
            Kind::Allow => Decision::Allow,
            Kind::Block => block(self.status, self.body, block_headers)?,
            Kind::Redirect => redirect(self.status, self.body)?,
            Kind::Challenge => challenge(self.challenge_type, self.challenge_params.unwrap_or_default())?,
        };

        let mut request_headers = Vec::new();
        for name in self.remove_request_headers.unwrap_or_default() {
            request_headers.push(HeaderOp::Remove(removable("remove_request_headers", name)?));
        }
        let added = self.add_request_headers.unwrap_or_default();
        check_host("add_request_headers", &added)?;
        add_headers("add_request_headers", added, &mut request_headers)?;
        let appended = self.append_request_headers.unwrap_or_default();
        if let Some((name, _)) = appended.0.iter().find(|(name, _)| is_host(name)) {
            return invalid(format!(
                "`append_request_headers` holds `{}`: a request has one; set it with `add_request_headers`",
                shortened(name)
            ));
        }
        append_headers("append_request_headers", appended, &mut request_headers)?;

        if let Some(confidence) = self.confidence
            && !(0.0..=1.0).contains(&confidence)
        {
            return invalid(format!("`confidence` is {confidence}: it must be 0 to 1"));
        }
        let routing_metadata = self.routing_metadata.unwrap_or_default();
        check_names("routing_metadata", &routing_metadata, Sameness::Exact)?;
        let routing_metadata = routing_metadata.0;
        for (key, value) in &routing_metadata {
            printable("routing_metadata", key)?;
            printable("routing_metadata", value)?;
        }
        Ok(Answer {
            decision,
            request_headers,
            response_headers,
            audit: Audit {
                tags: printable_list("tags", self.tags)?,
                rule_ids: printable_list("rule_ids", self.rule_ids)?,
                confidence: self.confidence,
                reason_codes: printable_list("reason_codes", self.reason_codes)?,
            },
            routing_metadata,
            needs_more: self.needs_more.unwrap_or(false),
            request_body_mutation: self
                .request_body_mutation
                .map(|Object(mutation)| mutation.check("request_body_mutation"))
                .transpose()?,
            response_body_mutation: self
                .response_body_mutation
                .map(|Object(mutation)| mutation.check("response_body_mutation"))
                .transpose()?,
            websocket_decision: self.websocket_decision.map(WebsocketWire::check).transpose()?,
            guardrail_response: self.guardrail_response.map(|Bounded(verdict)| checked_guardrail(&verdict)).transpose()?,
        })
    }
}

enum Kind {
    Allow,
    Block,
    Redirect,
    Challenge,
}

impl Kind {
    fn parse(decision: Option<&str>) -> Result<Self, InvalidAnswer> {
        let Some(decision) = decision else {
            return Ok(Self::Allow);
        };
        let names = [
            ("allow", Self::Allow),
            ("block", Self::Block),
            ("deny", Self::Block),
            ("redirect", Self::Redirect),
            ("challenge", Self::Challenge),
        ];
        match names.into_iter().find(|(name, _)| name.eq_ignore_ascii_case(decision)) {
            Some((_, kind)) => Ok(kind),
            None => {
                invalid(format!("`decision` is `{}`: it must be `allow`, `block`, `deny`, `redirect` or `challenge`", shortened(decision)))
            }
        }
    }
}

fn block<'a>(status: Option<u16>, body: Option<Text<'a>>, headers: Vec<(Text<'a>, Text<'a>)>) -> Result<Decision<'a>, InvalidAnswer> {
    let status = status.unwrap_or(403);
    // A client waits after 1xx for the response proper.
    if !(200..=599).contains(&status) {
        return invalid(format!("`status` of a block is {status}: it must be 200 to 599"));
    }
    // Without any body the proxy would send a text of its own, or its length.
    let body = if has_no_content(status) { Some(Text::borrowed("")) } else { body };
    Ok(Decision::Block { status, body, headers })
}

/// Whether a response of this status has no content (RFC 9110, 15.3.5, 15.3.6 and 15.4.5).
const fn has_no_content(status: u16) -> bool {
    matches!(status, 204 | 205 | 304)
}

fn redirect<'a>(status: Option<u16>, url: Option<Text<'a>>) -> Result<Decision<'a>, InvalidAnswer> {
    let status = status.unwrap_or(302);
    if !matches!(status, 301 | 302 | 303 | 307 | 308) {
        return invalid(format!("`status` of a redirect is {status}: it must be 301, 302, 303, 307 or 308"));
    }
    let Some(url) = url.filter(|url| !url.trim().is_empty()) else {
        return invalid("a redirect needs its URL in `body`");
    };
    Ok(Decision::Redirect { status, url: location("the URL of a redirect", url)? })
}

/// A URL that the client is sent to, as RFC 3986 wants it in a `Location`. `what` names it in errors.
fn location<'a>(what: &str, url: Text<'a>) -> Result<Text<'a>, InvalidAnswer> {
    // Browsers skip white space before a scheme.
    let scheme = url.trim_start().split(':').next().unwrap_or_default();
    if ["javascript", "data", "vbscript"].iter().any(|banned| banned.eq_ignore_ascii_case(scheme.trim_end())) {
        return invalid(format!("{what} has the scheme `{scheme}:`, which runs code in the browser"));
    }
    url::encoded(url).map_err(|error| InvalidAnswer(format!("{what} {}", error.reason())))
}

fn challenge<'a>(challenge_type: Option<Text<'a>>, params: Pairs<'a, Scalar<'a>>) -> Result<Decision<'a>, InvalidAnswer> {
    let Some(challenge_type) = challenge_type.filter(|kind| !kind.is_empty()) else {
        return invalid("a challenge needs a `challenge_type`");
    };
    printable("challenge_type", &challenge_type)?;
    // The proxy takes `Body` for `body`.
    check_names("challenge_params", &params, Sameness::AnyCase)?;
    let params: Vec<_> = params.0.into_iter().map(|(name, value)| (name, value.0)).collect();
    for (name, value) in &params {
        printable("challenge_params", name)?;
        // The page that the client is shown may have lines; everything else may end up in a header.
        if !name.eq_ignore_ascii_case("body") {
            printable("challenge_params", value)?;
        }
    }
    Ok(Decision::Challenge { challenge_type, params })
}

/// Largest sum of the names that lists of values repeat, in bytes: each value becomes a change with its name, so that a long name with many values
/// would grow far beyond the answer that it came in.
const MAX_REPEATED: usize = 1 << 20;

/// Most values that a field adds: each becomes a change of its own.
const MAX_ADDED: usize = 10_000;

fn check_amount(field: &str, headers: &Pairs<'_, Values<'_>>) -> Result<(), InvalidAnswer> {
    let (mut count, mut repeated) = (0, 0_usize);
    for (name, Values(values)) in &headers.0 {
        count += values.len();
        repeated = repeated.saturating_add(name.len().saturating_mul(values.len().saturating_sub(1)));
        if count > MAX_ADDED || repeated > MAX_REPEATED {
            return invalid(format!("`{field}` holds too many values of `{}`", shortened(name)));
        }
    }
    Ok(())
}

/// Hands over each header with its values, once their bytes are checked.
fn checked_headers<'a>(
    field: &str,
    headers: Pairs<'a, Values<'a>>,
    mut take: impl FnMut(Text<'a>, Vec<Text<'a>>),
) -> Result<(), InvalidAnswer> {
    check_names(field, &headers, Sameness::AnyCase)?;
    for (name, Values(values)) in headers.0 {
        let name = token(field, name)?;
        if header::is_framing(&name) {
            return invalid(format!("`{field}` holds `{}`, which frames the message: only the proxy may set it", shortened(&name)));
        }
        for value in &values {
            header_value(field, &name, value)?;
        }
        let values = if is_location(&name) { vec![one_location(field, values)?] } else { values };
        take(name, values);
    }
    Ok(())
}

/// A header that sends the client elsewhere keeps the rules of a redirect's URL.
fn one_location<'a>(field: &str, values: Vec<Text<'a>>) -> Result<Text<'a>, InvalidAnswer> {
    match <[Text<'a>; 1]>::try_from(values) {
        Ok([url]) => location(&format!("the `Location` in `{field}`"), url),
        Err(values) => invalid(format!("`{field}` sets `Location` to {} values: it must be one", values.len())),
    }
}

/// The first value of a name replaces what is there.
fn add_headers<'a>(field: &str, added: Pairs<'a, Values<'a>>, ops: &mut Vec<HeaderOp<'a>>) -> Result<(), InvalidAnswer> {
    check_amount(field, &added)?;
    checked_headers(field, added, |name, values| {
        let mut values = values.into_iter();
        if let Some(first) = values.next() {
            ops.push(HeaderOp::Set(name.clone(), first));
        }
        ops.extend(values.map(|value| HeaderOp::Add(name.clone(), value)));
    })
}

/// What is there already stays.
fn append_headers<'a>(field: &str, appended: Pairs<'a, Values<'a>>, ops: &mut Vec<HeaderOp<'a>>) -> Result<(), InvalidAnswer> {
    check_amount(field, &appended)?;
    checked_headers(field, appended, |name, values| {
        ops.extend(values.into_iter().map(|value| HeaderOp::Add(name.clone(), value)));
    })
}

/// The headers of a block response: the proxy takes one value a name.
fn joined_headers<'a>(added: Pairs<'a, Values<'a>>, appended: Pairs<'a, Values<'a>>) -> Result<Vec<(Text<'a>, Text<'a>)>, InvalidAnswer> {
    let mut headers: Vec<(Text<'a>, Text<'a>)> = Vec::with_capacity(added.0.len() + appended.0.len());
    let mut known = HashMap::new();
    let merges = !added.0.is_empty() && !appended.0.is_empty();
    let mut cookies = 0;
    let mut count_cookies = |name: &str, values: &[Text<'a>]| {
        if name.eq_ignore_ascii_case("set-cookie") {
            cookies += values.len();
        }
    };
    checked_headers("add_response_headers", added, |name, values| {
        count_cookies(&name, &values);
        let separator = header::separator(&name);
        if let Some(value) = values.into_iter().reduce(|before, value| joined(before, separator, &value)) {
            if merges {
                known.insert(name.to_ascii_lowercase(), headers.len());
            }
            headers.push((name, value));
        }
    })?;
    checked_headers("append_response_headers", appended, |name, values| {
        count_cookies(&name, &values);
        let separator = header::separator(&name);
        let Some(value) = values.into_iter().reduce(|before, value| joined(before, separator, &value)) else { return };
        match known.get(&name.to_ascii_lowercase()) {
            Some(&at) => {
                let before = std::mem::take(&mut headers[at].1);
                headers[at].1 = joined(before, separator, &value);
            }
            None => headers.push((name, value)),
        }
    })?;
    // The one header whose values cannot be joined (RFC 9110, 5.3).
    if cookies > 1 {
        return invalid(format!("a block holds {cookies} values of `Set-Cookie`: the protocol carries one value of a header in a block"));
    }
    Ok(headers)
}

fn joined<'a>(before: Text<'a>, separator: &str, value: &str) -> Text<'a> {
    let mut joined = before.0.into_owned();
    joined.push_str(separator);
    joined.push_str(value);
    Text::from(joined)
}

fn token<'a>(field: &str, name: Text<'a>) -> Result<Text<'a>, InvalidAnswer> {
    if header::is_token(&name) {
        Ok(name)
    } else {
        invalid(format!("`{field}` holds the name `{}`, which is no header name", shortened(&name)))
    }
}

/// A name that a module may remove from a request: with another the upstream would read a different
/// message, or none.
fn removable<'a>(field: &str, name: Text<'a>) -> Result<Text<'a>, InvalidAnswer> {
    let name = token(field, name)?;
    if header::is_framing(&name) {
        return invalid(format!("`{field}` holds `{}`, which frames the message: only the proxy may remove it", shortened(&name)));
    }
    if is_host(&name) {
        return invalid(format!("`{field}` holds `{}`: a request needs one; set another with `add_request_headers`", shortened(&name)));
    }
    Ok(name)
}

fn is_host(name: &str) -> bool {
    name.eq_ignore_ascii_case("host")
}

fn is_location(name: &str) -> bool {
    name.eq_ignore_ascii_case("location")
}

/// A request has one `Host` (RFC 9110, 7.2).
fn check_host(field: &str, added: &Pairs<'_, Values<'_>>) -> Result<(), InvalidAnswer> {
    for (_, Values(values)) in added.0.iter().filter(|(name, _)| is_host(name)) {
        match values.as_slice() {
            [host] if header::is_host(host) => {}
            [host] => return invalid(format!("`{field}` sets `Host` to `{}`, not a valid host", shortened(host))),
            _ => return invalid(format!("`{field}` sets `Host` to {} values: it must be one", values.len())),
        }
    }
    Ok(())
}

/// When two names of an object are the same.
#[derive(Clone, Copy)]
enum Sameness {
    /// Byte by byte.
    Exact,
    /// In any case, as names of headers are.
    AnyCase,
}

/// Checks that no name stands twice in an object: which of them counts would be chance.
fn check_names<V>(field: &str, pairs: &Pairs<'_, V>, sameness: Sameness) -> Result<(), InvalidAnswer> {
    /// Up to so many names are compared each with each, as in nearly every answer; more are hashed.
    const FEW: usize = 16;

    let Pairs(pairs) = pairs;
    let names = || pairs.iter().map(|(name, _)| name.as_str());
    let twice = if pairs.len() <= FEW {
        let same = |a: &str, b: &str| match sameness {
            Sameness::Exact => a == b,
            Sameness::AnyCase => a.eq_ignore_ascii_case(b),
        };
        names().enumerate().find(|(at, name)| names().take(*at).any(|other| same(name, other))).map(|(_, name)| name)
    } else {
        let mut known = HashSet::with_capacity(pairs.len());
        names().find(|name| {
            !known.insert(match sameness {
                Sameness::Exact => Cow::Borrowed(*name),
                Sameness::AnyCase => Cow::Owned(name.to_ascii_lowercase()),
            })
        })
    };
    match twice {
        Some(name) => invalid(format!("`{field}` holds `{}` twice", shortened(name))),
        None => Ok(()),
    }
}

fn header_value(field: &str, name: &str, value: &str) -> Result<(), InvalidAnswer> {
    if header::is_value(value) {
        Ok(())
    } else {
        invalid(format!("`{field}` holds control characters in the value of `{}`", shortened(name)))
    }
}

fn printable(field: &str, value: &str) -> Result<(), InvalidAnswer> {
    if header::is_value(value) { Ok(()) } else { invalid(format!("`{field}` holds control characters in `{}`", shortened(value))) }
}

fn printable_list<'a>(field: &str, list: Option<Vec<Text<'a>>>) -> Result<Vec<Text<'a>>, InvalidAnswer> {
    let list = list.unwrap_or_default();
    for value in &list {
        printable(field, value)?;
    }
    Ok(list)
}

/// Most values of a verdict: some hundred detections.
const MAX_VERDICT: usize = 10_000;

/// The verdict as text, once what the proxy reads of it is right: one that it cannot read it takes for none at all. The rest is handed on as it is.
/// Field by field as in `GuardrailResponse` of zentinel-agent-protocol 0.6.54.
fn checked_guardrail<'a>(verdict: &Value) -> Result<Text<'a>, InvalidAnswer> {
    let Value::Object(fields) = verdict else { return invalid("`guardrail_response` must be an object") };
    let wrong = |field: &str, wanted: &str| invalid(format!("`guardrail_response.{field}` must be {wanted}"));
    if !fields.get("detected").is_some_and(Value::is_boolean) {
        return wrong("detected", "true or false");
    }
    if !fields.get("confidence").is_none_or(is_score) {
        return wrong("confidence", "0 to 1");
    }
    if !fields.get("redacted_content").is_none_or(|value| value.is_string() || value.is_null()) {
        return wrong("redacted_content", "a string");
    }
    let detections = match fields.get("detections") {
        None => &[],
        Some(Value::Array(detections)) => detections.as_slice(),
        Some(_) => return wrong("detections", "a list of objects"),
    };
    for detection in detections {
        let Value::Object(fields) = detection else { return wrong("detections", "a list of objects") };
        for field in ["category", "description"] {
            if !fields.get(field).is_some_and(Value::is_string) {
                return wrong(&format!("detections.{field}"), "a string");
            }
        }
        let is_severity = |value: &Value| value.as_str().is_some_and(|value| ["low", "medium", "high", "critical"].contains(&value));
        if !fields.get("severity").is_none_or(is_severity) {
            return wrong("detections.severity", "`low`, `medium`, `high` or `critical`");
        }
        if !fields.get("confidence").is_none_or(|value| value.is_null() || is_score(value)) {
            return wrong("detections.confidence", "0 to 1");
        }
        let is_span = |value: &Value| ["start", "end"].iter().all(|end| value.get(end).is_some_and(Value::is_u64));
        if !fields.get("span").is_none_or(|value| value.is_null() || value.is_object() && is_span(value)) {
            return wrong("detections.span", "an object of `start` and `end`, in bytes");
        }
    }
    Ok(Text::from(verdict.to_string()))
}

fn is_score(value: &Value) -> bool {
    value.as_f64().is_some_and(|score| (0.0..=1.0).contains(&score))
}

/// Guest text is shown in messages by its beginning only, and without control characters.
fn shortened(text: &str) -> String {
    text.chars().take(40).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// One header value or a list of them.
struct Values<'a>(Vec<Text<'a>>);

impl<'de: 'a, 'a> Deserialize<'de> for Values<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ValuesVisitor;

        impl<'de> Visitor<'de> for ValuesVisitor {
            type Value = Values<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of strings")
            }

            fn visit_borrowed_str<E: serde::de::Error>(self, value: &'de str) -> Result<Self::Value, E> {
                Ok(Values(vec![Text::from(value)]))
            }

            fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<Self::Value, E> {
                Ok(Values(vec![Text::from(value.to_owned())]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
                let mut values = Vec::new();
                while let Some(value) = seq.next_element()? {
                    values.push(value);
                }
                Ok(Values(values))
            }
        }

        deserializer.deserialize_any(ValuesVisitor)
    }
}

/// A string, number or boolean, as the text that the wire wants.
struct Scalar<'a>(Text<'a>);

impl<'de: 'a, 'a> Deserialize<'de> for Scalar<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ScalarVisitor;

        impl<'de> Visitor<'de> for ScalarVisitor {
            type Value = Scalar<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a number or a boolean")
            }

            fn visit_borrowed_str<E: serde::de::Error>(self, value: &'de str) -> Result<Self::Value, E> {
                Ok(Scalar(Text::from(value)))
            }

            fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<Self::Value, E> {
                Ok(Scalar(Text::from(value.to_owned())))
            }

            fn visit_bool<E: serde::de::Error>(self, value: bool) -> Result<Self::Value, E> {
                Ok(Scalar(Text::from(value.to_string())))
            }

            fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<Self::Value, E> {
                Ok(Scalar(Text::from(value.to_string())))
            }

            fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<Self::Value, E> {
                Ok(Scalar(Text::from(value.to_string())))
            }

            fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Self::Value, E> {
                serde_json::Number::from_f64(value)
                    .map(|number| Scalar(Text::from(number.to_string())))
                    .ok_or_else(|| E::custom("a number that is none"))
            }
        }

        deserializer.deserialize_any(ScalarVisitor)
    }
}

#[derive(Deserialize)]
#[serde(bound(deserialize = "'de: 'a"))]
struct Mutation<'a> {
    action: Option<Text<'a>>,
    chunk_index: Option<u32>,
    data: Option<Text<'a>>,
    data_base64: Option<Text<'a>>,
}

impl<'a> Mutation<'a> {
    fn check(self, field: &str) -> Result<BodyMutation<'a>, InvalidAnswer> {
        let action = match self.action.as_deref() {
            Some(name) if name.eq_ignore_ascii_case("pass_through") => BodyAction::PassThrough,
            Some(name) if name.eq_ignore_ascii_case("drop") => BodyAction::Drop,
            Some(name) if name.eq_ignore_ascii_case("replace") => BodyAction::Replace(match (self.data, self.data_base64) {
                (Some(Text(Cow::Borrowed(data))), None) => Cow::Borrowed(data.as_bytes()),
                (Some(Text(Cow::Owned(data))), None) => Cow::Owned(data.into_bytes()),
                (None, Some(data)) => match base64_simd::STANDARD.decode_to_vec(data.as_bytes()) {
                    Ok(bytes) => Cow::Owned(bytes),
                    Err(_) => return invalid(format!("`{field}.data_base64` is not base64")),
                },
                (None, None) => return invalid(format!("`{field}` replaces the chunk and needs `data` or `data_base64`")),
                (Some(_), Some(_)) => return invalid(format!("`{field}` has both `data` and `data_base64`")),
            }),
            Some(name) => {
                return invalid(format!("`{field}.action` is `{}`: it must be `pass_through`, `replace` or `drop`", shortened(name)));
            }
            None => return invalid(format!("`{field}` needs an `action`: `pass_through`, `replace` or `drop`")),
        };
        Ok(BodyMutation { action, chunk_index: self.chunk_index })
    }
}

enum WebsocketWire<'a> {
    Named(Text<'a>),
    Close { code: u16, reason: Option<Text<'a>> },
}

impl<'a> WebsocketWire<'a> {
    fn check(self) -> Result<WebsocketDecision<'a>, InvalidAnswer> {
        match self {
            Self::Named(name) if name.eq_ignore_ascii_case("allow") => Ok(WebsocketDecision::Allow),
            Self::Named(name) if name.eq_ignore_ascii_case("drop") => Ok(WebsocketDecision::Drop),
            Self::Named(name) => invalid(format!("`websocket_decision` is `{}`: it must be `allow`, `drop` or a close", shortened(&name))),
            Self::Close { code, reason } => {
                // 1004 to 1006 and 1015 never go over the wire (RFC 6455, 7.4.1).
                if !(1000..=4999).contains(&code) || matches!(code, 1004..=1006 | 1015) {
                    return invalid(format!("`websocket_decision.close.code` is {code}: it must be a code that may be sent, 1000 to 4999"));
                }
                let reason = reason.unwrap_or_default();
                printable("websocket_decision.close.reason", &reason)?;
                // A control frame carries 125 bytes, two of them the code (RFC 6455, 5.5).
                if reason.len() > 123 {
                    return invalid("`websocket_decision.close.reason` has more than 123 bytes");
                }
                Ok(WebsocketDecision::Close { code, reason })
            }
        }
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for WebsocketWire<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(bound(deserialize = "'de: 'a"))]
        struct Close<'a> {
            code: u16,
            reason: Option<Text<'a>>,
        }

        struct WebsocketVisitor;

        impl<'de> Visitor<'de> for WebsocketVisitor {
            type Value = WebsocketWire<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("`allow`, `drop` or an object with `close`")
            }

            fn visit_borrowed_str<E: serde::de::Error>(self, value: &'de str) -> Result<Self::Value, E> {
                Ok(WebsocketWire::Named(Text::from(value)))
            }

            fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<Self::Value, E> {
                Ok(WebsocketWire::Named(Text::from(value.to_owned())))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut close = None;
                while let Some(key) = map.next_key::<Text<'de>>()? {
                    if &*key == "close" {
                        if close.is_some() {
                            return Err(A::Error::duplicate_field("close"));
                        }
                        close = Some(map.next_value::<Object<Close<'de>>>()?);
                    } else {
                        map.next_value::<IgnoredAny>()?;
                    }
                }
                match close {
                    Some(Object(Close { code, reason })) => Ok(WebsocketWire::Close { code, reason }),
                    None => Err(A::Error::missing_field("close")),
                }
            }
        }

        deserializer.deserialize_any(WebsocketVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(json: &str) -> Answer<'_> {
        read(json.as_bytes()).unwrap()
    }

    fn error(json: &str) -> String {
        read(json.as_bytes()).unwrap_err().to_string()
    }

    fn pair<'a>(name: &'a str, value: &'a str) -> (Text<'a>, Text<'a>) {
        (name.into(), value.into())
    }

    fn list<'a>(values: &[&'a str]) -> Vec<Text<'a>> {
        values.iter().map(|&value| value.into()).collect()
    }

    #[test]
    fn the_page_s_result_object() {
        let answer = parse(include_str!("../golden/result.json"));
        assert_eq!(answer.decision, Decision::Allow);
        assert_eq!(answer.request_headers, [HeaderOp::Remove("X-Debug".into()), HeaderOp::Set("X-Processed".into(), "true".into())]);
        assert_eq!(answer.response_headers, [HeaderOp::Set("X-Frame-Options".into(), "DENY".into())]);
        assert_eq!(answer.audit.tags, list(&["processed"]));
    }

    #[test]
    fn lists_of_values_do_not_grow_beyond_the_answer_they_came_in() {
        let values = vec![""; 200_000];
        let block = serde_json::json!({"decision": "block", "add_response_headers": {"X-A": values}}).to_string();
        let Decision::Block { headers, .. } = parse(&block).decision else { panic!() };
        assert_eq!(headers[0].1.len(), 2 * (values.len() - 1));

        let name = "x".repeat(1000);
        for field in ["add_request_headers", "add_response_headers", "append_request_headers", "append_response_headers"] {
            let repeated = serde_json::json!({field: {name.as_str(): values}}).to_string();
            assert!(error(&repeated).contains("too many values"));
        }
    }

    #[test]
    fn the_page_s_challenge() {
        let answer = parse(include_str!("../golden/challenge.json"));
        let params = vec![pair("site_key", "your-captcha-site-key"), pair("action", "login")];
        assert_eq!(answer.decision, Decision::Challenge { challenge_type: "captcha".into(), params });
        assert_eq!(answer.audit.tags, list(&["bot-challenge"]));
    }

    #[test]
    fn the_page_s_audit_metadata() {
        let answer = parse(include_str!("../golden/audit.json"));
        assert_eq!(answer.decision, Decision::Block { status: 403, body: None, headers: vec![] });
        assert_eq!(
            answer.audit,
            Audit {
                tags: list(&["path-traversal"]),
                rule_ids: list(&["SEC-001", "OWASP-930"]),
                confidence: Some(0.95),
                reason_codes: list(&["PATH_TRAVERSAL_DETECTED"]),
            }
        );
    }

    #[test]
    fn the_page_s_routing_metadata() {
        let answer = parse(include_str!("../golden/routing.json"));
        assert_eq!(answer.routing_metadata, [pair("upstream", "api-v2-backend"), pair("priority", "high")]);
    }

    #[test]
    fn the_page_s_body_mutations() {
        let answer = parse(include_str!("../golden/request_body_mutation.json"));
        assert_eq!(answer.request_body_mutation, Some(BodyMutation { action: BodyAction::PassThrough, chunk_index: Some(0) }));
        let answer = parse(include_str!("../golden/response_body_mutation.json"));
        let action = BodyAction::Replace(Cow::Borrowed(b"Modified response content"));
        assert_eq!(answer.response_body_mutation, Some(BodyMutation { action, chunk_index: Some(0) }));
    }

    #[test]
    fn the_page_s_needs_more() {
        assert!(parse(include_str!("../golden/needs_more.json")).needs_more);
    }

    #[test]
    fn no_bytes_and_null_fields_mean_no_opinion() {
        assert_eq!(parse(""), Answer::default());
        assert_eq!(parse("{}"), Answer::default());
        assert_eq!(parse(r#"{"decision":null,"status":null,"body":null,"tags":null,"unknown":[1,{}]}"#), Answer::default());
    }

    #[test]
    fn decisions_are_read_in_any_case() {
        assert!(matches!(parse(r#"{"decision":"BLOCK"}"#).decision, Decision::Block { status: 403, .. }));
        assert!(matches!(parse(r#"{"decision":"Deny","status":451}"#).decision, Decision::Block { status: 451, .. }));
        assert!(error(r#"{"decision":"alow"}"#).contains("`alow`"));
        assert!(error(r#"{"decision":""}"#).contains("must be"));
    }

    #[test]
    fn a_block_carries_its_response_headers() {
        let answer = parse(r#"{"decision":"block","add_response_headers":{"Retry-After":"5","X-A":["1","2"]}}"#);
        let headers = vec![pair("Retry-After", "5"), pair("X-A", "1, 2")];
        assert_eq!(answer.decision, Decision::Block { status: 403, body: None, headers });
        assert!(answer.response_headers.is_empty());
    }

    #[test]
    fn appended_headers_leave_what_is_there() {
        let answer =
            parse(r#"{"append_request_headers":{"Cookie":"a=1"},"append_response_headers":{"Set-Cookie":["a=1","b=2"],"X-None":[]}}"#);
        assert_eq!(answer.request_headers, [HeaderOp::Add("Cookie".into(), "a=1".into())]);
        let name: Text<'_> = "Set-Cookie".into();
        assert_eq!(answer.response_headers, [HeaderOp::Add(name.clone(), "a=1".into()), HeaderOp::Add(name, "b=2".into())]);
    }

    #[test]
    fn headers_are_removed_then_set_then_appended() {
        for field in ["request_headers", "response_headers"] {
            let json = format!(r#"{{"append_{field}":{{"A":"3"}},"add_{field}":{{"A":["1","2"]}},"remove_{field}":["A"]}}"#);
            let answer = parse(&json);
            let ops = if field == "request_headers" { &answer.request_headers } else { &answer.response_headers };
            let [set, add, append] = ["1", "2", "3"].map(Text::from);
            let name = || Text::from("A");
            let expected =
                [HeaderOp::Remove(name()), HeaderOp::Set(name(), set), HeaderOp::Add(name(), add), HeaderOp::Add(name(), append)];
            assert_eq!(*ops, expected);
        }
    }

    #[test]
    fn a_block_carries_appended_headers_too() {
        let answer = parse(
            r#"{"decision":"block","add_response_headers":{"X-A":"1","X-B":"1"},"append_response_headers":{"x-a":["2","3"],"X-C":"4"}}"#,
        );
        let headers = vec![pair("X-A", "1, 2, 3"), pair("X-B", "1"), pair("X-C", "4")];
        assert_eq!(answer.decision, Decision::Block { status: 403, body: None, headers });
        assert!(answer.response_headers.is_empty());
    }

    #[test]
    fn lists_set_the_first_value_and_add_the_rest() {
        let answer = parse(r#"{"add_response_headers":{"Set-Cookie":["a=1","b=2"],"X-None":[]}}"#);
        let name: Text<'_> = "Set-Cookie".into();
        assert_eq!(answer.response_headers, [HeaderOp::Set(name.clone(), "a=1".into()), HeaderOp::Add(name, "b=2".into())]);
    }

    #[test]
    fn redirects_need_a_url_that_is_harmless() {
        let url: Text<'_> = "/login".into();
        assert_eq!(parse(r#"{"decision":"redirect","body":"/login"}"#).decision, Decision::Redirect { status: 302, url });
        for bad in [
            r#"{"decision":"redirect"}"#,
            r#"{"decision":"redirect","body":" "}"#,
            r#"{"decision":"redirect","body":"/a\r\nX: y"}"#,
            r#"{"decision":"redirect","body":"JavaScript:alert(1)"}"#,
            r#"{"decision":"redirect","body":" data:text/html,x"}"#,
            r#"{"decision":"redirect","body":"/a","status":304}"#,
            r#"{"decision":"redirect","body":"/a","status":99999}"#,
        ] {
            error(bad);
        }
    }

    #[test]
    fn challenge_params_are_sent_as_strings() {
        let answer = parse(r#"{"decision":"challenge","challenge_type":"pow","challenge_params":{"n":5,"f":1.5,"b":true,"body":"a\nb"}}"#);
        let params = vec![pair("n", "5"), pair("f", "1.5"), pair("b", "true"), pair("body", "a\nb")];
        assert_eq!(answer.decision, Decision::Challenge { challenge_type: "pow".into(), params });
        error(r#"{"decision":"challenge"}"#);
        error(r#"{"decision":"challenge","challenge_type":"a","challenge_params":{"x":null}}"#);
        error(r#"{"decision":"challenge","challenge_type":"a","challenge_params":{"content-type":"a\r\nb"}}"#);
    }

    #[test]
    fn nothing_is_injected() {
        for bad in [
            r#"{"add_request_headers":{"X\r\nY":"1"}}"#,
            r#"{"add_request_headers":{"":"1"}}"#,
            r#"{"add_request_headers":{"X Y":"1"}}"#,
            r#"{"add_request_headers":{":path":"/"}}"#,
            r#"{"add_request_headers":{"X":"a\r\nb"}}"#,
            r#"{"add_response_headers":{"X":["a","b\u0000"]}}"#,
            r#"{"append_request_headers":{"X Y":"1"}}"#,
            r#"{"append_response_headers":{"X":["a","b\u0000"]}}"#,
            r#"{"decision":"block","append_response_headers":{"X":"a\nb"}}"#,
            r#"{"decision":"block","add_response_headers":{"X":"a\nb"}}"#,
            r#"{"remove_request_headers":["X:"]}"#,
            r#"{"remove_response_headers":["\n"]}"#,
            r#"{"tags":["a\nb"]}"#,
            r#"{"rule_ids":["a\u001b"]}"#,
            r#"{"reason_codes":["a\rb"]}"#,
            r#"{"routing_metadata":{"a":"b\n"}}"#,
        ] {
            error(bad);
        }
    }

    #[test]
    fn wrong_types_and_values_are_refused() {
        for bad in [
            "null",
            "[]",
            "1",
            "\"allow\"",
            "{",
            "{}x",
            r#"{"decision":1}"#,
            r#"{"status":"403"}"#,
            r#"{"status":403.5}"#,
            r#"{"status":-1}"#,
            r#"{"body":1}"#,
            r#"{"tags":"a"}"#,
            r#"{"tags":[1]}"#,
            r#"{"confidence":"1"}"#,
            r#"{"confidence":1.01}"#,
            r#"{"confidence":-0.1}"#,
            r#"{"confidence":1e999}"#,
            r#"{"needs_more":1}"#,
            r#"{"routing_metadata":{"a":1}}"#,
            r#"{"add_request_headers":{"a":1}}"#,
            r#"{"add_request_headers":["a"]}"#,
            r#"{"decision":"block","status":99}"#,
            r#"{"decision":"block","status":600}"#,
            r#"{"decision":"allow","decision":"block"}"#,
            r#"{"request_body_mutation":{"action":"burn"}}"#,
            r#"{"request_body_mutation":{"action":"replace"}}"#,
            r#"{"response_body_mutation":{"action":"replace","data_base64":"*"}}"#,
            r#"{"response_body_mutation":{}}"#,
            r#"{"websocket_decision":"maybe"}"#,
            r#"{"websocket_decision":{"close":{"code":1006}}}"#,
            r#"{"request_body_mutation":["drop"]}"#,
            r#"{"guardrail_response":{}}"#,
            r#"{"guardrail_response":{"detected":true,"confidence":2}}"#,
            r#"{"guardrail_response":{"detected":true,"confidence":null}}"#,
            r#"{"guardrail_response":{"detected":true,"detections":[1]}}"#,
            r#"{"guardrail_response":{"detected":true,"detections":{}}}"#,
            r#"{"guardrail_response":{"detected":true,"detected":false}}"#,
            r#"{"guardrail_response":{"detected":true,"redacted_content":1}}"#,
            &format!(r#"{{"guardrail_response":{{"detected":true,"detections":[{}{{}}]}}}}"#, "{},".repeat(10_000)),
            &bomb(r#"{"guardrail_response":{"detected":true,"detections":[{"a":"#, "}]}}"),
        ] {
            error(bad);
        }
        assert!(read(b"{\"unknown\":\"\xff\"}").is_err());
    }

    /// A value that nests in a text within a text, fifty times, where a certain key is read so: far more than a stack has room for.
    fn bomb(before: &str, after: &str) -> String {
        let mut text = String::from("1");
        for _ in 0..60 {
            let quoted = text.replace('\\', "\\u005c").replace('"', "\\u0022");
            text = format!("{}{{\"$serde_json::private::RawValue\":\"{quoted}\"}}{}", "[".repeat(110), "]".repeat(110));
        }
        // Refused for another reason when it is survived.
        format!("{before}{text},\"b\":1,\"b\":2{after}")
    }

    #[test]
    fn deep_nesting_in_an_unknown_field_is_survived() {
        let deep = format!("{{\"x\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
        let _ = read(deep.as_bytes());
    }

    const FRAMING: [&str; 10] = [
        "Content-Length",
        "transfer-encoding",
        "CONNECTION",
        "Keep-Alive",
        "Proxy-Connection",
        "TE",
        "Trailer",
        "Upgrade",
        "HTTP2-Settings",
        "content-length",
    ];

    #[test]
    fn what_frames_a_message_is_the_proxy_s() {
        for name in FRAMING {
            for field in ["add_request_headers", "append_request_headers", "add_response_headers", "append_response_headers"] {
                for decision in ["allow", "block", "redirect", "challenge"] {
                    let answer =
                        serde_json::json!({"decision": decision, "body": "/", "challenge_type": "x", field: {"X-A": "1", name: "30"}});
                    let error = error(&answer.to_string());
                    assert!(error.contains(name) && error.contains(field) && error.contains("frames the message"), "{error}");
                }
            }
            let error = error(&serde_json::json!({"remove_request_headers": ["X-A", name]}).to_string());
            assert!(error.contains(name) && error.contains("frames the message"), "{error}");
        }
        parse(r#"{"remove_response_headers":["Content-Length"]}"#);
    }

    #[test]
    fn a_request_keeps_one_host() {
        let set = parse(r#"{"add_request_headers":{"host":"shop.example:8443"}}"#);
        assert_eq!(set.request_headers, [HeaderOp::Set("host".into(), "shop.example:8443".into())]);
        for bad in [
            r#"{"add_request_headers":{"Host":["a","b"]}}"#,
            r#"{"add_request_headers":{"Host":[]}}"#,
            r#"{"add_request_headers":{"Host":""}}"#,
            r#"{"add_request_headers":{"Host":"a b"}}"#,
            r#"{"add_request_headers":{"Host":"a/b"}}"#,
            r#"{"add_request_headers":{"Host":"a","host":"b"}}"#,
            r#"{"append_request_headers":{"Host":"a"}}"#,
            r#"{"remove_request_headers":["HOST"]}"#,
            r#"{"remove_request_headers":["Host"],"add_request_headers":{"Host":"a"}}"#,
        ] {
            let error = error(bad);
            assert!(error.to_ascii_lowercase().contains("`host`"), "{error}");
        }
    }

    #[test]
    fn a_location_in_the_headers_keeps_the_rules_of_a_redirect() {
        for decision in ["allow", "block"] {
            let answer = |field: &str, value: Value| {
                serde_json::json!({"decision": decision, "status": 302, field: {"X-A": "1", "location": value}}).to_string()
            };
            let sent = answer("add_response_headers", serde_json::json!("/caf\u{e9} x"));
            let sent = format!("{:?}", parse(&sent));
            assert!(sent.contains("/caf%C3%A9%20x"), "{sent}");
            for bad in ["JavaScript:alert(1)", " data:text/html,x", "https://[a]/", "/a\tb"] {
                let error = error(&answer("add_response_headers", serde_json::json!(bad)));
                assert!(error.starts_with("the `Location` in `add_response_headers`") || error.contains("control characters"), "{error}");
            }
            for several in [serde_json::json!([]), serde_json::json!(["/a", "/b"])] {
                assert!(error(&answer("add_response_headers", several)).contains("values: it must be one"));
            }
            assert!(error(&answer("append_response_headers", serde_json::json!("/a"))).contains("a response has one"));
        }
        parse(r#"{"remove_response_headers":["Location"]}"#);
    }

    #[test]
    fn no_name_stands_twice() {
        for bad in [
            r#"{"add_request_headers":{"X-A":"1","X-A":"2"}}"#,
            r#"{"add_response_headers":{"X-A":"1","x-a":"2"}}"#,
            r#"{"append_request_headers":{"X-A":"1","X-A":"1"}}"#,
            r#"{"append_response_headers":{"X-A":[],"X-A":[]}}"#,
            r#"{"decision":"block","add_response_headers":{"Set-Cookie":"a=1","set-cookie":"b=2"}}"#,
            r#"{"decision":"challenge","challenge_type":"x","challenge_params":{"body":"a","Body":"b"}}"#,
            r#"{"routing_metadata":{"a":"1","a":"2"}}"#,
            r#"{"websocket_decision":{"close":{"code":1000},"close":{"code":1008}}}"#,
            r#"{"websocket_decision":{"close":{"code":1000,"code":1008}}}"#,
            r#"{"request_body_mutation":{"action":"drop","action":"pass_through"}}"#,
        ] {
            let error = error(bad);
            assert!(error.contains("twice") || error.contains("duplicate"), "{error}");
        }
        assert_eq!(parse(r#"{"routing_metadata":{"a":"1","A":"2"}}"#).routing_metadata.len(), 2);
        for count in [16, 17, 1000] {
            let names: Vec<String> = (0..count).map(|at| format!("\"X-{at}\":\"v\"")).collect();
            let json = |more: &str| format!("{{\"add_request_headers\":{{{}{more}}}}}", names.join(","));
            assert_eq!(parse(&json("")).request_headers.len(), count);
            assert!(error(&json(r#","x-3":"v""#)).contains("`x-3` twice"));
        }
    }

    #[test]
    fn a_block_ends_the_request() {
        for status in [100, 101, 102, 103, 199] {
            assert!(error(&format!(r#"{{"decision":"block","status":{status}}}"#)).contains("must be 200 to 599"));
        }
        for status in [204, 205, 304] {
            for body in ["null", r#""none""#] {
                let answer = format!(r#"{{"decision":"block","status":{status},"body":{body}}}"#);
                assert_eq!(parse(&answer).decision, Decision::Block { status, body: Some("".into()), headers: vec![] });
            }
        }
    }

    #[test]
    fn a_block_sets_one_cookie_at_most() {
        let one = parse(r#"{"decision":"block","append_response_headers":{"Set-Cookie":["a=1"]}}"#);
        assert_eq!(one.decision, Decision::Block { status: 403, body: None, headers: vec![pair("Set-Cookie", "a=1")] });
        for bad in [
            r#"{"decision":"block","add_response_headers":{"Set-Cookie":["a=1","b=2"]}}"#,
            r#"{"decision":"block","append_response_headers":{"set-cookie":["a=1","b=2"]}}"#,
            r#"{"decision":"block","add_response_headers":{"Set-Cookie":"a=1"},"append_response_headers":{"SET-COOKIE":"b=2"}}"#,
        ] {
            assert!(error(bad).contains("`Set-Cookie`"));
        }
        parse(r#"{"add_response_headers":{"Set-Cookie":["a=1","b=2"]}}"#);
    }

    #[test]
    fn the_url_of_a_redirect_is_encoded() {
        let url: Text<'_> = "/caf%C3%A9%20x?a=%2F#b".into();
        let json = serde_json::json!({"decision": "redirect", "body": "/caf\u{e9} x?a=%2F#b"}).to_string();
        assert_eq!(parse(&json).decision, Decision::Redirect { status: 302, url });
        assert!(error(r#"{"decision":"redirect","body":"https://[x]/"}"#).contains("the URL of a redirect has an invalid"));
    }

    #[test]
    fn websocket_and_guardrail_answers() {
        let answer = parse(r#"{"websocket_decision":{"close":{"code":1008,"reason":"no"}}}"#);
        assert_eq!(answer.websocket_decision, Some(WebsocketDecision::Close { code: 1008, reason: "no".into() }));
        let answer = parse(r#"{"guardrail_response": {"detected": true, "confidence": 0.5}}"#);
        assert_eq!(answer.guardrail_response.as_deref(), Some(r#"{"confidence":0.5,"detected":true}"#));
        let answer = parse(
            r#"{"guardrail_response":{"detected":false,"detections":[{"category":"x","description":"y","more":[1]}],"redacted_content":null,"more":{}}}"#,
        );
        assert!(answer.guardrail_response.unwrap().contains(r#""more":[1]"#));
    }

    #[test]
    fn a_field_adds_so_many_values_and_no_more() {
        let adding = |count| serde_json::json!({"add_response_headers": {"a": vec!["v"; count - 1], "b": "v"}}).to_string();
        assert_eq!(parse(&adding(MAX_ADDED)).response_headers.len(), MAX_ADDED);
        assert!(read(adding(MAX_ADDED + 1).as_bytes()).unwrap_err().to_string().contains("too many values"));
    }

    #[test]
    fn a_verdict_that_the_proxy_could_not_read_is_none() {
        let verdict = |with: &str| format!(r#"{{"guardrail_response":{{"detected":true,"detections":[{{"category":"x"{with}}}]}}}}"#);
        let described = |with: &str| verdict(&format!(r#","description":"y"{with}"#));
        for good in [
            described(""),
            described(r#","severity":"critical","confidence":1,"span":{"start":0,"end":18446744073709551615}"#),
            described(r#","confidence":null,"span":null"#),
        ] {
            parse(&good);
        }
        for bad in [
            verdict(""),
            verdict(r#","description":null"#),
            described(r#","severity":"HIGH""#),
            described(r#","severity":null"#),
            described(r#","confidence":"0.9""#),
            described(r#","confidence":1.1"#),
            described(r#","span":[0,1]"#),
            described(r#","span":{"start":-1,"end":2}"#),
            described(r#","span":{"start":0}"#),
            described(r#","span":{"start":0.5,"end":1}"#),
            r#"{"guardrail_response":{"detected":true,"detections":[1]}}"#.into(),
            r#"{"guardrail_response":{"detected":true,"detections":null}}"#.into(),
            r#"{"guardrail_response":{"detected":true,"confidence":null}}"#.into(),
        ] {
            let error = read(bad.as_bytes()).unwrap_err().to_string();
            assert!(error.contains("`guardrail_response."), "{bad}: {error}");
        }
    }

    #[test]
    fn on_configure_may_reject() {
        assert_eq!(read_configured(b"").unwrap(), None);
        assert_eq!(read_configured(b"{}").unwrap(), None);
        assert_eq!(read_configured(br#"{"error":"no key"}"#).unwrap().as_deref(), Some("no key"));
        read_configured(b"nonsense").unwrap_err();
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = read(&bytes);
        }

        #[test]
        fn whatever_parses_keeps_the_rules(
            decision in "allow|block|redirect|challenge|x",
            status in any::<u16>(),
            text in "\\PC{0,12}|[\\x00-\\x1f]{1,3}",
            name in "[ -~]{0,6}|te|Upgrade|trailer|Host",
        ) {
            let json = serde_json::json!({
                "decision": decision, "status": status, "body": text, "challenge_type": text, "challenge_params": {&name: &text},
                "add_request_headers": {&name: &text}, "add_response_headers": {&name: &text}, "tags": [&text],
            });
            let bytes = json.to_string();
            if let Ok(answer) = read(bytes.as_bytes()) {
                for op in answer.request_headers.iter().chain(&answer.response_headers) {
                    let (HeaderOp::Set(name, value) | HeaderOp::Add(name, value)) = op else { continue };
                    prop_assert!(header::is_token(name) && header::is_value(value) && !header::is_framing(name));
                }
                let impossible = matches!(answer.decision, Decision::Block { status, .. } if !(200..600).contains(&status));
                prop_assert!(!impossible);
                prop_assert!(answer.audit.tags.iter().all(|tag| header::is_value(tag)));
            }
        }
    }
}
