//! From an answered event to a span.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use zentinel_wasm_contract::{FailureKind, Hook};

use crate::ids::Ids;
use crate::proto::ExportTraceServiceRequest;
use crate::proto::Resource;
use crate::proto::span::SpanKind;
use crate::proto::status::StatusCode;
use crate::proto::{ResourceSpans, ScopeSpans, Span, SpanFlags, Status};
use crate::proto::{number, scope, text};
use crate::trace_parent::TraceParent;

/// An answered event.
#[derive(Clone, Debug)]
pub struct EventSpan {
    /// The trace that the event belongs to. Without one, a new one begins.
    pub parent: Option<TraceParent>,
    /// Distinguishes the event's request from others, if it is known. Events of one request without
    /// a parent are in one trace.
    pub request: Option<u64>,
    /// The id of the request between the proxy and its agents.
    pub correlation_id: String,
    /// The SHA-256 of the module.
    pub module: String,
    /// The hook that took the event.
    pub hook: Hook,
    /// What was decided.
    pub decision: &'static str,
    /// Status of the response to the client, of a block or redirect.
    pub status: Option<u16>,
    /// Why the module gave no usable answer, if it gave none.
    pub error: Option<FailureKind>,
    /// The event was allowed because of a module error.
    pub fail_open: bool,
    /// When the event arrived.
    pub arrived: SystemTime,
    /// From the event's arrival to its answer.
    pub duration: Duration,
    /// What of that was waiting for an instance.
    pub waiting: Duration,
    /// What of that the call took.
    pub in_guest: Duration,
}

/// Makes requests to a collector from spans.
pub(crate) struct SpanEncoder {
    pub(crate) resource: Resource,
    pub(crate) ids: Ids,
    /// The path of the module.
    pub(crate) module_path: String,
}

impl SpanEncoder {
    pub(crate) fn request(&mut self, spans: &mut Vec<EventSpan>) -> ExportTraceServiceRequest {
        let spans = spans.drain(..).map(|span| self.span(span)).collect();
        let scope_spans = vec![ScopeSpans { scope: Some(scope()), spans }];
        ExportTraceServiceRequest { resource_spans: vec![ResourceSpans { resource: Some(self.resource.clone()), scope_spans }] }
    }

    fn span(&mut self, event: EventSpan) -> Span {
        let began = event.arrived.duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut attributes = vec![
            text("wasm.module.sha256", event.module),
            text("wasm.module.path", &self.module_path),
            text("wasm.hook", event.hook.export()),
            text("wasm.decision", event.decision),
            text("wasm.correlation_id", event.correlation_id),
            number("wasm.wait_us", micros(event.waiting)),
            number("wasm.guest_us", micros(event.in_guest)),
        ];
        if let Some(status) = event.status {
            attributes.push(number("wasm.status", u64::from(status)));
        }
        let mut status = None;
        if let Some(kind) = event.error {
            attributes.push(text("error.type", kind.code()));
            let outcome = if event.fail_open { "module error, allowed" } else { "module error, blocked" };
            status = Some(Status { message: outcome.to_owned(), code: StatusCode::Error.into() });
        }
        let (trace_id, parent_span_id, remote) = match event.parent {
            Some(parent) => {
                let remote = SpanFlags::ContextHasIsRemoteMask as u32 | SpanFlags::ContextIsRemoteMask as u32;
                (parent.trace_id, parent.span_id.to_vec(), remote)
            }
            None => {
                let trace_id = match event.request {
                    Some(request) => self.ids.trace_of(request),
                    None => self.ids.trace(),
                };
                (trace_id, Vec::new(), 0)
            }
        };
        Span {
            trace_id: trace_id.to_vec(),
            span_id: self.ids.span().to_vec(),
            parent_span_id,
            // All that are exported are sampled.
            flags: remote | 1,
            name: event.hook.export().to_owned(),
            // The proxy calls the agent.
            kind: SpanKind::Server.into(),
            start_time_unix_nano: nanos(began),
            end_time_unix_nano: nanos(began + event.duration),
            attributes,
            status,
        }
    }
}

fn nanos(duration: Duration) -> u64 {
    // Enough until the year 2554.
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::proto::any_value::Value;

    /// A span to change.
    pub(crate) fn span() -> EventSpan {
        EventSpan {
            parent: None,
            request: None,
            correlation_id: "id-1".into(),
            module: "abc".into(),
            hook: Hook::RequestHeaders,
            decision: "allow",
            status: None,
            error: None,
            fail_open: false,
            arrived: UNIX_EPOCH + Duration::from_secs(1000),
            duration: Duration::from_micros(50),
            waiting: Duration::from_micros(3),
            in_guest: Duration::from_micros(40),
        }
    }

    fn encoder() -> SpanEncoder {
        SpanEncoder { resource: Resource::default(), ids: Ids::new(), module_path: "m.wasm".into() }
    }

    fn encoded(encoder: &mut SpanEncoder, span: EventSpan) -> Span {
        let mut request = encoder.request(&mut vec![span]);
        request.resource_spans.remove(0).scope_spans.remove(0).spans.remove(0)
    }

    fn attribute(span: &Span, name: &str) -> Option<String> {
        let found = span.attributes.iter().find(|attribute| attribute.key == name)?;
        match found.value.as_ref().unwrap().value.as_ref().unwrap() {
            Value::StringValue(text) => Some(text.clone()),
            Value::IntValue(number) => Some(number.to_string()),
        }
    }

    #[test]
    fn joins_its_parent() {
        let parent = TraceParent::parse("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01").unwrap();
        let span = encoded(&mut encoder(), EventSpan { parent: Some(parent), ..span() });
        assert_eq!((&*span.trace_id, &*span.parent_span_id, span.flags), (&parent.trace_id[..], &parent.span_id[..], 0x301));
        assert_ne!(span.span_id, span.parent_span_id);
    }

    #[test]
    fn begins_a_trace_for_each_request_without_a_parent() {
        let mut encoder = encoder();
        let mut trace = |request| {
            let span = encoded(&mut encoder, EventSpan { request, ..span() });
            assert_eq!((&*span.parent_span_id, span.flags), (&[][..], 1));
            assert_eq!((span.trace_id.len(), span.span_id.len()), (16, 8));
            span.trace_id
        };
        assert_ne!(trace(None), trace(None));
        assert_eq!(trace(Some(1)), trace(Some(1)));
        assert_ne!(trace(Some(1)), trace(Some(2)));
    }

    #[test]
    fn says_what_was_decided_and_when() {
        let span = encoded(&mut encoder(), EventSpan { decision: "block", status: Some(403), ..span() });
        for (name, value) in [
            ("wasm.module.sha256", "abc"),
            ("wasm.module.path", "m.wasm"),
            ("wasm.hook", "on_request_headers"),
            ("wasm.decision", "block"),
            ("wasm.status", "403"),
            ("wasm.correlation_id", "id-1"),
            ("wasm.wait_us", "3"),
            ("wasm.guest_us", "40"),
        ] {
            assert_eq!(attribute(&span, name).as_deref(), Some(value), "{name}");
        }
        assert_eq!((&*span.name, span.kind(), span.status), ("on_request_headers", SpanKind::Server, None));
        assert_eq!((span.start_time_unix_nano, span.end_time_unix_nano), (1_000_000_000_000, 1_000_000_050_000));
    }

    #[test]
    fn has_the_status_of_a_module_error() {
        let failed = EventSpan { error: Some(FailureKind::Trap), ..span() };
        for (fail_open, message) in [(false, "module error, blocked"), (true, "module error, allowed")] {
            let span = encoded(&mut encoder(), EventSpan { fail_open, ..failed.clone() });
            assert_eq!(span.status, Some(Status { message: message.into(), code: StatusCode::Error.into() }));
            assert_eq!(attribute(&span, "error.type").as_deref(), Some("WASM_TRAP"));
        }
    }
}
