//! What is specific to gRPC, with the published messages.

use std::time::Duration;

use published_client::agent::{Agent, Transport, bot_module, security_module};
use published_client::events::request;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use zentinel_agent_protocol::grpc_v2::agent_response::Decision;
use zentinel_agent_protocol::grpc_v2::agent_service_v2_client::AgentServiceV2Client;
use zentinel_agent_protocol::grpc_v2::{
    AgentToProxy, HandshakeRequest, Header, Ping, ProxyToAgent, RequestHeadersEvent, RequestMetadata, agent_to_proxy, proxy_to_agent,
};
use zentinel_agent_protocol::v2::AgentClientV2;

/// Far beyond the agent's own deadline, so only a missing message times out.
const TIMEOUT: Duration = Duration::from_secs(20);

struct Stream {
    send: mpsc::Sender<ProxyToAgent>,
    receive: tonic::Streaming<AgentToProxy>,
}

impl Stream {
    /// Opens a stream and performs the handshake as a proxy of the given version.
    async fn open(agent: &Agent, proxy_version: &str) -> Self {
        let mut client = AgentServiceV2Client::connect(agent.grpc_endpoint()).await.unwrap();
        let (send, events) = mpsc::channel(8);
        // The client waits for the response stream before it sends anything.
        let receive = client.process_stream(ReceiverStream::new(events)).await.unwrap().into_inner();
        let mut stream = Self { send, receive };
        stream
            .send(proxy_to_agent::Message::Handshake(HandshakeRequest {
                supported_versions: vec![2],
                proxy_id: "zentinel-proxy".to_owned(),
                proxy_version: proxy_version.to_owned(),
                config_json: "{}".to_owned(),
            }))
            .await;
        match stream.next().await {
            agent_to_proxy::Message::Handshake(response) => assert!(response.success, "{response:?}"),
            other => panic!("{other:?}"),
        }
        stream
    }

    async fn send(&self, message: proxy_to_agent::Message) {
        self.send.send(ProxyToAgent { message: Some(message) }).await.unwrap();
    }

    /// The next message that is not a report, because reports arrive at any time.
    async fn next(&mut self) -> agent_to_proxy::Message {
        loop {
            let message = tokio::time::timeout(TIMEOUT, self.receive.message()).await.expect("no message in time");
            match message.unwrap().expect("the stream has ended").message.expect("the message is empty") {
                agent_to_proxy::Message::Health(_) | agent_to_proxy::Message::Metrics(_) => {}
                other => return other,
            }
        }
    }
}

fn headers_event(id: &str, user_agent: &str) -> RequestHeadersEvent {
    RequestHeadersEvent {
        metadata: Some(RequestMetadata {
            correlation_id: id.to_owned(),
            client_ip: "203.0.113.7:54321".to_owned(),
            ..RequestMetadata::default()
        }),
        method: "GET".to_owned(),
        uri: "/".to_owned(),
        http_version: "HTTP/1.1".to_owned(),
        headers: vec![Header { name: "user-agent".to_owned(), value: user_agent.to_owned() }],
    }
}

#[tokio::test]
async fn sends_a_challenge_to_a_proxy_that_supports_it() {
    let agent = Agent::start(Transport::Grpc, &bot_module(), &[]);
    let mut stream = Stream::open(&agent, "0.6.54").await;

    stream.send(proxy_to_agent::Message::RequestHeaders(headers_event("a", "curl/8.5.0"))).await;

    let agent_to_proxy::Message::Response(response) = stream.next().await else {
        panic!("expected an answer");
    };
    assert_eq!(response.correlation_id, "a");
    let Some(Decision::Challenge(challenge)) = &response.decision else {
        panic!("{response:?}");
    };
    assert_eq!(challenge.challenge_type, "captcha");
    assert_eq!(challenge.params.get("site_key").map(String::as_str), Some("your-captcha-site-key"));
}

#[tokio::test]
async fn answers_a_ping_with_its_sequence_and_timestamp() {
    let agent = Agent::start(Transport::Grpc, &security_module(), &[]);
    let mut stream = Stream::open(&agent, "0.6.54").await;

    stream.send(proxy_to_agent::Message::Ping(Ping { sequence: 7, timestamp_ms: 123 })).await;

    let agent_to_proxy::Message::Pong(pong) = stream.next().await else {
        panic!("expected a pong");
    };
    assert_eq!((pong.sequence, pong.ping_timestamp_ms), (7, 123));
}

#[tokio::test]
async fn keeps_the_stream_open_after_a_valid_configuration() {
    let agent = Agent::start(Transport::Grpc, &security_module(), &[]);
    let client = AgentClientV2::new("wasm", agent.grpc_endpoint(), TIMEOUT).await.unwrap();
    client.connect().await.unwrap();

    client.send_configure(serde_json::json!({ "fail-open": true }), None).await.unwrap();
    let response = client.send_request_headers("a", &request("a", "/admin", &[])).await.unwrap();

    assert!(matches!(response.decision, zentinel_agent_protocol::Decision::Block { status: 403, .. }), "{response:?}");
}

#[tokio::test]
async fn ends_only_the_stream_of_an_invalid_configuration() {
    let agent = Agent::start(Transport::Grpc, &security_module(), &[]);
    let mut stream = Stream::open(&agent, "0.6.54").await;

    stream
        .send(proxy_to_agent::Message::Configure(zentinel_agent_protocol::grpc_v2::ConfigureEvent {
            config_json: r#"{"no-such-key":1}"#.to_owned(),
            config_version: None,
            is_initial: true,
            timestamp_ms: 0,
        }))
        .await;
    // The proxy sends a ping to learn whether the configuration was applied.
    let _ = stream.send.send(ProxyToAgent { message: Some(proxy_to_agent::Message::Ping(Ping { sequence: 1, timestamp_ms: 0 })) }).await;

    loop {
        match tokio::time::timeout(TIMEOUT, stream.receive.message()).await.expect("the stream did not end in time") {
            Ok(None) | Err(_) => break,
            Ok(Some(AgentToProxy { message: Some(agent_to_proxy::Message::Pong(_)) })) => {
                panic!("a rejected configuration must not be acknowledged");
            }
            Ok(Some(_)) => {}
        }
    }
    let mut other = Stream::open(&agent, "0.6.54").await;
    other.send(proxy_to_agent::Message::RequestHeaders(headers_event("a", "curl/8.5.0"))).await;
    assert!(matches!(other.next().await, agent_to_proxy::Message::Response(_)));
}
