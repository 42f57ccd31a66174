//! Fields of answers.

use serde_json::{Value, json};

/// The id of the event that it answers.
#[track_caller]
pub fn id_of(answer: &Value) -> &str {
    answer["audit"]["custom"]["correlation_id"].as_str().unwrap_or_else(|| panic!("no id in {answer}"))
}

/// The name of the decision: `allow`, `block`, `redirect` or `challenge`.
#[track_caller]
pub fn decision(answer: &Value) -> &str {
    match &answer["decision"] {
        Value::String(name) => name,
        Value::Object(object) => object.keys().next().unwrap(),
        _ => panic!("no decision in {answer}"),
    }
}

/// The reason code, if the answer is that to a module error.
pub fn module_error(answer: &Value) -> Option<&str> {
    let tags = answer["audit"]["tags"].as_array()?;
    tags.contains(&json!("wasm-error")).then(|| answer["audit"]["reason_codes"][0].as_str().unwrap())
}
