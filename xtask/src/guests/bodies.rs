//! What it costs a module to read a body and to replace it: `cargo xtask guests --bodies`.

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

/// Calls of each kind. The median of an odd number is one of them.
const CALLS: usize = 15;

/// What the bodies consist of: JSON, which must be escaped to stand within JSON, with a letter beyond ASCII.
const LINE: &str = "{\"name\": \"Ann Öster\", \"age\": 42}\n";

pub(super) fn run(agent: &Path, languages: &[Language]) -> Result<()> {
    let mut rows = Vec::new();
    for language in languages.iter().filter(|language| language.has(Policy::TOUR)) {
        tools::say(&format!("{language}: building"));
        let guest = build::build(*language).with_context(|| format!("building the guests in {language}"))?;
        tools::say(&format!("{language}: measuring"));
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
        "The tour reads a chunk of a response's body and replaces it by the same and one byte more. A call is what the agent takes for it, from the\n\
         event's arrival to its answer: the median of {CALLS}, with one instance and no other load. Per KiB: of the larger."
    );
    Ok(())
}

/// Asks the tour for bodies of the largest size, with the long deadline of [`Serving`]: a module whose
/// time grows with the size keeps it on the busiest machine, and one whose time grows with the square
/// of the size cannot.
pub(super) fn ask(agent: &Path, tour: &Path) -> Result<Tally> {
    let mut serving = Serving::start(agent, tour, &["--pool-size", "1"])?;
    let mut tally = Tally::default();
    for bytes in [false, true] {
        let answer = serving.connection.try_ask(kind::RESPONSE_BODY, &event(SIZES[1], bytes))?;
        let replaced = answer["response_body_mutation"].is_object();
        if !replaced {
            println!("tour: a body of {} bytes: the agent answered {}", SIZES[1], answer["audit"]);
        }
        tally += Tally::of(replaced);
    }
    serving.stop();
    Ok(tally)
}

/// Seconds of a call.
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

/// A chunk of a body, not the last one.
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
    fn bodies_have_the_size_they_are_said_to_have() {
        for size in SIZES {
            for bytes in [false, true] {
                let event = event(size, bytes);
                assert_eq!(event["data"].as_str().unwrap().len(), size.div_ceil(3) * 4);
                assert_eq!(event["bytes_sent"], size);
            }
        }
    }
}
