//! Measures the time from an agent's start to its first answer.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::answers::{Answers, Frame};
use crate::decision::Decided;
use crate::events::first_event;
use crate::process;
use crate::socket;
use crate::wire::Wire;

/// Between two attempts to connect: short compared with the measured time, and long enough to leave
/// the core to the agent.
const RETRY: Duration = Duration::from_micros(200);
const START_TIMEOUT: Duration = Duration::from_secs(60);
const STOP_TIMEOUT: Duration = Duration::from_secs(15);

/// Starts `command` `runs` times; reports the time to the first answer and the memory used then.
pub(crate) fn measure(socket: &Path, runs: usize, command: &[String]) -> Result<Value, String> {
    let mut milliseconds = Vec::with_capacity(runs);
    let mut memory = None;
    for _ in 0..runs {
        let started = Instant::now();
        let mut child = Command::new(&command[0])
            .args(&command[1..])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| format!("cannot start `{}`: {error}", command[0]))?;
        let answered = first_answer(socket, started, &mut child).and_then(|()| {
            let elapsed = started.elapsed();
            process::memory(child.id()).map(|memory| (elapsed, memory))
        });
        stop(&mut child)?;
        let (elapsed, used) = answered?;
        milliseconds.push(elapsed.as_secs_f64() * 1e3);
        memory = Some(used);
    }
    milliseconds.sort_by(f64::total_cmp);
    Ok(json!({
        "runs": runs,
        "first_answer_ms": {
            "min": milliseconds[0],
            "median": milliseconds[runs / 2],
            "max": milliseconds[runs - 1],
        },
        "memory": memory,
    }))
}

fn first_answer(path: &Path, started: Instant, child: &mut Child) -> Result<(), String> {
    while UnixStream::connect(path).is_err() {
        if started.elapsed() > START_TIMEOUT {
            return Err(format!("nothing listens on `{}`", path.display()));
        }
        if let Ok(Some(status)) = child.try_wait() {
            return Err(format!("the agent exited before it listened: {status}"));
        }
        thread::sleep(RETRY);
    }
    let mut stream = socket::connect(path, Wire::Json)?;
    let mut event = Vec::new();
    first_event(Wire::Json).write(1, &mut event);
    stream.write_all(&event).map_err(|error| format!("cannot write to the agent: {error}"))?;
    let mut answers = Answers::new(Wire::Json);
    let mut input = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let read = stream.read(&mut chunk).map_err(|error| format!("cannot read from the agent: {error}"))?;
        if read == 0 {
            return Err("the agent closed the connection".to_owned());
        }
        input.extend_from_slice(&chunk[..read]);
        while let Some(Frame { length, payload }) = answers.next_frame(&input)? {
            if let Some(payload) = payload
                && let Some((_, decided)) = answers.read(payload)?
            {
                return match decided {
                    Decided::Allow => Ok(()),
                    other => Err(format!("expected the first answer to allow, got {other:?}")),
                };
            }
            input.drain(..length);
        }
    }
}

fn stop(child: &mut Child) -> Result<(), String> {
    let pid = i32::try_from(child.id()).map_err(|error| error.to_string())?;
    kill(Pid::from_raw(pid), Signal::SIGTERM).map_err(|error| error.to_string())?;
    let signalled = Instant::now();
    while child.try_wait().map_err(|error| error.to_string())?.is_none() {
        if signalled.elapsed() > STOP_TIMEOUT {
            child.kill().map_err(|error| error.to_string())?;
            return Err(format!("the agent did not stop within {} s of SIGTERM", STOP_TIMEOUT.as_secs()));
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}
