//! Reads what a module answers from its JSON.
//!
//! [`read`] maps the fields of the JSON object to the parts of an [`Answer`], whose types keep the
//! rules of the contract, and names the field in which a rule is broken.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use zentinel_wasm_contract::answer::{
    Answer, AnswerBuilder, AnswerError, Block, BlockStatus, BodyAction, BodyMutation, ChallengeParams, ChallengeType, CloseCode,
    CloseReason, Confidence, Decision, GuardrailVerdict, RedirectStatus, RedirectUrl, RoutingMetadata, WebsocketDecision,
};
use zentinel_wasm_contract::limits::{MAX_DETAIL, MAX_QUOTE};
use zentinel_wasm_contract::text::Object;
use zentinel_wasm_contract::{Bounded, Failure, FailureKind, Pairs, Text, shortened};

use crate::fields::{AnswerFields, MutationFields, Scalar, Values, WebsocketFields};

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
        Self::new(FailureKind::InvalidResult, error.0)
    }
}

fn invalid<T>(message: impl Into<String>) -> Result<T, InvalidAnswer> {
    Err(InvalidAnswer(message.into()))
}

/// Names the field in which a rule is broken.
fn in_field(field: &str) -> impl Fn(AnswerError) -> InvalidAnswer {
    move |error| InvalidAnswer(format!("`{field}`: {error}"))
}

/// A guest's text as it is quoted in messages.
fn quoted(text: &str) -> String {
    format!("`{}`", shortened(text, MAX_QUOTE))
}

/// Reads and checks an answer. No bytes at all allow the event unchanged.
///
/// # Errors
///
/// Whatever the contract calls a module error: invalid UTF-8 or JSON, a wrong type, an unknown
/// decision, a value out of range, an invalid header, or one that only the proxy may write.
pub fn read(bytes: &[u8]) -> Result<Answer<'_>, InvalidAnswer> {
    match bytes {
        b"" | br#"{"decision":"allow"}"# => return Ok(Answer::default()),
        _ => {}
    }
    // Checked as a whole, because serde_json does not validate the strings of fields that it skips.
    let Ok(text) = std::str::from_utf8(bytes) else {
        return invalid("the answer is not valid UTF-8");
    };
    match serde_json::from_str::<Object<AnswerFields<'_>>>(text) {
        Ok(Object(fields)) => answer(fields),
        Err(error) => invalid(shortened(&format!("the answer does not match the contract: {error}"), MAX_DETAIL)),
    }
}

/// Reads what `on_configure` answered: nothing, an object without an `error`, or the reason why the
/// module rejects its configuration.
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
        // The reason is logged, and sent to the proxy.
        Ok(Object(configured)) => Ok(configured.error.map(|reason| shortened(&reason, MAX_DETAIL))),
        Err(error) => invalid(shortened(&format!("the answer of `on_configure` does not match the contract: {error}"), MAX_DETAIL)),
    }
}

fn answer(fields: AnswerFields<'_>) -> Result<Answer<'_>, InvalidAnswer> {
    let decision = match Kind::parse(fields.decision.as_deref())? {
        Kind::Allow => Decision::Allow,
        Kind::Block => block(fields.status, fields.body)?,
        Kind::Redirect => redirect(fields.status, fields.body)?,
        Kind::Challenge => challenge(fields.challenge_type, fields.challenge_params.unwrap_or_default())?,
    };
    let mut answer = AnswerBuilder::new(decision);

    if let Some(names) = fields.remove_request_headers {
        answer.remove_request_headers(names).map_err(in_field("remove_request_headers"))?;
    }
    if let Some(headers) = fields.add_request_headers {
        answer.set_request_headers(lists(headers)).map_err(in_field("add_request_headers"))?;
    }
    if let Some(headers) = fields.append_request_headers {
        answer.append_request_headers(lists(headers)).map_err(in_field("append_request_headers"))?;
    }
    if let Some(names) = fields.remove_response_headers {
        answer.remove_response_headers(names).map_err(in_field("remove_response_headers"))?;
    }
    if let Some(headers) = fields.add_response_headers {
        answer.set_response_headers(lists(headers)).map_err(in_field("add_response_headers"))?;
    }
    if let Some(headers) = fields.append_response_headers {
        answer.append_response_headers(lists(headers)).map_err(in_field("append_response_headers"))?;
    }

    if let Some(tags) = fields.tags {
        answer.tags(tags).map_err(in_field("tags"))?;
    }
    if let Some(rule_ids) = fields.rule_ids {
        answer.rule_ids(rule_ids).map_err(in_field("rule_ids"))?;
    }
    if let Some(reason_codes) = fields.reason_codes {
        answer.reason_codes(reason_codes).map_err(in_field("reason_codes"))?;
    }
    if let Some(confidence) = fields.confidence {
        answer.confidence(Confidence::new(confidence).map_err(in_field("confidence"))?);
    }
    if let Some(Pairs(metadata)) = fields.routing_metadata {
        answer.routing_metadata(RoutingMetadata::new(metadata).map_err(in_field("routing_metadata"))?);
    }

    answer.needs_more(fields.needs_more.unwrap_or(false));
    if let Some(Object(fields)) = fields.request_body_mutation {
        answer.request_body_mutation(mutation("request_body_mutation", fields)?);
    }
    if let Some(Object(fields)) = fields.response_body_mutation {
        answer.response_body_mutation(mutation("response_body_mutation", fields)?);
    }
    if let Some(fields) = fields.websocket_decision {
        answer.websocket_decision(websocket_decision(fields)?);
    }
    if let Some(Bounded(verdict)) = fields.guardrail_response {
        answer.guardrail_response(GuardrailVerdict::new(&verdict).map_err(in_field("guardrail_response"))?);
    }
    Ok(answer.build())
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
            None => invalid(format!("`decision` is {}, but must be `allow`, `block`, `deny`, `redirect` or `challenge`", quoted(decision))),
        }
    }
}

fn block<'a>(status: Option<u16>, body: Option<Text<'a>>) -> Result<Decision<'a>, InvalidAnswer> {
    let status = status.map_or(Ok(BlockStatus::FORBIDDEN), BlockStatus::new).map_err(in_field("status"))?;
    Ok(Decision::Block(Block::new(status, body)))
}

fn redirect(status: Option<u16>, url: Option<Text<'_>>) -> Result<Decision<'_>, InvalidAnswer> {
    let status = status.map_or(Ok(RedirectStatus::FOUND), RedirectStatus::new).map_err(in_field("status"))?;
    let Some(url) = url else { return invalid("a redirect needs its URL in `body`") };
    Ok(Decision::Redirect { status, url: RedirectUrl::new(url).map_err(in_field("body"))? })
}

fn challenge<'a>(challenge_type: Option<Text<'a>>, params: Pairs<'a, Scalar<'a>>) -> Result<Decision<'a>, InvalidAnswer> {
    let Some(challenge_type) = challenge_type else { return invalid("a challenge needs a `challenge_type`") };
    let challenge_type = ChallengeType::new(challenge_type).map_err(in_field("challenge_type"))?;
    let params = params.0.into_iter().map(|(name, value)| (name, value.0)).collect();
    Ok(Decision::Challenge { challenge_type, params: ChallengeParams::new(params).map_err(in_field("challenge_params"))? })
}

/// Headers as the contract takes them. Nothing is copied.
fn lists<'a>(headers: Pairs<'a, Values<'a>>) -> Vec<(Text<'a>, Vec<Text<'a>>)> {
    headers.0.into_iter().map(|(name, Values(values))| (name, values)).collect()
}

fn mutation<'a>(field: &str, fields: MutationFields<'a>) -> Result<BodyMutation<'a>, InvalidAnswer> {
    let action = match fields.action.as_deref() {
        Some(name) if name.eq_ignore_ascii_case("pass_through") => BodyAction::PassThrough,
        Some(name) if name.eq_ignore_ascii_case("drop") => BodyAction::Drop,
        Some(name) if name.eq_ignore_ascii_case("replace") => BodyAction::Replace(match (fields.data, fields.data_base64) {
            (Some(Text(Cow::Borrowed(data))), None) => Cow::Borrowed(data.as_bytes()),
            (Some(Text(Cow::Owned(data))), None) => Cow::Owned(data.into_bytes()),
            (None, Some(data)) => match base64_simd::STANDARD.decode_to_vec(data.as_bytes()) {
                Ok(bytes) => Cow::Owned(bytes),
                Err(_) => return invalid(format!("`{field}.data_base64` is invalid base64")),
            },
            (None, None) => return invalid(format!("`{field}` replaces the chunk, so it needs `data` or `data_base64`")),
            (Some(_), Some(_)) => return invalid(format!("`{field}` has both `data` and `data_base64`")),
        }),
        Some(name) => {
            return invalid(format!("`{field}.action` is {}, but must be `pass_through`, `replace` or `drop`", quoted(name)));
        }
        None => return invalid(format!("`{field}` needs an `action`: `pass_through`, `replace` or `drop`")),
    };
    Ok(BodyMutation { action, chunk_index: fields.chunk_index })
}

fn websocket_decision(fields: WebsocketFields<'_>) -> Result<WebsocketDecision<'_>, InvalidAnswer> {
    match fields {
        WebsocketFields::Named(name) if name.eq_ignore_ascii_case("allow") => Ok(WebsocketDecision::Allow),
        WebsocketFields::Named(name) if name.eq_ignore_ascii_case("drop") => Ok(WebsocketDecision::Drop),
        WebsocketFields::Named(name) => {
            invalid(format!("`websocket_decision` is {}, but must be `allow`, `drop` or an object with `close`", quoted(&name)))
        }
        WebsocketFields::Close { code, reason } => Ok(WebsocketDecision::Close {
            code: CloseCode::new(code).map_err(in_field("websocket_decision.close.code"))?,
            reason: CloseReason::new(reason.unwrap_or_default()).map_err(in_field("websocket_decision.close.reason"))?,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};
    use zentinel_wasm_contract::answer::{Audit, HeaderName, HeaderOp, HeaderValue, Printable};
    use zentinel_wasm_contract::header;
    use zentinel_wasm_contract::limits::MAX_ADDED;

    #[track_caller]
    fn parse(json: &str) -> Answer<'_> {
        read(json.as_bytes()).unwrap()
    }

    #[track_caller]
    fn error(json: &str) -> String {
        read(json.as_bytes()).unwrap_err().to_string()
    }

    fn list<'a>(values: &[&'a str]) -> Vec<Printable<'a>> {
        Printable::list(values.iter().map(|&value| value.into()).collect()).unwrap()
    }

    fn name(name: &str) -> HeaderName<'_> {
        HeaderName::new(name.into()).unwrap()
    }

    fn value(value: &str) -> HeaderValue<'_> {
        HeaderValue::new(value.into()).unwrap()
    }

    fn set<'a>(header: &'a str, to: &'a str) -> HeaderOp<'a> {
        HeaderOp::Set(name(header), value(to))
    }

    fn add<'a>(header: &'a str, added: &'a str) -> HeaderOp<'a> {
        HeaderOp::Add(name(header), value(added))
    }

    fn remove(header: &str) -> HeaderOp<'_> {
        HeaderOp::Remove(name(header))
    }

    fn block<'a>(status: u16, body: Option<&'a str>, headers: &[(&'a str, &'a str)]) -> Decision<'a> {
        let mut block = Block::new(BlockStatus::new(status).unwrap(), body.map(Text::from));
        let headers = headers.iter().map(|&(name, value)| (name.into(), vec![value.into()])).collect();
        block.headers_mut().set(headers).unwrap();
        Decision::Block(block)
    }

    fn challenge<'a>(challenge_type: &'a str, params: &[(&'a str, &'a str)]) -> Decision<'a> {
        Decision::Challenge {
            challenge_type: ChallengeType::new(challenge_type.into()).unwrap(),
            params: ChallengeParams::new(params.iter().map(|&(name, value)| (name.into(), value.into())).collect()).unwrap(),
        }
    }

    fn redirect(status: u16, url: &str) -> Decision<'_> {
        let status = RedirectStatus::new(status).unwrap();
        Decision::Redirect { status, url: RedirectUrl::new(url.into()).unwrap() }
    }

    mod product_page {
        use super::*;

        #[test]
        fn result_object() {
            let answer = parse(include_str!("../golden/result.json"));
            assert_eq!(answer.decision, Decision::Allow);
            assert_eq!(*answer.request_headers, [remove("X-Debug"), set("X-Processed", "true")]);
            assert_eq!(*answer.response_headers, [set("X-Frame-Options", "DENY")]);
            assert_eq!(answer.audit.tags, list(&["processed"]));
        }

        #[test]
        fn challenge_with_parameters() {
            let answer = parse(include_str!("../golden/challenge.json"));
            assert_eq!(answer.decision, challenge("captcha", &[("site_key", "your-captcha-site-key"), ("action", "login")]));
            assert_eq!(answer.audit.tags, list(&["bot-challenge"]));
        }

        #[test]
        fn audit_metadata() {
            let answer = parse(include_str!("../golden/audit.json"));
            assert_eq!(answer.decision, block(403, None, &[]));
            assert_eq!(
                answer.audit,
                Audit {
                    tags: list(&["path-traversal"]),
                    rule_ids: list(&["SEC-001", "OWASP-930"]),
                    confidence: Some(Confidence::new(0.95).unwrap()),
                    reason_codes: list(&["PATH_TRAVERSAL_DETECTED"]),
                }
            );
        }

        #[test]
        fn routing_metadata() {
            let answer = parse(include_str!("../golden/routing.json"));
            let pairs = [("upstream", "api-v2-backend"), ("priority", "high")];
            let expected = RoutingMetadata::new(pairs.map(|(key, value)| (key.into(), value.into())).into()).unwrap();
            assert_eq!(answer.routing_metadata, expected);
        }

        #[test]
        fn body_mutations() {
            let answer = parse(include_str!("../golden/request_body_mutation.json"));
            assert_eq!(answer.request_body_mutation, Some(BodyMutation { action: BodyAction::PassThrough, chunk_index: Some(0) }));
            let answer = parse(include_str!("../golden/response_body_mutation.json"));
            let action = BodyAction::Replace(Cow::Borrowed(b"Modified response content"));
            assert_eq!(answer.response_body_mutation, Some(BodyMutation { action, chunk_index: Some(0) }));
        }

        #[test]
        fn needs_more() {
            assert!(parse(include_str!("../golden/needs_more.json")).needs_more);
        }
    }

    mod decisions {
        use super::*;

        #[test]
        fn no_bytes_and_null_fields_allow() {
            assert_eq!(parse(""), Answer::default());
            assert_eq!(parse("{}"), Answer::default());
            assert_eq!(parse(r#"{"decision":null,"status":null,"body":null,"tags":null,"unknown":[1,{}]}"#), Answer::default());
        }

        #[test]
        fn are_read_in_any_case() {
            assert_eq!(parse(r#"{"decision":"BLOCK"}"#).decision, block(403, None, &[]));
            assert_eq!(parse(r#"{"decision":"Deny","status":451}"#).decision, block(451, None, &[]));
            assert!(error(r#"{"decision":"alow"}"#).contains("`alow`"));
            assert!(error(r#"{"decision":""}"#).contains("must be"));
        }

        #[test]
        fn a_block_has_a_final_status() {
            for status in [100, 101, 102, 103, 199] {
                let error = error(&format!(r#"{{"decision":"block","status":{status}}}"#));
                assert!(error.contains("`status`") && error.contains("must be 200 to 599"), "{error}");
            }
        }

        #[test]
        fn a_block_without_content_has_no_body() {
            for status in [204, 205, 304] {
                for body in ["null", r#""none""#] {
                    let answer = format!(r#"{{"decision":"block","status":{status},"body":{body}}}"#);
                    assert_eq!(parse(&answer).decision, block(status, Some(""), &[]));
                }
            }
        }

        #[test]
        fn a_redirect_needs_a_harmless_url() {
            assert_eq!(parse(r#"{"decision":"redirect","body":"/login"}"#).decision, redirect(302, "/login"));
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
        fn the_url_of_a_redirect_is_encoded() {
            let json = json!({"decision": "redirect", "body": "/caf\u{e9} x?a=%2F#b"}).to_string();
            let Decision::Redirect { url, .. } = parse(&json).decision else { panic!() };
            assert_eq!(url.as_str(), "/caf%C3%A9%20x?a=%2F#b");
            let error = error(r#"{"decision":"redirect","body":"https://[x]/"}"#);
            assert!(error.contains("`body`: the URL of a redirect has an invalid"), "{error}");
        }

        #[test]
        fn challenge_params_become_strings() {
            let answer =
                parse(r#"{"decision":"challenge","challenge_type":"pow","challenge_params":{"n":5,"f":1.5,"b":true,"body":"a\nb"}}"#);
            assert_eq!(answer.decision, challenge("pow", &[("n", "5"), ("f", "1.5"), ("b", "true"), ("body", "a\nb")]));
            error(r#"{"decision":"challenge"}"#);
            error(r#"{"decision":"challenge","challenge_type":"a","challenge_params":{"x":null}}"#);
            error(r#"{"decision":"challenge","challenge_type":"a","challenge_params":{"content-type":"a\r\nb"}}"#);
        }
    }

    mod headers {
        use super::*;

        #[test]
        fn lists_set_the_first_value_and_add_the_rest() {
            let answer = parse(r#"{"add_response_headers":{"Set-Cookie":["a=1","b=2"],"X-None":[]}}"#);
            assert_eq!(*answer.response_headers, [set("Set-Cookie", "a=1"), add("Set-Cookie", "b=2")]);
        }

        #[test]
        fn appended_values_follow_those_that_are_there() {
            let answer =
                parse(r#"{"append_request_headers":{"Cookie":"a=1"},"append_response_headers":{"Set-Cookie":["a=1","b=2"],"X-None":[]}}"#);
            assert_eq!(*answer.request_headers, [add("Cookie", "a=1")]);
            assert_eq!(*answer.response_headers, [add("Set-Cookie", "a=1"), add("Set-Cookie", "b=2")]);
        }

        #[test]
        fn are_removed_then_set_then_appended() {
            for field in ["request_headers", "response_headers"] {
                let json = format!(r#"{{"append_{field}":{{"A":"3"}},"add_{field}":{{"A":["1","2"]}},"remove_{field}":["A"]}}"#);
                let answer = parse(&json);
                let ops: &[_] = if field == "request_headers" { &answer.request_headers } else { &answer.response_headers };
                assert_eq!(*ops, [remove("A"), set("A", "1"), add("A", "2"), add("A", "3")]);
            }
        }

        #[test]
        fn a_block_carries_its_own() {
            let answer = parse(r#"{"decision":"block","add_response_headers":{"Retry-After":"5","X-A":["1","2"]}}"#);
            assert_eq!(answer.decision, block(403, None, &[("Retry-After", "5"), ("X-A", "1, 2")]));
            assert!(answer.response_headers.is_empty());
        }

        #[test]
        fn a_block_joins_appended_values() {
            let answer = parse(
                r#"{"decision":"block","add_response_headers":{"X-A":"1","X-B":"1"},"append_response_headers":{"x-a":["2","3"],"X-C":"4"}}"#,
            );
            assert_eq!(answer.decision, block(403, None, &[("X-A", "1, 2, 3"), ("X-B", "1"), ("X-C", "4")]));
            assert!(answer.response_headers.is_empty());
            // Many names are looked up in another way than few.
            let all = |value: &str| (0..20).map(|at| (format!("x-{at}"), json!(value))).collect::<serde_json::Map<_, _>>();
            let json = json!({"decision": "block", "add_response_headers": all("1"), "append_response_headers": all("2")}).to_string();
            let Decision::Block(block) = parse(&json).decision else { panic!() };
            assert_eq!(block.headers().len(), 20);
            assert!(block.headers().iter().all(|(_, value)| value.as_str() == "1, 2"));
        }

        #[test]
        fn a_block_sets_one_cookie() {
            let one = parse(r#"{"decision":"block","append_response_headers":{"Set-Cookie":["a=1"]}}"#);
            assert_eq!(one.decision, block(403, None, &[("Set-Cookie", "a=1")]));
            for bad in [
                r#"{"decision":"block","add_response_headers":{"Set-Cookie":["a=1","b=2"]}}"#,
                r#"{"decision":"block","append_response_headers":{"set-cookie":["a=1","b=2"]}}"#,
                r#"{"decision":"block","add_response_headers":{"Set-Cookie":"a=1"},"append_response_headers":{"SET-COOKIE":"b=2"}}"#,
            ] {
                assert!(error(bad).contains("`Set-Cookie`"));
            }
            parse(r#"{"add_response_headers":{"Set-Cookie":["a=1","b=2"]}}"#);
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
        fn only_the_proxy_frames_messages() {
            for name in FRAMING {
                for field in ["add_request_headers", "append_request_headers", "add_response_headers", "append_response_headers"] {
                    for decision in ["allow", "block", "redirect", "challenge"] {
                        let answer = json!({"decision": decision, "body": "/", "challenge_type": "x", field: {"X-A": "1", name: "30"}});
                        let error = error(&answer.to_string());
                        assert!(error.contains(name) && error.contains(field) && error.contains("frames the message"), "{error}");
                    }
                }
                let error = error(&json!({"remove_request_headers": ["X-A", name]}).to_string());
                assert!(error.contains(name) && error.contains("frames the message"), "{error}");
            }
            parse(r#"{"remove_response_headers":["Content-Length"]}"#);
        }

        #[test]
        fn a_request_keeps_one_host() {
            let answer = parse(r#"{"add_request_headers":{"host":"shop.example:8443"}}"#);
            assert_eq!(*answer.request_headers, [set("host", "shop.example:8443")]);
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
        fn a_location_keeps_the_rules_of_a_redirect() {
            for decision in ["allow", "block"] {
                let answer = |field: &str, value: Value| {
                    json!({"decision": decision, "status": 302, field: {"X-A": "1", "location": value}}).to_string()
                };
                let sent = answer("add_response_headers", json!("/caf\u{e9} x"));
                let sent = format!("{:?}", parse(&sent));
                assert!(sent.contains("/caf%C3%A9%20x"), "{sent}");
                for bad in ["JavaScript:alert(1)", " data:text/html,x", "https://[a]/", "/a\tb", "/a\nb"] {
                    let error = error(&answer("add_response_headers", json!(bad)));
                    assert!(error.starts_with("`add_response_headers`: the URL in `Location` "), "{error}");
                }
                for several in [json!([]), json!(["/a", "/b"])] {
                    let error = error(&answer("add_response_headers", several));
                    assert!(error.contains("`Location` must have one value"), "{error}");
                }
                assert!(error(&answer("append_response_headers", json!("/a"))).contains("a response has one"));
            }
            parse(r#"{"remove_response_headers":["Location"]}"#);
        }
    }

    mod bounds {
        use super::*;

        #[test]
        fn lists_of_values_do_not_grow_beyond_their_answer() {
            let values = vec![""; 200_000];
            let block = json!({"decision": "block", "add_response_headers": {"X-A": values}}).to_string();
            let Decision::Block(block) = parse(&block).decision else { panic!() };
            assert_eq!(block.headers()[0].1.len(), 2 * (values.len() - 1));

            let name = "x".repeat(1000);
            for field in ["add_request_headers", "add_response_headers", "append_request_headers", "append_response_headers"] {
                let repeated = json!({field: {name.as_str(): values}}).to_string();
                let error = error(&repeated);
                assert!(error.contains("too many values") && error.contains(field), "{error}");
            }
        }

        #[test]
        fn a_field_adds_a_limited_number_of_values() {
            let adding = |count| json!({"add_response_headers": {"a": vec!["v"; count - 1], "b": "v"}}).to_string();
            assert_eq!(parse(&adding(MAX_ADDED)).response_headers.len(), MAX_ADDED);
            assert!(error(&adding(MAX_ADDED + 1)).contains("too many values"));
        }

        /// A value nested in a text within a text, sixty times, if a certain key is read that way:
        /// far deeper than a stack allows.
        fn bomb(before: &str, after: &str) -> String {
            let mut text = String::from("1");
            for _ in 0..60 {
                let quoted = text.replace('\\', "\\u005c").replace('"', "\\u0022");
                text = format!("{}{{\"$serde_json::private::RawValue\":\"{quoted}\"}}{}", "[".repeat(110), "]".repeat(110));
            }
            // A reader that survives it rejects it for another reason.
            format!("{before}{text},\"b\":1,\"b\":2{after}")
        }

        #[test]
        fn survives_a_value_nested_in_texts() {
            error(&bomb(r#"{"guardrail_response":{"detected":true,"detections":[{"a":"#, "}]}}"));
        }

        #[test]
        fn survives_deep_nesting_in_an_unknown_field() {
            let deep = format!("{{\"x\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
            let _ = read(deep.as_bytes());
        }
    }

    mod rejects {
        use super::*;

        #[test]
        fn injected_text() {
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
        fn wrong_types_and_values() {
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
            ] {
                error(bad);
            }
            assert!(read(b"{\"unknown\":\"\xff\"}").is_err());
        }

        #[test]
        fn repeated_names() {
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
                assert!(error(&json(r#","x-3":"v""#)).contains("`x-3` is given twice"));
            }
        }
    }

    mod guardrails {
        use super::*;

        #[test]
        fn a_verdict_keeps_unknown_fields() {
            let answer = parse(r#"{"guardrail_response": {"detected": true, "confidence": 0.5}}"#);
            assert_eq!(answer.guardrail_response.as_deref(), Some(r#"{"confidence":0.5,"detected":true}"#));
            let answer = parse(
                r#"{"guardrail_response":{"detected":false,"detections":[{"category":"x","description":"y","more":[1]}],"redacted_content":null,"more":{}}}"#,
            );
            assert!(answer.guardrail_response.unwrap().contains(r#""more":[1]"#));
        }

        #[test]
        fn rejects_a_verdict_that_the_proxy_could_not_read() {
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
                let error = error(&bad);
                assert!(error.starts_with("`guardrail_response`: `") && error.contains("` must be "), "{bad}: {error}");
            }
        }
    }

    #[test]
    fn closes_a_websocket_connection() {
        let answer = parse(r#"{"websocket_decision":{"close":{"code":1008,"reason":"no"}}}"#);
        let close = WebsocketDecision::Close { code: CloseCode::POLICY_VIOLATION, reason: CloseReason::from_static("no") };
        assert_eq!(answer.websocket_decision, Some(close));
        for bad in [json!({"code": 1005}), json!({"code": 1000, "reason": "x".repeat(124)}), json!({"code": 1000, "reason": "\n"})] {
            let error = error(&json!({"websocket_decision": {"close": bad}}).to_string());
            assert!(error.starts_with("`websocket_decision.close."), "{error}");
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
        fn survives_any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = read(&bytes);
        }

        #[test]
        fn whatever_is_read_keeps_the_rules(
            decision in "allow|block|redirect|challenge|x",
            status in any::<u16>(),
            text in "\\PC{0,12}|[\\x00-\\x1f]{1,3}",
            name in "[ -~]{0,6}|te|Upgrade|trailer|Host",
        ) {
            let json = json!({
                "decision": decision, "status": status, "body": text, "challenge_type": text, "challenge_params": {&name: &text},
                "add_request_headers": {&name: &text}, "add_response_headers": {&name: &text}, "tags": [&text],
            });
            let bytes = json.to_string();
            if let Ok(answer) = read(bytes.as_bytes()) {
                for op in answer.request_headers.iter().chain(&*answer.response_headers) {
                    let (HeaderOp::Set(name, value) | HeaderOp::Add(name, value)) = op else { continue };
                    prop_assert!(header::is_token(name) && header::is_value(value) && !header::is_framing(name));
                }
                if let Decision::Block(block) = &answer.decision {
                    prop_assert!((200..600).contains(&block.status().get()));
                }
                prop_assert!(answer.audit.tags.iter().all(|tag| header::is_value(tag)));
            }
        }
    }
}
