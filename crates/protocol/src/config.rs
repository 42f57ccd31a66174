//! Configurations that the proxy sends.

use serde_json::Value;
use zentinel_wasm_bounds::run_blocking_if_large;
use zentinel_wasm_contract::Bounded;

/// A configuration as it comes. The module's own may be a list of as many addresses as it has room for.
pub(crate) type Config = Bounded<100_000>;

/// Largest configuration event, in bytes: what a module's configuration may have, as text within JSON, and room for the rest.
pub(crate) const MAX_CONFIGURE: usize = 4 << 20;

/// Why a larger one is not read.
pub(crate) const TOO_LARGE: &str = "larger than 4 MiB";

/// Reads a configuration. No text at all stands for none.
pub(crate) fn parse(json: &str) -> Result<Value, String> {
    if json.is_empty() {
        return Ok(Value::Null);
    }
    if json.len() > MAX_CONFIGURE {
        return Err("the configuration is larger than 4 MiB".into());
    }
    run_blocking_if_large(json.len(), || serde_json::from_str(json))
        .map(|config: Config| config.0)
        .map_err(|error| format!("the configuration is not JSON: {error}"))
}
