//! What the agent logs.

use std::io::{BufRead, BufReader, Read};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Instant;

use serde_json::Value;

use crate::PATIENCE;

/// What a process has written to standard error so far, by lines. A thread reads it.
#[derive(Clone, Default)]
pub struct Log(Arc<(Mutex<LogState>, Condvar)>);

#[derive(Default)]
struct LogState {
    lines: Vec<String>,
    ended: bool,
}

impl Log {
    pub(crate) fn follow(source: impl Read + Send + 'static) -> Self {
        let log = Self::default();
        let writer = log.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(source).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).into_owned();
                writer.0.0.lock().unwrap().lines.push(line);
                writer.0.1.notify_all();
            }
            writer.0.0.lock().unwrap().ended = true;
            writer.0.1.notify_all();
        });
        log
    }

    /// The lines so far.
    pub fn lines(&self) -> Vec<String> {
        self.0.0.lock().unwrap().lines.clone()
    }

    /// The lines so far that are JSON.
    pub fn entries(&self) -> Vec<Value> {
        self.lines().iter().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Waits until the agent says that it serves its socket.
    #[track_caller]
    pub fn wait_until_serving(&self) {
        self.wait_for_line("serving the socket", |line| line.contains("serving the socket"));
    }

    /// Waits for a line for which `wanted` returns true, and returns it.
    #[track_caller]
    pub fn wait_for_line(&self, what: &str, wanted: impl Fn(&str) -> bool) -> String {
        let deadline = Instant::now() + PATIENCE;
        let mut state = self.0.0.lock().unwrap();
        loop {
            if let Some(line) = state.lines.iter().find(|line| wanted(line)) {
                return line.clone();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero() && !state.ended, "no log line: {what}\n{}", state.lines.join("\n"));
            state = self.0.1.wait_timeout(state, left).unwrap().0;
        }
    }

    /// Waits for a JSON line for which `wanted` returns true, and returns it.
    #[track_caller]
    pub fn wait_for_entry(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let line = self.wait_for_line(what, |line| serde_json::from_str(line).is_ok_and(|entry| wanted(&entry)));
        serde_json::from_str(&line).unwrap()
    }

    /// Waits until the process has closed standard error, and returns all that it wrote there.
    #[track_caller]
    pub fn whole(&self) -> String {
        let deadline = Instant::now() + PATIENCE;
        let mut state = self.0.0.lock().unwrap();
        while !state.ended {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "the agent has not closed its standard error");
            state = self.0.1.wait_timeout(state, left).unwrap().0;
        }
        state.lines.join("\n")
    }
}
