//! What a module may do to a body.
//!
//! The proxy ignores some changes in silence, and sends others on under a length that is no longer
//! true, so that the upstream waits for bytes that never come. Both are module errors here.

use zentinel_wasm_contract::event::{BodyChunk, RequestHeaders};
use zentinel_wasm_contract::{Answer, BodyAction, BodyMutation, Decision, Failure, FailureKind, Hook};

/// What is known of the length of a request's body. The proxy sends the request's headers on before
/// it has the body, so a length in them is a promise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Length {
    /// By Content-Length. None: its value is not one number.
    Announced(Option<u64>),
    /// The body ends when it ends: it comes in chunks, or over HTTP/2.
    Open,
    /// The agent does not know the request's headers, or not for certain. A wrong guess would leave
    /// the client without an answer, so the length is taken to be announced.
    Unknown,
}

impl Length {
    /// What the headers of a request say.
    pub(crate) fn of(event: &RequestHeaders<'_>) -> Self {
        // Beside a Transfer-Encoding it does not count (RFC 9112, 6.3), but a proxy that sends both on
        // has promised it all the same.
        match event.headers.get("content-length") {
            None => Self::Open,
            Some(values) => match values {
                [value] => Self::Announced(value.trim().parse().ok()),
                _ => Self::Announced(None),
            },
        }
    }

    /// Checks that `size` bytes may become `replaced`.
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

/// What becomes of a change to the body at hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EventBody {
    /// The event is not one of a body.
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

/// Whether the proxy has buffered this chunk, and ignores a change to it: it knows its size as that of
/// the whole, also where its limit or the threshold of the hybrid mode has cut the body. What it
/// streams comes without a size.
pub(crate) fn is_buffered(chunk: &BodyChunk<'_>) -> bool {
    chunk.chunk_index == 0 && chunk.total_size == Some(chunk.data.size() as u64)
}

/// Checks that the proxy does to the body what `answer` says, and makes the answer to the last chunk
/// final.
pub(crate) fn settle(answer: &mut Answer<'_>, hook: Hook, body: EventBody) -> Result<(), Failure> {
    if answer.request_body_mutation.is_none() && answer.response_body_mutation.is_none() && !answer.needs_more {
        return Ok(());
    }
    if let EventBody::Request { is_last: true, .. } = body {
        // The proxy does not act on a refusal that needs more, although no more will come.
        answer.needs_more = false;
    }
    if answer.decision != Decision::Allow && !answer.needs_more {
        // Nothing of the body goes on. An error instead would let it through where errors are allowed.
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

/// Makes the answer to the last chunk of a collected body stand for all of it: the chunks before were dropped.
pub(crate) fn put_back<'a>(answer: &mut Answer<'a>, whole: &'a [u8]) {
    let action = match answer.request_body_mutation.take().map(|mutation| mutation.action) {
        None | Some(BodyAction::PassThrough) => BodyAction::Replace(whole.into()),
        Some(action) => action,
    };
    answer.request_body_mutation = Some(action.into());
}

/// Size of what a mutation makes of the chunk. None when it leaves it as it is.
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
        settle(&mut answer, hook, body).map(|()| answer.needs_more).map_err(|failure| failure.detail)
    }

    const SAME: &str = r#"{"request_body_mutation":{"action":"replace","data":"****"}}"#;
    const LONGER: &str = r#"{"request_body_mutation":{"action":"replace","data":"*****"}}"#;
    const DROP: &str = r#"{"request_body_mutation":{"action":"drop"}}"#;
    const PASS: &str = r#"{"request_body_mutation":{"action":"pass_through"}}"#;
    const RESPONSE_DROP: &str = r#"{"response_body_mutation":{"action":"drop"}}"#;

    #[test]
    fn a_promised_length_is_kept() {
        for (length, said) in [(Length::Announced(Some(9)), "announced 9 bytes"), (Length::Unknown, "does not know whether")] {
            settled(SAME, Hook::RequestBody, request(length)).unwrap();
            settled(PASS, Hook::RequestBody, request(length)).unwrap();
            for answer in [LONGER, DROP] {
                let error = settled(answer, Hook::RequestBody, request(length)).unwrap_err();
                assert!(error.contains(said) && error.contains("same length"), "{error}");
            }
        }
        settled(LONGER, Hook::RequestBody, request(Length::Open)).unwrap();
        settled(DROP, Hook::RequestBody, request(Length::Open)).unwrap();
    }

    #[test]
    fn what_would_be_ignored_is_an_error() {
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
    fn a_refusal_is_not_made_an_error() {
        let refusal = r#"{"decision":"block","request_body_mutation":{"action":"drop"}}"#;
        settled(refusal, Hook::RequestBody, request(Length::Unknown)).unwrap();
        let not_final = r#"{"decision":"block","needs_more":true,"request_body_mutation":{"action":"drop"}}"#;
        settled(not_final, Hook::RequestBody, request(Length::Unknown)).unwrap_err();
    }

    #[test]
    fn nothing_more_is_needed_after_the_last_chunk() {
        let answer = r#"{"decision":"block","needs_more":true}"#;
        assert_eq!(settled(answer, Hook::RequestBody, request(Length::Open)), Ok(true));
        let last = EventBody::Request { size: 0, is_last: true, applied: true, length: Length::Open };
        assert_eq!(settled(answer, Hook::RequestBody, last), Ok(false));
        assert_eq!(settled(answer, Hook::RequestHeaders, EventBody::None), Ok(true));
    }

    #[test]
    fn a_buffered_body_is_told_from_a_streamed_one() {
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
    fn base64_tells_its_size() {
        for (text, size) in [("", 0), ("YQ==", 1), ("YWI=", 2), ("YWJj", 3), ("YWJjZA==", 4), ("=", 0), ("==", 0)] {
            assert_eq!(Data::Base64(text.into()).size(), size, "{text}");
        }
    }
}
