//! The report, as tables and as JSON.

use super::cases::{Bound, Case, Figure};
use crate::table::{render, shorten};
use serde_json::{Value, json};

/// Characters of a wrong answer to show: the decision and the beginning of the answer.
const WIDTH: usize = 120;

/// Medians of a contestant's rounds.
#[derive(Clone, Copy, Default)]
pub(crate) struct Measured {
    pub(crate) cpu_us: Option<f64>,
    pub(crate) p50_us: Option<f64>,
    pub(crate) p99_us: Option<f64>,
    pub(crate) per_second: Option<f64>,
    pub(crate) peak_kb: Option<f64>,
    pub(crate) resident_kb: Option<f64>,
    pub(crate) first_answer_ms: Option<f64>,
}

impl Measured {
    /// The median of each figure over the rounds, as the generator reported them.
    fn medians(rounds: &[Value]) -> Self {
        let median = |pointer: &str| {
            let mut values: Vec<f64> = rounds.iter().filter_map(|round| round.pointer(pointer)?.as_f64()).collect();
            values.sort_by(f64::total_cmp);
            values.get(values.len() / 2).copied()
        };
        Self {
            cpu_us: median("/agent/cpu_us_per_answer"),
            p50_us: median("/latency_us/p50"),
            p99_us: median("/latency_us/p99"),
            per_second: median("/answers_per_second"),
            peak_kb: median("/agent/memory/peak_resident_kb"),
            resident_kb: median("/memory/resident_kb"),
            first_answer_ms: median("/first_answer_ms/median"),
        }
    }

    fn figure(&self, figure: Figure) -> Option<f64> {
        match figure {
            Figure::Cpu => self.cpu_us,
            Figure::P50 => self.p50_us,
            Figure::P99 => self.p99_us,
            Figure::Throughput => self.per_second,
            Figure::ResidentMb => self.resident_kb.map(|kb| kb / 1024.0),
            Figure::FirstAnswerMs => self.first_answer_ms,
        }
    }
}

struct Line {
    group: &'static str,
    name: String,
    contestants: Vec<(&'static str, Measured, Vec<Value>)>,
    verdicts: Vec<Verdict>,
}

struct Verdict {
    text: String,
    measured: Option<f64>,
    met: bool,
}

pub(crate) struct Report {
    rounds: usize,
    seconds: f64,
    machine: Value,
    lines: Vec<Line>,
}

impl Report {
    pub(crate) fn new(rounds: usize, seconds: f64, machine: Value) -> Self {
        Self { rounds, seconds, machine, lines: Vec::new() }
    }

    pub(crate) fn add(&mut self, case: &Case, rounds: Vec<Vec<Value>>) {
        let contestants: Vec<_> = case
            .contestants
            .iter()
            .zip(rounds)
            .map(|(contestant, rounds)| (contestant.label, Measured::medians(&rounds), rounds))
            .collect();
        let ours = contestants.last().map(|last| last.1).unwrap_or_default();
        let other = base(&contestants);
        let verdicts = case.goals.iter().map(|goal| verdict(goal.figure, goal.bound, &ours, &other)).collect();
        self.lines.push(Line { group: case.group, name: case.name.clone(), contestants, verdicts });
    }

    /// Contestants with wrong or missing answers.
    pub(crate) fn wrong_answers(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        for line in &self.lines {
            for (label, _, rounds) in &line.contestants {
                let count: u64 = rounds
                    .iter()
                    .flat_map(|round| ["wrong_decisions", "unknown_ids", "lost"].map(|field| round[field].as_u64().unwrap_or(0)))
                    .sum();
                if count > 0 {
                    let first = rounds.iter().find_map(|round| round["first_wrong"].as_str()).unwrap_or("no answer");
                    wrong.push(format!("{}: {}, {label}: {count} ({})", line.group, line.name, shorten(first, WIDTH)));
                }
            }
        }
        wrong
    }

    pub(crate) fn json(&self) -> Value {
        let lines: Vec<Value> = self
            .lines
            .iter()
            .map(|line| {
                let contestants: serde_json::Map<_, _> = line
                    .contestants
                    .iter()
                    .map(|(label, measured, rounds)| {
                        let medians = json!({
                            "cpu_us": measured.cpu_us, "p50_us": measured.p50_us, "p99_us": measured.p99_us,
                            "per_second": measured.per_second, "peak_resident_kb": measured.peak_kb,
                            "resident_kb": measured.resident_kb, "first_answer_ms": measured.first_answer_ms,
                        });
                        ((*label).to_owned(), json!({ "medians": medians, "rounds": rounds }))
                    })
                    .collect();
                let targets: Vec<Value> = line
                    .verdicts
                    .iter()
                    .map(|verdict| json!({ "target": verdict.text, "measured": verdict.measured, "met": verdict.met }))
                    .collect();
                json!({ "group": line.group, "case": line.name, "contestants": contestants, "targets": targets })
            })
            .collect();
        json!({ "machine": self.machine, "rounds": self.rounds, "seconds": self.seconds, "cases": lines })
    }

    pub(crate) fn text(&self) -> String {
        let mut text = format!(
            "{}, {} cores, Linux {}, {}. Medians of {} rounds of {} s. CPU is the agent's processor time per answer.\n",
            self.machine["cpu"].as_str().unwrap_or_default(),
            self.machine["cores"],
            self.machine["kernel"].as_str().unwrap_or_default(),
            self.machine["rustc"].as_str().unwrap_or_default(),
            self.rounds,
            self.seconds,
        );
        for group in self.groups() {
            text.push_str(&format!("\n{group}\n\n"));
            text.push_str(&self.table(group));
        }
        let verdicts: Vec<Vec<String>> = self
            .lines
            .iter()
            .flat_map(|line| {
                line.verdicts.iter().map(|verdict| {
                    vec![
                        format!("{}: {}", line.group, line.name),
                        verdict.text.clone(),
                        verdict.measured.map_or("–".to_owned(), |measured| format!("{measured:.2}")),
                        if verdict.met { "met" } else { "missed" }.to_owned(),
                    ]
                })
            })
            .collect();
        if !verdicts.is_empty() {
            text.push_str("\ntargets\n\n");
            text.push_str(&render(&["case", "target", "measured", ""], &verdicts, 0));
        }
        text
    }

    fn groups(&self) -> Vec<&'static str> {
        let mut groups: Vec<_> = self.lines.iter().map(|line| line.group).collect();
        groups.dedup();
        groups
    }

    /// One row per contestant, with ratios to the first one that is not echo.
    fn table(&self, group: &str) -> String {
        let starts =
            self.lines.iter().any(|line| line.group == group && line.contestants.iter().any(|one| one.1.first_answer_ms.is_some()));
        let mut rows = Vec::new();
        for line in self.lines.iter().filter(|line| line.group == group) {
            let base = base(&line.contestants);
            for (index, (label, measured, _)) in line.contestants.iter().enumerate() {
                let name = if index == 0 { line.name.clone() } else { String::new() };
                let mut row = vec![name, (*label).to_owned()];
                if starts {
                    row.push(number(measured.first_answer_ms, 1));
                    row.push(number(measured.resident_kb.map(|kb| kb / 1024.0), 1));
                } else {
                    for figure in [Figure::Cpu, Figure::P50, Figure::P99, Figure::Throughput] {
                        let digits = if matches!(figure, Figure::Throughput) { 0 } else { 1 };
                        row.push(number(measured.figure(figure), digits));
                        row.push(match (measured.figure(figure), base.figure(figure)) {
                            (Some(own), Some(base)) if base > 0.0 => format!("{:.2}", own / base),
                            _ => String::new(),
                        });
                    }
                    row.push(number(measured.peak_kb.map(|kb| kb / 1024.0), 1));
                }
                rows.push(row);
            }
        }
        if starts {
            render(&["", "", "first answer ms", "resident MB"], &rows, 2)
        } else {
            render(&["", "", "CPU µs", "×", "p50 µs", "×", "p99 µs", "×", "answers/s", "×", "peak MB"], &rows, 9)
        }
    }
}

/// The baseline of ratios: the first contestant that is not echo.
fn base(contestants: &[(&'static str, Measured, Vec<Value>)]) -> Measured {
    contestants.iter().find(|one| one.0 != "echo").map(|one| one.1).unwrap_or_default()
}

fn number(value: Option<f64>, digits: usize) -> String {
    value.map_or("–".to_owned(), |value| format!("{value:.digits$}"))
}

fn verdict(figure: Figure, bound: Bound, ours: &Measured, other: &Measured) -> Verdict {
    let name = match figure {
        Figure::Cpu => "CPU",
        Figure::P50 => "p50",
        Figure::P99 => "p99",
        Figure::Throughput => "answers/s",
        Figure::ResidentMb => "resident memory",
        Figure::FirstAnswerMs => "first answer",
    };
    let own = ours.figure(figure);
    let both = own.zip(other.figure(figure));
    let (text, measured, met): (String, _, fn(f64, f64) -> bool) = match bound {
        Bound::RatioAtMost(limit) => {
            (format!("{name} at most {limit} ×"), both.map(|(own, other)| own / other), |value, limit| value <= limit)
        }
        Bound::RatioAtLeast(limit) => {
            (format!("{name} at least {limit} ×"), both.map(|(own, other)| own / other), |value, limit| value >= limit)
        }
        Bound::AddsAtMost(limit) => {
            (format!("{name} at most {limit} µs more"), both.map(|(own, other)| own - other), |value, limit| value <= limit)
        }
        Bound::AtMost(limit) => {
            let unit = if matches!(figure, Figure::ResidentMb) { "MB" } else { "ms" };
            (format!("{name} at most {limit} {unit}"), own, |value, limit| value <= limit)
        }
    };
    let limit = match bound {
        Bound::RatioAtMost(limit) | Bound::RatioAtLeast(limit) | Bound::AddsAtMost(limit) | Bound::AtMost(limit) => limit,
    };
    Verdict { text, measured, met: measured.is_some_and(|value| met(value, limit)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpu(cpu_us: f64) -> Measured {
        Measured { cpu_us: Some(cpu_us), ..Measured::default() }
    }

    #[test]
    fn compares_figures_with_bounds() {
        let met = verdict(Figure::Cpu, Bound::RatioAtMost(1.0), &cpu(9.0), &cpu(10.0));
        assert!(met.met && met.measured == Some(0.9), "{}", met.text);
        assert!(!verdict(Figure::Cpu, Bound::RatioAtLeast(1.0), &cpu(9.0), &cpu(10.0)).met);
        assert!(verdict(Figure::Cpu, Bound::AddsAtMost(20.0), &cpu(19.0), &cpu(10.0)).met);
    }

    #[test]
    fn a_missing_figure_misses_its_bound() {
        assert!(!verdict(Figure::P50, Bound::RatioAtMost(1.0), &cpu(9.0), &cpu(10.0)).met);
    }
}
