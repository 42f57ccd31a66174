//! What a soak has shown of an agent, and whether it is well.

use super::agent::Sample;
use super::subject::Subject;

/// Points of the resident memory's curve.
const CURVE: usize = 8;

/// Memory that may come and go without being a leak, in bytes: allocators and page caches breathe.
const BREATHING: u64 = 16 << 20;

/// One answer in so many may be late: a busy machine now and then keeps an agent waiting beyond its deadline of 40 ms. More would hide that no
/// instance is free, or that good calls do not end.
const LATE: u64 = 1000;

/// What became of the requests to one agent.
#[derive(Default)]
pub(super) struct Outcome {
    pub(super) answers: u64,
    pub(super) misbehaved: u64,
    /// Misbehaviours that ended as they should.
    pub(super) stopped: u64,
    /// Requests that found no instance in time, or did not end in time because the machine was busy.
    pub(super) late: u64,
    pub(super) wrong: Vec<String>,
    /// Reloads asked for.
    pub(super) reloads: usize,
    /// Microseconds, of good requests.
    pub(super) latencies: Vec<u32>,
    pub(super) samples: Vec<Sample>,
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

    pub(super) fn curve(&self) -> Vec<Sample> {
        let step = self.samples.len().div_ceil(CURVE).max(1);
        self.samples.iter().step_by(step).chain(self.samples.last()).copied().collect()
    }

    pub(super) fn judge_answers(&self, name: &str, requests: u64, problems: &mut Vec<String>) {
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

    pub(super) fn judge(&self, subject: &Subject, problems: &mut Vec<String>) {
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
