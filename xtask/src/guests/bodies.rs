//! `cargo xtask guests --bodies`: measures how long modules take to read and replace a body.

use super::build::{self, Language};
use super::load::Durations;
use super::policy::Policy;
use super::serving::Serving;
use super::suite::Tally;
use crate::table::render;
use crate::tools;
use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use std::path::Path;
use testkit::{kind, response_body};

/// 1 MiB is the agent's default for `--max-body-bytes`.
const SIZES: [usize; 2] = [64 << 10, 1 << 20];

/// Calls of each kind; an odd number, so the median is one of them.
const CALLS: usize = 15;

/// A line of the bodies: JSON, because it must be escaped inside JSON, with a non-ASCII letter.
const LINE: &str = "{\"name\": \"Ann Öster\", \"age\": 42}\n";

pub(super) fn run(agent: &Path, languages: &[Language]) -> Result<()> {
    let mut rows = Vec::new();
    for language in languages.iter().filter(|language| language.has(Policy::TOUR)) {
        tools::announce(&format!("{language}: building"));
        let guest = build::build(*language).with_context(|| format!("building the guests in {language}"))?;
        tools::announce(&format!("{language}: measuring"));
        let mut row = vec![language.to_string()];
        for bytes in [false, true] {
            for size in SIZES {
                let median = median(agent, &guest.tour(), size, bytes)?;
                row.push(format!("{:.2}", median * 1e3));
                if size == SIZES[SIZES.len() - 1] {
                    row.push(format!("{:.1}", median * 1e6 / (size as f64 / 1024.0)));
                }
            }
        }
        rows.push(row);
    }
    let head = ["language", "text 64 KiB, ms", "1 MiB, ms", "µs per KiB", "bytes 64 KiB, ms", "1 MiB, ms", "µs per KiB"];
    println!("{}", render(&head, &rows, 6));
    println!(
        "The tour reads a chunk of a response's body and replaces it with the same bytes and one more. A call is the agent's time from the event's\n\
         arrival to its answer: the median of {CALLS}, with one instance and no other load. The time per KiB is that of the larger body."
    );
    Ok(())
}

/// Tests the tour with bodies of the largest size, with the long deadline of [`Serving`]. A module
/// whose time is linear in the size meets it even on a busy machine, and a quadratic one does not.
pub(super) fn test(agent: &Path, tour: &Path) -> Result<Tally> {
    let mut serving = Serving::start(agent, tour, &["--pool-size", "1"])?;
    let mut tally = Tally::default();
    for bytes in [false, true] {
        let answer = serving.connection.try_ask(kind::RESPONSE_BODY, &event(SIZES[1], bytes))?;
        let replaced = answer["response_body_mutation"].is_object();
        if !replaced {
            println!("tour: expected a replaced body of {} bytes, the agent answered {}", SIZES[1], answer["audit"]);
        }
        tally += Tally::of(replaced);
    }
    serving.stop();
    Ok(tally)
}

/// The median duration of a call, in seconds.
fn median(agent: &Path, module: &Path, size: usize, bytes: bool) -> Result<f64> {
    let mut serving = Serving::start(agent, module, &["--pool-size", "1"])?;
    let event = event(size, bytes);
    let mut calls = Vec::with_capacity(CALLS);
    for _ in 0..CALLS {
        let before = Durations::read(&serving, "on_response_body")?;
        let answer = serving.connection.try_ask(kind::RESPONSE_BODY, &event)?;
        let after = Durations::read(&serving, "on_response_body")?;
        let action = &answer["response_body_mutation"];
        ensure!(action.is_object(), "the module did not replace the body: {}", answer["audit"]);
        calls.push(after.sum - before.sum);
    }
    serving.stop();
    calls.sort_by(f64::total_cmp);
    Ok(calls[CALLS / 2])
}

/// An event with a chunk of a body that is not the last one.
fn event(size: usize, bytes: bool) -> Value {
    let mut body = LINE.repeat(size / LINE.len()).into_bytes();
    body.resize(size, b'.');
    if bytes {
        body[0] = 0xff;
    }
    let mut event = response_body("bodies", &body);
    event["is_last"] = Value::Bool(false);
    event["total_size"] = Value::Null;
    event
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_have_their_announced_size() {
        for size in SIZES {
            for bytes in [false, true] {
                let event = event(size, bytes);
                assert_eq!(event["data"].as_str().unwrap().len(), size.div_ceil(3) * 4);
                assert_eq!(event["bytes_sent"], size);
            }
        }
    }
}
