//! `cargo xtask demo`: shows a module's decisions on sample requests, from a fresh clone.

use crate::table::{render, shorten};
use crate::target::Target;
use crate::{cargo, dist, proxy, tools};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use signal_hook::consts::{SIGINT, SIGTERM};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use testkit::{Connection, decision, kind, request, request_body};
use zentinel_wasm_e2e::http::exchange;
use zentinel_wasm_e2e::kdl::{ALL_EVENTS, ProxyConfig};
use zentinel_wasm_e2e::upstream::Upstream;
use zentinel_wasm_e2e::{Agent, Proxy, free_port};

/// The proxy's preferred port.
const PROXY_PORT: u16 = 8080;

const BROWSER: &str = "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0";
const CURL: &str = "curl/8.14.1";
const BOT: &str = "Mozilla/5.0 (compatible; Googlebot/2.1; +http://www.google.com/bot.html)";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The module to serve [default: build examples/rust/security]
    #[arg(long, value_name = "FILE")]
    module: Option<PathBuf>,
    /// Show the decisions and exit
    #[arg(long)]
    once: bool,
    /// Start the real proxy on 127.0.0.1:8080 [default: if it is on PATH or in the cache]
    #[arg(long)]
    proxy: bool,
    /// Build the agent in release mode, for meaningful times
    #[arg(long)]
    release: bool,
    /// Build the agent for a release on this target, and run it in an emulator if necessary
    #[arg(long, value_enum, value_name = "TARGET", conflicts_with = "release")]
    target: Option<Target>,
}

/// A request that the demonstration sends.
struct Sample {
    method: &'static str,
    uri: &'static str,
    user_agent: Option<&'static str>,
    body: Option<&'static str>,
}

const SAMPLES: [Sample; 7] = [
    Sample { method: "GET", uri: "/", user_agent: Some(BROWSER), body: None },
    Sample { method: "GET", uri: "/api/users?page=1", user_agent: Some(CURL), body: None },
    Sample { method: "POST", uri: "/api/users", user_agent: Some(BROWSER), body: Some(r#"{"name":"Ada"}"#) },
    Sample { method: "GET", uri: "/admin", user_agent: Some(BROWSER), body: None },
    Sample { method: "DELETE", uri: "/admin/users/7", user_agent: Some(CURL), body: None },
    Sample { method: "GET", uri: "/robots.txt", user_agent: Some(BOT), body: None },
    Sample { method: "GET", uri: "/health", user_agent: None, body: None },
];

pub(crate) fn run(args: &Args) -> Result<()> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&stop))?;
    }
    let module = match &args.module {
        Some(file) if file.is_file() => file.canonicalize()?,
        Some(file) => bail!("`--module {}`: no such file", file.display()),
        None => {
            tools::announce("building examples/rust/security for Wasm");
            cargo::guest("examples/rust/security")?
        }
    };
    // With `--once` there is no time to use curl, so the proxy starts only on request.
    let proxy_binary = match proxy::find(proxy::DEFAULT_VERSION)? {
        Some(binary) if args.proxy || !args.once => Some(binary),
        None if args.proxy => bail!(
            "cannot find `zentinel` on PATH or in the cache: \
             `cargo xtask e2e` builds it from crates.io (takes about 25 minutes on two cores)"
        ),
        _ => None,
    };
    tools::announce("building the agent (takes minutes the first time)");
    let dir = tempfile::tempdir()?;
    let binary = match args.target {
        None => cargo::agent(args.release)?,
        Some(target) => target.runner(&dist::build(target)?, dir.path())?.with_context(|| target.cannot_run())?,
    };
    let mut agent = Agent::start(&binary, &module, dir.path(), None, &[])?;

    println!("module  {}", module.display());
    println!("socket  {}", agent.socket().display());
    let mut connection = Connection::try_open(agent.socket())?;
    println!("agent   {}\n", describe(&connection.handshake["capabilities"]));
    println!("{}", decisions(&mut connection)?);
    if !args.release && args.target.is_none() {
        println!("Times are those of a debug build; use `--release` for realistic ones.\n");
    }

    let mut stack = match proxy_binary {
        Some(binary) => Some(ProxyStack::start(&binary, agent.socket(), dir.path())?),
        None => None,
    };
    if let Some(stack) = &stack {
        println!("{}", stack.show()?);
    }
    if args.once {
        return Ok(());
    }
    println!("Serving until Ctrl-C. The agent's log is {}", dir.path().join("agent.log").display());
    while !stop.load(Ordering::SeqCst) {
        agent.check_running()?;
        if let Some(stack) = &mut stack {
            stack.proxy.check_running()?;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    drop(stack);
    agent.stop();
    Ok(())
}

/// The agent's capabilities in one line.
fn describe(capabilities: &Value) -> String {
    /// Types of events by the protocol's numbers, which start at 1.
    const EVENTS: [&str; 8] = [
        "request headers",
        "request body",
        "response headers",
        "response body",
        "request complete",
        "WebSocket frames",
        "guardrails",
        "configuration",
    ];
    let events: Vec<&str> = capabilities["supported_events"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|number| EVENTS.get(number.as_u64()?.checked_sub(1)? as usize).copied())
        .collect();
    format!("{} {}: {}", capabilities["name"].as_str().unwrap_or("?"), capabilities["version"].as_str().unwrap_or("?"), events.join(", "))
}

/// Sends every sample and renders the decisions as a table.
fn decisions(connection: &mut Connection) -> Result<String> {
    // The first call is slower because of page faults, so the table leaves it out.
    connection.try_ask(kind::REQUEST_HEADERS, &headers_event("warm-up", &SAMPLES[0]))?;
    let mut rows = Vec::new();
    for (number, sample) in SAMPLES.iter().enumerate() {
        let id = format!("demo-{number}");
        let start = Instant::now();
        let mut answer = connection.try_ask(kind::REQUEST_HEADERS, &headers_event(&id, sample))?;
        // Like the proxy, sends the body only if the headers were allowed.
        if let (Some(body), "allow") = (sample.body, decision(&answer)) {
            answer = connection.try_ask(kind::REQUEST_BODY, &request_body(&id, body))?;
        }
        let micros = start.elapsed().as_micros();
        let (status, detail) = outcome(&answer);
        rows.push(vec![
            sample.method.to_owned(),
            sample.uri.to_owned(),
            shorten(sample.user_agent.unwrap_or("(none)"), 28),
            decision(&answer).to_owned(),
            status,
            shorten(&detail, 56),
            micros.to_string(),
        ]);
    }
    let head = ["method", "uri", "user agent", "decision", "status", "details", "µs"];
    Ok(render(&head, &rows, 1))
}

/// The status that the client receives, and the details of the decision in a few words.
fn outcome(answer: &Value) -> (String, String) {
    let name = decision(answer);
    let details = &answer["decision"][name];
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (status, mut words) = match name {
        "block" => (details["status"].to_string(), vec![text(&details["body"])]),
        "redirect" => (details["status"].to_string(), vec![text(&details["url"])]),
        "challenge" => {
            let params = details["params"].as_object();
            let mut words = vec![text(&details["challenge_type"])];
            for (name, value) in params.into_iter().flatten() {
                words.push(format!("{name}={}", text(value)));
            }
            // The same rule as in the proxy.
            let asks_for_credentials = params.is_some_and(|params| params.contains_key("www-authenticate"));
            (if asks_for_credentials { "401" } else { "403" }.to_owned(), words)
        }
        _ => ("–".to_owned(), Vec::new()),
    };
    for side in ["request_headers", "response_headers"] {
        for operation in answer[side].as_array().into_iter().flatten() {
            let Some((verb, field)) = operation.as_object().and_then(|op| op.iter().next()) else {
                continue;
            };
            words.push(format!("{verb} {}", text(&field["name"])));
        }
    }
    for tag in answer["audit"]["tags"].as_array().into_iter().flatten() {
        words.push(format!("#{}", text(tag)));
    }
    words.retain(|word| !word.is_empty());
    (status, words.join(" "))
}

fn headers_event(id: &str, sample: &Sample) -> Value {
    let mut event = request(id, sample.uri);
    event["method"] = json!(sample.method);
    let mut headers = json!({ "host": ["shop.example"], "accept": ["*/*"] });
    if let Some(user_agent) = sample.user_agent {
        headers["user-agent"] = json!([user_agent]);
    }
    if let Some(body) = sample.body {
        headers["content-type"] = json!(["application/json"]);
        headers["content-length"] = json!([body.len().to_string()]);
    }
    event["headers"] = headers;
    event
}

/// The real proxy in front of a small upstream.
struct ProxyStack {
    proxy: Proxy,
    upstream: Upstream,
}

impl ProxyStack {
    fn start(binary: &Path, socket: &Path, dir: &Path) -> Result<Self> {
        tools::announce(&format!("starting {}", binary.display()));
        let upstream = Upstream::start()?;
        // 8080 is easy to type; if it is in use, any other port works.
        let port = match std::net::TcpListener::bind(("127.0.0.1", PROXY_PORT)) {
            Ok(_) => PROXY_PORT,
            Err(_) => free_port(),
        };
        let settings = ProxyConfig {
            port,
            upstream_port: upstream.port(),
            socket: socket.to_owned(),
            grpc_port: None,
            events: ALL_EVENTS.to_vec(),
            agent_lines: String::new(),
            audit_log: None,
            route_lines: String::new(),
        };
        let proxy = Proxy::start(binary, &settings, dir)?;
        Ok(Self { proxy, upstream })
    }

    /// Sends every sample through the proxy; returns a curl command for each, with the status.
    fn show(&self) -> Result<String> {
        let port = self.proxy.port();
        let mut text = format!(
            "zentinel serves http://127.0.0.1:{port}. The upstream on port {} describes the requests it receives. Try:\n\n",
            self.upstream.port()
        );
        for sample in &SAMPLES {
            let mut headers = vec![("Host".to_owned(), "shop.example".to_owned())];
            let mut curl = "curl -i".to_owned();
            match sample.user_agent {
                // curl's default.
                Some(CURL) => headers.push(("User-Agent".into(), CURL.into())),
                Some(user_agent) => {
                    headers.push(("User-Agent".into(), user_agent.into()));
                    curl += &format!(" -A '{}'", shorten_agent(user_agent));
                }
                None => curl += " -H 'User-Agent:'",
            }
            if !matches!(sample.method, "GET" | "POST") {
                curl += &format!(" -X {}", sample.method);
            }
            if let Some(body) = sample.body {
                headers.push(("Content-Type".into(), "application/json".into()));
                curl += &format!(" --json '{body}'");
            }
            let body = sample.body.map(str::as_bytes);
            let response = exchange(port, sample.method, sample.uri, &headers, body).context("cannot send a request through the proxy")?;
            curl += &format!(" 'http://127.0.0.1:{port}{}'", sample.uri);
            text += &format!("  {curl:<96} # {}\n", response.start_line.replace("HTTP/1.1 ", ""));
        }
        Ok(text)
    }
}

/// A user agent that is short enough for a command line and equivalent for the policy.
fn shorten_agent(user_agent: &str) -> &str {
    match user_agent {
        BROWSER => "Mozilla/5.0",
        BOT => "Googlebot/2.1",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summarizes_an_answer() {
        let challenge = json!({
            "decision": {"challenge": {"challenge_type": "captcha", "params": {"site_key": "k"}}},
            "audit": {"tags": ["suspicious-ua"]},
        });
        assert_eq!(decision(&challenge), "challenge");
        assert_eq!(outcome(&challenge), ("403".into(), "captcha site_key=k #suspicious-ua".into()));
        let allow = json!({
            "decision": "allow",
            "request_headers": [{"set": {"name": "X-Processed", "value": "true"}}],
        });
        assert_eq!(outcome(&allow), ("–".into(), "set X-Processed".into()));
    }
}
