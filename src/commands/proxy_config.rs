//! What the proxy's configuration makes of the agent: `check --proxy-config`.
//!
//! The file is read as zentinel 0.6.54 reads it, as far as it concerns the agent, and nothing else
//! in it is checked: `zentinel test --strict` does that.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kdl::{KdlDocument, KdlNode, KdlValue};
use serde_json::{Map, Value};
use zentinel_wasm_contract::{Hook, Hooks};
use zentinel_wasm_engine::Settings;

use crate::files;

/// Largest configuration, in bytes. Real ones have some kilobytes.
const MAX_FILE: u64 = 4 << 20;

/// The proxy's default of an agent's `timeout-ms`.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(1);

/// Names of events in the configuration, with `-` for `_`, and their hooks.
const EVENTS: [(&str, Hook); 11] = [
    ("request-headers", Hook::RequestHeaders),
    ("request-body", Hook::RequestBody),
    ("response-headers", Hook::ResponseHeaders),
    ("response-body", Hook::ResponseBody),
    ("websocket-frame", Hook::WebsocketFrame),
    ("web-socket-frame", Hook::WebsocketFrame),
    ("guardrail", Hook::GuardrailInspect),
    ("request-complete", Hook::RequestComplete),
    ("log", Hook::RequestComplete),
    // As the product page spells them, which the proxy rejects.
    ("request-body-chunk", Hook::RequestBody),
    ("response-body-chunk", Hook::ResponseBody),
];

/// The first events of [`EVENTS`], those that the proxy accepts.
const ACCEPTED_EVENTS: usize = 9;

/// What concerns agents in a proxy's configuration.
#[derive(Debug)]
pub(super) struct ProxyConfig {
    agents: Vec<AgentBlock>,
    filters: BTreeMap<String, AgentFilter>,
    /// The filters of each route.
    routes: Vec<(String, Vec<String>)>,
    has_includes: bool,
}

#[derive(Debug, PartialEq, Eq)]
enum Transport {
    Socket(PathBuf),
    Grpc(String),
    Other,
}

/// How a request body is delivered, from the least to the most conservative mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum BodyMode {
    Stream,
    Hybrid,
    Buffer,
    InspectFirst,
}

impl BodyMode {
    const fn name(self) -> &'static str {
        match self {
            Self::Stream => "stream",
            Self::Hybrid => "hybrid",
            Self::Buffer => "buffer",
            Self::InspectFirst => "inspect-first",
        }
    }
}

#[derive(Debug)]
struct AgentBlock {
    id: String,
    transport: Transport,
    events: Hooks,
    unknown_events: Vec<String>,
    timeout: Duration,
    body_mode: BodyMode,
    max_request_body: Option<u64>,
    max_response_body: Option<u64>,
    has_failure_mode: bool,
    config: Option<Value>,
}

#[derive(Debug)]
struct AgentFilter {
    agent: String,
    timeout: Option<Duration>,
    max_body: Option<u64>,
    fails_open: bool,
}

/// What is wrong, and what is probably not intended, each in one line.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Findings {
    pub(super) problems: Vec<String>,
    pub(super) warnings: Vec<String>,
}

/// Where the agent serves.
pub(super) struct Addresses<'a> {
    pub(super) socket: &'a Path,
    pub(super) grpc: Option<SocketAddr>,
}

impl ProxyConfig {
    /// Reads the file.
    ///
    /// # Errors
    ///
    /// It cannot be read or is not KDL: one line.
    pub(super) fn read(path: &Path) -> Result<Self, String> {
        let shown = path.display();
        let bytes = files::read(path, MAX_FILE).map_err(|error| format!("cannot read the proxy's configuration `{shown}`: {error}"))?;
        let text = String::from_utf8(bytes).map_err(|_| format!("the proxy's configuration `{shown}` is not UTF-8"))?;
        Self::parse(&text).map_err(|problem| format!("the proxy's configuration `{shown}` is invalid: {problem}"))
    }

    fn parse(text: &str) -> Result<Self, String> {
        let document: KdlDocument = text.parse().map_err(|error: kdl::KdlError| describe(&error, text))?;
        let agents = blocks(&document, "agents", "agent").into_iter().map(AgentBlock::parse).collect::<Result<_, _>>()?;
        let mut filters = BTreeMap::new();
        for node in blocks(&document, "filters", "filter") {
            if let Some((id, agent)) = text_of(node).zip(text_in(node, "agent")) {
                let milliseconds = number_in(node, "timeout-ms").filter(|number| *number > 0);
                filters.insert(
                    id.to_owned(),
                    AgentFilter {
                        agent: agent.to_owned(),
                        timeout: milliseconds.map(Duration::from_millis),
                        max_body: number_in(node, "max-body-bytes").filter(|number| *number > 0),
                        fails_open: text_in(node, "failure-mode") == Some("open"),
                    },
                );
            }
        }
        let routes = blocks(&document, "routes", "route").into_iter().map(|node| {
            let filters = node.children().and_then(|children| children.get("filters"));
            let names = filters.into_iter().flat_map(texts_of).map(str::to_owned).collect();
            (text_of(node).unwrap_or_default().to_owned(), names)
        });
        let has_includes = document.nodes().iter().any(|node| node.name().value() == "include");
        Ok(Self { agents, filters, routes: routes.collect(), has_includes })
    }

    /// The blocks of the agent that serves `addresses`.
    fn own(&self, addresses: &Addresses<'_>) -> Vec<&AgentBlock> {
        let is_own = |agent: &&AgentBlock| match &agent.transport {
            Transport::Socket(path) => path == addresses.socket,
            Transport::Grpc(address) => {
                let port = address.rsplit(':').next().and_then(|port| port.trim_end_matches('/').parse::<u16>().ok());
                port.is_some() && port == addresses.grpc.map(|address| address.port())
            }
            Transport::Other => false,
        };
        self.agents.iter().filter(is_own).collect()
    }

    /// The settings of the agent once the proxy has configured it.
    ///
    /// # Errors
    ///
    /// The agent would reject the configuration, and the proxy would not use it: one line.
    pub(super) fn settings(&self, addresses: &Addresses<'_>, settings: &Settings) -> Result<Settings, String> {
        let Some((agent, config)) = self.own(addresses).into_iter().find_map(|agent| Some((agent, agent.config.as_ref()?))) else {
            return Ok(settings.clone());
        };
        settings.with_proxy_config(config).map_err(|problem| format!("agent \"{}\": the `config` block is rejected: {problem}", agent.id))
    }

    /// What the configuration means for an agent with `settings`, whose module has `hooks`.
    pub(super) fn findings(&self, addresses: &Addresses<'_>, settings: &Settings, hooks: Hooks) -> Findings {
        let mut findings = Findings::default();
        if self.has_includes {
            findings.warnings.push("the proxy's configuration has an `include`, which is not followed here".into());
        }
        let own = self.own(addresses);
        if own.is_empty() {
            findings.problems.push(self.not_found(addresses));
        }
        if let [first, rest @ ..] = own.as_slice()
            && rest.iter().any(|agent| agent.config != first.config)
        {
            findings
                .problems
                .push("the agents with this address have different `config` blocks, but an agent has one: make them equal".into());
        }
        for agent in own {
            self.look_at(agent, settings, hooks, &mut findings);
        }
        findings
    }

    fn not_found(&self, Addresses { socket, grpc }: &Addresses<'_>) -> String {
        let named: Vec<String> = self
            .agents
            .iter()
            .filter_map(|agent| match &agent.transport {
                Transport::Socket(path) => Some(format!("`{}`", path.display())),
                Transport::Grpc(address) => Some(format!("`{address}`")),
                Transport::Other => None,
            })
            .collect();
        let served = match grpc {
            Some(address) => format!("the socket `{}` or gRPC on `{address}`", socket.display()),
            None => format!("the socket `{}`", socket.display()),
        };
        let named = if named.is_empty() { "nothing".into() } else { named.join(", ") };
        format!("no agent of the proxy connects to {served}: it connects to {named}")
    }

    fn look_at(&self, agent: &AgentBlock, settings: &Settings, hooks: Hooks, findings: &mut Findings) {
        let id = &agent.id;
        let is_grpc = matches!(agent.transport, Transport::Grpc(_));
        for name in &agent.unknown_events {
            findings.problems.push(format!("agent \"{id}\": the proxy rejects the event \"{name}\"{}", suggestion(name)));
        }
        let handled: Vec<Hook> = hooks.iter().filter(|hook| *hook != Hook::Configure).collect();
        let warnings = &mut findings.warnings;
        for event in agent.events.iter().filter(|event| !hooks.contains(*event)) {
            warnings.push(format!(
                "agent \"{id}\": the event \"{}\" costs a round trip, but the module does not export `{event}`: remove the event",
                event_name(event)
            ));
        }
        for hook in handled.iter().filter(|hook| !agent.events.contains(**hook)) {
            warnings.push(match hook {
                Hook::RequestComplete => format!("agent \"{id}\": `{hook}` is never called, because the proxy never sends its event"),
                _ => format!("agent \"{id}\": `{hook}` is never called: add \"{}\" to its `events`", event_name(*hook)),
            });
        }
        if is_grpc {
            for hook in [Hook::WebsocketFrame, Hook::GuardrailInspect] {
                if hooks.contains(hook) && agent.events.contains(hook) {
                    warnings.push(format!("agent \"{id}\": over gRPC `{hook}` is never called: use `unix-socket`"));
                }
            }
        }
        if agent.has_failure_mode {
            warnings.push(format!("agent \"{id}\": its `failure-mode` has no effect: set that of the filter"));
        }
        self.look_at_body(agent, is_grpc, settings, hooks, warnings);
        self.look_at_filters(agent, settings, warnings);
    }

    /// Time, size and failure mode of the filters, and whether a route uses them.
    fn look_at_filters(&self, agent: &AgentBlock, settings: &Settings, warnings: &mut Vec<String>) {
        let id = &agent.id;
        let own: Vec<_> = self.filters.iter().filter(|(_, filter)| filter.agent == *id).collect();
        let is_used = |name: &str| self.routes.iter().any(|(_, filters)| filters.iter().any(|filter| filter == name));
        if !own.iter().any(|(name, _)| is_used(name)) {
            warnings.push(format!("agent \"{id}\": no route has a filter of it, so the module decides about nothing"));
        }
        let limits = own.iter().filter_map(|(name, filter)| Some((filter.timeout?, format!("filter \"{name}\""))));
        let (shortest, whose) = limits.chain([(agent.timeout, format!("agent \"{id}\""))]).min().unwrap_or_default();
        if settings.timeout >= shortest {
            warnings.push(format!(
                "{whose}: the proxy gives up after {} ms, before the deadline of a call (`--timeout-ms` {}), and nobody sees the agent's \
                 answer: make `--timeout-ms` smaller or `timeout-ms` larger",
                shortest.as_millis(),
                settings.timeout.as_millis()
            ));
        }
        if settings.collect_request_body {
            for (name, _) in own.iter().filter(|(_, filter)| filter.fails_open) {
                warnings.push(format!(
                    "filter \"{name}\": with `--collect-request-body` its `failure-mode` must be \"closed\": an open one forwards a body \
                     without the part that the agent holds"
                ));
            }
        }
    }

    /// Modes and sizes of bodies.
    fn look_at_body(&self, agent: &AgentBlock, is_grpc: bool, settings: &Settings, hooks: Hooks, warnings: &mut Vec<String>) {
        let id = &agent.id;
        let gets = |hook| hooks.contains(hook) && agent.events.contains(hook);
        if is_grpc && (gets(Hook::RequestBody) || gets(Hook::ResponseBody)) {
            warnings.push(format!(
                "agent \"{id}\": over gRPC a change of a body is a module error: use `unix-socket` if the module changes them"
            ));
        }
        if gets(Hook::RequestBody) {
            self.look_at_mode(agent, is_grpc, settings, warnings);
            let filters = self.filters.iter().filter(|(_, filter)| filter.agent == *id);
            let of_filters = filters.filter_map(|(name, filter)| Some((format!("filter \"{name}\": `max-body-bytes`"), filter.max_body?)));
            let of_agent = agent.max_request_body.map(|size| (format!("agent \"{id}\": `max-request-body-bytes`"), size));
            warnings.extend(of_agent.into_iter().chain(of_filters).filter_map(|(name, size)| too_large(&name, size, settings)));
        }
        if gets(Hook::ResponseBody) {
            let size = agent.max_response_body;
            warnings.extend(size.and_then(|size| too_large(&format!("agent \"{id}\": `max-response-body-bytes`"), size, settings)));
        }
    }

    fn look_at_mode(&self, agent: &AgentBlock, is_grpc: bool, settings: &Settings, warnings: &mut Vec<String>) {
        let AgentBlock { id, body_mode, .. } = agent;
        if *body_mode != BodyMode::Stream {
            let mode = body_mode.name();
            warnings.push(if settings.collect_request_body {
                format!("agent \"{id}\": `--collect-request-body` needs `request-body-mode \"stream\"`, not \"{mode}\"")
            } else {
                format!(
                    "agent \"{id}\": with `request-body-mode \"{mode}\"` a change of a request body is a module error: use \"stream\" if the \
                     module changes them"
                )
            });
            return;
        }
        for (route, filters) in self.routes.iter().filter(|_| !is_grpc) {
            let on_route: BTreeSet<&str> =
                filters.iter().filter_map(|name| self.filters.get(name)).map(|filter| filter.agent.as_str()).collect();
            if !on_route.contains(id.as_str()) {
                continue;
            }
            let others = self.agents.iter().filter(|other| other.id != *id && on_route.contains(other.id.as_str()));
            let worst = others.filter(|other| other.events.contains(Hook::RequestBody)).max_by_key(|other| other.body_mode);
            if let Some(other) = worst.filter(|other| other.body_mode > *body_mode) {
                warnings.push(format!(
                    "route \"{route}\": the mode \"{}\" of the agent \"{}\" applies to \"{id}\" too, so a change of a request body is a module \
                     error: give both `request-body-mode \"stream\"`",
                    other.body_mode.name(),
                    other.id
                ));
            }
        }
    }
}

impl AgentBlock {
    fn parse(node: &KdlNode) -> Result<Self, String> {
        let id = text_of(node).ok_or("an agent has no name")?.to_owned();
        let (mut events, mut unknown_events) = (Vec::new(), Vec::new());
        for name in
            node.children().into_iter().flat_map(KdlDocument::nodes).filter(|node| node.name().value() == "events").flat_map(texts_of)
        {
            match EVENTS[..ACCEPTED_EVENTS].iter().find(|(event, _)| *event == name.replace('_', "-")) {
                Some((_, hook)) => events.push(*hook),
                None => unknown_events.push(name.to_owned()),
            }
        }
        // The proxy's default.
        if events.is_empty() && unknown_events.is_empty() {
            events.push(Hook::RequestHeaders);
        }
        let block = |name| node.children().and_then(|children| children.get(name));
        let transport = if let Some(socket) = block("unix-socket") {
            text_in(socket, "path").or_else(|| text_of(socket)).map(|path| Transport::Socket(path.into()))
        } else {
            block("grpc").and_then(|grpc| text_in(grpc, "address").or_else(|| text_of(grpc))).map(|address| Transport::Grpc(address.into()))
        };
        let body_mode = match text_in(node, "request-body-mode") {
            None | Some("buffer") => BodyMode::Buffer,
            Some("stream") => BodyMode::Stream,
            Some("inspect-first") => BodyMode::InspectFirst,
            Some(mode) if mode == "hybrid" || mode.starts_with("hybrid:") => BodyMode::Hybrid,
            Some(other) => {
                return Err(format!(
                    "agent \"{id}\": the proxy rejects `request-body-mode \"{other}\"`: use \"buffer\", \"stream\", \"hybrid:BYTES\" or \"inspect-first\""
                ));
            }
        };
        Ok(Self {
            transport: transport.unwrap_or(Transport::Other),
            events: events.into_iter().collect(),
            unknown_events,
            timeout: number_in(node, "timeout-ms").map_or(DEFAULT_TIMEOUT, Duration::from_millis),
            body_mode,
            max_request_body: number_in(node, "max-request-body-bytes"),
            max_response_body: number_in(node, "max-response-body-bytes"),
            has_failure_mode: block("failure-mode").is_some(),
            config: block("config").map(json),
            id,
        })
    }
}

fn too_large(name: &str, size: u64, settings: &Settings) -> Option<String> {
    (size > settings.max_body as u64).then(|| {
        format!(
            "{name} is {size}, but the module gets at most {} (`--max-body-bytes`): larger bodies are module errors: make them equal",
            settings.max_body
        )
    })
}

/// The name of a hook's event in the configuration.
fn event_name(hook: Hook) -> String {
    let name = EVENTS.iter().find(|(_, event)| *event == hook).map_or(hook.export(), |(name, _)| name);
    name.replace('-', "_")
}

fn suggestion(name: &str) -> String {
    let event = EVENTS.iter().find(|(event, _)| *event == name.replace('_', "-"));
    event.map(|(_, hook)| format!(": write \"{}\"", event_name(*hook))).unwrap_or_default()
}

/// The first problem of a text that is not KDL, with its line.
fn describe(error: &kdl::KdlError, text: &str) -> String {
    let Some(first) = error.diagnostics.first() else { return "it is not KDL".into() };
    let line = text.chars().take(first.span.offset()).filter(|c| *c == '\n').count() + 1;
    let help = first.help.as_deref().map(|help| format!(": {help}")).unwrap_or_default();
    format!("line {line}: {}{help}", first.message.as_deref().unwrap_or("it is not KDL"))
}

/// The nodes named `item` in the blocks named `list`.
fn blocks<'d>(document: &'d KdlDocument, list: &str, item: &str) -> Vec<&'d KdlNode> {
    let lists = document.nodes().iter().filter(|node| node.name().value() == list);
    let items = lists.filter_map(KdlNode::children).flat_map(KdlDocument::nodes);
    items.filter(|node| node.name().value() == item).collect()
}

/// The texts of a node's entries.
fn texts_of(node: &KdlNode) -> impl Iterator<Item = &str> {
    node.entries().iter().filter_map(|entry| entry.value().as_string())
}

/// The text of a node's first entry.
fn text_of(node: &KdlNode) -> Option<&str> {
    node.entries().first()?.value().as_string()
}

/// The text of a node in the block of `node`.
fn text_in<'n>(node: &'n KdlNode, name: &str) -> Option<&'n str> {
    text_of(node.children()?.get(name)?)
}

/// The number of a node in the block of `node`.
fn number_in(node: &KdlNode, name: &str) -> Option<u64> {
    let number = node.children()?.get(name)?.entries().first()?.value().as_integer()?;
    Some(number.clamp(0, i128::from(u64::MAX)) as u64)
}

/// A `config` block in the form in which the proxy sends it.
fn json(node: &KdlNode) -> Value {
    let mut object = Map::new();
    for child in node.children().into_iter().flat_map(KdlDocument::nodes) {
        let (named, unnamed): (Vec<_>, Vec<_>) = child.entries().iter().partition(|entry| entry.name().is_some());
        let mut fields: Map<String, Value> =
            named.into_iter().filter_map(|entry| Some((entry.name()?.value().to_owned(), scalar(entry.value())?))).collect();
        if let (true, Value::Object(nested)) = (child.children().is_some(), json(child)) {
            fields.extend(nested);
        }
        let mut values: Vec<Value> = unnamed.into_iter().filter_map(|entry| scalar(entry.value())).collect();
        let value = match (fields.is_empty(), values.len()) {
            (false, _) => Value::Object(fields),
            (true, 0) => Value::Bool(true),
            (true, 1) => values.remove(0),
            (true, _) => Value::Array(values),
        };
        object.insert(child.name().value().to_owned(), value);
    }
    Value::Object(object)
}

fn scalar(value: &KdlValue) -> Option<Value> {
    if let Some(text) = value.as_string() {
        Some(text.into())
    } else if let Some(number) = value.as_integer() {
        Some((number as i64).into())
    } else if let Some(number) = value.as_float() {
        serde_json::Number::from_f64(number).map(Value::Number)
    } else {
        value.as_bool().map(Value::Bool).or_else(|| value.is_null().then_some(Value::Null))
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::Cli;

    const HEADERS: [Hook; 2] = [Hook::RequestHeaders, Hook::ResponseHeaders];
    const BODIES: [Hook; 2] = [Hook::RequestHeaders, Hook::RequestBody];

    fn settings(options: &[&str]) -> Settings {
        Cli::try_parse_from(["x", "--module", "m"].iter().chain(options)).unwrap().settings()
    }

    fn addresses(grpc: Option<&str>) -> Addresses<'static> {
        Addresses { socket: Path::new("/s"), grpc: grpc.map(|address| address.parse().unwrap()) }
    }

    /// What is found about an agent block with `lines`, beside another agent `waf` on its route.
    fn findings_of(lines: &str, filter: &str, more: &str, options: &[&str], hooks: &[Hook]) -> Findings {
        let text = format!(
            r#"agents {{
                agent "wasm" type="custom" {{
                    {lines}
                }}
                {more}
            }}
            filters {{
                filter "policy" {{ type "agent"; agent "wasm"; {filter} }}
                filter "waf" {{ type "agent"; agent "waf"; failure-mode "open"; }}
                filter "other" {{ type "rate-limit"; }}
            }}
            routes {{ route "all" {{ matches {{ path-prefix "/" }}; upstream "backend"; filters "policy" "waf" "other"; }} }}"#
        );
        let config = ProxyConfig::parse(&text).unwrap();
        config.findings(&addresses(Some("0.0.0.0:50051")), &settings(options), hooks.iter().copied().collect())
    }

    fn warnings_of(lines: &str, options: &[&str], hooks: &[Hook]) -> Vec<String> {
        let Findings { problems, warnings } = findings_of(lines, "", "", options, hooks);
        assert!(problems.is_empty(), "{problems:?}");
        warnings
    }

    const GOOD: &str = r#"unix-socket "/s"; timeout-ms 50; events "request_headers" "response_headers""#;

    #[test]
    fn a_good_configuration_has_no_findings() {
        assert_eq!(findings_of(GOOD, "", "", &[], &HEADERS), Findings::default());
        let grpc = GOOD.replace(r#"unix-socket "/s""#, r#"grpc address="http://127.0.0.1:50051""#);
        assert_eq!(findings_of(&grpc, "", "", &[], &HEADERS), Findings::default());
        let block = GOOD.replace(r#"unix-socket "/s""#, r#"unix-socket { path "/s"; }"#);
        assert_eq!(findings_of(&block, "", "", &[], &HEADERS), Findings::default());
    }

    #[test]
    fn the_agent_is_found_by_its_address() {
        let elsewhere = findings_of(&GOOD.replace("/s", "/run/zentinel/wasm.sock"), "", "", &[], &HEADERS);
        assert_eq!(
            elsewhere.problems,
            ["no agent of the proxy connects to the socket `/s` or gRPC on `0.0.0.0:50051`: it connects to `/run/zentinel/wasm.sock`"]
        );
        let empty = ProxyConfig::parse("").unwrap().findings(&addresses(None), &settings(&[]), Hooks::default());
        assert_eq!(empty.problems, ["no agent of the proxy connects to the socket `/s`: it connects to nothing"]);
    }

    #[test]
    fn events_and_hooks_must_match() {
        let lines = r#"unix-socket "/s"; events "request_headers" "response-body""#;
        let hooks = [Hook::RequestHeaders, Hook::ResponseHeaders, Hook::RequestComplete, Hook::Configure];
        assert_eq!(
            warnings_of(lines, &[], &hooks),
            [
                "agent \"wasm\": the event \"response_body\" costs a round trip, but the module does not export `on_response_body`: \
                 remove the event",
                "agent \"wasm\": `on_response_headers` is never called: add \"response_headers\" to its `events`",
                "agent \"wasm\": `on_request_complete` is never called, because the proxy never sends its event",
            ]
        );
        // Without any, the proxy sends request headers.
        assert_eq!(warnings_of(r#"unix-socket "/s""#, &[], &[Hook::RequestHeaders]), Vec::<String>::new());
        let unknown = findings_of(r#"unix-socket "/s"; events "request_body_chunk" "nonsense""#, "", "", &[], &[]);
        assert_eq!(
            unknown.problems,
            [
                "agent \"wasm\": the proxy rejects the event \"request_body_chunk\": write \"request_body\"",
                "agent \"wasm\": the proxy rejects the event \"nonsense\"",
            ]
        );
    }

    #[test]
    fn the_smallest_timeout_of_the_proxy_counts() {
        let warned = |lines: &str, filter: &str, options: &[&str]| findings_of(lines, filter, "", options, &HEADERS).warnings;
        assert_eq!(warned(GOOD, "timeout-ms 45;", &[]), Vec::<String>::new());
        for (filter, options, whose) in [
            ("timeout-ms 40;", &[][..], "filter \"policy\": the proxy gives up after 40 ms"),
            ("timeout-ms 100;", &["--timeout-ms=60"], "agent \"wasm\": the proxy gives up after 50 ms"),
        ] {
            let warnings = warned(GOOD, filter, options);
            assert!(warnings.len() == 1 && warnings[0].starts_with(whose), "{warnings:?}");
        }
    }

    #[test]
    fn options_without_effect_are_named() {
        let warnings = warnings_of(&format!("{GOOD}; failure-mode \"closed\""), &[], &HEADERS);
        assert_eq!(warnings, ["agent \"wasm\": its `failure-mode` has no effect: set that of the filter"]);
        let unused = ProxyConfig::parse(&format!("agents {{ agent \"wasm\" {{ {GOOD} }} }}")).unwrap();
        let warnings = unused.findings(&addresses(None), &settings(&[]), HEADERS.into_iter().collect()).warnings;
        assert_eq!(warnings, ["agent \"wasm\": no route has a filter of it, so the module decides about nothing"]);
        let included = ProxyConfig::parse(&format!("include \"x.kdl\"\nagents {{ agent \"wasm\" {{ {GOOD} }} }}")).unwrap();
        let warnings = included.findings(&addresses(None), &settings(&[]), HEADERS.into_iter().collect()).warnings;
        assert_eq!(warnings[0], "the proxy's configuration has an `include`, which is not followed here");
    }

    #[test]
    fn body_modes_decide_about_mutations() {
        let lines = |mode: &str| format!(r#"unix-socket "/s"; timeout-ms 50; events "request_headers" "request_body"; {mode}"#);
        let stream = lines(r#"request-body-mode "stream""#);
        assert_eq!(warnings_of(&stream, &["--collect-request-body"], &BODIES), Vec::<String>::new());
        assert_eq!(
            warnings_of(&lines(""), &[], &BODIES),
            ["agent \"wasm\": with `request-body-mode \"buffer\"` a change of a request body is a module error: use \"stream\" if the \
                 module changes them"]
        );
        assert_eq!(
            warnings_of(&lines(r#"request-body-mode "hybrid:100""#), &["--collect-request-body"], &BODIES),
            ["agent \"wasm\": `--collect-request-body` needs `request-body-mode \"stream\"`, not \"hybrid\""]
        );
        assert!(ProxyConfig::parse(&format!("agents {{ agent \"a\" {{ {} }} }}", lines(r#"request-body-mode "x""#))).is_err());

        let waf = |events: &str| format!(r#"agent "waf" type="waf" {{ unix-socket "/w"; events {events} }}"#);
        let worse = findings_of(&stream, "", &waf(r#""request_headers" "request_body""#), &[], &BODIES).warnings;
        assert_eq!(
            worse,
            ["route \"all\": the mode \"buffer\" of the agent \"waf\" applies to \"wasm\" too, so a change of a request body is a module \
                 error: give both `request-body-mode \"stream\"`"]
        );
        assert_eq!(findings_of(&stream, "", &waf(r#""request_headers""#), &[], &BODIES), Findings::default());

        let open = findings_of(&stream, "failure-mode \"open\";", "", &["--collect-request-body"], &BODIES).warnings;
        assert!(open.len() == 1 && open[0].starts_with("filter \"policy\": with `--collect-request-body`"), "{open:?}");
    }

    #[test]
    fn sizes_must_agree() {
        let lines = r#"unix-socket "/s"; timeout-ms 50; events "request_headers" "request_body" "response_body"; request-body-mode "stream"
            max-request-body-bytes 2000; max-response-body-bytes 1000"#;
        let hooks = [Hook::RequestHeaders, Hook::RequestBody, Hook::ResponseBody];
        let warnings = findings_of(lines, "max-body-bytes 1001;", "", &["--max-body-bytes=1000"], &hooks).warnings;
        let rest = "but the module gets at most 1000 (`--max-body-bytes`): larger bodies are module errors: make them equal";
        assert_eq!(
            warnings,
            [
                format!("agent \"wasm\": `max-request-body-bytes` is 2000, {rest}"),
                format!("filter \"policy\": `max-body-bytes` is 1001, {rest}"),
            ]
        );
    }

    #[test]
    fn grpc_carries_less() {
        let lines = r#"grpc "http://agent:50051"; timeout-ms 50; events "request_headers" "request_body" "websocket_frame"; request-body-mode "stream""#;
        let hooks = [Hook::RequestHeaders, Hook::RequestBody, Hook::WebsocketFrame];
        assert_eq!(
            warnings_of(lines, &[], &hooks),
            [
                "agent \"wasm\": over gRPC `on_websocket_frame` is never called: use `unix-socket`",
                "agent \"wasm\": over gRPC a change of a body is a module error: use `unix-socket` if the module changes them",
            ]
        );
    }

    #[test]
    fn the_config_block_is_that_of_the_agent() {
        let with = |config: &str| {
            let config = ProxyConfig::parse(&format!("agents {{ agent \"wasm\" {{ {GOOD}; config {{ {config} }} }} }}")).unwrap();
            config.settings(&addresses(None), &settings(&[]))
        };
        let applied =
            with(r#"pool-size 8; fail-open; max-memory-mb 32.0; module-config { blocked "/a" "/b"; depth 2; nested { x #null; } }"#);
        let applied = applied.unwrap();
        assert_eq!((applied.pool_size, applied.fail_open, applied.max_memory_mb), (8, true, 32));
        let module_config: Value = serde_json::from_slice(&applied.module_config.unwrap()).unwrap();
        assert_eq!(module_config, serde_json::json!({"blocked": ["/a", "/b"], "depth": 2, "nested": {"x": null}}));
        assert_eq!(
            with("pool-size 0; colour 1").unwrap_err(),
            "agent \"wasm\": the `config` block is rejected: unknown key `colour`: expected one of pool-size, fail-open, timeout-ms, \
             max-memory-mb, isolation, collect-request-body, module-config; `pool-size` is 0: expected a whole number from 1 to 1024"
        );
    }

    #[test]
    fn what_is_not_kdl_is_named_with_its_line() {
        let error = ProxyConfig::parse("agents {\n    agent \"wasm\" {\n").unwrap_err();
        assert!(error.starts_with("line "), "{error}");
        // A boolean of the first version of KDL.
        let error = ProxyConfig::parse("system {\n    auto-https false\n}").unwrap_err();
        assert!(error.starts_with("line 2: "), "{error}");
    }
}
