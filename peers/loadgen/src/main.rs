//! Puts bounded load on an agent on this machine, checks every answer, and reads the agent's
//! resource usage from the kernel. Prints one JSON object.

mod answers;
mod decision;
mod events;
mod grpc;
mod load;
mod process;
mod socket;
mod start;
mod wire;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use clap::{Args, Parser, Subcommand, ValueEnum};
use hdrhistogram::Histogram;
use serde_json::{Value, json};

use crate::events::{Mix, MixOptions};
use crate::load::{MAX_SLOTS, Pace, Plan, Requests, Tally, Writes};
use crate::wire::Wire;

/// Put load on an agent and measure what it costs
#[derive(Parser)]
#[command(version)]
struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Put load on a running agent
    Run(RunOptions),
    /// Start an agent and time its first answer
    Start(StartOptions),
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Expect {
    /// Everything is allowed
    Noop,
    /// `/admin` is blocked with 403, everything else is allowed
    Security,
}

#[derive(Args)]
struct RunOptions {
    /// Unix socket of the agent
    #[arg(long, required_unless_present = "grpc_address", conflicts_with = "grpc_address")]
    socket: Option<PathBuf>,
    /// gRPC address of the agent
    #[arg(long)]
    grpc_address: Option<SocketAddr>,
    /// Encoding on the Unix socket
    #[arg(long, value_parser = ["json", "msgpack"], default_value = "json")]
    encoding: String,
    /// Connections
    #[arg(long, default_value_t = 4)]
    connections: usize,
    /// Requests in flight on each connection
    #[arg(long, default_value_t = 16)]
    in_flight: usize,
    /// Start N requests per second over all connections, even if earlier ones are unanswered
    #[arg(long, value_name = "N", conflicts_with = "in_flight")]
    rate: Option<f64>,
    /// Number of headers; several numbers are mixed evenly
    #[arg(long, value_delimiter = ',', default_value = "4,8,12")]
    headers: Vec<usize>,
    /// Send a request body of this size in bytes instead of headers
    #[arg(long)]
    body_bytes: Option<usize>,
    /// Send headers before each body, on the same connection and with the same id
    #[arg(long, requires = "body_bytes")]
    headers_first: bool,
    /// The expected answers
    #[arg(long, value_enum, default_value_t = Expect::Noop)]
    expect: Expect,
    /// Send every Nth request to `/loop`, time it separately and accept any answer
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    loop_every: Option<u64>,
    /// Write each event separately, as the proxy's client does; over gRPC, in a frame of its own
    #[arg(long)]
    write_each: bool,
    /// Seconds to measure
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Seconds of load before measuring
    #[arg(long, default_value_t = 1.0)]
    warmup: f64,
    /// Process to report processor time and memory of
    #[arg(long)]
    pid: Option<u32>,
}

#[derive(Args)]
struct StartOptions {
    /// Unix socket that the agent will serve
    #[arg(long)]
    socket: PathBuf,
    /// How often to start it
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..))]
    runs: u16,
    /// The agent and its arguments
    #[arg(last = true, required = true)]
    agent: Vec<String>,
}

fn main() -> ExitCode {
    let report = match Options::parse().command {
        Command::Run(options) => run(&options),
        Command::Start(options) => start::measure(&options.socket, usize::from(options.runs), &options.agent).map(|report| (report, true)),
    };
    match report {
        Ok((report, right)) => {
            println!("{report:#}");
            if right { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("loadgen: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &RunOptions) -> Result<(Value, bool), String> {
    check(options)?;
    let wire = match (&options.grpc_address, options.encoding.as_str()) {
        (Some(_), _) => Wire::Grpc,
        (None, "msgpack") => Wire::Msgpack,
        (None, _) => Wire::Json,
    };
    let mix = Arc::new(Mix::new(&MixOptions {
        wire,
        headers: options.headers.clone(),
        body_bytes: options.body_bytes,
        headers_before_body: options.headers_first,
        admin_blocked: options.expect == Expect::Security,
        loop_every: options.loop_every,
    }));
    let measure_from = Instant::now() + Duration::from_secs_f64(options.warmup);
    let plan = Plan {
        measure_from,
        measure_until: measure_from + Duration::from_secs_f64(options.seconds),
        pace: match options.rate {
            None => Pace::Closed { in_flight: options.in_flight },
            Some(rate) => Pace::Open { interval: Duration::from_secs_f64(options.connections as f64 / rate) },
        },
    };
    let requests = (0..options.connections).map(|connection| Requests::new(wire, Arc::clone(&mix), plan.clone(), connection)).collect();

    let watcher = {
        let plan = plan.clone();
        let pid = options.pid;
        thread::spawn(move || watch(&plan, pid))
    };
    let writes = if options.write_each { Writes::Each } else { Writes::Together };
    let finished = match (&options.grpc_address, &options.socket) {
        (Some(address), _) => grpc::run(*address, requests, &plan, writes)?,
        (None, Some(path)) => socket::run(path, wire, requests, &plan, writes)?,
        (None, None) => return Err("no agent given: use `--socket` or `--grpc-address`".to_owned()),
    };
    let watched = watcher.join().map_err(|_| "the measuring thread panicked".to_owned())??;

    let mut tally = Tally::new();
    for requests in &finished {
        tally.add(&requests.tally);
    }
    if tally.answers == 0 {
        return Err("no answers received".to_owned());
    }
    Ok(report(options, wire, &tally, &watched))
}

/// Rejects options that would make the load unbounded.
fn check(options: &RunOptions) -> Result<(), String> {
    if !(1..=1024).contains(&options.connections) {
        return Err("`--connections` must be 1 to 1024".to_owned());
    }
    if !(1..=MAX_SLOTS).contains(&options.in_flight) {
        return Err(format!("`--in-flight` must be 1 to {MAX_SLOTS}"));
    }
    if options.headers.is_empty() || options.headers.iter().any(|&count| count > 10_000) {
        return Err("`--headers` must be numbers up to 10000".to_owned());
    }
    if options.body_bytes.is_some_and(|bytes| bytes > 8 << 20) {
        return Err("`--body-bytes` must be at most 8 MiB".to_owned());
    }
    if !(0.01..=3600.0).contains(&options.seconds) || !(0.0..=60.0).contains(&options.warmup) {
        return Err("`--seconds` must be 0.01 to 3600 and `--warmup` 0 to 60".to_owned());
    }
    if options.rate.is_some_and(|rate| !(0.1..=1e6).contains(&rate)) {
        return Err("`--rate` must be 0.1 to 1000000".to_owned());
    }
    Ok(())
}

/// Resource usage during the measuring window.
struct Watched {
    seconds: f64,
    agent: Option<(Duration, process::Memory)>,
    generator: Duration,
}

fn watch(plan: &Plan, pid: Option<u32>) -> Result<Watched, String> {
    let own = std::process::id();
    let agent = || pid.map(process::cpu_time).transpose();
    thread::sleep(plan.measure_from.saturating_duration_since(Instant::now()));
    let from = Instant::now();
    let (agent_from, own_from) = (agent()?, process::cpu_time(own)?);
    thread::sleep(plan.measure_until.saturating_duration_since(Instant::now()));
    let seconds = from.elapsed().as_secs_f64();
    let (agent_until, own_until) = (agent()?, process::cpu_time(own)?);
    let agent = match (pid, agent_from, agent_until) {
        (Some(pid), Some(from), Some(until)) => Some((until - from, process::memory(pid)?)),
        _ => None,
    };
    Ok(Watched { seconds, agent, generator: own_until - own_from })
}

fn report(options: &RunOptions, wire: Wire, tally: &Tally, watched: &Watched) -> (Value, bool) {
    let each = |time: Duration| time.as_secs_f64() * 1e6 / tally.answers as f64;
    let right = tally.wrong_decisions == 0 && tally.unknown_ids == 0 && tally.lost == 0;
    let report = json!({
        "wire": format!("{wire:?}").to_lowercase(),
        "connections": options.connections,
        "in_flight": options.rate.is_none().then_some(options.in_flight),
        "rate": options.rate,
        "headers": options.headers,
        "body_bytes": options.body_bytes,
        "seconds": watched.seconds,
        "answers": tally.answers,
        "answers_per_second": tally.answers as f64 / watched.seconds,
        "latency_us": percentiles(&tally.latency),
        "looping_latency_us": percentiles(&tally.looping),
        "agent": watched.agent.map(|(cpu, memory)| json!({
            "cpu_us_per_answer": each(cpu),
            "cores": cpu.as_secs_f64() / watched.seconds,
            "memory": memory,
        })),
        "generator": {
            "cpu_us_per_answer": each(watched.generator),
            "cores": watched.generator.as_secs_f64() / watched.seconds,
        },
        "wrong_decisions": tally.wrong_decisions,
        "unknown_ids": tally.unknown_ids,
        "lost": tally.lost,
        "not_sent": tally.not_sent,
        "first_wrong": tally.first_wrong,
    });
    (report, right)
}

fn percentiles(nanoseconds: &Histogram<u64>) -> Option<Value> {
    if nanoseconds.is_empty() {
        return None;
    }
    let at = |quantile| nanoseconds.value_at_quantile(quantile) as f64 / 1e3;
    Some(json!({
        "p50": at(0.5),
        "p90": at(0.9),
        "p99": at(0.99),
        "p999": at(0.999),
        "max": nanoseconds.max() as f64 / 1e3,
        "mean": nanoseconds.mean() / 1e3,
    }))
}
