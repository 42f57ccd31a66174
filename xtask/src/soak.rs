//! `cargo xtask soak`: hours of trouble in a minute. Agents with a leaking, a looping, a panicking and a good module, under load and reloaded
//! again and again, must stay as they were: memory, file descriptors, threads, answers. All of the trouble must have come about: stopped misbehaviour
//! and reloads that succeeded.

mod agent;
mod load;
mod outcome;
mod subject;

use crate::tools::say;
use crate::{cargo, table};
use agent::{Agent, Sample};
use anyhow::{Result, bail, ensure};
use load::load;
use subject::SUBJECTS;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Requests in all
    #[arg(long, default_value_t = 1_000_000)]
    requests: u64,
    /// Requests a second to each agent
    #[arg(long, default_value_t = 4000)]
    rate: u64,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    ensure!(args.rate > 0, "`--rate` must not be 0");
    let program = cargo::agent(true)?;
    let agents = SUBJECTS.iter().map(|subject| Agent::start(&program, subject)).collect::<Result<Vec<_>>>()?;

    let per_agent = args.requests / SUBJECTS.len() as u64;
    // The same load without misbehaviour, to compare with.
    let quiet_requests = (per_agent / 5).clamp(1000, 40_000);
    say(&format!("quiet: {quiet_requests} requests to each of {} agents, {} a second", agents.len(), args.rate));
    let quiet = load(&agents, quiet_requests, args.rate, false)?;
    say(&format!("soak: {per_agent} requests to each, with misbehaviour and reloads"));
    let soaked = load(&agents, per_agent, args.rate, true)?;

    let mut problems = Vec::new();
    let mut rows = Vec::new();
    for ((agent, quiet), soaked) in agents.iter().zip(&quiet).zip(&soaked) {
        let name = agent.subject.name;
        quiet.judge_answers(&format!("{name}, quiet"), quiet_requests, &mut problems);
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
            format!("{} µs", quiet.percentile(99)),
            format!("{} µs", soaked.percentile(99)),
        ]);
    }
    println!(
        "{}",
        table::render(&["module", "answers", "misbehaved", "stopped", "late", "wrong", "reloads", "p99 quiet", "p99 soak"], &rows, 8)
    );
    let mut rows = Vec::new();
    for (agent, soaked) in agents.iter().zip(&soaked) {
        let curve: Vec<_> = soaked.curve().iter().map(|sample| (sample.resident >> 20).to_string()).collect();
        let range = |value: fn(&Sample) -> u64| {
            let values = || soaked.samples.iter().map(value);
            format!("{}–{}", values().min().unwrap_or(0), values().max().unwrap_or(0))
        };
        rows.push(vec![agent.subject.name.to_owned(), curve.join(" "), range(|sample| sample.files), range(|sample| sample.threads)]);
    }
    println!("{}", table::render(&["module", "resident memory over time, MiB", "files", "threads"], &rows, 2));

    let (before, after) = (quiet[0].percentile(99), soaked[0].percentile(99));
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
        println!("everything stayed as it was");
        return Ok(());
    }
    bail!("{}", problems.join("; "))
}
