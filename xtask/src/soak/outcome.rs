//! The results of a soak for one agent, and the checks on them.

use super::agent::Usage;
use super::subject::Subject;

/// Points of the curve of resident memory.
const CURVE_POINTS: usize = 8;

/// Bytes by which resident memory may grow without a leak, because allocators and page caches vary.
const MEMORY_SLACK: u64 = 16 << 20;

/// One answer in this many may be late, because a busy machine sometimes delays an agent beyond its
/// deadline of 40 ms. A larger share would hide that no instance is free or that good calls hang.
const LATE_ONE_IN: u64 = 1000;

/// The results of the requests to one agent.
#[derive(Default)]
pub(super) struct Outcome {
    pub(super) answers: u64,
    pub(super) misbehaved: u64,
    /// Misbehaviours that ended with the expected reason code.
    pub(super) stopped: u64,
    /// Requests that had no instance in time, or exceeded the deadline because the machine was
    /// busy.
    pub(super) late: u64,
    pub(super) wrong: Vec<String>,
    /// Requested reloads.
    pub(super) reloads: usize,
    /// In microseconds, of good requests.
    pub(super) latencies: Vec<u32>,
    pub(super) samples: Vec<Usage>,
}

impl Outcome {
    pub(super) fn add(&mut self, part: Self) {
        self.answers += part.answers;
        self.misbehaved += part.misbehaved;
        self.stopped += part.stopped;
        self.late += part.late;
        self.wrong.extend(part.wrong);
        self.latencies.extend(part.latencies);
    }

    pub(super) fn percentile(&self, percent: usize) -> u32 {
        let mut sorted = self.latencies.clone();
        sorted.sort_unstable();
        sorted.get((sorted.len() * percent / 100).min(sorted.len().saturating_sub(1))).copied().unwrap_or(0)
    }

    pub(super) fn curve(&self) -> Vec<Usage> {
        let step = self.samples.len().div_ceil(CURVE_POINTS).max(1);
        self.samples.iter().step_by(step).chain(self.samples.last()).copied().collect()
    }

    pub(super) fn judge_answers(&self, name: &str, requests: u64, problems: &mut Vec<String>) {
        if self.answers != requests {
            problems.push(format!("{name}: {} answers to {requests} requests", self.answers));
        }
        if let Some(wrong) = self.wrong.first() {
            problems.push(format!("{name}: {} wrong answers, the first: {wrong}", self.wrong.len()));
        }
        if self.late > requests / LATE_ONE_IN {
            problems.push(format!("{name}: {} answers were late, more than one in {LATE_ONE_IN}", self.late));
        }
        if self.latencies.is_empty() {
            problems.push(format!("{name}: no good request was allowed"));
        }
    }

    pub(super) fn judge(&self, subject: &Subject, problems: &mut Vec<String>) {
        let name = subject.name;
        if self.stopped == 0 && !subject.codes.is_empty() {
            let codes = subject.codes.join(" or ");
            // With more than this, at least one interval between reloads had too many.
            if self.misbehaved > subject.harmless * (self.reloads as u64 + 1) {
                problems.push(format!("{name}: {} misbehaviours and no {codes}", self.misbehaved));
            } else {
                println!("{name}: the run was too short to reach {codes}");
            }
        }
        // Skips the beginning, when every instance and buffer is used for the first time.
        let settled = &self.samples[self.samples.len() / 4..];
        let (early, late) = settled.split_at(settled.len() / 2);
        let highest = |samples: &[Usage], value: fn(&Usage) -> u64| samples.iter().map(value).max().unwrap_or(0);
        let grows = |value: fn(&Usage) -> u64, slack: u64| highest(late, value) > highest(early, value) + slack;
        for (what, grows) in [
            ("resident memory", grows(|sample| sample.resident, MEMORY_SLACK)),
            // A reload opens the module's file and compiles in a thread.
            ("file descriptors", grows(|sample| sample.files, 2)),
            ("threads", grows(|sample| sample.threads, 4)),
        ] {
            if grows {
                problems.push(format!("{name}: {what} keep growing"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::subject::SUBJECTS;
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
    fn reports_too_many_late_answers() {
        let [good, ..] = &SUBJECTS;
        assert_eq!(problems(good, &Outcome { late: 1, ..outcome(0, 0) }), "");
        let all = Outcome { late: 1000, latencies: Vec::new(), ..outcome(0, 0) };
        let expected = "good: 1000 answers were late, more than one in 1000; good: no good request was allowed";
        assert_eq!(problems(good, &all), expected);
    }

    #[test]
    fn reports_misbehaviour_that_is_never_stopped() {
        let [_, leaking, looping, panicking] = &SUBJECTS;
        for subject in [looping, panicking] {
            assert_eq!(problems(subject, &outcome(1, 1)), "");
            assert!(problems(subject, &outcome(1, 0)).contains("1 misbehaviours and no WASM_"));
        }
        // A reload frees the leaked memory.
        assert_eq!(problems(leaking, &Outcome { reloads: 1, ..outcome(120, 0) }), "");
        assert!(problems(leaking, &Outcome { reloads: 1, ..outcome(121, 0) }).contains("no WASM_MEMORY_LIMIT"));
    }
}
