//! The agent without a transport: events go to it directly, and its answers come back unchanged.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use testkit::{base64, module, request, request_body, response, response_body};
use zentinel_wasm_contract::report::HealthState;
use zentinel_wasm_contract::{Answer, Arrival, BodyAction, Decision, Encode, Event, Failure, FailureKind, Handler, HeaderCase, Hook};
use zentinel_wasm_engine::{Agent, Metrics, Settings};
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
    }
}

async fn start(wat: &str, settings: Settings) -> Arc<Agent> {
    let module = Arc::new(Module::from_bytes("test.wasm", module::encode(wat), None).unwrap());
    Agent::start(Runtime::start().unwrap(), module, settings, None, Metrics::new()).await.unwrap()
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
        assert!(agent.is_ready());
        agent.reloaded(Some("no such file".into()));
        assert!(reports.has_changed().unwrap());
        assert_eq!(reports.borrow_and_update().health.state, HealthState::Degraded("no such file".into()));
        agent.reloaded(None);
        agent.drain();
        assert_eq!(reports.borrow_and_update().health.state, HealthState::Draining);
        assert!(!agent.is_ready());
        // Requests that still arrive are decided.
        assert_eq!(blocked(&ask(&agent, Hook::RequestHeaders, &request(ID, "/")).await), None);
    }
}
