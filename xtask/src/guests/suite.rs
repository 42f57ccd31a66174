//! Runs the cases of `examples/cases/`, which every guest must pass.

use super::build::Language;
use super::policy::Policy;
use super::serving::Serving;
use crate::tools::{on_path, root};
use anyhow::{Result, bail, ensure};
use serde_json::{Map, Value, json};
use std::ops::AddAssign;
use std::path::Path;
use std::process::{Command, Stdio};
use testkit::kind;

/// Numbers of cases.
#[derive(Clone, Copy, Default)]
pub(super) struct Tally {
    pub(super) passed: usize,
    pub(super) failed: usize,
}

impl Tally {
    pub(super) fn of(passed: bool) -> Self {
        Self { passed: usize::from(passed), failed: usize::from(!passed) }
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

/// Calls the module's hooks in Node, also with events that the agent never sends.
pub(super) fn test_directly(policy: &Policy, module: &Path, language: Language) -> Result<Tally> {
    if on_path("node").is_none() {
        bail!("cannot find `node`, which calls the modules directly: run `apt-get install nodejs`, version 20 or later");
    }
    let mut command = Command::new("node");
    command.arg(root().join("examples/cases/direct.mjs")).arg(&policy.name).arg(module).env("NODE_NO_WARNINGS", "1");
    if language == Language::Rust {
        command.arg("page");
    }
    let result = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output()?;
    let text = String::from_utf8_lossy(&result.stdout);
    let Some((cases, sum)) = text.trim_end().rsplit_once('\n').or(Some(("", text.trim_end()))) else { unreachable!() };
    if !cases.is_empty() {
        println!("{cases}");
    }
    let numbers: Vec<usize> = sum.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    match numbers[..] {
        [passed, failed] => Ok(Tally { passed, failed }),
        _ => bail!("cannot call {} in Node: {}", module.display(), result.status),
    }
}

/// Sends the cases to the agent's Unix socket, as the proxy does.
pub(super) fn test_through_agent(agent: &Path, policy: &Policy, module: &Path) -> Result<Tally> {
    if policy.cases.iter().all(|case| case["request"].is_null()) {
        return Ok(Tally::default());
    }
    let mut serving = Serving::start(agent, module, &[])?;
    let mut tally = Tally::default();
    for (number, case) in policy.cases.iter().enumerate() {
        let Value::Object(request) = &case["request"] else { continue };
        ensure!(case["hook"] == "on_request_headers", "cases for the hook {} are not supported", case["hook"]);
        let answer = serving.connection.try_ask(kind::REQUEST_HEADERS, &event(&format!("case-{number}"), request))?;
        let expected = &case["expect"];
        let decision = decision(&answer, expected);
        if decision != *expected {
            println!("{}: {}: expected {expected}, the agent answered {answer}", policy.name, case["name"]);
        }
        tally += Tally::of(decision == *expected);
    }
    serving.stop();
    Ok(tally)
}

/// The event that the proxy would send for a case's request.
pub(super) fn event(id: &str, request: &Map<String, Value>) -> Value {
    let text = |name: &str, otherwise: &str| request.get(name).map_or_else(|| otherwise.to_owned(), text_of);
    let mut headers = Map::new();
    for number in 0..request.get("more_headers").and_then(Value::as_u64).unwrap_or(0) {
        headers.insert(format!("x-header-{number}"), json!([format!("value {number}")]));
    }
    for (name, value) in request.get("headers").and_then(Value::as_object).into_iter().flatten() {
        let values = if value.is_array() { value.clone() } else { json!([text_of(value)]) };
        headers.insert(name.to_lowercase(), values);
    }
    let mut event = testkit::request(id, &text("uri", "/"));
    event["method"] = json!(text("method", "GET"));
    event["metadata"]["client_ip"] = json!(format!("{}:0", text("client_ip", "192.0.2.7")));
    event["headers"] = Value::Object(headers);
    event
}

/// Evaluates a value of a case: a string, or `join` with pieces that may be repeated.
fn text_of(value: &Value) -> String {
    let piece = |piece: &Value| match piece {
        Value::String(text) => text.clone(),
        repeated => {
            let times = repeated["times"].as_u64().unwrap_or(0);
            repeated["repeat"].as_str().unwrap_or_default().repeat(times as usize)
        }
    };
    match &value["join"] {
        Value::Array(pieces) => pieces.iter().map(piece).collect(),
        _ => value.as_str().unwrap_or_default().to_owned(),
    }
}

/// The expected fields with their values in the agent's answer, in the form of the cases.
fn decision(answer: &Value, expected: &Value) -> Value {
    let (name, details) = match &answer["decision"] {
        Value::Object(decision) => decision.iter().next().map_or(("?", &Value::Null), |(name, details)| (name.as_str(), details)),
        other => (other.as_str().unwrap_or("?"), &Value::Null),
    };
    let fields = expected.as_object().into_iter().flatten().map(|(field, _)| {
        let value = match field.as_str() {
            "decision" => json!(name),
            "challenge_params" => details["params"].clone(),
            "tags" => answer["audit"]["tags"].clone(),
            other => details[other].clone(),
        };
        (field.clone(), value)
    });
    Value::Object(fields.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn joins_and_repeats_pieces_of_text() {
        assert_eq!(text_of(&json!("/a")), "/a");
        assert_eq!(text_of(&json!({"join": ["/", {"repeat": "ab", "times": 2}, "c"]})), "/ababc");
    }

    #[test]
    fn turns_a_case_into_an_event() {
        let request = json!({"uri": "/x", "client_ip": "::1", "headers": {"User-Agent": "a", "Accept": ["b", "c"]}, "more_headers": 1});
        let event = event("id", request.as_object().unwrap());
        assert_eq!(event["method"], "GET");
        assert_eq!(event["metadata"]["client_ip"], "::1:0");
        assert_eq!(event["headers"], json!({"user-agent": ["a"], "accept": ["b", "c"], "x-header-0": ["value 0"]}));
    }

    #[test]
    fn extracts_the_expected_fields() {
        let block = json!({"decision": {"block": {"status": 403, "body": "Forbidden", "headers": null}}, "audit": {"tags": []}});
        let expected = json!({"decision": "block", "status": 403, "body": "Forbidden"});
        assert_eq!(decision(&block, &expected), expected);
        let challenge = json!({"decision": {"challenge": {"challenge_type": "captcha", "params": {"a": "b"}}}, "audit": {"tags": ["t"]}});
        let expected = json!({"decision": "challenge", "challenge_type": "captcha", "challenge_params": {"a": "b"}, "tags": ["t"]});
        assert_eq!(decision(&challenge, &expected), expected);
        assert_ne!(decision(&json!({"decision": "allow"}), &expected), expected);
    }

    #[test]
    fn every_case_is_complete() {
        for policy in Policy::all().unwrap() {
            assert!(policy.cases.len() > 10);
            for case in &policy.cases {
                assert!(case["request"].is_object() != case["raw"].is_string(), "{case}");
                assert!(case["expect"].as_object().is_some_and(|expect| !expect.is_empty()), "{case}");
                assert!(case["hook"].is_string() && case["name"].is_string(), "{case}");
            }
        }
    }
}
