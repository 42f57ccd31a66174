//! The gRPC address, as used by proxies and tools.

#[path = "common/grpc.rs"]
mod client;

use client::{
    AMPLE, Authority, CONTROL_STREAM, Client, HEALTH_CHECK, PROCESS_EVENT, PROCESS_STREAM, Raw, Stream, address, body, configure, drain,
    get, handshake, is_allow, module_error, path, patiently, serve,
};
use prost::Message as _;
use rustix::process::Signal;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::net::TcpStream;
use std::path::Path;
use std::time::Duration;
use testkit::{Program, module};
use tonic::transport::Endpoint;
use tonic::{Code, Request};
use zentinel_wasm_protocol::grpc::health_proto::health_check_response::ServingStatus;
use zentinel_wasm_protocol::grpc::health_proto::{HealthCheckRequest, HealthCheckResponse};
use zentinel_wasm_protocol::grpc::proto;
use zentinel_wasm_protocol::grpc::proto::agent_response::Decision;
use zentinel_wasm_protocol::grpc::proto::agent_to_proxy::Message as FromAgent;
use zentinel_wasm_protocol::grpc::proto::proxy_to_agent::Message as ToAgent;

const AGENT: Program = Program(env!("CARGO_BIN_EXE_zentinel-wasm-agent"));

/// The input that a [`module::revealing`] returned.
#[track_caller]
fn seen(answer: &proto::AgentResponse) -> Value {
    match &answer.decision {
        Some(Decision::Block(proto::BlockDecision { body: Some(body), .. })) => serde_json::from_str(body).unwrap(),
        other => panic!("no input in {other:?}"),
    }
}

/// Starts an agent that cannot serve, and returns its exit code and its message.
fn rejection(options: &[&str]) -> (Option<i32>, String) {
    let directory = tempfile::tempdir().unwrap();
    let module = module::write(directory.path(), "module.wasm", &module::choosing());
    let mut agent = AGENT.launch(&module, |command| {
        command.args(options);
    });
    let code = agent.wait().code();
    (code, agent.log.whole())
}

mod events {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn reach_the_module_as_they_do_from_the_socket() {
        let (agent, _directory) = serve(&module::revealing(&module::PAGE_HOOKS), &AMPLE);
        let mut stream = Client::connect(&agent).await.process().await;
        let request = seen(&stream.ask(get("1", "/a?b=c")).await);
        assert_eq!(
            request,
            json!({
                "method": "GET", "uri": "/a?b=c", "client_ip": "192.0.2.7", "client_port": 50123, "correlation_id": "1",
                "headers": {"Accept": "a, b", "User-Agent": "curl/8.0"}, "header_values": {"Accept": ["a", "b"]},
                "protocol": "HTTP/1.1", "route_id": "all", "timestamp": "2026-01-02T03:04:05.678Z",
            })
        );
        let response = ToAgent::ResponseHeaders(proto::ResponseHeadersEvent {
            correlation_id: "2".into(),
            status_code: 404,
            headers: vec![proto::Header { name: "etag".into(), value: "x".into() }],
        });
        assert_eq!(seen(&stream.ask(response).await), json!({"correlation_id": "2", "status": 404, "headers": {"ETag": "x"}}));
        agent.end();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn may_have_large_binary_bodies() {
        let options = [&AMPLE[..], &["--max-body-bytes", "2000000"]].concat();
        let (agent, _directory) = serve(&module::revealing(&["on_request_body"]), &options);
        let mut stream = Client::connect(&agent).await.process().await;
        let binary = seen(&stream.ask(body("1", &b"\xff\x00"[..])).await);
        assert_eq!((&binary["body"], &binary["body_encoding"], &binary["bytes_received"]), (&json!("/wA="), &json!("base64"), &json!(2)));
        let large = "x".repeat(2_000_000);
        assert_eq!(seen(&stream.ask(body("2", large.clone())).await)["body"], large);
        let too_large = stream.ask(body("3", "x".repeat(2_000_001))).await;
        assert_eq!(module_error(&too_large), Some("WASM_BODY_LIMIT"));
        assert!(!is_allow(&too_large));
        stream.ping().await;
        agent.end();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn may_come_in_calls_of_their_own() {
        let (agent, _directory) = serve(&module::tagging("alone"), &AMPLE);
        let mut client = Client::connect(&agent).await;
        let message = |message| proto::ProxyToAgent { message: Some(message) }.encode_to_vec();
        let answer: proto::AgentToProxy = client.unary(PROCESS_EVENT, message(get("1", "/"))).await.unwrap();
        let Some(FromAgent::Response(answer)) = answer.message else { panic!() };
        assert_eq!((answer.correlation_id.as_str(), answer.audit.unwrap().tags), ("1", vec!["alone".to_owned()]));
        let status = client.unary::<proto::AgentToProxy>(PROCESS_EVENT, message(configure("{}"))).await.unwrap_err();
        assert_eq!(status.code(), Code::Unimplemented);
        let status = client.unary::<proto::AgentToProxy>("/zentinel.agent.v2.AgentServiceV2/Nonsense", Vec::new()).await.unwrap_err();
        assert_eq!(status.code(), Code::Unimplemented);
        agent.end();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn sent_at_once_are_each_answered_once() {
        const EVENTS: usize = 500;

        let (agent, _directory) = serve(&module::tagging("t"), &AMPLE);
        let mut stream = Client::connect(&agent).await.process().await;
        for at in 0..EVENTS {
            stream.send(get(&at.to_string(), "/")).await;
        }
        let mut answered = BTreeSet::new();
        for _ in 0..EVENTS {
            let answer = stream.answer().await;
            assert_eq!(module_error(&answer), None, "{answer:?}");
            assert!(answered.insert(answer.correlation_id));
        }
        stream.ping().await;
        agent.end();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn that_take_long_delay_no_others() {
        let options = ["--timeout-ms", "3000", "--pool-size", "4"];
        let (agent, _directory) = serve(&module::choosing(), &options);
        let mut stream = Client::connect(&agent).await.process().await;
        for id in ["slow-1", "slow-2", "slow-3"] {
            stream.send(get(id, "/loop")).await;
        }
        assert_eq!(stream.ask(get("quick", "/")).await.correlation_id, "quick");
        stream.ping().await;
        let mut slow = BTreeSet::new();
        for _ in 0..3 {
            let answer = stream.answer().await;
            assert_eq!(module_error(&answer), Some("WASM_TIMEOUT"), "{answer:?}");
            slow.insert(answer.correlation_id);
        }
        assert_eq!(slow, BTreeSet::from(["slow-1", "slow-2", "slow-3"].map(String::from)));
        agent.end();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn with_parts_of_bodies_are_not_collected() {
        let options = [&AMPLE[..], &["--collect-request-body"]].concat();
        let (agent, _directory) = serve(&module::answering(&["on_request_body"], r#"{"tags":["seen"]}"#), &options);
        let mut stream = Client::connect(&agent).await.process().await;
        let ToAgent::RequestBodyChunk(mut part) = body("1", "one") else { panic!() };
        part.is_last = false;
        assert_eq!(module_error(&stream.ask(ToAgent::RequestBodyChunk(part)).await), Some("WASM_BODY_NOT_COLLECTED"));
        // A single chunk is the whole body.
        assert_eq!(stream.ask(body("2", "one")).await.audit.unwrap().tags, ["seen"]);
        agent.log.wait_for_line("the warning", |line| line.contains("`--collect-request-body` needs the Unix socket"));
        agent.end();
    }
}

mod answers {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn carry_every_field_of_a_decision() {
        let answer = r#"{"decision":"block","status":451,"body":"no","add_response_headers":{"X-Why":"law"},"add_request_headers":{"A":["1","2"]},
        "remove_request_headers":["B"],"tags":["t"],"rule_ids":["r"],"confidence":0.5,"reason_codes":["c"],"needs_more":true}"#;
        let (agent, _directory) = serve(&module::answering(&["on_request_headers"], answer), &AMPLE);
        let mut stream = Client::connect(&agent).await.process().await;
        let answer = stream.ask(get("1", "/")).await;
        assert_eq!(answer.correlation_id, "1");
        let Some(Decision::Block(block)) = answer.decision else { panic!("{answer:?}") };
        assert_eq!((block.status, block.body.as_deref()), (451, Some("no")));
        assert_eq!((block.headers[0].name.as_str(), block.headers[0].value.as_str()), ("X-Why", "law"));
        let ops: Vec<_> = answer.request_headers.into_iter().map(|op| format!("{:?}", op.operation.unwrap())).collect();
        assert_eq!(ops, [r#"Remove("B")"#, r#"Set(Header { name: "A", value: "1" })"#, r#"Add(Header { name: "A", value: "2" })"#]);
        let audit = answer.audit.unwrap();
        assert_eq!((audit.tags, audit.rule_ids, audit.reason_codes), (vec!["t".into()], vec!["r".into()], vec!["c".into()]));
        assert_eq!((audit.confidence, answer.needs_more), (Some(0.5), true));
        agent.end();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn are_redirects_and_challenges_or_blocks_for_old_proxies() {
        let (agent, _directory) = serve(
            &module::answering(&["on_request_headers"], r#"{"decision":"redirect","status":307,"body":"https://example.org/"}"#),
            &AMPLE,
        );
        let answer = Client::connect(&agent).await.process().await.ask(get("1", "/")).await;
        let redirect = proto::RedirectDecision { url: "https://example.org/".into(), status: 307 };
        assert_eq!(answer.decision, Some(Decision::Redirect(redirect)));
        agent.end();

        let challenge = r#"{"decision":"challenge","challenge_type":"captcha","challenge_params":{"body":"prove it"}}"#;
        let (agent, _directory) = serve(&module::answering(&["on_request_headers"], challenge), &AMPLE);
        let mut client = Client::connect(&agent).await;
        let to_new = client.process().await.ask(get("1", "/")).await;
        assert!(matches!(to_new.decision, Some(Decision::Challenge(challenge)) if challenge.params["body"] == "prove it"));
        let to_old = client.process_as("0.6.45").await.ask(get("1", "/")).await;
        assert!(
            matches!(to_old.decision, Some(Decision::Block(block)) if block.status == 403 && block.body.as_deref() == Some("prove it"))
        );
        agent.end();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn too_large_for_the_proxy_are_module_errors() {
        let options = [&AMPLE[..], &["--max-body-bytes", "5000000"]].concat();
        let (agent, _directory) = serve(&module::revealing(&["on_request_body"]), &options);
        let mut stream = Client::connect(&agent).await.process().await;
        let answer = stream.ask(body("1", "x".repeat(4_500_000))).await;
        assert_eq!(module_error(&answer), Some("WASM_OUTPUT_LIMIT"));
        assert_eq!(seen(&stream.ask(body("2", "y")).await)["body"], "y");
        agent.end();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn that_grpc_cannot_carry_are_module_errors() {
        let answers = [
            ("request_body_mutation", r#"{"request_body_mutation":{"action":"replace","data":"x"},"tags":["kept"]}"#),
            ("websocket_decision", r#"{"websocket_decision":"drop"}"#),
        ];
        for (field, answer) in answers {
            for fail_open in [false, true] {
                let options = [&AMPLE[..], if fail_open { &["--fail-open"] } else { &[] }].concat();
                let (agent, _directory) = serve(&module::answering(&["on_request_body"], answer), &options);
                let mut stream = Client::connect(&agent).await.process().await;
                let answer = stream.ask(body("1", "y")).await;
                assert_eq!(is_allow(&answer), fail_open, "{answer:?}");
                let audit = answer.audit.unwrap();
                assert_eq!(audit.reason_codes, ["WASM_INVALID_RESULT"]);
                assert_eq!(audit.tags.contains(&"fail-open".to_owned()), fail_open);
                agent.log.wait_for_line("the reason", |line| line.contains(field) && line.contains("cannot be carried over gRPC"));
                agent.end();
            }
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn to_failed_websocket_frames_are_blocks() {
        let (agent, _directory) =
            serve(&module::answering(&["on_request_headers", "on_websocket_frame"], r#"{"websocket_decision":"drop"}"#), &AMPLE);
        let mut stream = Client::connect(&agent).await.process().await;
        let frame = proto::WebSocketFrameEvent {
            correlation_id: "1".into(),
            frame_type: 1,
            payload: b"hello".to_vec().into(),
            ..Default::default()
        };
        let answer = stream.ask(ToAgent::WebsocketFrame(frame)).await;
        assert!(matches!(answer.decision, Some(Decision::Block(block)) if block.status == 500));
        agent.end();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn without_their_routing_metadata_are_logged_once() {
        let answer = r#"{"routing_metadata":{"a":"b"},"tags":["kept"]}"#;
        let (agent, _directory) = serve(&module::answering(&["on_request_body"], answer), &AMPLE);
        let mut stream = Client::connect(&agent).await.process().await;
        for id in ["1", "2", "3"] {
            let answer = stream.ask(body(id, "y")).await;
            assert!(is_allow(&answer));
            assert_eq!(answer.audit.unwrap().tags, ["kept"]);
        }
        let is_warning = |line: &str| line.contains("dropped the module's `routing_metadata`");
        agent.log.wait_for_line("the loss", is_warning);
        let log = agent.log.clone();
        agent.end();
        assert_eq!(log.whole().lines().filter(|line| is_warning(line)).count(), 1);
    }
}

mod superseded {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_superseded_event_is_not_answered() {
        let options = ["--timeout-ms", "1000", "--pool-size", "2", "--admin-address", "127.0.0.1:0"];
        let (agent, _directory) = serve(&module::choosing(), &options);
        let mut stream = Client::connect(&agent).await.process().await;
        stream.send(get("same", "/loop")).await;
        // Without a pause, both might arrive at once, and the first would not be run at all.
        stream.ping().await;
        let answer = stream.ask(get("same", "/")).await;
        assert!(is_allow(&answer), "{answer:?}");
        agent.admin().wait_for_metric(r#"wasm_agent_errors_total{kind="timeout"}"#, 1.0);
        assert_eq!(stream.ask(get("end", "/")).await.correlation_id, "end");
        stream.ping().await;
        agent.end();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_cancelled_event_releases_its_instance() {
        let options = ["--timeout-ms", "50000", "--pool-size", "1"];
        let (agent, _directory) = serve(&module::choosing(), &options);
        let mut stream = Client::connect(&agent).await.process().await;
        stream.send(get("a", "/loop")).await;
        stream.ping().await;
        stream.send(ToAgent::Cancel(proto::CancelRequest { correlation_id: "a".into(), reason: 1, ..Default::default() })).await;
        // There is one instance, and the loop would keep it for longer than this test waits.
        assert_eq!(stream.ask(get("b", "/")).await.correlation_id, "b");
        agent.end();
    }
}

mod streams {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn begin_with_a_handshake() {
        let (agent, _directory) = serve(&module::answering(&["on_request_headers", "on_response_body"], "{}"), &AMPLE);
        let mut client = Client::connect(&agent).await;

        let (to, from) = client.streaming(PROCESS_STREAM).await;
        let stream = Stream { to, from, reports: Vec::new() };
        stream.send(get("1", "/")).await;
        assert_eq!(stream.end().await.unwrap_err().code(), Code::FailedPrecondition);

        let (to, from) = client.streaming(PROCESS_STREAM).await;
        let mut stream = Stream { to, from, reports: Vec::new() };
        stream.send(handshake(&[1], "0.6.54")).await;
        let Some(FromAgent::Handshake(rejection)) = stream.next().await.unwrap() else { panic!() };
        assert!(!rejection.success && rejection.error.unwrap().contains("[1]"));
        assert_eq!(stream.end().await.unwrap_err().code(), Code::FailedPrecondition);

        let answer: proto::AgentToProxy =
            client.unary(PROCESS_EVENT, proto::ProxyToAgent { message: Some(handshake(&[2], "0.6.54")) }.encode_to_vec()).await.unwrap();
        let Some(FromAgent::Handshake(handshake)) = answer.message else { panic!() };
        let capabilities = handshake.capabilities.unwrap();
        assert_eq!((capabilities.agent_id.as_str(), capabilities.protocol_version), ("zentinel-wasm-agent", 2));
        assert_eq!(capabilities.supported_events, [1, 4]);
        assert_eq!(capabilities.limits.unwrap().max_body_size, 1 << 20);
        agent.end();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn end_their_calls_when_dropped() {
        let options = ["--timeout-ms", "50000", "--pool-size", "1"];
        let (agent, _directory) = serve(&module::choosing(), &options);
        let mut client = Client::connect(&agent).await;
        let mut stream = client.process().await;
        stream.send(get("a", "/loop")).await;
        stream.ping().await;
        drop(stream);
        assert!(is_allow(&client.process().await.ask(get("b", "/")).await));
        agent.end();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn that_are_not_read_delay_no_others() {
        // The connection that is stuck when the agent ends uses up its grace period.
        let options = ["--timeout-ms", "2000", "--pool-size", "2", "--max-body-bytes", "1000000", "--shutdown-grace-ms", "1"];
        let (agent, _directory) = serve(&module::revealing(&["on_request_headers", "on_request_body"]), &options);
        let stuck = Client::connect(&agent).await.process().await;
        // More than fits in the client's windows, so answers stay with the agent.
        for at in 0..20 {
            stuck.send(body(&format!("stuck-{at}"), "x".repeat(900_000))).await;
        }
        let mut other = Client::connect(&agent).await.process().await;
        for at in 0..20 {
            let answer = other.ask(get(&at.to_string(), "/")).await;
            assert_eq!(module_error(&answer), None, "{answer:?}");
        }
        drop(stuck);
        agent.end();
    }
}

mod configuration {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn is_applied_before_later_messages_are_read() {
        let (agent, _directory) = serve(&module::choosing(), &AMPLE);
        let mut stream = Client::connect(&agent).await.process().await;
        assert!(!is_allow(&stream.ask(get("1", "/trap")).await));
        stream.send(configure(r#"{"fail-open":true,"pool-size":3}"#)).await;
        stream.ping().await;
        let answer = stream.ask(get("2", "/trap")).await;
        assert!(is_allow(&answer));
        assert_eq!(answer.audit.unwrap().tags, ["wasm-error", "fail-open"]);
        agent.end();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn rejected_ends_the_stream_with_the_reason() {
        let (agent, _directory) = serve(&module::choosing(), &AMPLE);
        let mut client = Client::connect(&agent).await;
        for (config, reason) in [(r#"{"fail-open":true,"colour":1}"#, "unknown key `colour`"), ("{", "the configuration is not JSON")] {
            let stream = client.process().await;
            stream.send(configure(config)).await;
            stream.send(ToAgent::Ping(proto::Ping::default())).await;
            let status = stream.end().await.unwrap_err();
            assert_eq!(status.code(), Code::FailedPrecondition);
            assert!(status.message().contains(reason), "{status:?}");
        }
        // The valid settings beside it are not applied either.
        assert!(!is_allow(&client.process().await.ask(get("1", "/trap")).await));
        agent.end();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn unreadable_ends_the_stream() {
        let (agent, _directory) = serve(&module::answering(&["on_request_headers"], "{}"), &AMPLE);
        let mut good = Client::connect(&agent).await.process().await;
        let texts = format!(r#"{{"module-config":{}}}"#, testkit::nested_texts());
        let many = format!(r#"{{"module-config":[{}1]}}"#, "1,".repeat(200_000));
        let large = format!(r#"{{"module-config":"{}"}}"#, "x".repeat(5 << 20));
        for json in ["{", &many, &large] {
            let stream = Client::connect(&agent).await.process().await;
            stream.send(configure(json)).await;
            assert_eq!(stream.end().await.unwrap_err().code(), Code::FailedPrecondition);
        }
        let stream = Client::connect(&agent).await.process().await;
        // A configuration that is not UTF-8.
        stream.send_raw(vec![0x52, 4, 0x0a, 2, 0xff, 0xff]).await;
        assert_eq!(stream.end().await.unwrap_err().code(), Code::FailedPrecondition);
        let mut stream = Client::connect(&agent).await.process().await;
        stream.send(configure(&texts)).await;
        assert!(is_allow(&stream.ask(get("1", "/")).await));
        assert!(is_allow(&good.ask(get("1", "/")).await));
        agent.end();
    }
}

mod health {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn is_reported_with_metrics_unasked() {
        let (agent, _directory) = serve(&module::choosing(), &AMPLE);
        let mut stream = Client::connect(&agent).await.process().await;
        let Some(FromAgent::Health(health)) = stream.receive().await.unwrap() else { panic!() };
        assert_eq!((health.agent_id.as_str(), health.state), ("zentinel-wasm-agent", 1));
        assert!(health.valid_until_ms.unwrap() > health.timestamp_ms);
        let Some(FromAgent::Metrics(metrics)) = stream.receive().await.unwrap() else { panic!() };
        assert!(metrics.counters.iter().any(|counter| counter.name == "wasm_agent_requests_total"));
        assert!(metrics.histograms.iter().all(|histogram| histogram.buckets.last().unwrap().le.is_infinite()));
        agent.end();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn is_served_by_the_standard_service() {
        let (agent, _directory) = serve(&module::choosing(), &AMPLE);
        let mut client = Client::connect(&agent).await;
        for service in ["", "zentinel.agent.v2.AgentServiceV2"] {
            assert_eq!(client.health(service).await.unwrap(), ServingStatus::Serving);
        }
        assert_eq!(client.health("nonsense").await.unwrap_err().code(), Code::NotFound);

        let mut watch = client.watch().await;
        assert_eq!(patiently(watch.message()).await.unwrap().unwrap().status(), ServingStatus::Serving);
        let (control, _answers) = client.streaming::<proto::ProxyControl>(CONTROL_STREAM).await;
        control.send(drain()).await.unwrap();
        assert_eq!(patiently(watch.message()).await.unwrap().unwrap().status(), ServingStatus::NotServing);
        assert_eq!(client.health("").await.unwrap(), ServingStatus::NotServing);
        agent.end();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn shows_a_drain_while_events_are_still_answered() {
        let (agent, _directory) = serve(&module::choosing(), &AMPLE);
        let mut client = Client::connect(&agent).await;
        let mut stream = client.process().await;
        stream.ping().await;
        let (control, mut answers) = client.streaming::<proto::ProxyControl>(CONTROL_STREAM).await;
        // A message that only agents send is ignored.
        let health = proto::HealthStatus { agent_id: "waf".into(), state: 1, ..Default::default() };
        control.send(proto::AgentControl { message: Some(proto::agent_control::Message::Health(health)) }.encode_to_vec()).await.unwrap();
        control.send(drain()).await.unwrap();
        loop {
            match stream.receive().await.unwrap() {
                Some(FromAgent::Health(health)) if health.state == 3 => break,
                Some(_) => {}
                None => panic!("the stream has ended"),
            }
        }
        assert!(is_allow(&stream.ask(get("1", "/")).await));
        assert!(is_allow(&client.process().await.ask(get("2", "/")).await));

        let configure =
            proto::ConfigureEvent { config_json: r#"{"colour":1}"#.into(), config_version: Some("v1".into()), ..Default::default() };
        let configure = proto::ProxyControl { message: Some(proto::proxy_control::Message::Configure(configure)) };
        control.send(configure.encode_to_vec()).await.unwrap();
        let Some(proto::proxy_control::Message::ConfigResponse(response)) = patiently(answers.message()).await.unwrap().unwrap().message
        else {
            panic!()
        };
        assert_eq!((response.request_id.as_str(), response.accepted), ("v1", false));
        assert!(response.error.unwrap().contains("unknown key `colour`"));
        agent.end();
    }

    /// A drain concerns the connection that asked for it. Other proxies, and the same one on a new
    /// connection, go on as before.
    #[tokio::test(flavor = "multi_thread")]
    async fn shows_a_drain_to_its_own_connection_alone() {
        let (agent, _directory) = serve(&module::choosing(), &[&AMPLE[..], &["--admin-address", "127.0.0.1:0"]].concat());
        let admin = agent.admin();
        let mut other = Client::connect(&agent).await;
        let mut others_stream = other.process().await;
        let mut others_watch = other.watch().await;
        assert_eq!(patiently(others_watch.message()).await.unwrap().unwrap().status(), ServingStatus::Serving);
        let mut client = Client::connect(&agent).await;
        let mut stream = client.process().await;
        let (control, _answers) = client.streaming::<proto::ProxyControl>(CONTROL_STREAM).await;
        control.send(drain()).await.unwrap();
        while !matches!(stream.receive().await.unwrap().expect("the stream has ended"), FromAgent::Health(health) if health.state == 3) {}
        assert_eq!(client.health("").await.unwrap(), ServingStatus::NotServing);
        // A later stream of the same connection gets it as well.
        let mut later = client.process().await;
        assert!(matches!(later.receive().await.unwrap(), Some(FromAgent::Health(health)) if health.state == 3));

        assert_eq!(admin.get("/healthz"), (200, "healthy\n".into()));
        assert_eq!(admin.get("/readyz"), (200, "ready\n".into()));
        assert_eq!(other.health("").await.unwrap(), ServingStatus::Serving);
        assert!(is_allow(&others_stream.ask(get("1", "/")).await));
        // A reload publishes a report after the drain. Nothing else would within 10 s.
        agent.signal(Signal::HUP);
        admin.wait_for_metric(r#"wasm_agent_reloads_total{result="success"}"#, 1.0);
        let reported = loop {
            if let FromAgent::Health(health) = others_stream.receive().await.unwrap().expect("the stream has ended") {
                break health.state;
            }
        };
        assert_eq!(reported, 1);
        drop((stream, later, control, client));
        let mut again = Client::connect(&agent).await;
        assert_eq!(again.health("").await.unwrap(), ServingStatus::Serving);
        let mut stream = again.process().await;
        assert!(matches!(stream.receive().await.unwrap(), Some(FromAgent::Health(health)) if health.state == 1));
        agent.end();
    }
}

mod shutdown {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn answers_events_in_flight_and_ends_streams() {
        const EVENTS: usize = 8;

        let (mut agent, _directory) = serve(&module::busy(300, "t"), &[&AMPLE[..], &["--pool-size", "2"]].concat());
        let mut stream = Client::connect(&agent).await.process().await;
        for at in 0..EVENTS {
            stream.send(get(&at.to_string(), "/")).await;
        }
        stream.ping().await;
        agent.signal(Signal::TERM);
        agent.log.wait_for_line("the shutdown", |line| line.contains("shutting down: finishing in-flight events"));
        // This event was on its way when the agent got the signal.
        stream.send(get("late", "/")).await;
        let mut answered = BTreeSet::new();
        for _ in 0..=EVENTS {
            let answer = stream.answer().await;
            assert_eq!(module_error(&answer), None, "{answer:?}");
            answered.insert(answer.correlation_id);
        }
        assert_eq!(answered.len(), EVENTS + 1);
        stream.end().await.unwrap();
        assert_eq!(agent.wait().code(), Some(0));
        assert!(TcpStream::connect(address(&agent)).is_err());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn does_not_wait_for_control_streams_and_watches() {
        let (mut agent, _directory) = serve(&module::choosing(), &[&AMPLE[..], &["--shutdown-grace-ms", "3600000"]].concat());
        let mut client = Client::connect(&agent).await;
        let (_control, mut answers) = client.streaming::<proto::ProxyControl>(CONTROL_STREAM).await;
        let mut health = client.watch().await;
        assert_eq!(patiently(health.message()).await.unwrap().unwrap().status(), ServingStatus::Serving);
        let silent = TcpStream::connect(address(&agent)).unwrap();
        agent.signal(Signal::TERM);
        assert!(patiently(answers.message()).await.unwrap().is_none());
        assert_eq!(patiently(health.message()).await.unwrap().unwrap().status(), ServingStatus::NotServing);
        assert!(patiently(health.message()).await.unwrap().is_none());
        assert_eq!(agent.wait().code(), Some(0));
        drop(silent);
    }
}

mod tls {
    use super::*;

    impl Client {
        /// Asks for the health. The error is whatever prevents an answer.
        async fn try_health(&mut self) -> Result<(), String> {
            patiently(self.0.ready()).await.map_err(|error| error.to_string())?;
            let request = Request::new(HealthCheckRequest::default().encode_to_vec());
            let codec = Raw::<HealthCheckResponse>(std::marker::PhantomData);
            patiently(self.0.unary(request, path(HEALTH_CHECK), codec)).await.map(drop).map_err(|status| status.to_string())
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn is_required_once_configured() {
        let authority = Authority::new();
        let options = authority.options();
        let (agent, _directory) = serve(&module::choosing(), &options.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(authority.ask(&agent, None).await, Ok(ServingStatus::Serving));
        Authority::new().ask(&agent, None).await.unwrap_err();
        let plain = Endpoint::from_shared(format!("http://{}", address(&agent))).unwrap().connect_timeout(Duration::from_secs(5));
        if let Ok(channel) = patiently(plain.connect()).await {
            Client::new(channel).try_health().await.unwrap_err();
        }
        agent.end();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn requires_a_client_certificate_with_a_client_ca() {
        let (authority, clients) = (Authority::new(), Authority::new());
        let mut options = authority.options();
        options.extend(["--grpc-client-ca".into(), clients.file("root.pem").display().to_string()]);
        let (agent, _directory) = serve(&module::choosing(), &options.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(authority.ask(&agent, Some(&clients)).await, Ok(ServingStatus::Serving));
        authority.ask(&agent, None).await.unwrap_err();
        authority.ask(&agent, Some(&authority)).await.unwrap_err();
        agent.end();
    }

    #[test]
    fn misconfigured_is_rejected_with_the_option() {
        let authority = Authority::new();
        let options = authority.options();
        let (cert, key) = (options[1].as_str(), options[3].as_str());
        let address = ["--grpc-address", "127.0.0.1:0"];
        let (code, message) = rejection(&[&address[..], &["--grpc-tls-cert", cert]].concat());
        assert_eq!((code, message.as_str()), (Some(2), "error: `--grpc-tls-cert` requires `--grpc-tls-key`"));
        for (cert, key, expected) in [
            ("/nowhere.pem", key, "cannot read certificates from `--grpc-tls-cert /nowhere.pem`"),
            (key, key, "the file contains none"),
            (cert, cert, "cannot read a private key from `--grpc-tls-key"),
        ] {
            let (code, message) = rejection(&[&address[..], &["--grpc-tls-cert", cert, "--grpc-tls-key", key]].concat());
            assert_eq!(code, Some(1), "{message}");
            assert!(message.contains(expected), "{expected} in {message}");
        }
    }
}

mod address {
    use super::*;

    #[test]
    fn in_use_is_rejected() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap().to_string();
        let (code, message) = rejection(&["--grpc-address", &address]);
        assert_eq!(code, Some(1));
        assert!(message.contains(&format!("cannot serve `--grpc-address {address}`")), "{message}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn may_come_from_either_variable() {
        let directory = tempfile::tempdir().unwrap();
        let module = module::write(Path::new(directory.path()), "module.wasm", &module::choosing());
        for variable in ["AGENT_GRPC_ADDRESS", "WASM_GRPC_ADDRESS"] {
            let agent = AGENT.start_with(&module, |command| {
                command.env(variable, "127.0.0.1:0");
            });
            assert_eq!(Client::connect(&agent).await.health("").await.unwrap(), ServingStatus::Serving);
            agent.end();
        }
    }
}
