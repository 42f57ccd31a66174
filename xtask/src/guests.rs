//! `cargo xtask guests`: builds the example policies in every language, and tests and measures them
//! in the real agent.

mod bodies;
mod build;
mod load;
mod policy;
mod serving;
mod suite;
mod toolchain;
mod traps;

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
    /// Only use this language
    #[arg(long, value_name = "LANG")]
    only: Option<Language>,
    /// Calls during the load
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(1000..=10_000_000))]
    calls: u32,
    /// Isolation during the load
    #[arg(long, value_enum, default_value = "pooled")]
    isolation: Isolation,
    /// Only measure the cost of large bodies in every SDK
    #[arg(long, conflicts_with_all = ["calls", "isolation"])]
    bodies: bool,
    /// Only test what the log has of traps and timeouts
    #[arg(long, conflicts_with_all = ["calls", "isolation", "bodies"])]
    traps: bool,
    /// Use this agent instead of building one
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let languages: Vec<Language> = Language::ALL.into_iter().filter(|language| args.only.is_none_or(|only| only == *language)).collect();
    let agent = match &args.agent {
        Some(agent) => agent.canonicalize().with_context(|| format!("`--agent {}`", agent.display()))?,
        None => {
            tools::announce("building the agent in release mode (takes minutes the first time)");
            cargo::agent(true)?
        }
    };
    if args.bodies {
        return bodies::run(&agent, &languages);
    }
    if args.traps {
        return traps::run(&agent, &languages);
    }
    let policies = Policy::all()?;
    let mut total = Tally::default();
    let mut rows = Vec::new();
    for language in languages {
        tools::announce(&format!("{language}: building"));
        let guest = build::build(language).with_context(|| format!("building the guests in {language}"))?;
        tools::announce(&format!("{language}: testing"));
        for policy in policies.iter().filter(|policy| language.has(&policy.name)) {
            let module = guest.module(policy);
            total += suite::test_directly(policy, &module, language)?;
            total += suite::test_through_agent(&agent, policy, &module)?;
        }
        if language.has(Policy::TOUR) {
            total += bodies::test(&agent, &guest.tour())?;
        }
        if language != Language::RustSdk {
            total += traps::test(&agent, &build::traps(language)?, language)?;
        }
        tools::announce(&format!("{language}: measuring"));
        let load = load::measure(&agent, &guest.module(&policies[0]), args.calls, args.isolation)?;
        total += Tally::of(load.is_level());
        rows.push(row(language, &guest, &load)?);
    }
    println!("{}", table(&rows, args));
    println!("{} passed, {} failed", total.passed, total.failed);
    if total.failed > 0 {
        bail!("some guests fail cases or leak memory");
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
        "{}\nThese are figures of the security policy. A call is the agent's time from a request's arrival to its answer. \
         The load ran with `--isolation {}`.",
        render(&head, rows, 5),
        args.isolation.name()
    )
}
