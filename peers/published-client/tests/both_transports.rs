//! What the published client receives over the Unix socket and over gRPC alike.

use std::sync::Arc;
use std::time::Duration;

use published_client::agent::{Agent, Transport, bot_module, security_module};
use published_client::events::{request, request_body, response, response_body};
use published_client::module::{Answer, Hook, module};
use zentinel_agent_protocol::v2::{AgentCapabilities, AgentClientV2, AgentClientV2Uds, AgentPool, CancelReason};
use zentinel_agent_protocol::{
    AgentResponse, BinaryRequestBodyChunkEvent, BinaryResponseBodyChunkEvent, Decision, EventType, HeaderOp, RequestHeadersEvent,
    ResponseHeadersEvent,
};

/// Far beyond the agent's own deadline, so only a missing answer times out.
const TIMEOUT: Duration = Duration::from_secs(20);

enum Client {
    Socket(AgentClientV2Uds),
    Grpc(AgentClientV2),
}

impl Client {
    async fn connect(agent: &Agent, transport: Transport) -> Self {
        match transport {
            Transport::Socket => {
                let client = AgentClientV2Uds::new("wasm", agent.socket(), TIMEOUT).await.unwrap();
                client.connect().await.unwrap();
                Self::Socket(client)
            }
            Transport::Grpc => {
                let client = AgentClientV2::new("wasm", agent.grpc_endpoint(), TIMEOUT).await.unwrap();
                client.connect().await.unwrap();
                Self::Grpc(client)
            }
        }
    }

    async fn capabilities(&self) -> AgentCapabilities {
        match self {
            Self::Socket(client) => client.capabilities().await,
            Self::Grpc(client) => client.capabilities().await,
        }
        .expect("the handshake carries capabilities")
    }

    async fn request(&self, event: &RequestHeadersEvent) -> AgentResponse {
        let id = &event.metadata.correlation_id;
        match self {
            Self::Socket(client) => client.send_request_headers(id, event).await,
            Self::Grpc(client) => client.send_request_headers(id, event).await,
        }
        .unwrap()
    }

    async fn request_body(&self, event: BinaryRequestBodyChunkEvent) -> AgentResponse {
        match self {
            Self::Socket(client) => client.send_request_body_chunk_binary(&event).await,
            Self::Grpc(client) => {
                let id = event.correlation_id.clone();
                client.send_request_body_chunk(&id, &event.into()).await
            }
        }
        .unwrap()
    }

    async fn response(&self, event: &ResponseHeadersEvent) -> AgentResponse {
        match self {
            Self::Socket(client) => client.send_response_headers(&event.correlation_id, event).await,
            Self::Grpc(client) => client.send_response_headers(&event.correlation_id, event).await,
        }
        .unwrap()
    }

    async fn response_body(&self, event: BinaryResponseBodyChunkEvent) -> AgentResponse {
        match self {
            Self::Socket(client) => client.send_response_body_chunk_binary(&event).await,
            Self::Grpc(client) => {
                let id = event.correlation_id.clone();
                client.send_response_body_chunk(&id, &event.into()).await
            }
        }
        .unwrap()
    }

    async fn ping(&self) {
        match self {
            Self::Socket(client) => client.ping().await.unwrap(),
            Self::Grpc(client) => {
                client.ping().await.unwrap();
            }
        }
    }

    async fn cancel(&self, id: &str) {
        match self {
            Self::Socket(client) => client.cancel_request(id, CancelReason::ClientDisconnect).await,
            Self::Grpc(client) => client.cancel_request(id, CancelReason::ClientDisconnect).await,
        }
        .unwrap();
    }
}

/// Runs each test over each transport.
macro_rules! over_both_transports {
    ($($test:ident)*) => {
        mod socket {
            $(#[tokio::test] async fn $test() { super::$test(super::Transport::Socket).await; })*
        }
        mod grpc {
            $(#[tokio::test] async fn $test() { super::$test(super::Transport::Grpc).await; })*
        }
    };
}

mod handshake {
    use super::*;

    over_both_transports! {
        names_the_agent_and_its_hooks
    }

    async fn names_the_agent_and_its_hooks(transport: Transport) {
        let agent = Agent::with_module(
            transport,
            &module(&[Hook::always("on_request_headers", "{}"), Hook::always("on_response_body", "{}")]),
            &[],
        );
        let client = Client::connect(&agent, transport).await;

        let capabilities = client.capabilities().await;

        assert_eq!(capabilities.agent_id, "zentinel-wasm-agent");
        assert_eq!(capabilities.version, env!("CARGO_PKG_VERSION"));
        assert!(capabilities.supports_event(EventType::RequestHeaders));
        assert!(capabilities.supports_event(EventType::ResponseBodyChunk));
        assert!(!capabilities.supports_event(EventType::RequestBodyChunk));
        assert!(!capabilities.supports_event(EventType::WebSocketFrame));
    }
}

mod decisions {
    use super::*;

    over_both_transports! {
        the_security_module_blocks_admin
        the_bot_module_allows_browsers
        a_redirect_has_its_status
        header_operations_arrive
        audit_metadata_arrives
        a_block_has_its_headers
        a_module_can_ask_for_the_body
    }

    async fn the_security_module_blocks_admin(transport: Transport) {
        let agent = Agent::start(transport, &security_module(), &[]);
        let client = Client::connect(&agent, transport).await;

        let allowed = client.request(&request("a", "/api/users?page=1", &[("host", "shop.example.com")])).await;
        let blocked = client.request(&request("b", "/admin/users", &[("host", "shop.example.com")])).await;

        assert_eq!(allowed.decision, Decision::Allow);
        assert_eq!(blocked.decision, Decision::Block { status: 403, body: Some("Forbidden".to_owned()), headers: None });
    }

    /// The published client announces version 0.6.45, which treats a challenge as an allow, so the
    /// agent sends it a block. The challenge itself is tested where the version can be chosen.
    async fn the_bot_module_allows_browsers(transport: Transport) {
        let agent = Agent::start(transport, &bot_module(), &[]);
        let client = Client::connect(&agent, transport).await;

        let browser = client.request(&request("a", "/", &[("user-agent", "Mozilla/5.0 (X11; Linux x86_64)")])).await;
        let bot = client.request(&request("b", "/", &[("user-agent", "curl/8.5.0")])).await;
        let nameless = client.request(&request("c", "/", &[])).await;

        assert_eq!(browser.decision, Decision::Allow);
        for (response, tag) in [(bot, "suspicious-ua"), (nameless, "no-user-agent")] {
            assert!(matches!(response.decision, Decision::Block { status: 403, .. }), "{response:?}");
            assert!(response.audit.tags.contains(&tag.to_owned()), "{response:?}");
        }
    }

    async fn a_redirect_has_its_status(transport: Transport) {
        let answer = r#"{"decision":"redirect","status":308,"body":"https://login.example.com/?next=%2F"}"#;
        let agent = Agent::with_module(transport, &module(&[Hook::always("on_request_headers", answer)]), &[]);
        let client = Client::connect(&agent, transport).await;

        let response = client.request(&request("a", "/", &[])).await;

        assert_eq!(response.decision, Decision::Redirect { url: "https://login.example.com/?next=%2F".to_owned(), status: 308 });
    }

    async fn header_operations_arrive(transport: Transport) {
        let answer = r#"{"decision":"allow",
        "add_request_headers":{"X-One":"1","X-Many":["a","b"]},"remove_request_headers":["X-Debug"],
        "add_response_headers":{"X-Frame-Options":"DENY"},"remove_response_headers":["Server"]}"#;
        let agent = Agent::with_module(transport, &module(&[Hook::always("on_request_headers", answer)]), &[]);
        let client = Client::connect(&agent, transport).await;

        let response = client.request(&request("a", "/", &[])).await;

        let set = |name: &str, value: &str| HeaderOp::Set { name: name.to_owned(), value: value.to_owned() };
        let add = |name: &str, value: &str| HeaderOp::Add { name: name.to_owned(), value: value.to_owned() };
        let remove = |name: &str| HeaderOp::Remove { name: name.to_owned() };
        for operation in [set("X-One", "1"), set("X-Many", "a"), add("X-Many", "b"), remove("X-Debug")] {
            assert!(response.request_headers.contains(&operation), "{operation:?} is missing in {response:?}");
        }
        assert_eq!(response.request_headers.len(), 4);
        for operation in [set("X-Frame-Options", "DENY"), remove("Server")] {
            assert!(response.response_headers.contains(&operation), "{operation:?} is missing in {response:?}");
        }
        assert_eq!(response.response_headers.len(), 2);
    }

    async fn audit_metadata_arrives(transport: Transport) {
        let answer = r#"{"decision":"block","status":403,"tags":["path-traversal"],"rule_ids":["SEC-001","OWASP-930"],
        "confidence":0.5,"reason_codes":["PATH_TRAVERSAL_DETECTED"],"routing_metadata":{"priority":"high"}}"#;
        let agent = Agent::with_module(transport, &module(&[Hook::always("on_request_headers", answer)]), &[]);
        let client = Client::connect(&agent, transport).await;

        let response = client.request(&request("a", "/", &[])).await;

        assert_eq!(response.audit.tags, ["path-traversal"]);
        assert_eq!(response.audit.rule_ids, ["SEC-001", "OWASP-930"]);
        assert_eq!(response.audit.confidence, Some(0.5));
        assert_eq!(response.audit.reason_codes, ["PATH_TRAVERSAL_DETECTED"]);
        // The gRPC message has no field for routing metadata.
        let priority = response.routing_metadata.get("priority").map(String::as_str);
        assert_eq!(priority, if transport == Transport::Socket { Some("high") } else { None });
    }

    async fn a_block_has_its_headers(transport: Transport) {
        let answer = r#"{"decision":"deny","status":429,"body":"later","add_response_headers":{"Retry-After":"5"}}"#;
        let agent = Agent::with_module(transport, &module(&[Hook::always("on_request_headers", answer)]), &[]);
        let client = Client::connect(&agent, transport).await;

        let response = client.request(&request("a", "/", &[])).await;

        let Decision::Block { status: 429, body: Some(body), headers: Some(headers) } = response.decision else {
            panic!("{response:?}");
        };
        assert_eq!(body, "later");
        assert_eq!(headers.get("Retry-After").map(String::as_str), Some("5"));
    }

    async fn a_module_can_ask_for_the_body(transport: Transport) {
        let hooks = [
            Hook::always("on_request_headers", r#"{"decision":"allow","needs_more":true}"#),
            Hook::always("on_request_body", r#"{"decision":"block","status":413}"#),
        ];
        let agent = Agent::with_module(transport, &module(&hooks), &[]);
        let client = Client::connect(&agent, transport).await;

        let first = client.request(&request("a", "/", &[])).await;
        let second = client.request_body(request_body("a", b"body")).await;

        assert!(first.needs_more && first.decision == Decision::Allow, "{first:?}");
        assert!(!second.needs_more && matches!(second.decision, Decision::Block { status: 413, .. }), "{second:?}");
    }
}

mod request_bodies {
    use super::*;

    over_both_transports! {
        text_is_inspected
        bytes_are_inspected
        each_chunk_is_inspected
    }

    async fn text_is_inspected(transport: Transport) {
        let block = Answer::Json(r#"{"decision":"block","status":422}"#);
        let agent = Agent::with_module(transport, &module(&[Hook::when("on_request_body", "DROP TABLE \\\"caf\u{e9}\\\"", block)]), &[]);
        let client = Client::connect(&agent, transport).await;

        let good = client.request_body(request_body("a", "SELECT \"caf\u{e9}\"".as_bytes())).await;
        let bad = client.request_body(request_body("b", "x; DROP TABLE \"caf\u{e9}\"".as_bytes())).await;

        assert_eq!(good.decision, Decision::Allow);
        assert!(matches!(bad.decision, Decision::Block { status: 422, .. }), "{bad:?}");
    }

    async fn bytes_are_inspected(transport: Transport) {
        use base64::Engine as _;
        const BYTES: &[u8] = b"\x00\xff\x89PNG\r\n\x1a\n\xc3\x28";
        let needle: &'static str = base64::engine::general_purpose::STANDARD.encode(BYTES).leak();
        let block = Answer::Json(r#"{"decision":"block","status":415}"#);
        let agent = Agent::with_module(transport, &module(&[Hook::when("on_request_body", needle, block)]), &[]);
        let client = Client::connect(&agent, transport).await;

        let response = client.request_body(request_body("a", BYTES)).await;

        assert!(matches!(response.decision, Decision::Block { status: 415, .. }), "{response:?}");
    }

    async fn each_chunk_is_inspected(transport: Transport) {
        let block = Answer::Json(r#"{"decision":"block","status":422}"#);
        let agent = Agent::with_module(transport, &module(&[Hook::when("on_request_body", "second", block)]), &[]);
        let client = Client::connect(&agent, transport).await;

        let mut decisions = Vec::new();
        for (index, chunk) in ["first", "second", "third"].into_iter().enumerate() {
            let event = BinaryRequestBodyChunkEvent::new("a", chunk.as_bytes(), index as u32, index == 2);
            decisions.push(client.request_body(event).await.decision);
        }

        assert_eq!(decisions[0], Decision::Allow);
        assert!(matches!(decisions[1], Decision::Block { status: 422, .. }), "{decisions:?}");
        assert_eq!(decisions[2], Decision::Allow);
    }
}

mod hooks {
    use super::*;

    over_both_transports! {
        are_called_for_responses
        allow_when_missing
    }

    async fn are_called_for_responses(transport: Transport) {
        let header = Answer::Json(r#"{"decision":"allow","add_response_headers":{"X-Seen":"yes"}}"#);
        let block = Answer::Json(r#"{"decision":"block","status":502}"#);
        let hooks = [Hook::when("on_response_headers", "418", header), Hook::when("on_response_body", "secret", block)];
        let agent = Agent::with_module(transport, &module(&hooks), &[]);
        let client = Client::connect(&agent, transport).await;

        let plain = client.response(&response("a", 200, &[("content-type", "text/plain")])).await;
        let teapot = client.response(&response("b", 418, &[("content-type", "text/plain")])).await;
        let body = client.response_body(response_body("b", b"a secret")).await;

        assert!(plain.response_headers.is_empty(), "{plain:?}");
        assert_eq!(teapot.response_headers, [HeaderOp::Set { name: "X-Seen".to_owned(), value: "yes".to_owned() }]);
        assert!(matches!(body.decision, Decision::Block { status: 502, .. }), "{body:?}");
    }

    async fn allow_when_missing(transport: Transport) {
        let agent = Agent::start(transport, &security_module(), &[]);
        let client = Client::connect(&agent, transport).await;

        for answer in [
            client.request_body(request_body("a", b"/admin")).await,
            client.response(&response("a", 200, &[])).await,
            client.response_body(response_body("a", b"/admin")).await,
        ] {
            assert_eq!(answer.decision, Decision::Allow);
            assert!(answer.audit.tags.is_empty(), "{answer:?}");
        }
    }
}

mod traps {
    use super::*;

    over_both_transports! {
        block_with_500_and_a_tag
        allow_with_tags_when_failing_open
    }

    async fn block_with_500_and_a_tag(transport: Transport) {
        let agent = Agent::with_module(transport, &module(&[Hook::when("on_request_headers", "/trap", Answer::Trap)]), &[]);
        let client = Client::connect(&agent, transport).await;

        let trapped = client.request(&request("a", "/trap", &[])).await;
        let after = client.request(&request("b", "/", &[])).await;

        assert!(matches!(trapped.decision, Decision::Block { status: 500, .. }), "{trapped:?}");
        assert!(trapped.audit.tags.contains(&"wasm-error".to_owned()), "{trapped:?}");
        assert_eq!(trapped.audit.reason_codes, ["WASM_TRAP"]);
        assert_eq!(after.decision, Decision::Allow);
    }

    async fn allow_with_tags_when_failing_open(transport: Transport) {
        let trap = module(&[Hook { name: "on_request_headers", needle: "", found: Answer::Trap, otherwise: Answer::Trap }]);
        let agent = Agent::with_module(transport, &trap, &["--fail-open"]);
        let client = Client::connect(&agent, transport).await;

        let response = client.request(&request("a", "/", &[])).await;

        assert_eq!(response.decision, Decision::Allow);
        for tag in ["wasm-error", "fail-open"] {
            assert!(response.audit.tags.contains(&tag.to_owned()), "{response:?}");
        }
    }
}

mod requests {
    use super::*;

    over_both_transports! {
        survive_a_ping
        survive_an_unknown_cancellation
        are_not_delayed_by_a_slow_call
        get_their_own_answers
    }

    async fn survive_a_ping(transport: Transport) {
        let agent = Agent::start(transport, &security_module(), &[]);
        let client = Client::connect(&agent, transport).await;

        client.ping().await;
        let response = client.request(&request("a", "/admin", &[])).await;

        assert!(matches!(response.decision, Decision::Block { status: 403, .. }), "{response:?}");
    }

    async fn survive_an_unknown_cancellation(transport: Transport) {
        let agent = Agent::start(transport, &security_module(), &[]);
        let client = Client::connect(&agent, transport).await;

        client.cancel("never-sent").await;
        let response = client.request(&request("a", "/admin", &[])).await;

        assert!(matches!(response.decision, Decision::Block { status: 403, .. }), "{response:?}");
    }

    async fn are_not_delayed_by_a_slow_call(transport: Transport) {
        let endless = module(&[Hook::when("on_request_headers", "/endless", Answer::Loop)]);
        let agent = Agent::with_module(transport, &endless, &["--timeout-ms", "5000", "--pool-size", "2"]);
        let client = Arc::new(Client::connect(&agent, transport).await);

        let slow = tokio::spawn({
            let client = Arc::clone(&client);
            async move { client.request(&request("slow", "/endless", &[])).await }
        });
        // These share the connection of the endless call, so the agent has read that call before.
        for number in 0..50 {
            let response = client.request(&request(&format!("fast-{number}"), "/", &[])).await;
            assert_eq!(response.decision, Decision::Allow);
        }

        assert!(!slow.is_finished(), "the endless call ended before the others");
        let slow = slow.await.unwrap();
        assert!(matches!(slow.decision, Decision::Block { status: 500, .. }), "{slow:?}");
        assert_eq!(slow.audit.reason_codes, ["WASM_TIMEOUT"]);
    }

    async fn get_their_own_answers(transport: Transport) {
        // The proxy also uses a pool of clients, with four connections and many events in flight on
        // each. Calls wait for instances, so the deadline is generous.
        let agent = Agent::start(transport, &security_module(), &["--timeout-ms", "5000"]);
        let pool = Arc::new(AgentPool::new());
        let endpoint = match transport {
            Transport::Socket => agent.socket(),
            Transport::Grpc => agent.grpc_endpoint(),
        };
        pool.add_agent("wasm", endpoint).await.unwrap();

        let requests: Vec<_> = (0..400)
            .map(|number| {
                let pool = Arc::clone(&pool);
                tokio::spawn(async move {
                    let uri = if number % 3 == 0 { "/admin" } else { "/" };
                    let event = request(&format!("id-{number}"), uri, &[]);
                    (number, pool.send_request_headers("wasm", &event.metadata.correlation_id, &event).await.unwrap())
                })
            })
            .collect();

        for request in requests {
            let (number, response) = request.await.unwrap();
            let blocked = matches!(response.decision, Decision::Block { status: 403, .. });
            assert_eq!(blocked, number % 3 == 0, "{number}: {response:?}");
        }
    }
}
