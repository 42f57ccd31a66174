//! The policies that every language implements, with the cases in `examples/cases/`.

use crate::tools::root;
use anyhow::{Context, Result, bail};
use serde_json::Value;

/// A policy and its cases.
pub(super) struct Policy {
    /// The name of its folders.
    pub(super) name: String,
    pub(super) cases: Vec<Value>,
}

impl Policy {
    /// The policy that uses most of an SDK.
    pub(super) const TOUR: &str = "tour";

    /// All policies, beginning with security.
    pub(super) fn all() -> Result<Vec<Self>> {
        ["security", "bot-protection", Self::TOUR].into_iter().map(Self::read).collect()
    }

    fn read(name: &str) -> Result<Self> {
        let file = root().join("examples/cases").join(name).with_extension("json");
        let text = std::fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
        let mut suite: Value = serde_json::from_str(&text).with_context(|| format!("reading {}", file.display()))?;
        let Value::Array(cases) = suite["cases"].take() else { bail!("{} has no array `cases`", file.display()) };
        Ok(Self { name: name.to_owned(), cases })
    }
}
