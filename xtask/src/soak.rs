//! `cargo xtask soak`: hours of misbehaviour in a minute. Agents with a good, a leaking, a looping
//! and a panicking module run under load and are reloaded repeatedly. Their memory, file
//! descriptors, threads and answers must not change. The run fails too if no misbehaviour was
//! stopped, or if a reload did not succeed.

mod agent;
mod load;
mod outcome;
mod subject;

use crate::tools::announce;
use crate::{cargo, table};
use agent::{SoakedAgent, Usage};
use anyhow::{Result, bail, ensure};
use load::load;
use subject::SUBJECTS;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Total number of requests
    #[arg(long, default_value_t = 1_000_000)]
    requests: u64,
    /// Requests per second to each agent
    #[arg(long, default_value_t = 4000)]
    rate: u64,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    ensure!(args.rate > 0, "`--rate` must not be 0");
    let program = cargo::agent(true)?;
    let agents = SUBJECTS.iter().map(|subject| SoakedAgent::start(&program, subject)).collect::<Result<Vec<_>>>()?;

    let per_agent = args.requests / SUBJECTS.len() as u64;
    // The same load without misbehaviour, as a baseline.
    let baseline_requests = (per_agent / 5).clamp(1000, 40_000);
    announce(&format!("baseline: {baseline_requests} requests to each of {} agents, {} per second", agents.len(), args.rate));
    let baseline = load(&agents, baseline_requests, args.rate, false)?;
    announce(&format!("soak: {per_agent} requests to each, with misbehaviour and reloads"));
    let soaked = load(&agents, per_agent, args.rate, true)?;

    let mut problems = Vec::new();
    let mut rows = Vec::new();
    for ((agent, baseline), soaked) in agents.iter().zip(&baseline).zip(&soaked) {
        let name = agent.subject.name;
        baseline.judge_answers(&format!("{name}, baseline"), baseline_requests, &mut problems);
        soaked.judge_answers(name, per_agent, &mut problems);
        soaked.judge(agent.subject, &mut problems);
        if let Err(error) = agent.settle(soaked.reloads) {
            problems.push(format!("{name}: {error:#}"));
        }
        rows.push(vec![
            name.to_owned(),
            soaked.answers.to_string(),
            soaked.misbehaved.to_string(),
            soaked.stopped.to_string(),
            soaked.late.to_string(),
            soaked.wrong.len().to_string(),
            agent.reloads("success").to_string(),
            format!("{} µs", baseline.percentile(99)),
            format!("{} µs", soaked.percentile(99)),
        ]);
    }
    println!(
        "{}",
        table::render(&["module", "answers", "misbehaved", "stopped", "late", "wrong", "reloads", "p99 baseline", "p99 soak"], &rows, 8)
    );
    let mut rows = Vec::new();
    for (agent, soaked) in agents.iter().zip(&soaked) {
        let curve: Vec<_> = soaked.curve().iter().map(|sample| (sample.resident >> 20).to_string()).collect();
        let range = |value: fn(&Usage) -> u64| {
            let values = || soaked.samples.iter().map(value);
            format!("{}–{}", values().min().unwrap_or(0), values().max().unwrap_or(0))
        };
        rows.push(vec![agent.subject.name.to_owned(), curve.join(" "), range(|sample| sample.files), range(|sample| sample.threads)]);
    }
    println!("{}", table::render(&["module", "resident memory over time, MiB", "files", "threads"], &rows, 2));

    let (before, after) = (baseline[0].percentile(99), soaked[0].percentile(99));
    if after > 2 * before {
        problems.push(format!("the good module's p99 went from {before} µs to {after} µs, more than twice"));
    }
    for agent in agents {
        let name = agent.subject.name;
        if let Err(error) = agent.end() {
            problems.push(format!("{name}: {error:#}"));
        }
    }
    if problems.is_empty() {
        println!("no leaks, no wrong answers, all reloads succeeded");
        return Ok(());
    }
    bail!("{}", problems.join("; "))
}
