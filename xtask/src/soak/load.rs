//! The load of a soak, and the reloads during it.

use super::agent::{SAMPLE_INTERVAL, SoakedAgent};
use super::outcome::Outcome;
use super::subject::Subject;
use anyhow::{Context, Result, anyhow};
use std::io::{BufReader, Read, Write};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};
use testkit::{Connection, frame, kind, read_frame};

/// As many connections as a proxy opens.
const CONNECTIONS: u64 = 4;

/// Time between two bursts on a connection.
const BURST_INTERVAL: Duration = Duration::from_millis(2);

/// Time between two reloads of an agent.
const RELOAD_INTERVAL: Duration = Duration::from_secs(5);

/// Sends `requests` to every agent at `rate`, and samples the agents' usage meanwhile.
pub(super) fn load(agents: &[SoakedAgent], requests: u64, rate: u64, misbehave: bool) -> Result<Vec<Outcome>> {
    let done = AtomicBool::new(false);
    let done = &done;
    thread::scope(|scope| {
        let clients: Vec<Vec<_>> = agents
            .iter()
            .map(|agent| {
                let client = |connection| {
                    let mine = requests / CONNECTIONS + u64::from(connection < requests % CONNECTIONS);
                    scope.spawn(move || {
                        client(agent, connection, mine, rate, misbehave)
                            .with_context(|| format!("cannot send requests to the {} module", agent.subject.name))
                    })
                };
                (0..CONNECTIONS).map(client).collect()
            })
            .collect();
        let watcher = scope.spawn(move || watch(agents, misbehave, done));
        let parts: Vec<Vec<_>> = clients.into_iter().map(|clients| clients.into_iter().map(ScopedJoinHandle::join).collect()).collect();
        done.store(true, Relaxed);
        let mut outcomes = watcher.join().map_err(|_| anyhow!("the watcher panicked"))??;
        for (outcome, parts) in outcomes.iter_mut().zip(parts) {
            for part in parts {
                outcome.add(part.map_err(|_| anyhow!("a client panicked"))??);
            }
        }
        Ok(outcomes)
    })
}

/// Samples the agents' usage until `done`, and reloads them meanwhile.
fn watch(agents: &[SoakedAgent], misbehave: bool, done: &AtomicBool) -> Result<Vec<Outcome>> {
    let mut outcomes: Vec<_> = agents.iter().map(|_| Outcome::default()).collect();
    // The first one is immediate, so a short run has one too.
    let mut next_reload = Instant::now();
    while !done.load(Relaxed) {
        let reloads = misbehave && Instant::now() >= next_reload;
        if reloads {
            next_reload = Instant::now() + RELOAD_INTERVAL;
        }
        for (agent, outcome) in agents.iter().zip(&mut outcomes) {
            outcome.samples.push(agent.sample()?);
            if reloads {
                outcome.reloads += 1;
                agent.reload(outcome.reloads)?;
            }
        }
        thread::sleep(SAMPLE_INTERVAL);
    }
    Ok(outcomes)
}

/// One connection, with a thread that sends at `rate` and one that reads the answers. The
/// correlation id contains what was sent and when.
fn client(agent: &SoakedAgent, connection: u64, requests: u64, rate: u64, misbehave: bool) -> Result<Outcome> {
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
                    // The offset keeps connections from misbehaving at the same time.
                    let bad = misbehave
                        && subject.one_in > 0
                        && (sent + connection * subject.one_in / CONNECTIONS).is_multiple_of(subject.one_in);
                    append(&mut burst, bad, sent, started.elapsed());
                    sent += 1;
                }
                writer.write_all(&burst)?;
                thread::sleep(BURST_INTERVAL);
            }
            Ok(())
        });
        let outcome = receive(BufReader::new(stream), subject, requests, started);
        sender.join().map_err(|_| anyhow!("the sender panicked"))??;
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
        let (kind, payload) = read_frame(&mut stream)?.context("the agent closed the connection before its last answer")?;
        if kind != kind::AGENT_RESPONSE {
            continue;
        }
        let now = started.elapsed().as_micros() as u64;
        outcome.answers += 1;
        let text = String::from_utf8_lossy(&payload);
        let (_, id) = text.split_once(r#""correlation_id":""#).context("the answer has no correlation id")?;
        let mut parts = id.split(['-', '"']);
        let bad = parts.next() == Some("b");
        let number: usize = parts.next().and_then(|number| number.parse().ok()).context("the answer has an unknown correlation id")?;
        let sent: u64 = parts.next().and_then(|sent| sent.parse().ok()).context("the answer has an unknown correlation id")?;
        let twice = seen.get_mut(number).is_none_or(|seen| std::mem::replace(seen, true));
        let good = text.contains(r#""decision":"allow""#) && text.contains(r#""tags":["good"]"#);
        let failed = |code: &str| text.contains(r#""status":500"#) && text.contains(r#""tags":["wasm-error"]"#) && text.contains(code);
        let expected = bad && subject.codes.iter().any(|code| failed(code));
        let right = if expected {
            outcome.stopped += 1;
            true
        } else if failed("WASM_OVERLOADED") || failed("WASM_TIMEOUT") {
            // The documented answer if the machine is too busy to meet the deadline.
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
