//! `cargo xtask crash`: measures how long requests fail after a crash of the agent.

use crate::table::render;
use crate::{cargo, proxy, tools};
use anyhow::{Context, Result, bail};
use std::time::{Duration, Instant};
use zentinel_wasm_e2e::sample::{Files, SampleStack};

/// The samples for the proxy, one for each transport.
const SAMPLES: [&str; 2] = ["deploy/kdl/wasm-agent.kdl", "deploy/kdl/grpc.kdl"];

/// How long the agent is gone, as with `RestartSec=1s`.
const DOWNTIME: Duration = Duration::from_secs(1);

/// 50 requests per second: enough to open a circuit breaker at once, as traffic does.
const REQUEST_INTERVAL: Duration = Duration::from_millis(20);

/// The outage has ended when all requests succeed for this long. It exceeds the second for which
/// the samples' circuit breaker stays open.
const STABLE: Duration = Duration::from_secs(3);

/// Longer than the proxy's default circuit breaker stays open twice.
const LIMIT: Duration = Duration::from_secs(90);

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Crashes for each configuration
    #[arg(long, value_name = "COUNT", default_value_t = 5)]
    rounds: u32,
}

/// What the clients saw of one crash.
#[derive(Clone, Copy)]
struct Outage {
    /// From the crash to the last failed request.
    duration: Duration,
    failed: u32,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let proxy = proxy::find_or_build(proxy::DEFAULT_VERSION)?;
    tools::announce("building the agent and examples/rust/security");
    let files = Files { agent: cargo::agent(false)?, proxy, module: cargo::guest("examples/rust/security")? };
    let mut rows = Vec::new();
    for sample in SAMPLES {
        let text = std::fs::read_to_string(tools::root().join(sample)).with_context(|| format!("reading {sample}"))?;
        for (name, text) in [("as it is", text.clone()), ("without `circuit-breaker`", without_breaker(&text)?)] {
            let name = format!("{sample} {name}");
            tools::announce(&format!("{name}: {} crashes", args.rounds));
            let mut stack = SampleStack::start(&files, &text)?;
            let outages: Vec<Outage> = (0..args.rounds).map(|_| crash(&mut stack)).collect::<Result<_>>()?;
            rows.push(summary(name, outages));
        }
    }
    println!("{}", render(&["configuration", "median", "longest", "failed requests per crash"], &rows, 3));
    Ok(())
}

/// The configuration with the proxy's default circuit breaker.
fn without_breaker(text: &str) -> Result<String> {
    let (before, block) = text.split_once("circuit-breaker {").context("the sample has no `circuit-breaker`")?;
    let (_, after) = block.split_once('}').context("the block is not closed")?;
    Ok(format!("{before}{after}"))
}

/// Kills the agent, starts it again after [`DOWNTIME`], and sends requests until they succeed.
fn crash(stack: &mut SampleStack) -> Result<Outage> {
    stack.kill_agent();
    let start = Instant::now();
    let mut outage = Outage { duration: Duration::ZERO, failed: 0 };
    let mut down = true;
    loop {
        let elapsed = start.elapsed();
        if down && elapsed >= DOWNTIME {
            stack.start_agent()?;
            down = false;
        }
        let succeeded = stack.get("/").is_ok_and(|response| response.status() == 200);
        let elapsed = start.elapsed();
        if !succeeded {
            outage = Outage { duration: elapsed, failed: outage.failed + 1 };
        } else if !down && elapsed > outage.duration + STABLE {
            return Ok(outage);
        }
        if elapsed > LIMIT {
            bail!("requests still fail {} s after a crash", LIMIT.as_secs());
        }
        std::thread::sleep(REQUEST_INTERVAL);
    }
}

fn summary(name: String, mut outages: Vec<Outage>) -> Vec<String> {
    outages.sort_by_key(|outage| outage.duration);
    let seconds = |outage: Option<&Outage>| outage.map_or("-".into(), |outage| format!("{:.1} s", outage.duration.as_secs_f64()));
    let failed = outages.iter().map(|outage| outage.failed).sum::<u32>() / outages.len().max(1) as u32;
    vec![name, seconds(outages.get(outages.len() / 2)), seconds(outages.last()), failed.to_string()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn removes_the_circuit_breaker_of_a_sample() {
        let text = "a {\n    circuit-breaker {\n        timeout-seconds 1\n    }\n    b\n}\n";
        let without = without_breaker(text).unwrap();
        assert_eq!(without.split_whitespace().collect::<Vec<_>>(), ["a", "{", "b", "}"]);
    }
}
