//! Which changes of a body a module may request.
//!
//! The proxy silently ignores some changes, and forwards others with a wrong length, so the
//! upstream waits for bytes that never come. Both are module errors here.

use serde::{Deserialize, Serialize};
use zentinel_wasm_contract::event::{BodyChunk, RequestHeaders};
use zentinel_wasm_contract::{Answer, BodyAction, BodyMutation, Decision, Failure, FailureKind, Hook};

/// What is known about the length of a request's body. The proxy forwards the request's headers
/// before it has the body, so a length in them is a promise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Length {
    /// Content-Length has this value. `None`: the value is not one number.
    Announced(Option<u64>),
    /// The length is not announced: the body is chunked, or comes over HTTP/2.
    Open,
    /// The agent does not know the request's headers for certain. A wrong guess would leave the
    /// client without an answer, so the length counts as announced.
    Unknown,
}

impl Length {
    /// The length that the headers of a request announce.
    pub(crate) fn of(event: &RequestHeaders<'_>) -> Self {
        // With a Transfer-Encoding it does not count (RFC 9112, 6.3), but a proxy that forwards
        // both has promised it nevertheless.
        match event.headers.get("content-length") {
            None => Self::Open,
            Some(values) => match values {
                [value] => Self::Announced(value.trim().parse().ok()),
                _ => Self::Announced(None),
            },
        }
    }

    /// Checks that `size` bytes may be replaced with `replaced` bytes.
    pub(crate) fn check(self, size: u64, replaced: u64) -> Result<(), Failure> {
        if size == replaced {
            return Ok(());
        }
        let change = format!("`request_body_mutation` makes {replaced} bytes of {size}");
        let why = match self {
            Self::Open => return Ok(()),
            Self::Announced(Some(length)) => {
                format!(
                    "but the request announced {length} bytes: a replacement must have the same length, or the client must send chunked"
                )
            }
            Self::Announced(None) => {
                "but the request announced a length: a replacement must have the same length, or the client must send chunked".to_owned()
            }
            Self::Unknown => "but the agent does not know whether the request announced a length, because it has not seen its headers or \
                              because another live request has the same correlation id: a replacement must have the same length"
                .to_owned(),
        };
        Err(Failure::new(FailureKind::InvalidResult, format!("{change}, {why}")))
    }
}

/// The part of a body that an event carries, and how the proxy treats changes to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EventBody {
    /// The event carries no body.
    None,
    /// A chunk of a request's body.
    Request {
        /// In bytes.
        size: u64,
        /// Whether it is the last.
        is_last: bool,
        /// Whether the proxy applies a change.
        applied: bool,
        /// Of the whole body.
        length: Length,
    },
    /// A chunk of a response's body.
    Response {
        /// In bytes.
        size: u64,
    },
}

impl EventBody {
    /// A chunk of a request's body.
    pub(crate) fn request(chunk: &BodyChunk<'_>, length: Length) -> Self {
        let size = chunk.data.size() as u64;
        Self::Request { size, is_last: chunk.is_last, applied: !is_buffered(chunk), length }
    }

    /// A chunk of a response's body.
    pub(crate) fn response(chunk: &BodyChunk<'_>) -> Self {
        Self::Response { size: chunk.data.size() as u64 }
    }
}

/// Whether the proxy has buffered this chunk and ignores changes to it: it sends the chunk's size
/// as the size of the body, even if its limit or the threshold of the hybrid mode has truncated the
/// body. Streamed chunks have no such size.
pub(crate) fn is_buffered(chunk: &BodyChunk<'_>) -> bool {
    chunk.chunk_index == 0 && chunk.total_size == Some(chunk.data.size() as u64)
}

/// Checks that the proxy applies the body mutations of `answer`, and makes the answer to the last
/// chunk final.
pub(crate) fn settle(answer: &mut Answer<'_>, hook: Hook, body: EventBody) -> Result<(), Failure> {
    if answer.request_body_mutation.is_none() && answer.response_body_mutation.is_none() && !answer.needs_more {
        return Ok(());
    }
    if let EventBody::Request { is_last: true, .. } = body {
        // The proxy ignores a refusal with `needs_more`, although no more chunks will come.
        answer.needs_more = false;
    }
    if answer.decision != Decision::Allow && !answer.needs_more {
        // The body is not forwarded. An error would forward it with `--fail-open`.
        return Ok(());
    }
    if let Some(replaced) = replaced(answer.request_body_mutation.as_ref()) {
        let EventBody::Request { size, applied, length, .. } = body else {
            return Err(out_of_place("request_body_mutation", hook, Hook::RequestBody));
        };
        if !applied {
            return ignored(
                "`request_body_mutation` would be ignored, because the proxy has buffered the body: set `request-body-mode \"stream\"` on \
                 every agent of the route",
            );
        }
        length.check(size, replaced)?;
    }
    if let Some(replaced) = replaced(answer.response_body_mutation.as_ref()) {
        let EventBody::Response { size } = body else {
            return Err(out_of_place("response_body_mutation", hook, Hook::ResponseBody));
        };
        if replaced == 0 && size > 0 {
            return ignored(
                "`response_body_mutation` would be ignored, because the proxy sends the original instead of an empty body: replace it with at \
                 least one byte, or block",
            );
        }
    }
    Ok(())
}

/// Makes the answer to the last chunk of a collected body replace the whole body, because the
/// chunks before were dropped.
pub(crate) fn put_back<'a>(answer: &mut Answer<'a>, whole: &'a [u8]) {
    let action = match answer.request_body_mutation.take().map(|mutation| mutation.action) {
        None | Some(BodyAction::PassThrough) => BodyAction::Replace(whole.into()),
        Some(action) => action,
    };
    answer.request_body_mutation = Some(action.into());
}

/// Size of the chunk after a mutation, or `None` if the mutation does not change it.
fn replaced(mutation: Option<&BodyMutation<'_>>) -> Option<u64> {
    match &mutation?.action {
        BodyAction::PassThrough => None,
        BodyAction::Replace(bytes) => Some(bytes.len() as u64),
        BodyAction::Drop => Some(0),
    }
}

fn ignored(detail: &str) -> Result<(), Failure> {
    Err(Failure::new(FailureKind::InvalidResult, detail))
}

fn out_of_place(field: &str, hook: Hook, right: Hook) -> Failure {
    let detail =
        format!("`{field}` would be ignored in an answer of `{}`: the proxy applies it in answers of `{}`", hook.export(), right.export());
    Failure::new(FailureKind::InvalidResult, detail)
}

#[cfg(test)]
mod tests {
    use super::*;
    use zentinel_wasm_contract::event::Data;

    fn request(length: Length) -> EventBody {
        EventBody::Request { size: 4, is_last: false, applied: true, length }
    }

    #[track_caller]
    fn settled(answer: &str, hook: Hook, body: EventBody) -> Result<bool, String> {
        let mut answer = zentinel_wasm_guest_json::answer::read(answer.as_bytes()).unwrap();
        settle(&mut answer, hook, body).map(|()| answer.needs_more).map_err(|failure| failure.detail.into())
    }

    const SAME: &str = r#"{"request_body_mutation":{"action":"replace","data":"****"}}"#;
    const LONGER: &str = r#"{"request_body_mutation":{"action":"replace","data":"*****"}}"#;
    const DROP: &str = r#"{"request_body_mutation":{"action":"drop"}}"#;
    const PASS: &str = r#"{"request_body_mutation":{"action":"pass_through"}}"#;
    const RESPONSE_DROP: &str = r#"{"response_body_mutation":{"action":"drop"}}"#;

    #[test]
    fn keeps_an_announced_length() {
        for (length, reason) in [(Length::Announced(Some(9)), "announced 9 bytes"), (Length::Unknown, "does not know whether")] {
            settled(SAME, Hook::RequestBody, request(length)).unwrap();
            settled(PASS, Hook::RequestBody, request(length)).unwrap();
            for answer in [LONGER, DROP] {
                let error = settled(answer, Hook::RequestBody, request(length)).unwrap_err();
                assert!(error.contains(reason) && error.contains("same length"), "{error}");
            }
        }
        settled(LONGER, Hook::RequestBody, request(Length::Open)).unwrap();
        settled(DROP, Hook::RequestBody, request(Length::Open)).unwrap();
    }

    #[test]
    fn rejects_mutations_that_the_proxy_ignores() {
        let buffered = EventBody::Request { size: 4, is_last: true, applied: false, length: Length::Open };
        settled(PASS, Hook::RequestBody, buffered).unwrap();
        assert!(settled(SAME, Hook::RequestBody, buffered).unwrap_err().contains(r#"set `request-body-mode "stream"`"#));
        assert!(settled(SAME, Hook::RequestHeaders, EventBody::None).unwrap_err().contains("in an answer of `on_request_headers`"));
        assert!(settled(SAME, Hook::ResponseBody, EventBody::Response { size: 4 }).unwrap_err().contains("would be ignored"));
        assert!(settled(RESPONSE_DROP, Hook::RequestBody, request(Length::Open)).unwrap_err().contains("would be ignored"));
        assert!(settled(RESPONSE_DROP, Hook::ResponseBody, EventBody::Response { size: 4 }).unwrap_err().contains("sends the original"));
        settled(RESPONSE_DROP, Hook::ResponseBody, EventBody::Response { size: 0 }).unwrap();
    }

    #[test]
    fn accepts_refusals_with_mutations() {
        let refusal = r#"{"decision":"block","request_body_mutation":{"action":"drop"}}"#;
        settled(refusal, Hook::RequestBody, request(Length::Unknown)).unwrap();
        let not_final = r#"{"decision":"block","needs_more":true,"request_body_mutation":{"action":"drop"}}"#;
        settled(not_final, Hook::RequestBody, request(Length::Unknown)).unwrap_err();
    }

    #[test]
    fn makes_the_answer_to_the_last_chunk_final() {
        let answer = r#"{"decision":"block","needs_more":true}"#;
        assert_eq!(settled(answer, Hook::RequestBody, request(Length::Open)), Ok(true));
        let last = EventBody::Request { size: 0, is_last: true, applied: true, length: Length::Open };
        assert_eq!(settled(answer, Hook::RequestBody, last), Ok(false));
        assert_eq!(settled(answer, Hook::RequestHeaders, EventBody::None), Ok(true));
    }

    #[test]
    fn distinguishes_buffered_from_streamed_chunks() {
        let chunk = |data: &'static [u8], chunk_index, total_size| BodyChunk {
            correlation_id: "a".into(),
            data: Data::Raw(data),
            is_last: false,
            total_size,
            chunk_index,
            bytes_received: None,
            bytes_sent: None,
        };
        assert!(is_buffered(&chunk(b"abc", 0, Some(3))));
        assert!(!is_buffered(&chunk(b"abc", 0, None)));
        assert!(!is_buffered(&chunk(b"abc", 0, Some(9))));
        assert!(!is_buffered(&chunk(b"abc", 1, Some(3))));
    }

    #[test]
    fn computes_the_size_of_base64() {
        for (text, size) in [("", 0), ("YQ==", 1), ("YWI=", 2), ("YWJj", 3), ("YWJjZA==", 4), ("=", 0), ("==", 0)] {
            assert_eq!(Data::Base64(text.into()).size(), size, "{text}");
        }
    }
}
