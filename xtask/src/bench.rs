//! `cargo xtask bench`: measures the agent's cost as ratios to an agent that does nothing.
//!
//! Every case runs several rounds of its contestants in turn, so other activity on the machine
//! affects all of them, and reports the median round. The load generator checks every answer and
//! reads processor time and memory from the kernel.

mod cases;
mod contestant;
mod modules;
mod report;

use crate::tools::{announce, output, root};
use crate::{cargo, peers};
use anyhow::{Context, Result, bail};
use cases::Case;
use contestant::{Builds, Running};
use report::Report;
use serde_json::Value;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;
use testkit::{Collector, CollectorReply};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Rounds of each contestant in each case; the report shows the median
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// Seconds per round
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// Only run cases whose name contains this
    #[arg(long, value_name = "PATTERN")]
    only: Option<String>,
    /// Run one round of 0.5 s: checks that everything works, without useful figures
    #[arg(long, conflicts_with_all = ["rounds", "seconds"])]
    quick: bool,
    /// Measure this agent instead of building one
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,
    /// List the cases and exit
    #[arg(long)]
    list: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let cases: Vec<Case> =
        cases::all().into_iter().filter(|case| args.only.as_ref().is_none_or(|pattern| case.title().contains(pattern.as_str()))).collect();
    if cases.is_empty() {
        bail!("no case name contains `{}`: `cargo xtask bench --list` lists them", args.only.as_deref().unwrap_or_default());
    }
    if args.list {
        for case in &cases {
            println!("{}", case.title());
        }
        return Ok(());
    }
    let (rounds, seconds) = if args.quick { (1, 0.5) } else { (usize::from(args.rounds), args.seconds) };

    let builds = build(args)?;
    let mut report = Report::new(rounds, seconds, machine()?);
    for (number, case) in cases.iter().enumerate() {
        announce(&format!("{} of {}: {}", number + 1, cases.len(), case.title()));
        let rounds_of_each = measure(case, &builds, rounds, seconds)?;
        report.add(case, rounds_of_each);
    }

    println!("{}", report.text());
    let file = root().join("target/bench/report.json");
    std::fs::write(&file, format!("{:#}\n", report.json())).with_context(|| format!("writing {}", file.display()))?;
    announce(&format!("all rounds: {}", file.display()));
    let wrong = report.wrong_answers();
    if !wrong.is_empty() {
        bail!("{} contestants gave wrong answers, which the report lists:\n{}", wrong.len(), wrong[..wrong.len().min(10)].join("\n"));
    }
    Ok(())
}

fn build(args: &Args) -> Result<Builds> {
    let programs = peers::programs()?;
    let agent = match &args.agent {
        Some(own) => own.canonicalize().with_context(|| format!("no agent at {}", own.display()))?,
        None => cargo::agent(true)?,
    };
    let dir = root().join("target/bench");
    std::fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
    let modules = modules::build(&dir)?;
    let collector = Collector::start();
    collector.reply_with(CollectorReply::Forget);
    Ok(Builds { programs, agent, modules, collector, dir })
}

/// Runs a case; returns the generator's report of every round, by contestant.
fn measure(case: &Case, builds: &Builds, rounds: usize, seconds: f64) -> Result<Vec<Vec<Value>>> {
    if let Some(runs) = case.starts(rounds) {
        return case.contestants.iter().map(|contestant| Ok(vec![contestant.time_start(builds, runs)?])).collect();
    }
    let running =
        case.contestants.iter().map(|contestant| Running::start(contestant, builds, case.needs_grpc())).collect::<Result<Vec<_>>>()?;
    let mut measured = vec![Vec::with_capacity(rounds); running.len()];
    for round in 0..rounds {
        for turn in 0..running.len() {
            // Each round starts with another contestant, so the order does not favour any of them.
            let index = (turn + round) % running.len();
            let arguments = case.load(index, seconds);
            let began = Instant::now();
            let result = put_under_load(builds, &running[index], &arguments).with_context(|| {
                format!("{}, {}, after {:.1} s", case.title(), case.contestants[index].label, began.elapsed().as_secs_f64())
            })?;
            measured[index].push(result);
        }
    }
    Ok(measured)
}

/// Runs the generator once. It reports even if answers were wrong, which makes it exit with 1.
fn put_under_load(builds: &Builds, running: &Running, arguments: &[String]) -> Result<Value> {
    let output = Command::new(&builds.programs.loadgen)
        .arg("run")
        .args(running.address(arguments.iter().any(|argument| argument == contestant::OVER_GRPC)))
        .args(["--pid", &running.pid().to_string()])
        .args(arguments.iter().filter(|argument| *argument != contestant::OVER_GRPC))
        .stdin(Stdio::null())
        .output()
        .context("cannot start the load generator")?;
    serde_json::from_slice(&output.stdout).with_context(|| String::from_utf8_lossy(&output.stderr).trim().to_owned())
}

/// Describes the machine, for the readers of the report.
fn machine() -> Result<Value> {
    let read = |path: &str| std::fs::read_to_string(path).with_context(|| format!("reading {path}"));
    let cpu = read("/proc/cpuinfo")?;
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split(": ").nth(1)).unwrap_or("unknown").to_owned();
    let load = read("/proc/loadavg")?;
    let load: f64 = load.split(' ').next().and_then(|load| load.parse().ok()).unwrap_or(0.0);
    if load > 0.5 {
        announce(&format!("the machine is busy (load {load}): ratios are less accurate, absolute times are wrong"));
    }
    Ok(serde_json::json!({
        "cpu": model,
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
        "kernel": read("/proc/sys/kernel/osrelease")?.trim(),
        "rustc": output(Command::new("rustc").arg("--version"))?.trim(),
        "load_average_before": load,
    }))
}
