//! The cases and their goals.

use super::contestant::{COLLECTOR, Contestant, OVER_GRPC, Program};
use super::modules::Module;

/// Contestants under the same load, one row of a table each.
pub(crate) struct Case {
    pub(crate) group: &'static str,
    pub(crate) name: String,
    pub(crate) contestants: Vec<Contestant>,
    load: Vec<String>,
    /// More arguments of the generator, for the last contestant only.
    extra_load: Vec<String>,
    /// Multiplies the duration of rounds, because some figures need more answers.
    duration_factor: f64,
    /// Measures starts of the contestants instead of load.
    starts: bool,
    pub(crate) goals: Vec<Goal>,
}

/// A bound on a figure of the last contestant, usually as a ratio to the first one that is not
/// echo.
pub(crate) struct Goal {
    pub(crate) figure: Figure,
    pub(crate) bound: Bound,
}

#[derive(Clone, Copy)]
pub(crate) enum Figure {
    Cpu,
    P50,
    P99,
    Throughput,
    ResidentMb,
    FirstAnswerMs,
}

#[derive(Clone, Copy)]
pub(crate) enum Bound {
    RatioAtMost(f64),
    RatioAtLeast(f64),
    /// A bound on the difference instead of the ratio.
    AddsAtMost(f64),
    AtMost(f64),
}

impl Case {
    pub(crate) fn title(&self) -> String {
        format!("{}: {}", self.group, self.name)
    }

    pub(crate) fn needs_grpc(&self) -> bool {
        self.load.iter().any(|argument| argument == OVER_GRPC)
    }

    pub(crate) fn starts(&self, rounds: usize) -> Option<usize> {
        self.starts.then_some(rounds * 4)
    }

    /// The generator's arguments for a contestant.
    pub(crate) fn load(&self, contestant: usize, seconds: f64) -> Vec<String> {
        let mut load = self.load.clone();
        if contestant + 1 == self.contestants.len() {
            load.extend_from_slice(&self.extra_load);
        }
        // Enough to warm the caches and fill the pool.
        load.extend(["--warmup".to_owned(), (0.25 * seconds).to_string()]);
        load.extend(["--seconds".to_owned(), (self.duration_factor * seconds).to_string()]);
        // Only these implement the product page's policy.
        if let Program::Agent { module: Module::Security | Module::Sdk, .. } = self.contestants[contestant].program {
            load.extend(["--expect".to_owned(), "security".to_owned()]);
        }
        load
    }

    fn new(group: &'static str, name: impl Into<String>, contestants: Vec<Contestant>, load: &str) -> Self {
        Self {
            group,
            name: name.into(),
            contestants,
            load: words(load),
            extra_load: Vec::new(),
            duration_factor: 1.0,
            starts: false,
            goals: Vec::new(),
        }
    }

    fn goal(mut self, figure: Figure, bound: Bound) -> Self {
        self.goals.push(Goal { figure, bound });
        self
    }
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

fn echo() -> Contestant {
    Contestant { label: "echo", program: Program::Echo, cores: None }
}

fn noop() -> Contestant {
    Contestant { label: "no-op", program: Program::Noop, cores: None }
}

fn agent(label: &'static str, module: Module, arguments: &str) -> Contestant {
    Contestant { label, program: Program::Agent { module, arguments: words(arguments) }, cores: None }
}

fn security() -> Contestant {
    agent("agent", Module::Security, "")
}

fn three() -> Vec<Contestant> {
    vec![echo(), noop(), security()]
}

fn two() -> Vec<Contestant> {
    vec![noop(), security()]
}

/// All cases, in the order of the tables.
pub(crate) fn all() -> Vec<Case> {
    let mut cases = Vec::new();
    cases.extend(headers());
    cases.extend(bodies());
    cases.extend(isolation());
    cases.extend(exporting());
    cases.extend(start());
    cases.extend(scaling());
    cases
}

const SHAPES: [(usize, usize); 4] = [(1, 1), (4, 1), (4, 16), (4, 64)];

fn shape(connections: usize, in_flight: usize) -> String {
    format!("--connections {connections} --in-flight {in_flight}")
}

fn headers() -> Vec<Case> {
    use Bound::{RatioAtLeast, RatioAtMost};
    use Figure::{Cpu, P50, Throughput};
    let mut cases = Vec::new();
    for (connections, in_flight) in SHAPES {
        let case = Case::new("headers", format!("socket JSON {connections}×{in_flight}"), three(), &shape(connections, in_flight));
        cases.push(match (connections, in_flight) {
            (1, 1) => case.goal(Cpu, RatioAtMost(1.25)).goal(P50, RatioAtMost(1.3)),
            (4, 16) => case.goal(Cpu, RatioAtMost(1.0)),
            (4, 64) => case.goal(Cpu, RatioAtMost(1.0)).goal(Throughput, RatioAtLeast(1.0)),
            _ => case,
        });
    }
    // The proxy's client writes each event separately. By default the generator writes all events
    // that are due at once.
    cases.push(Case::new("headers", "socket JSON 4×16, a write for each event", three(), "--write-each"));
    let sdk = vec![noop(), agent("agent sdk", Module::Sdk, "")];
    cases.push(Case::new("headers", "socket JSON 4×16, SDK module", sdk, "").goal(Cpu, RatioAtMost(0.8)));
    for (connections, in_flight) in [(1, 1), (4, 16)] {
        let load = format!("{} --encoding msgpack", shape(connections, in_flight));
        cases.push(Case::new("headers", format!("socket MessagePack {connections}×{in_flight}"), three(), &load));
    }
    for (connections, in_flight) in [(1, 1), (4, 16)] {
        let load = format!("{} {OVER_GRPC}", shape(connections, in_flight));
        let case = Case::new("headers", format!("gRPC {connections}×{in_flight}"), two(), &load);
        cases.push(if in_flight == 16 { case.goal(Cpu, RatioAtMost(1.0)) } else { case });
    }
    let each = format!("{OVER_GRPC} --write-each");
    cases.push(Case::new("headers", "gRPC 4×16, a frame for each event", two(), &each));
    cases
}

fn bodies() -> Vec<Case> {
    let mut cases = Vec::new();
    let contestants = || vec![noop(), agent("agent body", Module::Body, "")];
    for kilobytes in [4, 64, 512] {
        for (wire, arguments) in [("socket JSON", ""), ("socket MessagePack", "--encoding msgpack"), ("gRPC", OVER_GRPC)] {
            let load = format!("{arguments} --connections 4 --in-flight 4 --body-bytes {}", kilobytes * 1024);
            let case = Case::new("bodies", format!("{wire}, {kilobytes} kB"), contestants(), &load);
            cases.push(if kilobytes == 64 { case.goal(Figure::Throughput, Bound::RatioAtLeast(0.8)) } else { case });
        }
    }
    cases
}

fn isolation() -> Vec<Case> {
    let mut cases = Vec::new();
    for (connections, in_flight) in [(1, 1), (4, 16)] {
        let contestants = vec![security(), agent("agent fresh", Module::Security, "--isolation request")];
        cases.push(
            Case::new(
                "isolation",
                format!("a fresh instance for each call, {connections}×{in_flight}"),
                contestants,
                &shape(connections, in_flight),
            )
            .goal(Figure::Cpu, Bound::AddsAtMost(20.0)),
        );
    }
    // At this rate, looping calls use less than half of one slot of four, and a fifth of two cores,
    // on average.
    let contestants = vec![agent("agent loop", Module::Loop, ""), agent("agent looping", Module::Loop, "")];
    let mut looping =
        Case::new("isolation", "one request in ten loops, 100/s", contestants, "--rate 100").goal(Figure::P99, Bound::RatioAtMost(1.5));
    looping.extra_load = words("--loop-every 10");
    // In a round of the usual duration, only two answers would be above the 99th percentile.
    looping.duration_factor = 10.0;
    cases.push(looping);
    cases
}

/// Every event has a span, because the events have no trace context.
fn exporting() -> Vec<Case> {
    let mut cases = Vec::new();
    for (connections, in_flight) in [(1, 1), (4, 16)] {
        let contestants = vec![security(), agent("agent otlp", Module::Security, &format!("--otlp-endpoint {COLLECTOR}"))];
        let name = format!("a span for each event, {connections}×{in_flight}");
        cases.push(Case::new("OTLP", name, contestants, &shape(connections, in_flight)).goal(Figure::Cpu, Bound::RatioAtMost(1.5)));
    }
    cases
}

fn start() -> Vec<Case> {
    let mut case = Case::new("start", "first answer, warm compile cache, four instances", two(), "")
        .goal(Figure::FirstAnswerMs, Bound::AtMost(50.0))
        .goal(Figure::ResidentMb, Bound::AtMost(20.0));
    case.starts = true;
    vec![case]
}

fn scaling() -> Vec<Case> {
    let mut cases = Vec::new();
    for count in [4, 12, 40, 100] {
        cases.push(Case::new("number of headers", format!("{count}"), two(), &format!("--headers {count}")));
    }
    for kilobytes in [1, 4, 16, 64, 256] {
        let contestants = vec![noop(), agent("agent body", Module::Body, "")];
        let load = format!("--in-flight 4 --body-bytes {}", kilobytes * 1024);
        cases.push(Case::new("size of the body", format!("{kilobytes} kB"), contestants, &load));
    }
    for size in [1, 2, 4, 8, 16] {
        let contestants = vec![noop(), agent("agent", Module::Security, &format!("--pool-size {size}"))];
        cases.push(Case::new("size of the pool", format!("{size}"), contestants, ""));
    }
    for connections in [1, 2, 4, 8, 16] {
        cases.push(Case::new("connections", format!("{connections}×16"), two(), &format!("--connections {connections}")));
    }
    for (name, cores) in [("1", "0"), ("2", "0,1")] {
        let mut contestants = two();
        for contestant in &mut contestants {
            contestant.cores = Some(cores);
        }
        cases.push(Case::new("cores", name, contestants, ""));
    }
    cases
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn titles_are_unique() {
        let cases = all();
        let titles: HashSet<_> = cases.iter().map(Case::title).collect();
        assert_eq!(titles.len(), cases.len());
    }

    #[test]
    fn only_the_product_page_s_policy_is_expected_to_block() {
        for case in all() {
            for (index, contestant) in case.contestants.iter().enumerate() {
                let expects_blocks = case.load(index, 1.0).iter().any(|argument| argument == "security");
                let blocks = matches!(contestant.program, Program::Agent { module: Module::Security | Module::Sdk, .. });
                assert_eq!(expects_blocks, blocks, "{}", case.title());
            }
        }
    }
}
