//! The agent without a transport: events go to it directly, and its answers come back unchanged.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use testkit::{base64, module, request, request_body, response, response_body};
use zentinel_wasm_contract::report::HealthState;
use zentinel_wasm_contract::{Answer, Arrival, BodyAction, Decision, Encode, Event, Failure, FailureKind, Handler, HeaderCase, Hook};
use zentinel_wasm_engine::{Agent, BreakerLimits, DecisionKind, Metrics, Observer, Outcome, RequestLine, Settings};
use zentinel_wasm_runtime::{Isolation, Module, Runtime};

/// A transport that returns answers unchanged.
#[derive(Clone)]
struct Unchanged {
    id: Arc<str>,
    connection: Option<u64>,
}

impl Encode for Unchanged {
    type Encoded = Answer<'static>;

    fn correlation_id(&self) -> &Arc<str> {
        &self.id
    }

    fn connection(&self) -> Option<u64> {
        self.connection
    }

    fn encode(&self, answer: &Answer<'_>) -> Result<Answer<'static>, Failure> {
        Ok(answer.clone().into_owned())
    }
}

/// The id of every request.
const ID: &str = "a";

fn transport(connection: Option<u64>) -> Unchanged {
    Unchanged { id: ID.into(), connection }
}

fn settings() -> Settings {
    Settings {
        pool_size: 2,
        fail_open: false,
        timeout: Duration::from_secs(20),
        max_memory_mb: 16,
        isolation: Isolation::Pooled,
        module_config: None,
        max_body: 1 << 20,
        collect_request_body: false,
        max_output: 1 << 20,
        header_case: HeaderCase::Canonical,
        start_timeout: Duration::from_secs(20),
        breaker: BreakerLimits::default(),
    }
}

async fn start(wat: &str, settings: Settings) -> Arc<Agent> {
    start_observed(wat, settings, Vec::new()).await
}

async fn start_observed(wat: &str, settings: Settings, observers: Vec<Arc<dyn Observer>>) -> Arc<Agent> {
    let module = Arc::new(Module::from_bytes("test.wasm", module::encode(wat), None).unwrap());
    Agent::start(Runtime::start().unwrap(), module, settings, None, Metrics::new(), observers).await.unwrap()
}

async fn ask_on(agent: &Arc<Agent>, connection: Option<u64>, hook: Hook, event: &Value) -> Answer<'static> {
    let json = event.to_string();
    let event = match hook {
        Hook::RequestHeaders => Event::RequestHeaders(serde_json::from_str(&json).unwrap()),
        Hook::RequestBody => Event::RequestBody(serde_json::from_str(&json).unwrap()),
        Hook::ResponseHeaders => Event::ResponseHeaders(serde_json::from_str(&json).unwrap()),
        Hook::ResponseBody => Event::ResponseBody(serde_json::from_str(&json).unwrap()),
        _ => panic!("no test needs {hook}"),
    };
    agent.handle(&event, Arrival::Alone, transport(connection)).await
}

async fn ask(agent: &Arc<Agent>, hook: Hook, event: &Value) -> Answer<'static> {
    ask_on(agent, None, hook, event).await
}

/// The status of a block. None: the answer is an allow.
#[track_caller]
fn blocked(answer: &Answer<'_>) -> Option<u16> {
    match &answer.decision {
        Decision::Allow => None,
        Decision::Block(block) => Some(block.status().get()),
        other => panic!("{other:?}"),
    }
}

/// The input that the module saw.
#[track_caller]
fn seen(answer: &Answer<'_>) -> Value {
    let (_, event) = answer.routing_metadata.first().expect("the module returns its input");
    serde_json::from_str(event).unwrap()
}

fn texts<T: std::ops::Deref<Target = str>>(list: &[T]) -> Vec<&str> {
    list.iter().map(|text| &**text).collect()
}

mod decisions {
    use super::*;

    #[tokio::test]
    async fn are_made_for_every_event_of_a_request() {
        let agent = start(&module::echo(&module::PAGE_HOOKS), settings()).await;
        let first = ask(&agent, Hook::RequestHeaders, &request(ID, "/cart")).await;
        let second = ask(&agent, Hook::RequestBody, &request_body(ID, "one")).await;
        let third = ask(&agent, Hook::ResponseHeaders, &response(ID, 418)).await;
        let fourth = ask(&agent, Hook::ResponseBody, &response_body(ID, "two")).await;
        assert_eq!([&first, &second, &third, &fourth].map(blocked), [None; 4]);
        assert_eq!([&seen(&first)["uri"], &seen(&second)["body"], &seen(&third)["status"]], [&json!("/cart"), &json!("one"), &json!(418)]);
        // Later hooks see what the agent remembers of earlier events.
        for later in [&second, &third, &fourth] {
            assert_eq!(seen(later)["uri"], "/cart", "{later:?}");
        }
        assert_eq!(seen(&fourth)["status"], 418);
        assert_eq!(agent.metrics().requests.get(), 4);
    }

    #[tokio::test]
    async fn block_with_the_modules_status() {
        let agent = start(&module::answering(&["on_request_headers"], r#"{"decision":"block","status":451}"#), settings()).await;
        let answer = ask(&agent, Hook::RequestHeaders, &request(ID, "/")).await;
        assert_eq!(blocked(&answer), Some(451));
        assert_eq!(agent.metrics().blocked.get(), 1);
    }

    #[tokio::test]
    async fn allow_events_without_a_hook() {
        let agent = start(&module::answering(&["on_request_headers"], r#"{"decision":"block"}"#), settings()).await;
        assert_eq!(agent.capabilities().hooks, [Hook::RequestHeaders].into_iter().collect());
        assert_eq!(ask(&agent, Hook::ResponseHeaders, &response(ID, 200)).await, Answer::default());
    }

    #[tokio::test]
    async fn follow_a_reload() {
        let agent = start(&module::tagging("old"), settings()).await;
        let new = Module::from_bytes("new.wasm", module::encode(&module::tagging("new")), None).unwrap();
        agent.reload(Arc::new(new), None).await.unwrap();
        let answer = ask(&agent, Hook::RequestHeaders, &request(ID, "/")).await;
        assert_eq!(texts(&answer.audit.tags), ["new"]);
    }
}

mod module_errors {
    use super::*;

    /// Traps on `/t`, loops on `/l`.
    async fn fail(uri: &str, fail_open: bool) -> (Arc<Agent>, Answer<'static>) {
        let settings = Settings { fail_open, timeout: Duration::from_millis(100), ..settings() };
        let agent = start(&module::choosing(), settings).await;
        let answer = ask(&agent, Hook::RequestHeaders, &request(ID, uri)).await;
        (agent, answer)
    }

    #[tokio::test]
    async fn block_by_default() {
        for (uri, code) in [("/t", "WASM_TRAP"), ("/l", "WASM_TIMEOUT")] {
            let (agent, answer) = fail(uri, false).await;
            assert_eq!(blocked(&answer), Some(500), "{uri}");
            assert_eq!((texts(&answer.audit.tags), texts(&answer.audit.reason_codes)), (vec!["wasm-error"], vec![code]));
            assert_eq!((agent.metrics().blocked.get(), agent.metrics().fail_open.get()), (1, 0));
        }
    }

    #[tokio::test]
    async fn allow_with_fail_open() {
        for (uri, code) in [("/t", "WASM_TRAP"), ("/l", "WASM_TIMEOUT")] {
            let (agent, answer) = fail(uri, true).await;
            assert_eq!(blocked(&answer), None, "{uri}");
            assert_eq!((texts(&answer.audit.tags), texts(&answer.audit.reason_codes)), (vec!["wasm-error", "fail-open"], vec![code]));
            assert_eq!((agent.metrics().blocked.get(), agent.metrics().fail_open.get()), (0, 1));
        }
    }

    #[tokio::test]
    async fn include_undecodable_events() {
        for (fail_open, status) in [(false, Some(500)), (true, None)] {
            let agent = start(&module::tagging("x"), Settings { fail_open, ..settings() }).await;
            let answer = agent.reject(Hook::RequestHeaders, Failure::new(FailureKind::InvalidEvent, "not JSON"), transport(None));
            assert_eq!(blocked(&answer), status);
            assert_eq!(texts(&answer.audit.reason_codes), ["WASM_INVALID_EVENT"]);
        }
    }
}

mod outcomes {
    use std::sync::Mutex;

    use super::*;

    /// Keeps every outcome.
    #[derive(Default)]
    struct Outcomes(Mutex<Vec<Arc<Outcome>>>);

    impl Observer for Outcomes {
        fn observe(&self, outcome: &Arc<Outcome>) {
            self.0.lock().unwrap().push(Arc::clone(outcome));
        }
    }

    impl Outcomes {
        fn take(&self) -> Vec<Arc<Outcome>> {
            std::mem::take(&mut *self.0.lock().unwrap())
        }

        /// The only outcome since the last call.
        #[track_caller]
        fn one(&self) -> Arc<Outcome> {
            let all = self.take();
            assert_eq!(all.len(), 1, "{all:?}");
            Arc::clone(&all[0])
        }
    }

    async fn observed(wat: &str, settings: Settings) -> (Arc<Agent>, Arc<Outcomes>) {
        let outcomes = Arc::new(Outcomes::default());
        let observer: Arc<dyn Observer> = Arc::clone(&outcomes) as _;
        (start_observed(wat, settings, vec![observer]).await, outcomes)
    }

    #[tokio::test]
    async fn have_the_decision_and_its_reasons() {
        let answer = r#"{"decision":"block","status":451,"tags":["t"],"rule_ids":["r"],"reason_codes":["c"],"confidence":0.5}"#;
        let (agent, outcomes) = observed(&module::answering(&["on_request_headers"], answer), settings()).await;
        let mut event = request(ID, "/cart?x=1");
        event["metadata"]["traceparent"] = json!("00-a-b-01");
        ask(&agent, Hook::RequestHeaders, &event).await;
        let outcome = outcomes.one();
        assert_eq!((&*outcome.correlation_id, outcome.traceparent.as_deref(), outcome.module.len()), (ID, Some("00-a-b-01"), 64));
        assert_eq!((outcome.hook, outcome.is_exported, outcome.is_last), (Hook::RequestHeaders, true, true));
        let line = RequestLine {
            route: Some("all".into()),
            method: Some("GET".into()),
            uri: Some("/cart?x=1".into()),
            client: "192.0.2.7:50123".into(),
        };
        assert_eq!(outcome.request_line, Some(line));
        let answer = &outcome.answer;
        assert_eq!((answer.decision, answer.status, answer.confidence), (DecisionKind::Block, Some(451), Some(0.5)));
        assert_eq!([&answer.tags, &answer.rule_ids, &answer.reason_codes], [&["t"], &["r"], &["c"]]);
        assert_eq!((outcome.error, outcome.fail_open), (None, false));
        assert!(outcome.times.in_guest > Duration::ZERO && outcome.times.waiting + outcome.times.in_guest <= outcome.duration);
    }

    #[tokio::test]
    async fn are_joined_by_request() {
        let (agent, outcomes) = observed(&module::echo(&module::PAGE_HOOKS), settings()).await;
        for (hook, event) in [
            (Hook::RequestHeaders, request(ID, "/")),
            (Hook::RequestBody, request_body(ID, "one")),
            (Hook::ResponseHeaders, response(ID, 200)),
            (Hook::ResponseBody, response_body(ID, "two")),
        ] {
            ask(&agent, hook, &event).await;
        }
        let all = outcomes.take();
        assert!(all[0].request.is_some() && all.iter().all(|outcome| outcome.request == all[0].request), "{all:?}");
        assert_eq!(all.iter().map(|outcome| outcome.is_last).collect::<Vec<_>>(), [false, false, false, true]);
        // Only the first says what the request is.
        assert_eq!(all.iter().map(|outcome| outcome.request_line.is_some()).collect::<Vec<_>>(), [true, false, false, false]);
        ask(&agent, Hook::RequestHeaders, &request(ID, "/")).await;
        assert_ne!(outcomes.one().request, all[0].request);
    }

    #[tokio::test]
    async fn of_requests_with_the_same_id_are_not_joined() {
        let (agent, outcomes) = observed(&module::echo(&module::PAGE_HOOKS), settings()).await;
        ask(&agent, Hook::RequestHeaders, &request(ID, "/first")).await;
        let first = outcomes.one();
        ask(&agent, Hook::RequestHeaders, &request(ID, "/second")).await;
        let second = outcomes.one();
        assert!(!first.is_last && second.is_last);
        assert_ne!(first.request, second.request);
        // It could be that of either.
        ask(&agent, Hook::ResponseHeaders, &response(ID, 200)).await;
        let response = outcomes.one();
        assert_eq!((response.request, response.is_last), (None, true));
    }

    #[tokio::test]
    async fn of_a_refused_request_are_complete() {
        let (agent, outcomes) = observed(&module::answering(&module::PAGE_HOOKS, r#"{"decision":"block"}"#), settings()).await;
        ask(&agent, Hook::RequestHeaders, &request(ID, "/")).await;
        assert!(outcomes.one().is_last);
    }

    #[tokio::test]
    async fn end_with_the_last_event_that_the_module_takes() {
        for (hooks, method, followed) in [
            (&["on_request_headers"][..], "POST", false),
            (&["on_request_headers", "on_request_body"], "GET", false),
            (&["on_request_headers", "on_request_body"], "POST", true),
            (&["on_request_headers", "on_response_headers"], "GET", true),
        ] {
            let (agent, outcomes) = observed(&module::answering(hooks, "{}"), settings()).await;
            let mut event = request(ID, "/");
            event["method"] = json!(method);
            ask(&agent, Hook::RequestHeaders, &event).await;
            assert_eq!(outcomes.one().is_last, !followed, "{hooks:?} {method}");
            if followed {
                ask(&agent, Hook::RequestBody, &request_body(ID, "x")).await;
                let is_last = outcomes.one().is_last;
                assert_eq!(is_last, !hooks.contains(&"on_response_headers"), "{hooks:?} {method}");
                // Whether it is the last one or one that the module does not take.
                ask(&agent, Hook::ResponseHeaders, &response(ID, 200)).await;
                assert!(outcomes.one().is_last, "{hooks:?} {method}");
            }
        }
    }

    #[tokio::test]
    async fn end_with_a_response_without_content() {
        for (status, is_last) in [(103, false), (200, false), (204, true), (304, true)] {
            let (agent, outcomes) = observed(&module::answering(&module::PAGE_HOOKS, "{}"), settings()).await;
            ask(&agent, Hook::RequestHeaders, &request(ID, "/")).await;
            outcomes.one();
            ask(&agent, Hook::ResponseHeaders, &response(ID, status)).await;
            assert_eq!(outcomes.one().is_last, is_last, "{status}");
        }
    }

    #[tokio::test]
    async fn have_the_module_error() {
        for fail_open in [false, true] {
            let settings = Settings { fail_open, max_body: 3, ..settings() };
            let (agent, outcomes) = observed(&module::choosing(), settings.clone()).await;
            ask(&agent, Hook::RequestHeaders, &request(ID, "/t")).await;
            let outcome = outcomes.one();
            assert_eq!((outcome.error, outcome.fail_open), (Some(FailureKind::Trap), fail_open));
            let (decision, status) = if fail_open { (DecisionKind::Allow, None) } else { (DecisionKind::Block, Some(500)) };
            assert_eq!((outcome.answer.decision, outcome.answer.status), (decision, status));
            assert_eq!(outcome.answer.reason_codes, ["WASM_TRAP"]);
            // The module is not called.
            let (agent, outcomes) = observed(&module::echo(&module::PAGE_HOOKS), settings).await;
            ask(&agent, Hook::RequestHeaders, &request(ID, "/")).await;
            let request = outcomes.one().request;
            ask(&agent, Hook::RequestBody, &request_body(ID, "long")).await;
            let outcome = outcomes.one();
            assert_eq!((outcome.request, outcome.error), (request, Some(FailureKind::BodyLimit)));
            assert_eq!((outcome.is_last, outcome.times.in_guest), (!fail_open, Duration::ZERO));
            agent.reject(Hook::RequestHeaders, Failure::new(FailureKind::InvalidEvent, "not JSON"), transport(None));
            let outcome = outcomes.one();
            assert_eq!((outcome.error, outcome.fail_open, outcome.is_last), (Some(FailureKind::InvalidEvent), fail_open, true));
        }
    }

    #[tokio::test]
    async fn say_whether_the_module_has_the_hook() {
        let (agent, outcomes) = observed(&module::tagging("x"), settings()).await;
        ask(&agent, Hook::ResponseHeaders, &response(ID, 200)).await;
        let outcome = outcomes.one();
        assert_eq!((outcome.is_exported, outcome.answer.decision), (false, DecisionKind::Allow));
    }
}

mod bodies {
    use super::*;

    fn chunk(index: u32, before: usize, bytes: &str, is_last: bool) -> Value {
        json!({
            "correlation_id": ID, "data": base64(bytes.as_bytes()), "is_last": is_last, "total_size": null, "chunk_index": index,
            "bytes_received": before + bytes.len(),
        })
    }

    fn action<'a>(answer: &'a Answer<'_>) -> Option<&'a BodyAction<'a>> {
        answer.request_body_mutation.as_ref().map(|mutation| &mutation.action)
    }

    #[tokio::test]
    async fn are_collected_on_one_connection() {
        let agent = start(&module::echo(&["on_request_body"]), Settings { collect_request_body: true, ..settings() }).await;
        let first = ask_on(&agent, Some(1), Hook::RequestBody, &chunk(0, 0, "one ", false)).await;
        assert_eq!((action(&first), first.needs_more), (Some(&BodyAction::Drop), true));
        assert!(agent.awaits_more(1) && !agent.awaits_more(2));
        let last = ask_on(&agent, Some(1), Hook::RequestBody, &chunk(1, 4, "two", true)).await;
        assert_eq!(seen(&last)["body"], "one two");
        assert_eq!((action(&last), last.needs_more), (Some(&BodyAction::Replace(b"one two".as_slice().into())), false));
        assert!(!agent.awaits_more(1));
    }

    #[tokio::test]
    async fn are_rejected_when_their_connection_has_ended() {
        let settings = Settings { collect_request_body: true, fail_open: true, ..settings() };
        let agent = start(&module::echo(&["on_request_body"]), settings).await;
        ask_on(&agent, Some(1), Hook::RequestBody, &chunk(0, 0, "one ", false)).await;
        agent.disconnected(1);
        // Also with `fail_open`, because the first chunk is lost.
        let last = ask_on(&agent, Some(2), Hook::RequestBody, &chunk(1, 4, "two", true)).await;
        assert_eq!((blocked(&last), texts(&last.audit.reason_codes)), (Some(500), vec!["WASM_BODY_NOT_COLLECTED"]));
    }
}

mod health {
    use super::*;

    #[tokio::test]
    async fn is_reported_when_it_changes() {
        let agent = start(&module::tagging("x"), settings()).await;
        let mut reports = agent.reports();
        assert_eq!(reports.borrow_and_update().health.state, HealthState::Healthy);
        assert_eq!(agent.not_ready(), None);
        agent.reloaded(Some("no such file".into()));
        assert!(reports.has_changed().unwrap());
        assert_eq!(reports.borrow_and_update().health.state, HealthState::Degraded("reload failed: no such file".into()));
        agent.reloaded(None);
        agent.drain();
        assert_eq!(reports.borrow_and_update().health.state, HealthState::Draining);
        assert_eq!(agent.not_ready().as_deref(), Some("draining"));
        // Requests that still arrive are decided.
        assert_eq!(blocked(&ask(&agent, Hook::RequestHeaders, &request(ID, "/")).await), None);
    }
}

/// A transport that sends bytes. It is as large as the one of the socket.
#[derive(Clone)]
struct Bytes {
    id: Arc<str>,
    _rest: [usize; 3],
}

impl Encode for Bytes {
    type Encoded = Vec<u8>;

    fn correlation_id(&self) -> &Arc<str> {
        &self.id
    }

    fn encode(&self, _: &Answer<'_>) -> Result<Vec<u8>, Failure> {
        Ok(Vec::new())
    }
}

#[tokio::test]
async fn the_future_of_an_event_stays_small() {
    /// Each event allocates its future, and glibc keeps no larger blocks in a thread's cache:
    /// beyond it, a busy agent needs up to 9 % more processor time per event.
    const LARGEST_CACHED: usize = 1032;

    let agent = start(&module::echo(&module::PAGE_HOOKS), settings()).await;
    let json = request(ID, "/").to_string();
    let event = Event::RequestHeaders(serde_json::from_str(&json).unwrap());
    let future = agent.handle(&event, Arrival::Alone, Bytes { id: ID.into(), _rest: [0; 3] });
    let size = size_of_val(&future);
    assert!(size <= LARGEST_CACHED, "{size} bytes");
}
