//! Configurations that the proxy sends.

use serde_json::Value;
use zentinel_wasm_bounds::run_blocking_if_large;
use zentinel_wasm_contract::Bounded;

/// A received configuration. The number of values is bounded; the module's part may be a list of as
/// many addresses as fit into its size.
pub(crate) type Config = Bounded<100_000>;

/// Largest configuration event, in bytes: the largest configuration of a module, as text within
/// JSON, and room for the rest.
pub(crate) const MAX_CONFIGURE: usize = 4 << 20;

/// Why a larger one is rejected.
pub(crate) const TOO_LARGE: &str = "larger than 4 MiB";

/// Parses the text of a configuration. An empty text means that there is none.
pub(crate) fn parse(json: &str) -> Result<Value, String> {
    if json.is_empty() {
        return Ok(Value::Null);
    }
    if json.len() > MAX_CONFIGURE {
        return Err(format!("the configuration is {TOO_LARGE}"));
    }
    run_blocking_if_large(json.len(), || serde_json::from_str(json))
        .map(|config: Config| config.0)
        .map_err(|error| format!("the configuration is not JSON: {error}"))
}
