//! A proxy's side of the gRPC address.
//!
//! Not a part of the testkit, because it needs the protocol's crate and takes long to compile.

// Every test binary has its own copy and uses only a part of it.
#![allow(dead_code, unreachable_pub)]

use std::net::SocketAddr;
use std::path::PathBuf;

use bytes::{Buf as _, BufMut as _, Bytes};
use http::uri::PathAndQuery;
use prost::Message as _;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tempfile::TempDir;
use tokio::sync::mpsc;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Request, Status, Streaming};
use zentinel_wasm_protocol::grpc::health_proto::health_check_response::ServingStatus;
use zentinel_wasm_protocol::grpc::health_proto::{HealthCheckRequest, HealthCheckResponse};
use zentinel_wasm_protocol::grpc::proto;
use zentinel_wasm_protocol::grpc::proto::agent_response::Decision;
use zentinel_wasm_protocol::grpc::proto::agent_to_proxy::Message as FromAgent;
use zentinel_wasm_protocol::grpc::proto::proxy_to_agent::Message as ToAgent;

use crate::AGENT;
use testkit::{Agent, PATIENCE, module};

/// A deadline that calls meet on a busy machine too.
pub const AMPLE: [&str; 2] = ["--timeout-ms", "20000"];

pub const PROCESS_STREAM: &str = "/zentinel.agent.v2.AgentServiceV2/ProcessStream";
pub const PROCESS_EVENT: &str = "/zentinel.agent.v2.AgentServiceV2/ProcessEvent";
pub const CONTROL_STREAM: &str = "/zentinel.agent.v2.AgentServiceV2/ControlStream";
pub const HEALTH_CHECK: &str = "/grpc.health.v1.Health/Check";
pub const HEALTH_WATCH: &str = "/grpc.health.v1.Health/Watch";

/// Sends bytes, so a test can send anything, and receives messages.
pub struct Raw<M>(pub std::marker::PhantomData<M>);

impl<M: prost::Message + Default + 'static> Codec for Raw<M> {
    type Encode = Vec<u8>;
    type Decode = M;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self(std::marker::PhantomData)
    }

    fn decoder(&mut self) -> Self {
        Self(std::marker::PhantomData)
    }
}

impl<M> Encoder for Raw<M> {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        out.put_slice(&item);
        Ok(())
    }
}

impl<M: prost::Message + Default> Decoder for Raw<M> {
    type Item = M;
    type Error = Status;

    fn decode(&mut self, input: &mut DecodeBuf<'_>) -> Result<Option<M>, Status> {
        let bytes = input.copy_to_bytes(input.remaining());
        M::decode(bytes).map(Some).map_err(|error| Status::internal(error.to_string()))
    }
}

pub async fn patiently<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("no answer in time")
}

pub fn path(path: &'static str) -> PathAndQuery {
    PathAndQuery::from_static(path)
}

/// A client of the agent's services.
pub struct Client(pub tonic::client::Grpc<Channel>);

impl Client {
    pub fn new(channel: Channel) -> Self {
        Self(tonic::client::Grpc::new(channel))
    }

    pub async fn connect(agent: &Agent) -> Self {
        let endpoint = Endpoint::from_shared(format!("http://{}", address(agent))).unwrap();
        Self::new(patiently(endpoint.connect()).await.unwrap())
    }

    /// A call with one message in each direction.
    pub async fn unary<M: prost::Message + Default + 'static>(&mut self, method: &'static str, message: Vec<u8>) -> Result<M, Status> {
        patiently(self.0.ready()).await.unwrap();
        let response = patiently(self.0.unary(Request::new(message), path(method), Raw(std::marker::PhantomData))).await?;
        Ok(response.into_inner())
    }

    /// A call with streams in both directions.
    pub async fn streaming<M: prost::Message + Default + 'static>(
        &mut self,
        method: &'static str,
    ) -> (mpsc::Sender<Vec<u8>>, Streaming<M>) {
        let (to, mut queue) = mpsc::channel(1000);
        let outgoing = futures_util::stream::poll_fn(move |context| queue.poll_recv(context));
        patiently(self.0.ready()).await.unwrap();
        let call = self.0.streaming(Request::new(outgoing), path(method), Raw(std::marker::PhantomData));
        (to, patiently(call).await.unwrap().into_inner())
    }

    /// Opens a watch on the agent's health.
    pub async fn watch(&mut self) -> Streaming<HealthCheckResponse> {
        patiently(self.0.ready()).await.unwrap();
        let request = Request::new(HealthCheckRequest::default().encode_to_vec());
        let call = self.0.server_streaming(request, path(HEALTH_WATCH), Raw(std::marker::PhantomData));
        patiently(call).await.unwrap().into_inner()
    }

    pub async fn health(&mut self, service: &str) -> Result<ServingStatus, Status> {
        let request = HealthCheckRequest { service: service.into() }.encode_to_vec();
        self.unary::<HealthCheckResponse>(HEALTH_CHECK, request).await.map(|response| response.status())
    }

    pub async fn process(&mut self) -> Stream {
        self.process_as("0.6.54").await
    }

    /// Opens a stream and completes the handshake as a proxy of some version.
    pub async fn process_as(&mut self, version: &str) -> Stream {
        let (to, from) = self.streaming(PROCESS_STREAM).await;
        let mut stream = Stream { to, from, reports: Vec::new() };
        stream.send(handshake(&[2, 1], version)).await;
        let Some(FromAgent::Handshake(handshake)) = stream.receive().await.unwrap() else { panic!("no handshake") };
        assert!(handshake.success, "{handshake:?}");
        stream
    }
}

pub fn handshake(versions: &[u32], proxy_version: &str) -> ToAgent {
    ToAgent::Handshake(proto::HandshakeRequest {
        supported_versions: versions.to_vec(),
        proxy_id: "test".into(),
        proxy_version: proxy_version.into(),
        config_json: "{}".into(),
    })
}

/// One stream of a proxy.
pub struct Stream {
    pub to: mpsc::Sender<Vec<u8>>,
    pub from: Streaming<proto::AgentToProxy>,
    /// Reports that arrived while something else was awaited.
    pub reports: Vec<FromAgent>,
}

impl Stream {
    pub async fn send(&self, message: ToAgent) {
        self.send_raw(proto::ProxyToAgent { message: Some(message) }.encode_to_vec()).await;
    }

    pub async fn send_raw(&self, bytes: Vec<u8>) {
        patiently(self.to.send(bytes)).await.unwrap();
    }

    /// The next message, or None at the end.
    pub async fn receive(&mut self) -> Result<Option<FromAgent>, Status> {
        Ok(patiently(self.from.message()).await?.map(|message| message.message.expect("an empty message")))
    }

    /// The next message that is not a report.
    pub async fn next(&mut self) -> Result<Option<FromAgent>, Status> {
        loop {
            match self.receive().await? {
                Some(report @ (FromAgent::Health(_) | FromAgent::Metrics(_))) => self.reports.push(report),
                other => return Ok(other),
            }
        }
    }

    pub async fn answer(&mut self) -> proto::AgentResponse {
        match self.next().await.unwrap() {
            Some(FromAgent::Response(response)) => response,
            other => panic!("no answer: {other:?}"),
        }
    }

    pub async fn ask(&mut self, event: ToAgent) -> proto::AgentResponse {
        self.send(event).await;
        self.answer().await
    }

    /// Sends a ping and waits for its pong, so the agent has read all earlier messages.
    pub async fn ping(&mut self) {
        self.send(ToAgent::Ping(proto::Ping { sequence: 7, timestamp_ms: 8 })).await;
        match self.next().await.unwrap() {
            Some(FromAgent::Pong(pong)) => assert_eq!((pong.sequence, pong.ping_timestamp_ms), (7, 8)),
            other => panic!("no pong: {other:?}"),
        }
    }

    /// How the stream ends.
    pub async fn end(mut self) -> Result<(), Status> {
        match self.next().await? {
            None => Ok(()),
            Some(message) => panic!("a message instead of the end: {message:?}"),
        }
    }
}

pub fn get(id: &str, uri: &str) -> ToAgent {
    let header = |name: &str, value: &str| proto::Header { name: name.into(), value: value.into() };
    ToAgent::RequestHeaders(proto::RequestHeadersEvent {
        metadata: Some(proto::RequestMetadata {
            correlation_id: id.into(),
            client_ip: "192.0.2.7:50123".into(),
            protocol: "HTTP/1.1".into(),
            route_id: Some("all".into()),
            timestamp_ms: 1_767_323_045_678,
            ..Default::default()
        }),
        method: "GET".into(),
        uri: uri.into(),
        http_version: "HTTP/1.1".into(),
        headers: vec![header("accept", "a"), header("user-agent", "curl/8.0"), header("accept", "b")],
    })
}

pub fn body(id: &str, data: impl Into<Bytes>) -> ToAgent {
    let data = data.into();
    ToAgent::RequestBodyChunk(proto::BodyChunkEvent {
        correlation_id: id.into(),
        bytes_transferred: data.len() as u64,
        data,
        is_last: true,
        ..Default::default()
    })
}

pub fn configure(json: &str) -> ToAgent {
    ToAgent::Configure(proto::ConfigureEvent { config_json: json.into(), ..Default::default() })
}

/// The reason code, if the answer is that to a module error.
pub fn module_error(answer: &proto::AgentResponse) -> Option<&str> {
    let audit = answer.audit.as_ref()?;
    audit.tags.contains(&"wasm-error".to_owned()).then(|| audit.reason_codes[0].as_str())
}

pub fn is_allow(answer: &proto::AgentResponse) -> bool {
    matches!(answer.decision, Some(Decision::Allow(_)))
}

/// Starts an agent that serves a module made from `wat` over gRPC too. Returns the directory of the
/// module as well.
pub fn serve(wat: &str, options: &[&str]) -> (Agent, TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let module = module::write(directory.path(), "module.wasm", wat);
    let agent = AGENT.start_with(&module, |command| {
        command.args(["--grpc-address", "127.0.0.1:0"]).args(options);
    });
    (agent, directory)
}

/// The address that `--grpc-address 127.0.0.1:0` was bound to.
pub fn address(agent: &Agent) -> SocketAddr {
    let line = agent.log.wait_for_line("the gRPC address", |line| line.contains("serving gRPC on "));
    let (_, rest) = line.split_once("serving gRPC on ").unwrap();
    let address: String = rest.chars().take_while(|c| c.is_ascii_digit() || ".:".contains(*c)).collect();
    address.parse().unwrap()
}

/// A request to drain, encoded for a control stream.
pub fn drain() -> Vec<u8> {
    let drain = proto::DrainRequest { duration_ms: 1000, reason: 2, timestamp_ms: 1 };
    proto::ProxyControl { message: Some(proto::proxy_control::Message::Drain(drain)) }.encode_to_vec()
}

/// A certificate authority, and a certificate that it has signed, as files.
pub struct Authority {
    directory: TempDir,
    root: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    pub fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let authority = Self { directory: tempfile::tempdir().unwrap(), root };
        std::fs::write(authority.file("root.pem"), authority.root.pem()).unwrap();
        authority
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Certificate and key for `name`, PEM.
    pub fn issue(&self, name: &str) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(vec![name.to_owned()]).unwrap().signed_by(&key, &self.root).unwrap();
        (certificate.pem(), key.serialize_pem())
    }

    /// The options of an agent with a certificate of this root.
    pub fn options(&self) -> Vec<String> {
        self.write_certificate(self);
        let path = |name: &str| self.file(name).display().to_string();
        vec!["--grpc-tls-cert".into(), path("cert.pem"), "--grpc-tls-key".into(), path("key.pem")]
    }

    /// Puts a certificate that `issuer` has signed into the files of [`options`](Self::options).
    pub fn write_certificate(&self, issuer: &Self) {
        let (certificate, key) = issuer.issue("localhost");
        std::fs::write(self.file("cert.pem"), certificate).unwrap();
        std::fs::write(self.file("key.pem"), key).unwrap();
    }

    /// Connects to the agent over TLS, with a certificate of `client` if there is one.
    pub async fn connect(&self, agent: &Agent, client: Option<&Self>) -> Result<Channel, String> {
        let mut tls = ClientTlsConfig::new().domain_name("localhost").ca_certificate(Certificate::from_pem(self.root.pem()));
        if let Some(client) = client {
            let (certificate, key) = client.issue("proxy");
            tls = tls.identity(Identity::from_pem(certificate, key));
        }
        let endpoint = Endpoint::from_shared(format!("https://{}", address(agent))).unwrap().tls_config(tls).unwrap();
        patiently(endpoint.connect()).await.map_err(|error| error.to_string())
    }

    /// Asks for the agent's health over TLS, with a certificate of `client` if there is one.
    pub async fn ask(&self, agent: &Agent, client: Option<&Self>) -> Result<ServingStatus, String> {
        let channel = self.connect(agent, client).await?;
        let mut client = tonic::client::Grpc::new(channel);
        patiently(client.ready()).await.map_err(|error| error.to_string())?;
        let request = Request::new(HealthCheckRequest::default().encode_to_vec());
        let codec = Raw::<HealthCheckResponse>(std::marker::PhantomData);
        let response = patiently(client.unary(request, path(HEALTH_CHECK), codec)).await.map_err(|status| status.to_string())?;
        Ok(response.into_inner().status())
    }
}
