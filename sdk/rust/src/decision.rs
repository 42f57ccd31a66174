//! Decisions of hooks.

use crate::json::{write_key, write_number, write_score, write_separator, write_string};
use crate::{Text, base64};

/// The decision on a request, response or WebSocket frame, with changes and data for the audit log.
///
/// Start with [`allow`](Self::allow), [`block`](Self::block), [`redirect`](Self::redirect) or
/// [`challenge`](Self::challenge), then add to it.
#[derive(Clone, Debug, Default, PartialEq)]
#[must_use = "a decision has an effect only when the hook returns it"]
pub struct Decision {
    action: Action,
    status: Option<u16>,
    body: Option<Text>,
    request_headers: HeaderChanges,
    response_headers: HeaderChanges,
    tags: Vec<Text>,
    rule_ids: Vec<Text>,
    reason_codes: Vec<Text>,
    confidence: Option<f64>,
    routing: Vec<(Text, Text)>,
    needs_more: bool,
    request_body: Option<BodyChange>,
    response_body: Option<BodyChange>,
    frame: Option<FrameChange>,
}

#[derive(Clone, Debug, Default, PartialEq)]
enum Action {
    #[default]
    Allow,
    Block,
    Redirect,
    Challenge {
        kind: Text,
        params: Vec<(Text, Text)>,
    },
}

#[derive(Clone, Debug, Default, PartialEq)]
struct HeaderChanges {
    set: Vec<(Text, Vec<Text>)>,
    append: Vec<(Text, Vec<Text>)>,
    remove: Vec<Text>,
}

#[derive(Clone, Debug, PartialEq)]
enum BodyChange {
    Keep,
    ReplaceText(Text),
    ReplaceBytes(Vec<u8>),
    Drop,
}

#[derive(Clone, Debug, PartialEq)]
enum FrameChange {
    Drop,
    Close { code: u16, reason: Text },
}

impl Decision {
    /// Allows the request or response.
    pub fn allow() -> Self {
        Self::default()
    }

    /// Rejects the request or response with an HTTP status, 200 to 599.
    pub fn block(status: u16) -> Self {
        Self { action: Action::Block, status: Some(status), ..Self::default() }
    }

    /// Redirects the client to `url`, with status 302 unless [`status`](Self::status) sets another.
    pub fn redirect(url: impl Into<Text>) -> Self {
        Self { action: Action::Redirect, body: Some(url.into()), ..Self::default() }
    }

    /// Challenges the client, for example with a `captcha`.
    pub fn challenge(kind: impl Into<Text>) -> Self {
        Self { action: Action::Challenge { kind: kind.into(), params: Vec::new() }, ..Self::default() }
    }

    /// Sets the HTTP status of a block, or of a redirect: 301, 302, 303, 307 or 308.
    pub fn status(mut self, status: u16) -> Self {
        self.status = Some(status);
        self
    }

    /// Sets the body of a block's response.
    pub fn body(mut self, body: impl Into<Text>) -> Self {
        self.body = Some(body.into());
        self
    }

    /// Sets a parameter of a challenge. Has no effect on other decisions.
    pub fn param(mut self, name: impl Into<Text>, value: impl Into<Text>) -> Self {
        if let Action::Challenge { params, .. } = &mut self.action {
            // The agent rejects parameters whose names differ only in case.
            let (name, value) = (name.into(), value.into());
            params.retain(|(known, _): &(Text, Text)| !known.eq_ignore_ascii_case(&name));
            params.push((name, value));
        }
        self
    }

    /// Sets a header of the request to the upstream.
    pub fn set_request_header(self, name: impl Into<Text>, value: impl Into<Text>) -> Self {
        self.set_request_header_values(name, [value])
    }

    /// Sets a header of the request to the upstream to several values.
    pub fn set_request_header_values<V: Into<Text>>(mut self, name: impl Into<Text>, values: impl IntoIterator<Item = V>) -> Self {
        self.request_headers.set(name.into(), values.into_iter().map(Into::into).collect());
        self
    }

    /// Appends a value to a header of the request to the upstream and keeps the existing values.
    pub fn append_request_header(mut self, name: impl Into<Text>, value: impl Into<Text>) -> Self {
        self.request_headers.append(name.into(), value.into());
        self
    }

    /// Removes a header from the request to the upstream.
    pub fn remove_request_header(mut self, name: impl Into<Text>) -> Self {
        self.request_headers.remove.push(name.into());
        self
    }

    /// Sets a header of the response to the client, including the response of a block.
    pub fn set_response_header(self, name: impl Into<Text>, value: impl Into<Text>) -> Self {
        self.set_response_header_values(name, [value])
    }

    /// Sets a header of the response to the client to several values.
    pub fn set_response_header_values<V: Into<Text>>(mut self, name: impl Into<Text>, values: impl IntoIterator<Item = V>) -> Self {
        self.response_headers.set(name.into(), values.into_iter().map(Into::into).collect());
        self
    }

    /// Appends a value to a header of the response to the client and keeps the existing values,
    /// such as the cookies of the upstream.
    pub fn append_response_header(mut self, name: impl Into<Text>, value: impl Into<Text>) -> Self {
        self.response_headers.append(name.into(), value.into());
        self
    }

    /// Removes a header from the response to the client.
    pub fn remove_response_header(mut self, name: impl Into<Text>) -> Self {
        self.response_headers.remove.push(name.into());
        self
    }

    /// Adds a free-form tag to the audit log.
    pub fn tag(mut self, tag: impl Into<Text>) -> Self {
        self.tags.push(tag.into());
        self
    }

    /// Adds the id of a rule that matched to the audit log.
    pub fn rule_id(mut self, rule_id: impl Into<Text>) -> Self {
        self.rule_ids.push(rule_id.into());
        self
    }

    /// Adds a structured reason to the audit log.
    pub fn reason_code(mut self, reason_code: impl Into<Text>) -> Self {
        self.reason_codes.push(reason_code.into());
        self
    }

    /// Sets the confidence of the decision, 0 to 1. Other values are clamped to this range; NaN
    /// becomes 0.
    pub fn confidence(mut self, confidence: f64) -> Self {
        self.confidence = Some(if confidence.is_nan() { 0.0 } else { confidence.clamp(0.0, 1.0) });
        self
    }

    /// Sets routing metadata, a hint for the choice of an upstream.
    pub fn routing(mut self, name: impl Into<Text>, value: impl Into<Text>) -> Self {
        set(&mut self.routing, name.into(), value.into());
        self
    }

    /// Marks the decision as not final: the hook for the body decides.
    pub fn needs_more(mut self) -> Self {
        self.needs_more = true;
        self
    }

    /// Explicitly keeps this chunk of the request body.
    pub fn keep_request_body(mut self) -> Self {
        self.request_body = Some(BodyChange::Keep);
        self
    }

    /// Replaces this chunk of the request body with text.
    pub fn replace_request_body(mut self, text: impl Into<Text>) -> Self {
        self.request_body = Some(BodyChange::ReplaceText(text.into()));
        self
    }

    /// Replaces this chunk of the request body with bytes, which need not be UTF-8.
    pub fn replace_request_body_bytes(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.request_body = Some(BodyChange::ReplaceBytes(bytes.into()));
        self
    }

    /// Drops this chunk of the request body.
    pub fn drop_request_body(mut self) -> Self {
        self.request_body = Some(BodyChange::Drop);
        self
    }

    /// Explicitly keeps this chunk of the response body.
    pub fn keep_response_body(mut self) -> Self {
        self.response_body = Some(BodyChange::Keep);
        self
    }

    /// Replaces this chunk of the response body with text.
    pub fn replace_response_body(mut self, text: impl Into<Text>) -> Self {
        self.response_body = Some(BodyChange::ReplaceText(text.into()));
        self
    }

    /// Replaces this chunk of the response body with bytes, which need not be UTF-8.
    pub fn replace_response_body_bytes(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.response_body = Some(BodyChange::ReplaceBytes(bytes.into()));
        self
    }

    /// Drops this chunk of the response body. The agent treats this as a module error unless the
    /// chunk is empty, because the proxy would send the original.
    pub fn drop_response_body(mut self) -> Self {
        self.response_body = Some(BodyChange::Drop);
        self
    }

    /// Drops this WebSocket frame.
    pub fn drop_frame(mut self) -> Self {
        self.frame = Some(FrameChange::Drop);
        self
    }

    /// Closes the WebSocket connection with a code (RFC 6455, section 7.4) and a reason of at most
    /// 123 bytes.
    pub fn close_websocket(mut self, code: u16, reason: impl Into<Text>) -> Self {
        self.frame = Some(FrameChange::Close { code, reason: reason.into() });
        self
    }

    /// Returns the answer as JSON.
    pub fn to_json(&self) -> String {
        let mut out = Vec::with_capacity(128);
        self.write(&mut out);
        // Never fails: only whole strings and ASCII are written.
        String::from_utf8(out).unwrap_or_default()
    }

    /// Whether the decision is to let the event pass unchanged.
    pub(crate) fn is_plain_allow(&self) -> bool {
        matches!(self.action, Action::Allow)
            && self.status.is_none()
            && self.body.is_none()
            && self.request_headers.is_empty()
            && self.response_headers.is_empty()
            && self.tags.is_empty()
            && self.rule_ids.is_empty()
            && self.reason_codes.is_empty()
            && self.confidence.is_none()
            && self.routing.is_empty()
            && !self.needs_more
            && self.request_body.is_none()
            && self.response_body.is_none()
            && self.frame.is_none()
    }

    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(match &self.action {
            Action::Allow => b"{\"decision\":\"allow\"".as_slice(),
            Action::Block => b"{\"decision\":\"block\"",
            Action::Redirect => b"{\"decision\":\"redirect\"",
            Action::Challenge { .. } => b"{\"decision\":\"challenge\"",
        });
        if let Some(status) = self.status {
            write_key(out, "status");
            write_number(out, status.into());
        }
        if let Some(body) = &self.body {
            write_key(out, "body");
            write_string(out, body);
        }
        if let Action::Challenge { kind, params } = &self.action {
            write_key(out, "challenge_type");
            write_string(out, kind);
            write_map(out, "challenge_params", params);
        }
        self.request_headers.write(out, "add_request_headers", "append_request_headers", "remove_request_headers");
        self.response_headers.write(out, "add_response_headers", "append_response_headers", "remove_response_headers");
        write_list(out, "tags", &self.tags);
        write_list(out, "rule_ids", &self.rule_ids);
        write_list(out, "reason_codes", &self.reason_codes);
        if let Some(confidence) = self.confidence {
            write_key(out, "confidence");
            write_score(out, confidence);
        }
        write_map(out, "routing_metadata", &self.routing);
        if self.needs_more {
            write_key(out, "needs_more");
            out.extend_from_slice(b"true");
        }
        write_body_change(out, "request_body_mutation", self.request_body.as_ref());
        write_body_change(out, "response_body_mutation", self.response_body.as_ref());
        match &self.frame {
            None => {}
            Some(FrameChange::Drop) => {
                write_key(out, "websocket_decision");
                out.extend_from_slice(b"\"drop\"");
            }
            Some(FrameChange::Close { code, reason }) => {
                write_key(out, "websocket_decision");
                out.extend_from_slice(b"{\"close\":{\"code\":");
                write_number(out, (*code).into());
                write_key(out, "reason");
                write_string(out, reason);
                out.extend_from_slice(b"}}");
            }
        }
        out.push(b'}');
    }
}

impl HeaderChanges {
    /// Replaces an earlier value of the same name, because a JSON object must not repeat a name.
    /// Header names ignore case.
    fn set(&mut self, name: Text, values: Vec<Text>) {
        match self.set.iter_mut().find(|(known, _)| known.eq_ignore_ascii_case(&name)) {
            Some((_, known)) => *known = values,
            None => self.set.push((name, values)),
        }
    }

    fn append(&mut self, name: Text, value: Text) {
        match self.append.iter_mut().find(|(known, _)| known.eq_ignore_ascii_case(&name)) {
            Some((_, values)) => values.push(value),
            None => self.append.push((name, vec![value])),
        }
    }

    fn is_empty(&self) -> bool {
        self.set.is_empty() && self.append.is_empty() && self.remove.is_empty()
    }

    fn write(&self, out: &mut Vec<u8>, set: &str, append: &str, remove: &str) {
        write_headers(out, set, &self.set);
        write_headers(out, append, &self.append);
        write_list(out, remove, &self.remove);
    }
}

fn write_headers(out: &mut Vec<u8>, field: &str, headers: &[(Text, Vec<Text>)]) {
    if headers.is_empty() {
        return;
    }
    write_key(out, field);
    out.push(b'{');
    for (name, values) in headers {
        write_separator(out);
        write_string(out, name);
        out.push(b':');
        match values.as_slice() {
            [value] => write_string(out, value),
            values => write_strings(out, values),
        }
    }
    out.push(b'}');
}

fn set(entries: &mut Vec<(Text, Text)>, name: Text, value: Text) {
    match entries.iter_mut().find(|(known, _)| *known == name) {
        Some((_, known)) => *known = value,
        None => entries.push((name, value)),
    }
}

fn write_list(out: &mut Vec<u8>, name: &str, values: &[Text]) {
    if !values.is_empty() {
        write_key(out, name);
        write_strings(out, values);
    }
}

fn write_strings(out: &mut Vec<u8>, values: &[Text]) {
    out.push(b'[');
    for value in values {
        write_separator(out);
        write_string(out, value);
    }
    out.push(b']');
}

fn write_map(out: &mut Vec<u8>, name: &str, entries: &[(Text, Text)]) {
    if entries.is_empty() {
        return;
    }
    write_key(out, name);
    out.push(b'{');
    for (name, value) in entries {
        write_separator(out);
        write_string(out, name);
        out.push(b':');
        write_string(out, value);
    }
    out.push(b'}');
}

fn write_body_change(out: &mut Vec<u8>, name: &str, change: Option<&BodyChange>) {
    let Some(change) = change else { return };
    write_key(out, name);
    match change {
        BodyChange::Keep => out.extend_from_slice(b"{\"action\":\"pass_through\"}"),
        BodyChange::Drop => out.extend_from_slice(b"{\"action\":\"drop\"}"),
        BodyChange::ReplaceText(text) => {
            out.extend_from_slice(b"{\"action\":\"replace\",\"data\":");
            write_string(out, text);
            out.push(b'}');
        }
        BodyChange::ReplaceBytes(bytes) => {
            out.extend_from_slice(b"{\"action\":\"replace\",\"data_base64\":\"");
            base64::encode(out, bytes);
            out.extend_from_slice(b"\"}");
        }
    }
}
