//! A panic is logged in one line and closes only its connection.

use std::process::{Command, Stdio};
use std::sync::Arc;

use serde_json::Value;
use testkit::{Connection, id_of};
use tokio::net::UnixListener;
use tokio::sync::watch;
use zentinel_agent_wasm::logging::{Log, LogFormat};
use zentinel_wasm_contract::report::Reports;
use zentinel_wasm_contract::{Answer, Arrival, Capabilities, Encode, Event, Failure, Handler, Hook};
use zentinel_wasm_protocol::{Stage, Timeouts, socket};

/// Set for the process whose standard error is checked.
const CHILD: &str = "PANICS_TEST_CHILD";

/// Panics on events of a GET of `/panic`, and allows all others.
struct Fragile(watch::Sender<Arc<Reports>>);

impl Handler for Fragile {
    fn capabilities(&self) -> Capabilities {
        Capabilities { hooks: [Hook::RequestHeaders].into_iter().collect(), max_body: 0 }
    }

    fn handle<E: Encode>(
        self: &Arc<Self>,
        event: &Event<'_>,
        _arrival: Arrival,
        encode: E,
    ) -> impl Future<Output = E::Encoded> + Send + 'static {
        let panics = matches!(event, Event::RequestHeaders(event) if &*event.uri == "/panic");
        async move {
            assert!(!panics, "a bug\nover two lines {}", "x".repeat(100_000));
            encode.encode(&Answer::default()).unwrap()
        }
    }

    fn reject<E: Encode>(self: &Arc<Self>, _hook: Hook, failure: Failure, _encode: E) -> E::Encoded {
        unreachable!("{failure}")
    }

    fn configure(self: &Arc<Self>, _config: Value) -> impl Future<Output = Result<(), String>> + Send + 'static {
        std::future::ready(Ok(()))
    }

    fn reports(&self) -> watch::Receiver<Arc<Reports>> {
        self.0.subscribe()
    }
}

/// Serves two connections, on one of which the handler panics.
fn child() {
    let log = Log::start().unwrap();
    log.init(LogFormat::Json, false);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("agent").build().unwrap();
    let home = tempfile::tempdir().unwrap();
    let socket = home.path().join("s");
    let listener = runtime.block_on(async { UnixListener::bind(&socket).unwrap() });
    let stage = watch::Sender::new(Stage::Serving);
    let serving = stage.subscribe();
    runtime.spawn(async move {
        let handler = Arc::new(Fragile(watch::Sender::default()));
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(socket::serve(stream, Arc::clone(&handler), serving.clone(), &Timeouts::default()));
        }
    });
    let [mut bad, mut good] = [(); 2].map(|()| Connection::open(&socket));
    assert_eq!(id_of(&good.get("1", "/")), "1");
    bad.send(testkit::kind::REQUEST_HEADERS, &testkit::request("2", "/panic"));
    assert!(bad.answer_or_end().is_none());
    assert_eq!(id_of(&good.get("3", "/")), "3");
    let metrics = String::from_utf8(zentinel_agent_wasm::logging::metrics().text()).unwrap();
    assert!(metrics.lines().any(|line| line == "wasm_agent_panics_total 1"), "{metrics}");
    runtime.shutdown_background();
}

#[test]
fn are_one_log_line_and_close_one_connection() {
    if std::env::var_os(CHILD).is_some() {
        child();
        return;
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "are_one_log_line_and_close_one_connection", "--nocapture"])
        .env(CHILD, "1")
        .env_remove("RUST_LOG")
        .env_remove("RUST_BACKTRACE")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let log = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{log}");
    let lines: Vec<_> = log.lines().collect();
    assert_eq!(lines.len(), 1, "{log}");
    assert!(lines[0].len() < 2000, "{}", lines[0].len());
    let entry: Value = serde_json::from_str(lines[0]).unwrap();
    assert_eq!((&entry["level"], &entry["thread"]), (&"ERROR".into(), &"agent".into()));
    assert!(entry["message"].as_str().unwrap().starts_with("panicked: a bug over two lines xxx"), "{entry}");
    assert!(entry["location"].as_str().unwrap().contains("tests/panics.rs:"), "{entry}");
}
