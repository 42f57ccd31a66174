//! `cargo xtask restart`: measures what restarts and upgrades of the agent cost its clients.

use crate::table::render;
use crate::{cargo, proxy, tools};
use anyhow::{Result, bail};
use std::time::Duration;
use zentinel_wasm_e2e::restarts::{Change, Report, Restarts};
use zentinel_wasm_e2e::sample::Files;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Restarts with the descriptor store of a service manager
    #[arg(long, value_name = "COUNT", default_value_t = 100)]
    restarts: usize,
    /// Upgrades to another binary with `--takeover`
    #[arg(long, value_name = "COUNT", default_value_t = 20)]
    upgrades: usize,
    /// Requests per second
    #[arg(long, value_name = "RATE", default_value_t = 500)]
    rate: u32,
    /// Run this binary of the agent instead of building one
    #[arg(long, value_name = "FILE")]
    agent: Option<std::path::PathBuf>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let proxy = proxy::find_or_build(proxy::DEFAULT_VERSION)?;
    tools::announce("building the agent and examples/rust/security");
    let agent = match &args.agent {
        Some(agent) => agent.clone(),
        None => cargo::agent(true)?,
    };
    let files = Files { agent, proxy, module: cargo::guest("examples/rust/security")? };
    tools::announce(&format!("{} restarts and {} upgrades under {} requests/s", args.restarts, args.upgrades, args.rate));
    let report = Restarts::start(&files)?.run(args.rate, &changes(args.restarts, args.upgrades));
    let rows = [("nothing", None), ("a restart", Some(Change::Restart)), ("an upgrade", Some(Change::Upgrade))];
    let rows: Vec<_> = rows.into_iter().map(|(name, change)| row(name, &report, change)).collect();
    println!("{}", render(&["during", "requests", "failed", "median", "p99", "over 50 ms", "latest"], &rows, 6));
    match report.failed() {
        0 => Ok(()),
        failed => bail!("{failed} of {} requests failed", report.requests()),
    }
}

/// Distributes the upgrades evenly among the restarts.
fn changes(restarts: usize, upgrades: usize) -> Vec<Change> {
    let all = restarts + upgrades;
    let is_upgrade = |at: usize| (at + 1) * upgrades / all > at * upgrades / all;
    (0..all).map(|at| if is_upgrade(at) { Change::Upgrade } else { Change::Restart }).collect()
}

fn row(name: &str, report: &Report, change: Option<Change>) -> Vec<String> {
    /// What operators notice.
    const LATE: Duration = Duration::from_millis(50);
    let samples = report.samples(change);
    let failed = samples.iter().filter(|sample| sample.status != Some(200)).count();
    let mut latencies: Vec<Duration> = samples.iter().map(|sample| sample.latency).collect();
    latencies.sort();
    let late = latencies.iter().filter(|latency| **latency > LATE).count();
    let at = |part: f64| {
        let at = (latencies.len() as f64 * part) as usize;
        latencies
            .get(at.min(latencies.len().saturating_sub(1)))
            .map_or("-".into(), |latency| format!("{:.1} ms", latency.as_secs_f64() * 1e3))
    };
    vec![name.into(), samples.len().to_string(), failed.to_string(), at(0.5), at(0.99), late.to_string(), at(1.0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn upgrades_are_distributed_among_restarts() {
        let changes = changes(100, 20);
        assert_eq!(changes.iter().filter(|change| **change == Change::Upgrade).count(), 20);
        assert_eq!(changes.len(), 120);
        assert!(changes.chunks(6).all(|chunk| chunk.contains(&Change::Upgrade)));
    }
}
