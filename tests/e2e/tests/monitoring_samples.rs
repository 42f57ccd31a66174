//! The samples for Prometheus and Grafana, with a real Prometheus that scrapes the agent behind
//! the real proxy. Without Prometheus (`apt-get install prometheus`), the tests print that they
//! skip it.

use serde_json::{Value, json};
use std::fs::File;
use std::io::{self, Write as _};
use std::process::{Child, Command, Stdio};
use tempfile::TempDir;
use zentinel_wasm_e2e::http::exchange;
use zentinel_wasm_e2e::sample::{self, adapt};
use zentinel_wasm_e2e::{HttpRequest, Stack, Transport, free_port, wait};

/// The agent's admin address in the samples.
const ADMIN: &str = "127.0.0.1:9191";

/// The values of Grafana's variables. `$__rate_interval` covers several scrapes.
const VARIABLES: [(&str, &str); 2] = [("$instance", ".*"), ("$__rate_interval", "20s")];

/// Whether a program of Prometheus exists. Without it, a test prints that it is skipped.
fn has(program: &str) -> bool {
    let found = Command::new(program).arg("--version").output().is_ok();
    if !found {
        // Not `eprintln!`, which tests that pass do not show.
        writeln!(io::stderr(), "skipped: `{program}` is not installed (`apt-get install prometheus`)").expect("cannot write to stderr");
    }
    found
}

/// A running Prometheus with a configuration of `deploy/prometheus`.
struct Prometheus {
    child: Child,
    port: u16,
    dir: TempDir,
}

impl Prometheus {
    /// Starts it with `prometheus.yml` and its alerts, which scrapes the agent once a second.
    fn start(admin_port: u16) -> Self {
        let dir = TempDir::new().expect("cannot create a directory");
        let port = free_port();
        let changes = [(ADMIN, format!("127.0.0.1:{admin_port}")), ("interval: 15s", "interval: 1s".into())];
        let config = adapt(&sample::read("prometheus/prometheus.yml"), &changes);
        std::fs::write(dir.path().join("prometheus.yml"), config).expect("cannot write the configuration");
        std::fs::copy(sample::path("prometheus/alerts.yml"), dir.path().join("alerts.yml")).expect("cannot copy the alerts");
        let log = File::create(dir.path().join("log")).expect("cannot create the log");
        let child = Command::new("prometheus")
            .arg("--config.file=prometheus.yml")
            .arg("--storage.tsdb.path=data")
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("cannot share the log"))
            .stderr(log)
            .spawn()
            .expect("cannot start Prometheus");
        let prometheus = Self { child, port, dir };
        wait::until("Prometheus is ready", || prometheus.get("/-/ready").filter(|(status, _)| *status == 200));
        prometheus
    }

    fn get(&self, path: &str) -> Option<(u16, String)> {
        let response = exchange(self.port, "GET", path, &[("Host".into(), "localhost".into())], None).ok()?;
        Some((response.status(), response.text()))
    }

    /// The data of a response of the API.
    #[track_caller]
    fn api(&self, path: &str) -> Value {
        let (status, text) = self.get(path).unwrap_or_else(|| panic!("no response to {path}"));
        let answer: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error} in {text:?}"));
        assert_eq!((status, &answer["status"]), (200, &json!("success")), "{path}: {text}");
        answer["data"].clone()
    }

    /// The number of series in the result of a query.
    #[track_caller]
    fn series(&self, query: &str) -> usize {
        let encoded: String = query.bytes().map(|byte| format!("%{byte:02X}")).collect();
        let data = self.api(&format!("/api/v1/query?query={encoded}"));
        data["result"].as_array().unwrap_or_else(|| panic!("no result: {data}")).len()
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        // Both fail only if the process has exited already.
        self.child.kill().ok();
        self.child.wait().ok();
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
            eprintln!("--- log of Prometheus:\n{log}");
        }
    }
}

/// The queries of the dashboard's panels, by title.
fn queries() -> Vec<(String, String)> {
    let dashboard: Value = serde_json::from_str(&sample::read("grafana/zentinel-wasm-agent.json")).expect("invalid JSON");
    let mut queries = Vec::new();
    for panel in dashboard["panels"].as_array().expect("no panels") {
        for target in panel["targets"].as_array().into_iter().flatten() {
            let expression = target["expr"].as_str().expect("no query");
            let query = VARIABLES.iter().fold(expression.to_owned(), |query, (name, value)| query.replace(name, value));
            assert!(!query.contains('$'), "unknown variable in {expression}");
            queries.push((panel["title"].to_string(), query));
        }
    }
    queries
}

mod monitoring {
    use super::*;

    #[test]
    #[ignore = "needs the real proxy: cargo xtask e2e"]
    fn shows_data_in_every_panel() {
        if !has("prometheus") {
            return;
        }
        let admin_port = free_port();
        let address = format!("127.0.0.1:{admin_port}");
        let stack = Stack::over(Transport::UnixSocket).agent_args(&["--admin-address", &address]).start();
        let prometheus = Prometheus::start(admin_port);
        let queries = queries();
        assert!(!queries.is_empty(), "the dashboard has no queries");
        let blocked = HttpRequest::get("/").answer("on_request_headers", &json!({"decision": "block"}));
        let trapped = HttpRequest::get("/").query("on_request_headers", "!trap");
        wait::until("every panel has data", || {
            assert_eq!([200, 403, 500], [&HttpRequest::get("/"), &blocked, &trapped].map(|request| stack.send(request).status()));
            let empty: Vec<_> = queries.iter().filter(|(_, query)| prometheus.series(query) == 0).collect();
            // Shown by a test that fails.
            println!("without data: {empty:?}");
            empty.is_empty().then_some(())
        });

        wait::until("the alerts are evaluated", || {
            let rules = prometheus.api("/api/v1/rules").to_string();
            assert!(rules.contains("WasmAgent") && !rules.contains(r#""health":"err""#), "{rules}");
            (!rules.contains(r#""health":"unknown""#)).then_some(())
        });
    }

    #[test]
    #[ignore = "needs the real proxy: cargo xtask e2e"]
    fn accepts_the_configurations_of_prometheus() {
        if !has("promtool") {
            return;
        }
        for name in ["prometheus.yml", "prometheus-kubernetes.yml"] {
            let path = sample::path("prometheus").join(name);
            let output = Command::new("promtool").args(["check", "config"]).arg(&path).output().expect("cannot run promtool");
            let printed = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success() && !printed.contains("WARN"), "{name}: {printed}");
        }
    }

    /// The Service that Prometheus looks up in Kubernetes is the one of the manifests, and the
    /// admin port is the same in all samples.
    #[test]
    #[ignore = "needs the real proxy: cargo xtask e2e"]
    fn agrees_with_the_other_samples() {
        let kubernetes = sample::read("prometheus/prometheus-kubernetes.yml");
        for manifest in ["kubernetes/sidecar.yaml", "kubernetes/grpc.yaml"] {
            assert!(sample::read(manifest).contains("name: zentinel-wasm-agent-metrics\n"), "{manifest}");
        }
        assert!(kubernetes.contains("zentinel-wasm-agent-metrics.default.svc") && kubernetes.contains("port: 9191"), "{kubernetes}");
        for name in ["systemd/zentinel-wasm-agent.service", "prometheus/prometheus.yml"] {
            assert!(sample::read(name).contains(ADMIN), "{name} does not contain {ADMIN}");
        }
    }
}
