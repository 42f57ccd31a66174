//! Spans and metrics for a collector, which is a server of the test.

#[path = "common/otlp.rs"]
mod received;

use std::collections::{BTreeMap, BTreeSet};
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;

use prost::Message as _;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use serde_json::{Value, json};
use testkit::{Agent, Collector, CollectorReply, Program, decision, kind, module, module_error, request, request_body, response, wait_for};
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::{ServerConfig, ServerConnection, StreamOwned};
use zentinel_wasm_otlp::MAX_QUEUED;
use zentinel_wasm_otlp::proto::span::SpanKind;
use zentinel_wasm_otlp::proto::status::StatusCode;
use zentinel_wasm_otlp::proto::{ExportTracePartialSuccess, ExportTraceServiceResponse};

use received::{Received, scraped, span_of, spans};

const AGENT: Program = Program(env!("CARGO_BIN_EXE_zentinel-wasm-agent"));

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";

const DROPPED: &str = "wasm_agent_otlp_dropped_total";

fn start(wat: &str, endpoint: &str, options: &[&str]) -> Agent {
    let modules = tempfile::tempdir().unwrap();
    let all = [&["--otlp-endpoint", endpoint, "--admin-address", "127.0.0.1:0", "--timeout-ms", "20000"], options].concat();
    AGENT.start(&module::write(modules.path(), "m.wasm", wat), &all)
}

/// A request with a `traceparent` of the proxy.
fn traced(id: &str, uri: &str, traceparent: &str) -> Value {
    let mut event = request(id, uri);
    event["metadata"]["traceparent"] = json!(traceparent);
    event
}

fn parent(flags: &str) -> String {
    format!("00-{TRACE}-b7ad6b7169203331-{flags}")
}

mod spans_of_events {
    use super::*;

    #[test]
    fn join_the_trace_of_their_request() {
        let collector = Collector::start();
        let agent = start(&module::judging(), &collector.url(), &[]);
        let mut proxy = agent.connect();
        proxy.ask(kind::REQUEST_HEADERS, &traced("a", "/", &parent("01")));
        proxy.ask(kind::REQUEST_BODY, &request_body("a", "x"));
        proxy.ask(kind::RESPONSE_HEADERS, &response("a", 200));
        let mut ids = BTreeSet::new();
        for hook in ["on_request_headers", "on_request_body", "on_response_headers"] {
            let received = span_of(&collector, "a", hook);
            assert_eq!((received.trace_id(), received.parent()), (TRACE.into(), "b7ad6b7169203331".into()), "{hook}");
            assert_eq!((&*received.span.name, received.span.kind()), (hook, SpanKind::Server));
            ids.insert(received.span.span_id);
        }
        assert_eq!(ids.len(), 3);
    }

    #[test]
    fn describe_the_event_and_its_module() {
        let collector = Collector::start();
        let agent = start(&module::judging(), &collector.url(), &[]);
        let mut proxy = agent.connect();
        assert_eq!(decision(&proxy.get("allowed", "/")), "allow");
        assert_eq!(decision(&proxy.get("blocked", "/b")), "block");
        let allowed = span_of(&collector, "allowed", "on_request_headers");
        let blocked = span_of(&collector, "blocked", "on_request_headers");
        assert_eq!((&*allowed.attributes["wasm.decision"], allowed.attributes.get("wasm.status")), ("allow", None));
        assert_eq!((&*blocked.attributes["wasm.decision"], &*blocked.attributes["wasm.status"]), ("block", "403"));
        for Received { span, attributes, resource } in [allowed, blocked] {
            assert_eq!((attributes["wasm.module.sha256"].len(), &span.status), (64, &None));
            assert!(attributes["wasm.module.path"].ends_with("/m.wasm"), "{attributes:?}");
            let number = |name: &str| attributes[name].parse::<u64>().unwrap();
            let nanos = span.end_time_unix_nano - span.start_time_unix_nano;
            assert!(nanos > 0 && (number("wasm.wait_us") + number("wasm.guest_us")) * 1000 <= nanos, "{attributes:?} in {nanos} ns");
            assert_eq!(resource["service.name"], "zentinel-wasm-agent");
            assert_eq!(resource["service.version"], env!("CARGO_PKG_VERSION"));
        }
    }

    #[test]
    fn show_module_errors() {
        for (options, outcome) in [(&[][..], "module error, blocked"), (&["--fail-open"], "module error, allowed")] {
            let collector = Collector::start();
            let agent = start(&module::choosing(), &collector.url(), options);
            let answer = agent.connect().ask(kind::REQUEST_HEADERS, &traced("a", "/t", &parent("01")));
            assert_eq!(module_error(&answer), Some("WASM_TRAP"));
            let received = span_of(&collector, "a", "on_request_headers");
            let status = received.span.status.as_ref().unwrap();
            assert_eq!((status.code(), &*status.message), (StatusCode::Error, outcome));
            assert_eq!(received.attributes["error.type"], "WASM_TRAP");
            assert_eq!(received.trace_id(), TRACE);
        }
    }

    #[test]
    fn begin_a_trace_if_there_is_none() {
        let collector = Collector::start();
        let agent = start(&module::judging(), &collector.url(), &[]);
        let mut proxy = agent.connect();
        let invalid = ["", "x", &parent("zz"), &parent("01").to_uppercase(), &format!("{}\u{e9}", parent("01")), &"0".repeat(1 << 20)];
        for (number, traceparent) in invalid.iter().enumerate() {
            assert_eq!(decision(&proxy.ask(kind::REQUEST_HEADERS, &traced(&number.to_string(), "/", traceparent))), "allow");
        }
        proxy.get("none", "/");
        let mut traces = BTreeSet::new();
        for id in (0..invalid.len()).map(|number| number.to_string()).chain(["none".to_owned()]) {
            let received = span_of(&collector, &id, "on_request_headers");
            assert_eq!((received.parent(), received.span.trace_id.len()), (String::new(), 16));
            assert!(traces.insert(received.trace_id()), "{id}");
        }
        assert!(!traces.contains(TRACE));
        // Later events of a request are in its trace.
        proxy.ask(kind::RESPONSE_HEADERS, &response("none", 200));
        let received = span_of(&collector, "none", "on_response_headers");
        assert_eq!(received.trace_id(), span_of(&collector, "none", "on_request_headers").trace_id());
    }

    #[test]
    fn join_the_trace_of_the_request_s_header_if_the_proxy_has_none() {
        const OF_THE_HEADER: &str = "11111111111111111111111111111111";
        let header = format!("00-{OF_THE_HEADER}-2222222222222222-01");
        let collector = Collector::start();
        let agent = start(&module::judging(), &collector.url(), &[]);
        let mut proxy = agent.connect();
        let mut ask = |id: &str, traceparent: Value, headers: Value| {
            let mut event = request(id, "/");
            event["metadata"]["traceparent"] = traceparent;
            event["headers"]["traceparent"] = headers;
            proxy.ask(kind::REQUEST_HEADERS, &event);
            proxy.ask(kind::RESPONSE_HEADERS, &response(id, 200));
            ["on_request_headers", "on_response_headers"].map(|hook| span_of(&collector, id, hook).trace_id())
        };
        assert_eq!(ask("header", Value::Null, json!([header])), [OF_THE_HEADER; 2]);
        assert_eq!(ask("both", json!(parent("01")), json!([header])), [TRACE; 2]);
        // A header that is there twice is invalid.
        assert!(!ask("twice", Value::Null, json!([header, header])).contains(&OF_THE_HEADER.to_owned()));
    }

    #[test]
    fn are_left_out_if_the_trace_is_not_sampled() {
        let collector = Collector::start();
        let agent = start(&module::judging(), &collector.url(), &[]);
        let mut proxy = agent.connect();
        proxy.ask(kind::REQUEST_HEADERS, &traced("unsampled", "/", &parent("00")));
        proxy.ask(kind::RESPONSE_HEADERS, &response("unsampled", 200));
        proxy.ask(kind::REQUEST_HEADERS, &traced("sampled", "/", &parent("03")));
        span_of(&collector, "sampled", "on_request_headers");
        agent.end_unharmed();
        let ids: Vec<_> = spans(&collector).iter().map(|received| received.id().to_owned()).collect();
        assert_eq!(ids, ["sampled"]);
    }

    #[test]
    fn have_bounded_texts() {
        let collector = Collector::start();
        let agent = start(&module::judging(), &collector.url(), &[]);
        let id = "i".repeat(4000);
        agent.connect().get(&id, "/");
        let received = wait_for("the span", || spans(&collector).pop());
        assert!(received.id().starts_with("iii") && received.id().len() < 1000, "{}", received.id().len());
    }

    #[test]
    fn follow_the_variables_of_opentelemetry() {
        let collector = Collector::start();
        let modules = tempfile::tempdir().unwrap();
        let file = module::write(modules.path(), "m.wasm", &module::judging());
        let agent = AGENT.start_with(&file, |command| {
            command.env("WASM_OTLP_ENDPOINT", format!("{}/base/", collector.url())).env("WASM_OTLP_HEADERS", "authorization=Bearer%20t");
            command.env("OTEL_SERVICE_NAME", "edge").env("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test");
        });
        agent.connect().get("a", "/");
        let received = span_of(&collector, "a", "on_request_headers");
        assert_eq!((&*received.resource["service.name"], &*received.resource["deployment.environment.name"]), ("edge", "test"));
        let post = collector.wait_for_post("/base/v1/traces");
        assert_eq!(post.header("authorization"), Some("Bearer t"));
        assert!(!agent.log.lines().join("\n").contains("Bearer"));
        collector.wait_for_post("/base/v1/metrics");
    }
}

mod metrics {
    use super::*;

    /// The lines of a scrape.
    fn scrape(agent: &Agent) -> BTreeMap<String, f64> {
        let (_, text) = agent.admin().get("/metrics");
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        lines.map(|line| line.rsplit_once(' ').unwrap()).map(|(series, value)| (series.to_owned(), value.parse().unwrap())).collect()
    }

    #[test]
    fn have_the_values_of_the_scrape() {
        let collector = Collector::start();
        let agent = start(&module::choosing(), &collector.url(), &["--pool-size", "1"]);
        let mut proxy = agent.connect();
        for (number, uri) in ["/", "/", "/t"].iter().enumerate() {
            proxy.get(&number.to_string(), uri);
        }
        // The instance that failed has been replaced.
        agent.admin().wait_for_metric("wasm_agent_pool_available", 1.0);
        let expected = scrape(&agent);
        assert_eq!(expected["wasm_agent_requests_total"], 3.0);
        assert_eq!(expected[r#"wasm_agent_errors_total{kind="trap"}"#], 1.0);
        wait_for("an export with the same values", || (scraped(&collector) == expected).then_some(()));
        assert!(expected.len() > 100, "{expected:?}");
    }

    #[test]
    fn are_exported_at_the_end() {
        let collector = Collector::start();
        let agent = start(&module::choosing(), &collector.url(), &[]);
        agent.connect().get("a", "/");
        agent.end_unharmed();
        assert_eq!(scraped(&collector)["wasm_agent_requests_total"], 1.0);
    }
}

mod collectors {
    use super::*;

    /// Sends requests as fast as they are answered.
    fn send(agent: &Agent, count: usize) {
        let mut proxy = agent.connect();
        for number in 0..count {
            assert_eq!(decision(&proxy.get(&number.to_string(), "/")), "allow");
        }
    }

    fn warnings(agent: &Agent) -> Vec<Value> {
        let about = |entry: &Value| entry["message"].as_str().is_some_and(|message| message.contains("--otlp-endpoint"));
        agent.log.entries().into_iter().filter(about).collect()
    }

    #[test]
    fn get_everything_at_the_end() {
        const REQUESTS: usize = 1500;
        let collector = Collector::start();
        let agent = start(&module::judging(), &collector.url(), &[]);
        send(&agent, REQUESTS);
        let admin = agent.admin();
        assert_eq!(admin.metric(DROPPED), 0.0);
        agent.end_unharmed();
        let ids: BTreeSet<_> = spans(&collector).iter().map(|received| received.id().to_owned()).collect();
        assert_eq!(ids.len(), REQUESTS);
    }

    #[test]
    fn that_are_dead_cost_spans_and_one_line() {
        // Nobody listens on its port.
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let agent = start(&module::judging(), &format!("http://{address}"), &[]);
        send(&agent, 10);
        agent.admin().wait_for_metric(DROPPED, 10.0);
        let [warning] = &warnings(&agent)[..] else { panic!("{:?}", warnings(&agent)) };
        let message = warning["message"].as_str().unwrap();
        assert_eq!(warning["level"], "WARN");
        assert!(
            message.starts_with(&format!("cannot export to `--otlp-endpoint http://{address}`, spans may be lost: cannot connect: ")),
            "{message}"
        );
        agent.end_unharmed();
    }

    #[test]
    fn that_hang_cost_spans_and_bounded_memory() {
        const REQUESTS: usize = 20_000;
        let collector = Collector::start();
        collector.reply_with(CollectorReply::Silence);
        // A module for which the agent remembers nothing of a request.
        let agent = start(&module::choosing(), &collector.url(), &[]);
        send(&agent, 100);
        let before = agent.resident();
        send(&agent, REQUESTS);
        // Those of the queue, of the batch on its way, and of one that has been given up.
        let dropped = agent.admin().metric(DROPPED);
        assert!(dropped >= (REQUESTS - MAX_QUEUED - 2 * 512) as f64 && dropped < REQUESTS as f64, "{dropped}");
        let grown = agent.resident().saturating_sub(before);
        assert!(grown < 8 << 20, "{grown}");
        agent.log.wait_for_line("the failure", |line| line.contains("no response within 5s"));
        let log = agent.log.clone();
        agent.end_unharmed();
        assert!(log.whole().contains("spans were not exported within 1s"), "{}", log.whole());
    }

    #[test]
    fn that_reject_spans_cost_those() {
        let collector = Collector::start();
        collector.reply_with(CollectorReply::Status(400, b"no".into()));
        let agent = start(&module::judging(), &collector.url(), &[]);
        send(&agent, 10);
        agent.admin().wait_for_metric(DROPPED, 10.0);
        agent.log.wait_for_line("the status", |line| line.contains("/v1/traces was answered with 400 Bad Request"));
        collector.reply_with(CollectorReply::Status(200, Vec::new()));
        send(&agent, 1);
        agent.log.wait_for_line("the recovery", |line| line.contains("exporting to `--otlp-endpoint"));
        let partial_success = Some(ExportTracePartialSuccess { rejected_spans: 2, error_message: "two".into() });
        collector.reply_with(CollectorReply::Status(200, ExportTraceServiceResponse { partial_success }.encode_to_vec()));
        send(&agent, 3);
        agent.admin().wait_for_metric(DROPPED, 12.0);
        agent.log.wait_for_line("the reason", |line| line.contains("some traces were rejected: two"));
        agent.end_unharmed();
    }

    #[test]
    fn that_are_unavailable_for_a_moment_get_everything() {
        for reply in [CollectorReply::Status(503, Vec::new()), CollectorReply::CloseAfter] {
            let collector = Collector::start();
            collector.reply_with(reply);
            let agent = start(&module::judging(), &collector.url(), &[]);
            send(&agent, 10);
            collector.wait_for_post("/v1/traces");
            send(&agent, 10);
            collector.reply_with(CollectorReply::Status(200, Vec::new()));
            let admin = agent.admin();
            wait_for("all spans", || (spans(&collector).len() >= 20).then_some(()));
            assert_eq!(admin.metric(DROPPED), 0.0);
            agent.end_unharmed();
        }
    }

    #[test]
    fn keep_one_connection() {
        let collector = Collector::start();
        let agent = start(&module::judging(), &collector.url(), &[]);
        for id in ["a", "b", "c"] {
            agent.connect().get(id, "/");
            span_of(&collector, id, "on_request_headers");
        }
        assert_eq!(collector.connections(), 1);
    }
}

mod tls {
    use super::*;

    /// A collector whose certificate a CA of its own has issued, and the CA's file.
    fn collector(folder: &Path) -> (Collector, String) {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let file = folder.join("ca.pem");
        std::fs::write(&file, ca.pem()).unwrap();
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(vec!["localhost".to_owned()]).unwrap().signed_by(&key, &ca).unwrap();
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.into()], key.into())
            .unwrap();
        let config = Arc::new(config);
        let wrap = move |stream| StreamOwned::new(ServerConnection::new(Arc::clone(&config)).unwrap(), stream);
        (Collector::start_with(CollectorReply::Status(200, Vec::new()), wrap), file.display().to_string())
    }

    #[test]
    fn encrypts_with_the_given_authority() {
        let folder = tempfile::tempdir().unwrap();
        let (collector, ca) = collector(folder.path());
        let endpoint = format!("https://localhost:{}", collector.address().port());
        let agent = start(&module::judging(), &endpoint, &["--otlp-ca", &ca]);
        agent.connect().get("a", "/");
        span_of(&collector, "a", "on_request_headers");
        agent.end_unharmed();
    }

    #[test]
    fn sends_nothing_to_others() {
        let folder = tempfile::tempdir().unwrap();
        let other = tempfile::tempdir().unwrap();
        let ((contacted, _), (_, other_ca)) = (collector(folder.path()), collector(other.path()));
        let endpoint = format!("https://localhost:{}", contacted.address().port());
        let agent = start(&module::judging(), &endpoint, &["--otlp-ca", &other_ca]);
        agent.connect().get("a", "/");
        agent.log.wait_for_line("the failure", |line| line.contains("TLS failed: invalid peer certificate"));
        agent.end_unharmed();
        assert!(contacted.posts().is_empty());
    }

    #[test]
    fn needs_certificates_at_the_start() {
        let folder = tempfile::tempdir().unwrap();
        let file = module::write(folder.path(), "m.wasm", &module::judging());
        let mut agent = AGENT.launch(&file, |command| {
            command.args(["--otlp-endpoint", "https://localhost:1", "--otlp-ca"]).arg(&file);
        });
        assert_eq!(agent.wait().code(), Some(1));
        let log = agent.log.whole();
        assert!(log.contains("cannot read certificates from `--otlp-ca") && log.trim_end().lines().count() == 1, "{log}");
    }
}

#[test]
fn the_thread_exists_only_with_a_collector() {
    let threads = |agent: &Agent| {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", agent.pid().as_raw_nonzero())).unwrap();
        let name = |task: std::io::Result<std::fs::DirEntry>| std::fs::read_to_string(task.unwrap().path().join("comm")).unwrap();
        tasks.map(name).filter(|name| name == "otlp\n").count()
    };
    let collector = Collector::start();
    assert_eq!(threads(&start(&module::judging(), &collector.url(), &[])), 1);
    let modules = tempfile::tempdir().unwrap();
    assert_eq!(threads(&AGENT.start(&module::write(modules.path(), "m.wasm", &module::judging()), &[])), 0);
}
