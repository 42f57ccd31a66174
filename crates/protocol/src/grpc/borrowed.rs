//! A fast reader for the events of every request, which copies nothing.
//!
//! It accepts a subset of messages with the same result as prost, else returns `None`, and prost
//! decodes the message. So what is valid, and what an error reads like, is decided in one place.

use zentinel_wasm_contract::event::{Metadata, RequestHeaders, ResponseHeaders};
use zentinel_wasm_contract::{Event, MAX_ENTRIES, Text};

use super::event::present;
use super::fields::{FieldValue, Fields};
use super::headers::HeaderGroups;
use super::timestamp::rfc3339;

/// Reads request or response headers, if the message is such an event.
pub(super) fn headers(message: &[u8]) -> Option<Event<'_>> {
    let mut fields = Fields(message);
    let (number, FieldValue::Bytes(event)) = fields.next()? else { return None };
    // Two events in one message are left to prost.
    if !fields.0.is_empty() {
        return None;
    }
    match number {
        2 => request(event).map(Event::RequestHeaders),
        4 => response(event).map(Event::ResponseHeaders),
        _ => None,
    }
}

fn request(event: &[u8]) -> Option<RequestHeaders<'_>> {
    let mut known = None;
    let (mut method, mut uri, mut http_version) = ("", "", "");
    let mut headers = HeaderGroups::default();
    each(event, |number, value| {
        match number {
            // Two metadata messages would have to be merged.
            1 if known.is_some() => return None,
            1 => known = Some(metadata(value.bytes()?)?),
            2 => method = value.text()?,
            3 => uri = value.text()?,
            4 => http_version = value.text()?,
            5 => header(value, &mut headers)?,
            _ => {}
        }
        Some(())
    })?;
    let mut metadata = known?;
    metadata.protocol = metadata.protocol.or_else(|| present(http_version));
    Some(RequestHeaders { metadata, method: method.into(), uri: uri.into(), headers: headers.finish() })
}

fn metadata(bytes: &[u8]) -> Option<Metadata<'_>> {
    let (mut correlation_id, mut request_id, mut client_ip, mut client_port, mut protocol, mut timestamp_ms) = ("", "", "", 0, "", 0);
    let (mut server_name, mut tls_version, mut route_id, mut upstream_id, mut traceparent) = (None, None, None, None, None);
    each(bytes, |number, value| {
        match number {
            1 => correlation_id = value.text()?,
            2 => request_id = value.text()?,
            3 => client_ip = value.text()?,
            4 => client_port = u32::try_from(value.number()?).ok()?,
            5 => server_name = Some(value.text()?),
            6 => protocol = value.text()?,
            7 => tls_version = Some(value.text()?),
            8 => route_id = Some(value.text()?),
            9 => upstream_id = Some(value.text()?),
            10 => timestamp_ms = value.number()?,
            11 => traceparent = Some(value.text()?),
            _ => {}
        }
        Some(())
    })?;
    Some(Metadata {
        correlation_id: correlation_id.into(),
        request_id: present(request_id),
        client_ip: client_ip.into(),
        client_port,
        server_name: server_name.map(Text::from),
        protocol: present(protocol),
        tls_version: tls_version.map(Text::from),
        route_id: route_id.map(Text::from),
        upstream_id: upstream_id.map(Text::from),
        timestamp: rfc3339(timestamp_ms).map(Text::from),
        traceparent: traceparent.map(Text::from),
    })
}

fn response(event: &[u8]) -> Option<ResponseHeaders<'_>> {
    let (mut correlation_id, mut status) = ("", 0);
    let mut headers = HeaderGroups::default();
    each(event, |number, value| {
        match number {
            1 => correlation_id = value.text()?,
            2 => status = u16::try_from(value.number()?).ok()?,
            3 => header(value, &mut headers)?,
            _ => {}
        }
        Some(())
    })?;
    Some(ResponseHeaders { correlation_id: correlation_id.into(), status, headers: headers.finish() })
}

fn header<'a>(header: FieldValue<'a>, headers: &mut HeaderGroups<'a>) -> Option<()> {
    let (mut name, mut text) = ("", "");
    each(header.bytes()?, |number, value| {
        match number {
            1 => name = value.text()?,
            2 => text = value.text()?,
            _ => {}
        }
        Some(())
    })?;
    headers.push(name, text);
    (headers.len() <= MAX_ENTRIES).then_some(())
}

/// Passes every field of a message to `field`, unless one of them is invalid.
#[inline]
fn each<'a>(message: &'a [u8], mut field: impl FnMut(u32, FieldValue<'a>) -> Option<()>) -> Option<()> {
    let mut fields = Fields(message);
    while !fields.0.is_empty() {
        let (number, value) = fields.next()?;
        field(number, value)?;
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::super::{event, proto};
    use super::*;
    use proptest::prelude::*;
    use prost::Message as _;
    use proto::proxy_to_agent::Message;

    fn encode(message: Message) -> Vec<u8> {
        proto::ProxyToAgent { message: Some(message) }.encode_to_vec()
    }

    fn messages(text: &[String; 4], optional: Option<String>, number: u32) -> [Vec<u8>; 2] {
        let [id, uri, name, value] = text.clone();
        let header = |name: &str, value: &str| proto::Header { name: name.to_owned(), value: value.to_owned() };
        let headers = vec![header(&name, &value), header("a", &uri), header(&name, &id)];
        let metadata = proto::RequestMetadata {
            correlation_id: id.clone(),
            request_id: value,
            client_ip: "192.0.2.1".to_owned(),
            client_port: number,
            server_name: optional.clone(),
            route_id: optional.clone(),
            timestamp_ms: number.into(),
            traceparent: optional,
            ..Default::default()
        };
        let http_version = "HTTP/1.1".to_owned();
        let request =
            proto::RequestHeadersEvent { metadata: Some(metadata), method: "GET".to_owned(), uri, http_version, headers: headers.clone() };
        let response = proto::ResponseHeadersEvent { correlation_id: id, status_code: number % 1000, headers };
        [encode(Message::RequestHeaders(request)), encode(Message::ResponseHeaders(response))]
    }

    /// The event as prost decodes it.
    fn by_prost(bytes: &[u8]) -> Option<String> {
        let message = event::read(bytes.to_vec().into()).ok()?;
        event::event(&message)?.ok().map(|event| format!("{event:?}"))
    }

    proptest! {
        #[test]
        fn reads_headers_like_prost(text in any::<[String; 4]>(), optional in any::<Option<String>>(), number in any::<u32>()) {
            for message in messages(&text, optional, number) {
                let read = headers(&message).map(|event| format!("{event:?}"));
                prop_assert!(read.is_some());
                prop_assert_eq!(read, by_prost(&message));
            }
        }

        #[test]
        fn reads_damaged_headers_like_prost_or_not_at_all(
            text in any::<[String; 4]>(), at in any::<prop::sample::Index>(), with in prop::collection::vec(any::<u8>(), 0..4), cut in 0..4_usize
        ) {
            for mut message in messages(&text, Some(String::new()), 200) {
                let start = at.index(message.len());
                let end = (start + cut).min(message.len());
                message.splice(start..end, with.iter().copied());
                if let Some(event) = headers(&message) {
                    prop_assert_eq!(Some(format!("{event:?}")), by_prost(&message));
                }
            }
        }

        #[test]
        fn any_bytes_are_accepted_or_rejected(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = headers(&bytes);
        }
    }
}
