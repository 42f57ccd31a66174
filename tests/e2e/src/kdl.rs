//! The proxy's configuration for one agent, one route and one upstream.

use std::path::PathBuf;

/// How the proxy connects to the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// Frames on a Unix socket.
    UnixSocket,
    /// gRPC on a loopback port.
    Grpc,
}

/// The parts of the configuration that tests vary.
#[derive(Debug, Clone)]
pub struct ProxyConfig {
    /// The proxy's port on 127.0.0.1.
    pub port: u16,
    /// The upstream's port on 127.0.0.1.
    pub upstream_port: u16,
    /// The agent's socket.
    pub socket: PathBuf,
    /// The file of the proxy's audit log, if it keeps one.
    pub audit_log: Option<PathBuf>,
    /// The agent's gRPC port, if the proxy uses gRPC.
    pub grpc_port: Option<u16>,
    /// The events that the proxy sends the agent.
    pub events: Vec<&'static str>,
    /// More lines for the agent's block, such as `request-body-mode "stream"`.
    pub agent_lines: String,
    /// More lines for the route's block, such as `websocket #true`.
    pub route_lines: String,
}

/// Every event of an ordinary request.
pub const ALL_EVENTS: [&str; 4] = ["request_headers", "request_body", "response_headers", "response_body"];

/// The configuration as text, for 0.6.54 and 0.6.45.
pub fn render(settings: &ProxyConfig) -> String {
    let ProxyConfig { port, upstream_port, socket, audit_log, grpc_port, events, agent_lines, route_lines } = settings;
    let transport = match grpc_port {
        Some(port) => format!("grpc address=\"http://127.0.0.1:{port}\""),
        None => format!("unix-socket {:?}", socket.display().to_string()),
    };
    let audit_log = match audit_log {
        Some(file) => {
            format!("audit-log {{ enabled #true; file {:?}; log-agent-decisions #true; buffer-size 1; }}", file.display().to_string())
        }
        None => String::new(),
    };
    let events: Vec<String> = events.iter().map(|event| format!("{event:?}")).collect();
    let events = events.join(" ");
    format!(
        r#"system {{ worker-threads 2; graceful-shutdown-timeout-secs 1; }}
listeners {{ listener "http" {{ address "127.0.0.1:{port}"; protocol "http"; request-timeout-secs 30; }} }}
agents {{
    agent "wasm" type="custom" {{
        {transport}
        timeout-ms 5000
        failure-mode "closed"
        events {events}
        max-request-body-bytes 1048576
        max-response-body-bytes 1048576
        // A test that waits for the agent to return causes many failures; keep the circuit closed.
        circuit-breaker {{ failure-threshold 100000; }}
        {agent_lines}
    }}
}}
filters {{ filter "wasm" {{ type "agent"; agent "wasm"; failure-mode "closed"; }} }}
routes {{
    route "all" {{
        matches {{ path-prefix "/" }}
        upstream "backend"
        {route_lines}
        filters "wasm"
        policies {{ failure-mode "closed" }}
    }}
}}
// Without this block, 0.6.45 sends no request body to an agent.
waf {{
    engine "custom"
    mode "off"
    body-inspection {{
        inspect-request-body #true
        max-inspection-bytes 1048576
        content-types "application/json" "text/plain" "application/x-www-form-urlencoded" "application/octet-stream"
    }}
}}
upstreams {{ upstream "backend" {{ target "127.0.0.1:{upstream_port}" weight=1 }} }}
// The metrics listener would bind every interface, on a port that all proxies share.
observability {{ logging {{ level "info"; format "json"; {audit_log} }}; metrics {{ enabled #false; }} }}
"#
    )
}

/// The configuration of a proxy without an agent, in front of another proxy on 127.0.0.1.
pub fn render_hop(port: u16, next_port: u16, route_lines: &str) -> String {
    format!(
        r#"system {{ worker-threads 2; graceful-shutdown-timeout-secs 1; }}
listeners {{ listener "http" {{ address "127.0.0.1:{port}"; protocol "http"; request-timeout-secs 30; }} }}
routes {{
    route "all" {{
        matches {{ path-prefix "/" }}
        upstream "next"
        {route_lines}
    }}
}}
upstreams {{ upstream "next" {{ target "127.0.0.1:{next_port}" weight=1 }} }}
observability {{ logging {{ level "info"; format "json"; }}; metrics {{ enabled #false; }} }}
"#
    )
}
