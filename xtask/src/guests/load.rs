//! Measures many calls of one module in the agent.

use super::serving::Serving;
use super::suite::event;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::path::Path;
use testkit::kind;

/// Calls with the other isolation: enough for a mean. A fresh instance of a slow language takes 1
/// ms.
const SAMPLE: u32 = 2000;

/// Calls after which the process and a garbage collector have reserved their memory.
const WARM_UP: u32 = 2000;

/// Bytes by which memory may grow, because a process and a garbage collector never use exactly the
/// same amount. If events are never freed, 10 000 calls exceed this.
const MEMORY_SLACK: u64 = 6_000_000;

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Isolation {
    /// Reuse instances
    Pooled,
    /// Use a fresh instance for each call
    Request,
}

impl Isolation {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Pooled => "pooled",
            Self::Request => "request",
        }
    }
}

pub(super) struct Load {
    /// Mean time of a call of a warm instance.
    pub(super) pooled_us: f64,
    /// Mean time of a call of a fresh instance.
    fresh_us: f64,
    /// The agent's memory after the warm-up.
    pub(super) memory_before: u64,
    /// The agent's memory after all calls.
    pub(super) memory_after: u64,
}

impl Load {
    pub(super) fn instantiate_us(&self) -> f64 {
        (self.fresh_us - self.pooled_us).max(0.0)
    }

    /// Whether memory has not grown since the warm-up.
    pub(super) fn is_level(&self) -> bool {
        let level = self.memory_after < self.memory_before + MEMORY_SLACK;
        if !level {
            println!("memory grew from {} to {} bytes", self.memory_before, self.memory_after);
        }
        level
    }
}

/// Calls `module` `calls` times with this isolation, and [`SAMPLE`] times with the other one.
pub(super) fn measure(agent: &Path, module: &Path, calls: u32, isolation: Isolation) -> Result<Load> {
    let other = match isolation {
        Isolation::Pooled => Isolation::Request,
        Isolation::Request => Isolation::Pooled,
    };
    let main = run(agent, module, calls, isolation)?;
    let sample = run(agent, module, SAMPLE, other)?;
    let (pooled_us, fresh_us) = match isolation {
        Isolation::Pooled => (main.mean_us, sample.mean_us),
        Isolation::Request => (sample.mean_us, main.mean_us),
    };
    Ok(Load { pooled_us, fresh_us, memory_before: main.memory_before, memory_after: main.memory_after })
}

struct Run {
    mean_us: f64,
    memory_before: u64,
    memory_after: u64,
}

fn run(agent: &Path, module: &Path, calls: u32, isolation: Isolation) -> Result<Run> {
    let mut serving = Serving::start(agent, module, &["--pool-size", "1", "--isolation", isolation.name()])?;
    let request = request();
    let ask = |serving: &mut Serving, times: u32| -> Result<()> {
        for _ in 0..times {
            let answer = serving.connection.try_ask(kind::REQUEST_HEADERS, &request)?;
            ensure!(answer["decision"] == "allow", "expected allow during the load, got {answer}");
        }
        Ok(())
    };
    let warm_up = WARM_UP.min(calls / 2);
    ask(&mut serving, warm_up)?;
    let (before, memory_before) = (Durations::read(&serving, "on_request_headers")?, serving.memory()?);
    ask(&mut serving, calls - warm_up)?;
    let (after, memory_after) = (Durations::read(&serving, "on_request_headers")?, serving.memory()?);
    serving.stop();
    let mean = (after.sum - before.sum) / (after.count - before.count);
    Ok(Run { mean_us: mean * 1e6, memory_before, memory_after })
}

/// A browser's request, which every policy allows.
fn request() -> Value {
    let request = json!({
        "uri": "/api/users?page=1",
        "headers": {
            "Host": "shop.example",
            "User-Agent": "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0",
            "Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8",
            "Accept-Language": "en-GB,en;q=0.5",
            "Accept-Encoding": "gzip, deflate, br, zstd",
            "Cookie": "session=0123456789abcdef0123456789abcdef",
        },
    });
    event("load", request.as_object().expect("a JSON object"))
}

/// The agent's own metrics of the duration of calls.
pub(super) struct Durations {
    pub(super) sum: f64,
    count: f64,
}

impl Durations {
    pub(super) fn read(serving: &Serving, hook: &str) -> Result<Self> {
        let metrics = serving.metrics()?;
        let value = |name: &str| -> Result<f64> {
            let prefix = format!("wasm_agent_call_duration_seconds_{name}{{hook=\"{hook}\"}} ");
            let line = metrics.lines().find_map(|line| line.strip_prefix(prefix.as_str()));
            line.with_context(|| format!("the agent has no metric `{prefix}`"))?.parse().context("cannot read the agent's metrics")
        };
        Ok(Self { sum: value("sum")?, count: value("count")? })
    }
}
