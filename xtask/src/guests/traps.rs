//! Tests what the agent logs of traps and timeouts, with `fixtures/traps`.

use super::build::{self, Language};
use super::serving::Serving;
use super::suite::Tally;
use crate::tools;
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::path::Path;
use testkit::kind;
use zentinel_wasm_e2e::wait;

/// Deadline of the calls, in milliseconds. A trap must not take as long on a busy machine.
const TIMEOUT_MS: &str = "2000";

/// Frames that the log must have, beginning with the innermost: the function, and the file with its
/// line if the language has debug information.
type Frames = &'static [(&'static str, &'static str)];

/// The frames of the trap and of the timeout.
fn expected(language: Language) -> (Frames, Frames) {
    match language {
        Language::Rust | Language::RustSdk => (
            &[("`expect<u8>`", "option.rs:"), ("`trap::item`", "trap.rs:13"), ("`on_request_headers`", "trap.rs:29")],
            &[("`trap::spin`", "trap.rs"), ("`on_response_headers`", "trap.rs:34")],
        ),
        Language::C => (
            &[("`item`", "trap.c:17"), ("`on_request_headers`", "trap.c:27")],
            &[("`spin`", "trap.c:23"), ("`on_response_headers`", "trap.c:")],
        ),
        Language::Cpp => (
            &[("`policy::List::item(int) const`", "trap.cpp:14"), ("`on_request_headers`", "trap.cpp:")],
            &[("`policy::spin(int)`", "trap.cpp:21"), ("`on_response_headers`", "trap.cpp:")],
        ),
        Language::Zig => (
            &[("`trap.item`", "trap.zig:15"), ("`trap.on_request_headers`", "trap.zig:28")],
            &[("`trap.spin`", "trap.zig"), ("`trap.on_response_headers`", "trap.zig:32")],
        ),
        // Go's linker writes no debug information for Wasm.
        Language::Go => (&[("`main.item`", ""), ("`main.onRequestHeaders`", "")], &[("`main.spin`", ""), ("`main.onResponseHeaders`", "")]),
        // Its debug information is a source map, a file of its own, and its optimizer inlines all.
        Language::AssemblyScript => (&[("`trap/on_request_headers`", "")], &[("`trap/on_response_headers`", "")]),
    }
}

/// Tests all of `languages`.
pub(super) fn run(agent: &Path, languages: &[Language]) -> Result<()> {
    let mut total = Tally::default();
    for language in languages.iter().filter(|language| **language != Language::RustSdk) {
        tools::announce(&format!("{language}: traps"));
        let module = build::traps(*language).with_context(|| format!("building `fixtures/traps` in {language}"))?;
        total += test(agent, &module, *language)?;
    }
    println!("{} passed, {} failed", total.passed, total.failed);
    if total.failed > 0 {
        bail!("the log does not name the functions of some traps");
    }
    Ok(())
}

/// Makes both hooks fail and looks for their functions in the agent's log.
pub(super) fn test(agent: &Path, module: &Path, language: Language) -> Result<Tally> {
    let mut serving = Serving::start_with(agent, module, &["--timeout-ms", TIMEOUT_MS])?;
    let (trap, timeout) = expected(language);
    serving.connection.try_ask(kind::REQUEST_HEADERS, &testkit::request("trap", "/"))?;
    serving.connection.try_ask(kind::RESPONSE_HEADERS, &testkit::response("timeout", 200))?;
    let mut tally = Tally::default();
    let cases = [("trap", "WASM_TRAP", "", trap), ("timeout", "WASM_TIMEOUT", "the call exceeded its deadline", timeout)];
    for (id, code, ending, frames) in cases {
        let message = wait::until_ok("the module error is logged", || {
            let log = serving.log();
            let entries = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            let mut errors = entries.filter(|entry| entry["correlation_id"] == id && entry["kind"] == code);
            Ok(errors.find_map(|entry| Some(entry["message"].as_str()?.to_owned())))
        })?;
        let passed = has_frames(&message, ending, frames);
        println!("{id}: {message}");
        if !passed {
            println!("expected the frames {frames:?}");
        }
        tally += Tally::of(passed);
    }
    serving.stop();
    Ok(tally)
}

/// Whether the trace in a message consists of `frames` at first.
fn has_frames(message: &str, ending: &str, frames: &[(&str, &str)]) -> bool {
    let Some((problem, trace)) = message.split_once(" (in ") else { return false };
    let mut shown = trace.split(" < ");
    problem.ends_with(ending)
        && frames.iter().all(|(function, line)| shown.next().is_some_and(|shown| shown.contains(function) && shown.contains(line)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_compared_in_order() {
        let message = "module error, blocked: the call exceeded its deadline (in `spin` at a.c:3 < `hook`)";
        assert!(has_frames(message, "the call exceeded its deadline", &[("`spin`", "a.c:3"), ("`hook`", "")]));
        assert!(!has_frames(message, "", &[("`hook`", "")]) && !has_frames(message, "trap", &[("`spin`", "")]));
        assert!(!has_frames(message, "", &[("`spin`", ""), ("`hook`", ""), ("`more`", "")]) && !has_frames("blocked", "", &[]));
    }
}
