//! What was decided about one request, as a line of JSON.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use zentinel_wasm_contract::json::{field, key, optional_field, plain_field, string};
use zentinel_wasm_contract::{FailureKind, Hook};
use zentinel_wasm_engine::{DecisionKind, Outcome, RequestLine};

/// Most tags, rule ids or reason codes of one hook.
const MAX_ENTRIES: usize = 32;

/// The same in a line that would otherwise be longer than [`MAX_LINE`].
const FEW_ENTRIES: usize = 4;

/// Length of a line, in bytes, beyond which it has fewer entries: more than any real policy needs.
/// With [`FEW_ENTRIES`], no line has more than 64 KiB.
const MAX_LINE: usize = 16 << 10;

/// How much of a client's address is recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientPrivacy {
    /// The address.
    Full,
    /// Its network: /24 of IPv4, /48 of IPv6.
    Truncated,
    /// Nothing.
    Off,
}

/// What is recorded of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Privacy {
    /// The query, beside the path.
    pub query: bool,
    /// The client's address.
    pub client: ClientPrivacy,
}

/// What was decided about one request, or about one event that belongs to none.
pub(super) struct Record {
    correlation_id: String,
    traceparent: Option<Arc<str>>,
    arrived: SystemTime,
    request_line: Option<RequestLine>,
    hooks: Vec<HookRecord>,
}

/// What was decided at one hook, which may have been called for several chunks of a body.
struct HookRecord {
    hook: Hook,
    module: String,
    events: u32,
    decision: DecisionKind,
    status: Option<u16>,
    /// The decision does not take effect, because the module wanted to see more.
    needs_more: bool,
    tags: Vec<String>,
    rule_ids: Vec<String>,
    reason_codes: Vec<String>,
    is_truncated: bool,
    confidence: Option<f64>,
    error: Option<FailureKind>,
    fail_open: bool,
    waiting: Duration,
    in_guest: Duration,
    duration: Duration,
}

impl Record {
    /// The record of the request that `outcome` belongs to, without it.
    pub(super) fn new(outcome: &mut Outcome) -> Self {
        Self {
            correlation_id: std::mem::take(&mut outcome.correlation_id),
            traceparent: outcome.traceparent.take(),
            arrived: outcome.arrived,
            request_line: outcome.request_line.take(),
            hooks: Vec::new(),
        }
    }

    /// Adds the outcome of an event.
    pub(super) fn add(&mut self, outcome: Outcome) {
        // Nothing was decided.
        if !outcome.is_exported && outcome.error.is_none() {
            return;
        }
        match self.hooks.iter_mut().find(|known| known.hook == outcome.hook) {
            Some(known) => known.add(outcome),
            None => self.hooks.push(HookRecord::new(outcome)),
        }
    }

    /// The hook that decided about the request, if any was called.
    fn decisive(&self) -> Option<&HookRecord> {
        // The first of several.
        self.hooks.iter().rev().max_by_key(|hook| hook.effect())
    }

    /// Whether the response has no body, whatever its headers say (RFC 9110, 9.3.2).
    pub(super) fn is_head(&self) -> bool {
        self.request_line.as_ref().is_some_and(|line| line.method.as_deref() == Some("HEAD"))
    }

    /// Whether there is anything to record.
    pub(super) fn is_empty(&self) -> bool {
        self.hooks.is_empty()
    }

    /// Whether the request was refused, or there was a module error.
    pub(super) fn is_notable(&self) -> bool {
        self.hooks.iter().any(|hook| hook.effect() != DecisionKind::Allow || hook.error.is_some() || hook.fail_open)
    }

    /// Memory that it takes, in bytes.
    pub(super) fn size(&self) -> usize {
        let line = self.request_line.as_ref().map_or(0, |line| {
            [&line.route, &line.method, &line.uri].into_iter().flatten().map(String::len).sum::<usize>() + line.client.len()
        });
        let texts = self.correlation_id.len() + self.traceparent.as_ref().map_or(0, |text| text.len());
        size_of::<Self>() + texts + line + self.hooks.iter().map(HookRecord::size).sum::<usize>()
    }

    /// Appends the fields of the record's line. `is_complete`: no other event of the request is
    /// expected.
    pub(super) fn write(&self, out: &mut Vec<u8>, privacy: Privacy, is_complete: bool) {
        let start = out.len();
        self.write_fields(out, privacy, is_complete, MAX_ENTRIES);
        if out.len() - start > MAX_LINE {
            out.truncate(start);
            self.write_fields(out, privacy, is_complete, FEW_ENTRIES);
        }
    }

    fn write_fields(&self, out: &mut Vec<u8>, privacy: Privacy, is_complete: bool, max_entries: usize) {
        field(out, "timestamp", &timestamp(self.arrived));
        field(out, "correlation_id", &self.correlation_id);
        optional_field(out, "traceparent", self.traceparent.as_deref());
        if let Some(line) = &self.request_line {
            optional_field(out, "route", line.route.as_deref());
            optional_field(out, "method", line.method.as_deref());
            if let Some(uri) = &line.uri {
                let (path, query) = uri.split_once('?').map_or((&**uri, None), |(path, query)| (path, Some(query)));
                field(out, "path", path);
                optional_field(out, "query", query.filter(|_| privacy.query));
            }
            optional_field(out, "client", client(&line.client, privacy.client).as_deref());
        }
        let decisive = self.decisive();
        field(out, "decision", decisive.map_or(DecisionKind::Allow, HookRecord::effect).name());
        if let Some(status) = decisive.filter(|hook| !hook.needs_more).and_then(|hook| hook.status) {
            plain_field(out, "status", status);
        }
        if let Some(error) = self.hooks.iter().find_map(|hook| hook.error) {
            field(out, "error", error.code());
        }
        if self.hooks.iter().any(|hook| hook.fail_open) {
            plain_field(out, "fail_open", true);
        }
        if !is_complete {
            plain_field(out, "complete", false);
        }
        key(out, "hooks");
        out.push(b'[');
        for (at, hook) in self.hooks.iter().enumerate() {
            if at > 0 {
                out.push(b',');
            }
            hook.write(out, max_entries);
        }
        out.push(b']');
    }
}

impl HookRecord {
    fn new(outcome: Outcome) -> Self {
        let Outcome { hook, module, answer, error, fail_open, times, duration, .. } = outcome;
        Self {
            hook,
            module,
            events: 1,
            decision: answer.decision,
            status: answer.status,
            needs_more: answer.needs_more,
            tags: answer.tags,
            rule_ids: answer.rule_ids,
            reason_codes: answer.reason_codes,
            is_truncated: answer.is_truncated,
            confidence: answer.confidence,
            error,
            fail_open,
            waiting: times.waiting,
            in_guest: times.in_guest,
            duration,
        }
    }

    /// Adds the outcome of another event.
    fn add(&mut self, outcome: Outcome) {
        let later = Self::new(outcome);
        self.events = self.events.saturating_add(1);
        if self.needs_more || later.effect() > self.effect() {
            (self.decision, self.status, self.needs_more) = (later.decision, later.status, later.needs_more);
        }
        self.module = later.module;
        self.is_truncated |= later.is_truncated;
        for (list, more) in
            [(&mut self.tags, later.tags), (&mut self.rule_ids, later.rule_ids), (&mut self.reason_codes, later.reason_codes)]
        {
            for text in more {
                if list.contains(&text) {
                    continue;
                }
                if list.len() < MAX_ENTRIES {
                    list.push(text);
                } else {
                    self.is_truncated = true;
                }
            }
        }
        self.confidence = [self.confidence, later.confidence].into_iter().flatten().reduce(f64::max);
        self.error = self.error.or(later.error);
        self.fail_open |= later.fail_open;
        self.waiting += later.waiting;
        self.in_guest += later.in_guest;
        self.duration += later.duration;
    }

    /// What the proxy does. It acts on a decision only if the module did not want to see more.
    fn effect(&self) -> DecisionKind {
        if self.needs_more { DecisionKind::Allow } else { self.decision }
    }

    fn size(&self) -> usize {
        let texts = [&self.tags, &self.rule_ids, &self.reason_codes].into_iter().flatten();
        size_of::<Self>() + self.module.len() + texts.map(|text| size_of::<String>() + text.len()).sum::<usize>()
    }

    fn write(&self, out: &mut Vec<u8>, max_entries: usize) {
        out.push(b'{');
        field(out, "hook", self.hook.export());
        field(out, "decision", self.decision.name());
        if let Some(status) = self.status {
            plain_field(out, "status", status);
        }
        if self.needs_more {
            plain_field(out, "needs_more", true);
        }
        let mut is_truncated = self.is_truncated;
        for (name, list) in [("tags", &self.tags), ("rule_ids", &self.rule_ids), ("reason_codes", &self.reason_codes)] {
            if list.is_empty() {
                continue;
            }
            key(out, name);
            out.push(b'[');
            for (at, text) in list.iter().take(max_entries).enumerate() {
                if at > 0 {
                    out.push(b',');
                }
                string(out, text);
            }
            out.push(b']');
            is_truncated |= list.len() > max_entries;
        }
        if is_truncated {
            plain_field(out, "truncated", true);
        }
        if let Some(confidence) = self.confidence {
            plain_field(out, "confidence", confidence);
        }
        if let Some(error) = self.error {
            field(out, "error", error.code());
        }
        if self.fail_open {
            plain_field(out, "fail_open", true);
        }
        if self.events > 1 {
            plain_field(out, "events", self.events);
        }
        milliseconds(out, "waiting_ms", self.waiting);
        milliseconds(out, "guest_ms", self.in_guest);
        milliseconds(out, "total_ms", self.duration);
        field(out, "module", &self.module);
        out.push(b'}');
    }
}

fn milliseconds(out: &mut Vec<u8>, name: &str, time: Duration) {
    plain_field(out, name, format_args!("{:.3}", time.as_secs_f64() * 1000.0));
}

/// A time in UTC (RFC 3339).
pub(super) fn timestamp(time: SystemTime) -> String {
    /// The end of the year 9999, beyond which the format has no times.
    const LATEST: Duration = Duration::from_secs(253_402_300_799);

    // A clock may be set to any time.
    humantime::format_rfc3339_micros(time.clamp(UNIX_EPOCH, UNIX_EPOCH + LATEST)).to_string()
}

/// The address of a client, without the port that the proxy may have appended.
fn client(text: &str, privacy: ClientPrivacy) -> Option<String> {
    if privacy == ClientPrivacy::Off || text.is_empty() {
        return None;
    }
    let address = text.parse::<SocketAddr>().map(|address| address.ip()).or_else(|_| text.trim_matches(['[', ']']).parse::<IpAddr>());
    match (address.map(|address| address.to_canonical()), privacy) {
        (Ok(address), ClientPrivacy::Full) => Some(address.to_string()),
        (Ok(IpAddr::V4(address)), _) => {
            let [a, b, c, _] = address.octets();
            Some(format!("{a}.{b}.{c}.0/24"))
        }
        (Ok(IpAddr::V6(address)), _) => {
            let [a, b, c, ..] = address.segments();
            Some(format!("{}/48", std::net::Ipv6Addr::new(a, b, c, 0, 0, 0, 0, 0)))
        }
        // Not an address: nothing is known about which part of it identifies a client.
        (Err(_), ClientPrivacy::Full) => Some(text.to_owned()),
        (Err(_), _) => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use zentinel_wasm_engine::AnswerSummary;
    use zentinel_wasm_runtime::CallTimes;

    use super::*;

    const ALL: Privacy = Privacy { query: true, client: ClientPrivacy::Full };

    fn outcome(hook: Hook, answer: AnswerSummary) -> Outcome {
        Outcome {
            correlation_id: "a".into(),
            traceparent: None,
            request: Some(1),
            is_last: false,
            request_line: None,
            hook,
            is_exported: true,
            module: "abc".into(),
            answer,
            error: None,
            fail_open: false,
            arrived: UNIX_EPOCH + Duration::from_micros(1_700_000_000_123_456),
            duration: Duration::from_micros(1500),
            times: CallTimes { waiting: Duration::from_micros(1), in_guest: Duration::from_millis(1) },
        }
    }

    fn record(outcomes: impl IntoIterator<Item = Outcome>) -> Record {
        let mut record: Option<Record> = None;
        for mut outcome in outcomes {
            record.get_or_insert_with(|| Record::new(&mut outcome)).add(outcome);
        }
        record.unwrap()
    }

    #[track_caller]
    fn line(record: &Record, privacy: Privacy) -> Value {
        let mut out = b"{".to_vec();
        record.write(&mut out, privacy, true);
        out.push(b'}');
        assert!(out.len() <= 64 << 10 && !out.contains(&b'\n'), "{}", out.len());
        serde_json::from_slice(&out).unwrap()
    }

    fn answer(decision: DecisionKind, status: Option<u16>) -> AnswerSummary {
        AnswerSummary { decision, status, ..AnswerSummary::default() }
    }

    #[test]
    fn a_line_has_all_that_was_decided() {
        let request_line = RequestLine {
            route: Some("all".into()),
            method: Some("GET".into()),
            uri: Some("/x?y=1".into()),
            client: "192.0.2.7:50123".into(),
        };
        let blocks = AnswerSummary { rule_ids: vec!["r".into()], confidence: Some(0.5), ..answer(DecisionKind::Block, Some(451)) };
        let record = record([
            Outcome { request_line: Some(request_line), ..outcome(Hook::RequestHeaders, answer(DecisionKind::Allow, None)) },
            outcome(Hook::ResponseHeaders, blocks),
        ]);
        let times = json!({"waiting_ms": 0.001, "guest_ms": 1.0, "total_ms": 1.5, "module": "abc"});
        let with_times = |mut hook: Value| {
            hook.as_object_mut().unwrap().extend(times.as_object().unwrap().clone());
            hook
        };
        let expected = json!({
            "timestamp": "2023-11-14T22:13:20.123456Z", "correlation_id": "a", "route": "all", "method": "GET", "path": "/x",
            "query": "y=1", "client": "192.0.2.7", "decision": "block", "status": 451,
            "hooks": [
                with_times(json!({"hook": "on_request_headers", "decision": "allow"})),
                with_times(json!({"hook": "on_response_headers", "decision": "block", "status": 451, "rule_ids": ["r"], "confidence": 0.5})),
            ],
        });
        assert_eq!(line(&record, ALL), expected);
        let private = line(&record, Privacy { query: false, client: ClientPrivacy::Off });
        assert_eq!((&private["query"], &private["client"], &private["path"]), (&Value::Null, &Value::Null, &json!("/x")));
    }

    #[test]
    fn chunks_of_a_body_are_one_entry() {
        let more = |decision| AnswerSummary { needs_more: true, tags: vec!["t".into(), format!("{decision:?}")], ..answer(decision, None) };
        let chunk = |answer| outcome(Hook::RequestBody, answer);
        // What the proxy does not act on counts for nothing once there is a final decision.
        let passed = record([chunk(more(DecisionKind::Block)), chunk(more(DecisionKind::Allow)), chunk(answer(DecisionKind::Allow, None))]);
        assert!(!passed.is_notable());
        let entry = line(&passed, ALL)["hooks"][0].clone();
        assert_eq!((&entry["events"], &entry["decision"], &entry["guest_ms"]), (&json!(3), &json!("allow"), &json!(3.0)));
        assert_eq!(entry["tags"], json!(["t", "Block", "Allow"]));
        let unfinished = record([chunk(more(DecisionKind::Block))]);
        let entry = line(&unfinished, ALL);
        assert_eq!((&entry["decision"], &entry["hooks"][0]["needs_more"]), (&json!("allow"), &json!(true)));
        // A refusal stays one, whatever comes behind it.
        let refused = record([chunk(answer(DecisionKind::Block, Some(403))), chunk(answer(DecisionKind::Allow, None))]);
        assert_eq!(line(&refused, ALL)["status"], 403);
    }

    #[test]
    fn errors_are_named() {
        let failed = Outcome { error: Some(FailureKind::Trap), fail_open: true, ..outcome(Hook::RequestHeaders, AnswerSummary::default()) };
        let record = record([failed]);
        assert!(record.is_notable());
        let line = line(&record, ALL);
        assert_eq!((&line["error"], &line["fail_open"], &line["decision"]), (&json!("WASM_TRAP"), &json!(true), &json!("allow")));
        assert_eq!(line["hooks"][0]["error"], "WASM_TRAP");
    }

    #[test]
    fn events_without_a_hook_decide_nothing() {
        let record = record([Outcome { is_exported: false, ..outcome(Hook::ResponseHeaders, AnswerSummary::default()) }]);
        assert!(record.is_empty() && !record.is_notable());
    }

    #[test]
    fn lines_are_bounded_and_escaped() {
        // Control characters are rejected in answers.
        let texts = |count: usize| -> Vec<String> { (0..count).map(|at| format!("{at}{}", "\"\\".repeat(126))).collect() };
        let hostile = || AnswerSummary { tags: texts(32), rule_ids: texts(32), reason_codes: texts(32), ..AnswerSummary::default() };
        let wild = "\u{1}\n\"".repeat(700);
        let request_line =
            RequestLine { route: Some(wild[..256].into()), method: Some(wild[..256].into()), uri: Some(wild), client: "x".into() };
        let mut outcomes: Vec<_> = Hook::HANDLERS.into_iter().map(|hook| outcome(hook, hostile())).collect();
        outcomes[0].request_line = Some(request_line);
        let line = line(&record(outcomes), ALL);
        assert_eq!((line["hooks"][3]["tags"].as_array().unwrap().len(), &line["hooks"][3]["truncated"]), (FEW_ENTRIES, &json!(true)));
        assert!(line["path"].as_str().unwrap().starts_with("\u{1}\n\""));
        assert_eq!(line["client"], "x");
    }

    #[test]
    fn entries_of_chunks_are_bounded() {
        let chunk = |from: usize| {
            let rule_ids = (from..from + MAX_ENTRIES).map(|at| at.to_string()).collect();
            outcome(Hook::RequestBody, AnswerSummary { rule_ids, ..AnswerSummary::default() })
        };
        let record = record((0..100).map(chunk));
        let entry = line(&record, ALL)["hooks"][0].clone();
        assert_eq!((entry["rule_ids"].as_array().unwrap().len(), &entry["truncated"]), (MAX_ENTRIES, &json!(true)));
    }

    #[test]
    fn addresses_are_truncated_to_their_network() {
        for (text, full, truncated) in [
            ("192.0.2.7", Some("192.0.2.7"), Some("192.0.2.0/24")),
            ("192.0.2.7:50123", Some("192.0.2.7"), Some("192.0.2.0/24")),
            ("2001:db8:1:2::7", Some("2001:db8:1:2::7"), Some("2001:db8:1::/48")),
            ("[2001:db8:1:2::7]:443", Some("2001:db8:1:2::7"), Some("2001:db8:1::/48")),
            ("[2001:db8:1:2::7]", Some("2001:db8:1:2::7"), Some("2001:db8:1::/48")),
            ("::ffff:192.0.2.7", Some("192.0.2.7"), Some("192.0.2.0/24")),
            ("unix", Some("unix"), None),
            ("", None, None),
        ] {
            assert_eq!(client(text, ClientPrivacy::Full).as_deref(), full, "{text}");
            assert_eq!(client(text, ClientPrivacy::Truncated).as_deref(), truncated, "{text}");
            assert_eq!(client(text, ClientPrivacy::Off), None, "{text}");
        }
    }

    #[test]
    fn any_time_has_a_timestamp() {
        assert_eq!(timestamp(UNIX_EPOCH - Duration::from_secs(1)), "1970-01-01T00:00:00.000000Z");
        assert_eq!(timestamp(UNIX_EPOCH + Duration::from_secs(1 << 40)), "9999-12-31T23:59:59.000000Z");
    }
}
