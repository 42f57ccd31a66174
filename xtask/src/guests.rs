//! `cargo xtask guests`: the example policies in every language, built, asked, and measured through the real agent.

mod bodies;
mod build;
mod load;
mod policy;
mod serving;
mod suite;
mod toolchain;

use crate::table::render;
use crate::{cargo, tools};
use anyhow::{Context, Result, bail};
use build::Language;
use load::{Isolation, Load};
use policy::Policy;
use std::path::PathBuf;
use suite::Tally;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only this language
    #[arg(long, value_name = "LANG")]
    only: Option<Language>,
    /// Calls of the load
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(1000..=10_000_000))]
    calls: u32,
    /// Isolation during the load
    #[arg(long, value_enum, default_value = "pooled")]
    isolation: Isolation,
    /// Measure what large bodies cost in every SDK, and nothing else
    #[arg(long, conflicts_with_all = ["calls", "isolation"])]
    bodies: bool,
    /// Use this agent instead of building one
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let languages: Vec<Language> = Language::ALL.into_iter().filter(|language| args.only.is_none_or(|only| only == *language)).collect();
    let agent = match &args.agent {
        Some(agent) => agent.canonicalize().with_context(|| format!("`--agent {}`", agent.display()))?,
        None => {
            tools::say("building the agent with optimisation (minutes the first time)");
            cargo::agent(true)?
        }
    };
    if args.bodies {
        return bodies::run(&agent, &languages);
    }
    let policies = Policy::all()?;
    let mut total = Tally::default();
    let mut rows = Vec::new();
    for language in languages {
        tools::say(&format!("{language}: building"));
        let guest = build::build(language).with_context(|| format!("building the guests in {language}"))?;
        tools::say(&format!("{language}: asking"));
        for policy in policies.iter().filter(|policy| language.has(&policy.name)) {
            let module = guest.module(policy);
            total += suite::ask_directly(policy, &module, language)?;
            total += suite::ask_through_agent(&agent, policy, &module)?;
        }
        if language.has(Policy::TOUR) {
            total += bodies::ask(&agent, &guest.tour())?;
        }
        tools::say(&format!("{language}: measuring"));
        let load = load::measure(&agent, &guest.module(&policies[0]), args.calls, args.isolation)?;
        total += Tally::of(load.is_level());
        rows.push(row(language, &guest, &load)?);
    }
    println!("{}", table(&rows, args));
    println!("{} passed, {} failed", total.passed, total.failed);
    if total.failed > 0 {
        bail!("some guests decide otherwise than the cases say, or their memory grows");
    }
    Ok(())
}

fn row(language: Language, guest: &build::Guest, load: &Load) -> Result<Vec<String>> {
    let size = std::fs::metadata(guest.security())?.len();
    let megabytes = |bytes: u64| format!("{:.1}", bytes as f64 / 1e6);
    Ok(vec![
        language.to_string(),
        guest.toolchain.clone(),
        format!("{:.1}", size as f64 / 1e3),
        format!("{:.0}", load.instantiate_us()),
        format!("{:.1}", load.pooled_us),
        megabytes(load.memory_before),
        megabytes(load.memory_after),
    ])
}

fn table(rows: &[Vec<String>], args: &Args) -> String {
    let after = format!("after {} calls, MB", args.calls);
    let head = ["language", "toolchain", "size, kB", "instantiate, µs", "call, µs", "agent's memory, MB", after.as_str()];
    format!(
        "{}\nThe security policy. A call is what the agent takes for a request from its arrival to its answer; the load ran with `--isolation {}`.",
        render(&head, rows, 5),
        args.isolation.name()
    )
}
