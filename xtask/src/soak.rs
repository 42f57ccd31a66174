//! `cargo xtask soak`: hours of trouble in a minute. Agents with a leaking, a looping, a panicking and a good module, under load and reloaded
//! again and again, must stay as they were: memory, file descriptors, threads, answers. All of the trouble must have come about: stopped misbehaviour
//! and reloads that succeeded.

use crate::tools::say;
use crate::{cargo, table};
use anyhow::{Context, Result, anyhow, bail, ensure};
use std::fs;
use std::io::{BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use testkit::{Connection, Program, Signal, frame, kind, module, read_frame};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Requests in all
    #[arg(long, default_value_t = 1_000_000)]
    requests: u64,
    /// Requests a second to each agent
    #[arg(long, default_value_t = 4000)]
    rate: u64,
}

/// As many as a proxy opens.
const CONNECTIONS: u64 = 4;

/// Time between two bursts on a connection.
const BEAT: Duration = Duration::from_millis(2);

/// Time between two reloads of an agent.
const RELOAD: Duration = Duration::from_secs(5);

/// Time between two looks at the agents.
const LOOK: Duration = Duration::from_millis(250);

/// Points of the resident memory's curve.
const CURVE: usize = 8;

/// Memory that may come and go without being a leak, in bytes: allocators and page caches breathe.
const BREATHING: u64 = 16 << 20;

/// One answer in so many may be late: a busy machine now and then keeps an agent waiting beyond its deadline of 40 ms. More would hide that no
/// instance is free, or that good calls do not end.
const LATE: u64 = 1000;

/// What takes longer than this will not come: an answer, the end of a reload. Ten seconds of it are how long the agent keeps threads without work.
const PATIENCE: Duration = Duration::from_secs(30);

/// A module and how it misbehaves.
struct Subject {
    name: &'static str,
    /// Its file in `fixtures/hostile`; the good one is never asked to misbehave.
    fixture: &'static str,
    /// One request in so many makes it misbehave; none with 0.
    one_in: u64,
    /// Codes of the module errors that may come of it.
    codes: &'static [&'static str],
    /// Misbehaviours that may be answered well between two reloads. One more must be stopped.
    harmless: u64,
}

/// One looping request in a thousand keeps one of the four instances busy for a sixth of the time at the usual rate. Each of them has room for 15
/// leaks of 4 MB.
const SUBJECTS: [Subject; 4] = [
    Subject { name: "good", fixture: "trap-unreachable", one_in: 0, codes: &[], harmless: 0 },
    Subject { name: "leaking", fixture: "grow-memory-leaking", one_in: 200, codes: &["WASM_MEMORY_LIMIT"], harmless: 4 * 15 },
    Subject { name: "looping", fixture: "loop", one_in: 1000, codes: &["WASM_TIMEOUT"], harmless: 0 },
    Subject { name: "panicking", fixture: "trap-unreachable", one_in: 100, codes: &["WASM_TRAP"], harmless: 0 },
];

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

struct Agent {
    subject: &'static Subject,
    process: testkit::Agent,
    module: PathBuf,
    /// The agent before it was asked anything.
    idle: Sample,
    /// The module, and the same module with another digest.
    versions: [Vec<u8>; 2],
}

impl Agent {
    fn start(program: &Path, subject: &'static Subject) -> Result<Self> {
        let home = TempDir::new()?;
        let bytes = module::encode(&module::hostile(subject.fixture));
        // A custom section changes nothing but the digest.
        let other = [bytes.as_slice(), b"\0\x05\x04soak"].concat();
        let module = home.path().join("module.wasm");
        fs::write(&module, &bytes)?;
        let cache = home.path().join("cache");
        let process = Program(program).launch_in(home, "agent.sock", &module, |command| {
            command.arg("--cache-dir").arg(cache).args(["--admin-address", "127.0.0.1:0"]);
        });
        process.log.wait_for_line("serving the socket", |line| line.contains("serving the socket"));
        let mut agent = Self { subject, process, module, idle: Sample::default(), versions: [bytes, other] };
        // Once its socket answers, everything that it keeps is there.
        drop(Connection::try_open(&agent.process.socket)?);
        thread::sleep(LOOK);
        agent.idle = agent.sample()?;
        Ok(agent)
    }

    fn reload(&self, number: usize) -> Result<()> {
        let next = self.module.with_extension("next");
        fs::write(&next, &self.versions[number % 2])?;
        fs::rename(next, &self.module)?;
        self.process.signal(Signal::HUP);
        Ok(())
    }

    /// Reloads with this result, as the agent counts them.
    fn reloads(&self, result: &str) -> u64 {
        self.process.admin().metric(&format!(r#"wasm_agent_reloads_total{{result="{result}"}}"#)) as u64
    }

    /// Waits until every reload asked for has succeeded, and until the agent has no more files and threads than before the load. The only slack are one
    /// or two threads that have read and compiled the module at the start: they count before the load, and end some seconds later.
    fn settle(&self, asked: usize) -> Result<()> {
        ensure!(asked > 0, "no reload was asked for");
        let deadline = Instant::now() + PATIENCE;
        loop {
            // Before the metrics are asked for: that takes a file.
            let now = self.sample()?;
            let (succeeded, failed) = (self.reloads("success"), self.reloads("failure"));
            let problem = if failed > 0 || succeeded != asked as u64 {
                format!("{asked} reloads were asked for, {succeeded} succeeded and {failed} failed")
            } else if now.files > self.idle.files {
                format!("{} file descriptors before the load and {} after it", self.idle.files, now.files)
            } else if now.threads > self.idle.threads {
                format!("{} threads before the load and {} after it", self.idle.threads, now.threads)
            } else {
                return Ok(());
            };
            ensure!(Instant::now() < deadline, "{problem}");
            thread::sleep(LOOK);
        }
    }

    fn sample(&self) -> Result<Sample> {
        let count = |what| -> Result<u64> {
            let folder = format!("/proc/{}/{what}", self.process.pid().as_raw_nonzero());
            Ok(fs::read_dir(folder).context("the agent is gone")?.count() as u64)
        };
        Ok(Sample { resident: self.process.resident(), files: count("fd")?, threads: count("task")? })
    }

    fn end(mut self) -> Result<()> {
        self.process.signal(Signal::TERM);
        let status = self.process.wait();
        ensure!(status.success(), "the agent ended with {status}");
        ensure!(!self.process.log.whole().contains("panicked"), "the agent has panicked");
        Ok(())
    }
}

#[derive(Clone, Copy, Default)]
struct Sample {
    resident: u64,
    files: u64,
    threads: u64,
}

/// What became of the requests to one agent.
#[derive(Default)]
struct Outcome {
    answers: u64,
    misbehaved: u64,
    /// Misbehaviours that ended as they should.
    stopped: u64,
    /// Requests that found no instance in time, or did not end in time because the machine was busy.
    late: u64,
    wrong: Vec<String>,
    /// Reloads asked for.
    reloads: usize,
    /// Microseconds, of good requests.
    latencies: Vec<u32>,
    samples: Vec<Sample>,
}

impl Outcome {
    fn add(&mut self, part: Self) {
        self.answers += part.answers;
        self.misbehaved += part.misbehaved;
        self.stopped += part.stopped;
        self.late += part.late;
        self.wrong.extend(part.wrong);
        self.latencies.extend(part.latencies);
    }

    fn percentile(&self, percent: usize) -> u32 {
        let mut sorted = self.latencies.clone();
        sorted.sort_unstable();
        sorted.get((sorted.len() * percent / 100).min(sorted.len().saturating_sub(1))).copied().unwrap_or(0)
    }

    fn curve(&self) -> Vec<Sample> {
        let step = self.samples.len().div_ceil(CURVE).max(1);
        self.samples.iter().step_by(step).chain(self.samples.last()).copied().collect()
    }

    fn judge_answers(&self, name: &str, requests: u64, problems: &mut Vec<String>) {
        if self.answers != requests {
            problems.push(format!("{name}: {} answers to {requests} requests", self.answers));
        }
        if let Some(wrong) = self.wrong.first() {
            problems.push(format!("{name}: {} wrong answers, the first: {wrong}", self.wrong.len()));
        }
        if self.late > requests / LATE {
            problems.push(format!("{name}: {} answers were late, more than one in {LATE}", self.late));
        }
        if self.latencies.is_empty() {
            problems.push(format!("{name}: no good request was answered well"));
        }
    }

    fn judge(&self, subject: &Subject, problems: &mut Vec<String>) {
        let name = subject.name;
        if self.stopped == 0 && !subject.codes.is_empty() {
            let codes = subject.codes.join(" or ");
            // With more than this, there were too many between two of the reloads at least.
            if self.misbehaved > subject.harmless * (self.reloads as u64 + 1) {
                problems.push(format!("{name}: {} misbehaviours and no {codes}", self.misbehaved));
            } else {
                println!("{name}: the run was too short for {codes}, which was not tried");
            }
        }
        // The beginning is left out: there every instance and buffer is used for the first time.
        let settled = &self.samples[self.samples.len() / 4..];
        let (early, late) = settled.split_at(settled.len() / 2);
        let highest = |samples: &[Sample], value: fn(&Sample) -> u64| samples.iter().map(value).max().unwrap_or(0);
        let grows = |value: fn(&Sample) -> u64, slack: u64| highest(late, value) > highest(early, value) + slack;
        for (what, grows) in [
            ("resident memory", grows(|sample| sample.resident, BREATHING)),
            // A reload has the module's file open, and a thread that compiles.
            ("file descriptors", grows(|sample| sample.files, 2)),
            ("threads", grows(|sample| sample.threads, 4)),
        ] {
            if grows {
                problems.push(format!("{name}: {what} keep growing"));
            }
        }
    }
}

/// Sends `requests` to every agent at `rate`, and looks at the agents meanwhile.
fn load(agents: &[Agent], requests: u64, rate: u64, trouble: bool) -> Result<Vec<Outcome>> {
    let done = AtomicBool::new(false);
    let done = &done;
    thread::scope(|scope| {
        let clients: Vec<Vec<_>> = agents
            .iter()
            .map(|agent| {
                let client = |connection| {
                    let mine = requests / CONNECTIONS + u64::from(connection < requests % CONNECTIONS);
                    scope.spawn(move || {
                        client(agent, connection, mine, rate, trouble).with_context(|| format!("asking the {} module", agent.subject.name))
                    })
                };
                (0..CONNECTIONS).map(client).collect()
            })
            .collect();
        let watcher = scope.spawn(move || watch(agents, trouble, done));
        let parts: Vec<Vec<_>> = clients.into_iter().map(|clients| clients.into_iter().map(ScopedJoinHandle::join).collect()).collect();
        done.store(true, Relaxed);
        let mut outcomes = watcher.join().map_err(|_| anyhow!("the watcher has panicked"))??;
        for (outcome, parts) in outcomes.iter_mut().zip(parts) {
            for part in parts {
                outcome.add(part.map_err(|_| anyhow!("a client has panicked"))??);
            }
        }
        Ok(outcomes)
    })
}

/// Looks at the agents until all is done, and reloads them meanwhile.
fn watch(agents: &[Agent], trouble: bool, done: &AtomicBool) -> Result<Vec<Outcome>> {
    let mut outcomes: Vec<_> = agents.iter().map(|_| Outcome::default()).collect();
    // The first at once: a short run has one too.
    let mut next_reload = Instant::now();
    while !done.load(Relaxed) {
        let reloads = trouble && Instant::now() >= next_reload;
        if reloads {
            next_reload = Instant::now() + RELOAD;
        }
        for (agent, outcome) in agents.iter().zip(&mut outcomes) {
            outcome.samples.push(agent.sample()?);
            if reloads {
                outcome.reloads += 1;
                agent.reload(outcome.reloads)?;
            }
        }
        thread::sleep(LOOK);
    }
    Ok(outcomes)
}

/// One connection: a thread that sends at its rate, and one that takes what comes back. An id tells what was asked and when.
fn client(agent: &Agent, connection: u64, requests: u64, rate: u64, trouble: bool) -> Result<Outcome> {
    let stream = Connection::try_open(&agent.process.socket)?.into_stream();
    let subject = agent.subject;
    let started = Instant::now();
    let mut writer = stream.try_clone()?;
    thread::scope(|scope| {
        let sender = scope.spawn(move || -> Result<()> {
            let mut sent = 0;
            while sent < requests {
                let due = (started.elapsed().as_secs_f64() * rate as f64 / CONNECTIONS as f64) as u64;
                let mut burst = Vec::new();
                while sent < due.min(requests) {
                    // Not all connections at once.
                    let bad =
                        trouble && subject.one_in > 0 && (sent + connection * subject.one_in / CONNECTIONS).is_multiple_of(subject.one_in);
                    append(&mut burst, bad, sent, started.elapsed());
                    sent += 1;
                }
                writer.write_all(&burst)?;
                thread::sleep(BEAT);
            }
            Ok(())
        });
        let outcome = receive(BufReader::new(stream), subject, requests, started);
        sender.join().map_err(|_| anyhow!("the sender has panicked"))??;
        outcome
    })
}

fn append(out: &mut Vec<u8>, bad: bool, number: u64, now: Duration) {
    let (method, letter) = if bad { ("EVIL", 'b') } else { ("GET", 'g') };
    let event = format!(
        r#"{{"metadata":{{"correlation_id":"{letter}-{number}-{}","client_ip":"192.0.2.1:1"}},"method":"{method}","uri":"/api/users?page=1","headers":{{"host":["example.org"],"user-agent":["soak"],"accept":["*/*"]}}}}"#,
        now.as_micros()
    );
    out.extend(frame(kind::REQUEST_HEADERS, event.as_bytes()));
}

fn receive(mut stream: impl Read, subject: &Subject, requests: u64, started: Instant) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    let mut seen = vec![false; requests as usize];
    while outcome.answers < requests {
        let (kind, payload) = read_frame(&mut stream)?.context("an answer is missing")?;
        if kind != kind::AGENT_RESPONSE {
            continue;
        }
        let now = started.elapsed().as_micros() as u64;
        outcome.answers += 1;
        let text = String::from_utf8_lossy(&payload);
        let (_, id) = text.split_once(r#""correlation_id":""#).context("an answer without an id")?;
        let mut parts = id.split(['-', '"']);
        let bad = parts.next() == Some("b");
        let number: usize = parts.next().and_then(|number| number.parse().ok()).context("an id that was never sent")?;
        let sent: u64 = parts.next().and_then(|sent| sent.parse().ok()).context("an id that was never sent")?;
        let twice = seen.get_mut(number).is_none_or(|seen| std::mem::replace(seen, true));
        let good = text.contains(r#""decision":"allow""#) && text.contains(r#""tags":["good"]"#);
        let failed = |code: &str| text.contains(r#""status":500"#) && text.contains(r#""tags":["wasm-error"]"#) && text.contains(code);
        let expected = bad && subject.codes.iter().any(|code| failed(code));
        let right = if expected {
            outcome.stopped += 1;
            true
        } else if failed("WASM_OVERLOADED") || failed("WASM_TIMEOUT") {
            // The documented answer, when the machine is too busy for the deadline.
            outcome.late += 1;
            true
        } else {
            good && (!bad || subject.harmless > 0)
        };
        if bad {
            outcome.misbehaved += 1;
        } else if good {
            outcome.latencies.push(u32::try_from(now.saturating_sub(sent)).unwrap_or(u32::MAX));
        }
        if twice || !right {
            outcome.wrong.push(text.chars().take(300).collect());
        }
    }
    Ok(outcome)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(subject: &Subject, outcome: &Outcome) -> String {
        let mut problems = Vec::new();
        outcome.judge_answers(subject.name, 1000, &mut problems);
        outcome.judge(subject, &mut problems);
        problems.join("; ")
    }

    fn outcome(misbehaved: u64, stopped: u64) -> Outcome {
        Outcome { answers: 1000, misbehaved, stopped, latencies: vec![100], ..Outcome::default() }
    }

    #[test]
    fn answers_that_are_all_late_are_a_problem() {
        let [good, ..] = &SUBJECTS;
        assert_eq!(problems(good, &Outcome { late: 1, ..outcome(0, 0) }), "");
        let all = Outcome { late: 1000, latencies: Vec::new(), ..outcome(0, 0) };
        let expected = "good: 1000 answers were late, more than one in 1000; good: no good request was answered well";
        assert_eq!(problems(good, &all), expected);
    }

    #[test]
    fn misbehaviour_that_is_never_stopped_is_a_problem() {
        let [_, leaking, looping, panicking] = &SUBJECTS;
        for subject in [looping, panicking] {
            assert_eq!(problems(subject, &outcome(1, 1)), "");
            assert!(problems(subject, &outcome(1, 0)).contains("1 misbehaviours and no WASM_"));
        }
        // A reload gives the memory back.
        assert_eq!(problems(leaking, &Outcome { reloads: 1, ..outcome(120, 0) }), "");
        assert!(problems(leaking, &Outcome { reloads: 1, ..outcome(121, 0) }).contains("no WASM_MEMORY_LIMIT"));
    }
}
