//! Settings of a module, from the command line and from the proxy's `config { }` block.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use zentinel_wasm_breaker::BreakerLimits;
use zentinel_wasm_contract::{HeaderCase, shortened};
use zentinel_wasm_runtime::Isolation;

/// How a module is run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Number of instances, and so of concurrent calls.
    pub pool_size: u32,
    /// Whether module errors allow the event.
    pub fail_open: bool,
    /// Deadline of a whole call, including the wait for an instance.
    pub timeout: Duration,
    /// Linear memory of one instance, in MiB.
    pub max_memory_mb: u32,
    /// Whether instances are reused.
    pub isolation: Isolation,
    /// JSON for `on_configure`, if any.
    pub module_config: Option<Arc<[u8]>>,
    /// Largest body passed to the module, in bytes.
    pub max_body: usize,
    /// Whether the module gets streamed request bodies as a whole.
    pub collect_request_body: bool,
    /// Largest answer read from the module, in bytes.
    pub max_output: usize,
    /// The case of header names in events for the module.
    pub header_case: HeaderCase,
    /// Time for an instance to become ready.
    pub start_timeout: Duration,
    /// When the circuit breakers of the module's hooks open, and how often they probe.
    pub breaker: BreakerLimits,
}

/// Largest values of settings.
pub struct SettingLimits;

impl SettingLimits {
    /// Instances: each takes 4 GiB of address space.
    pub const POOL_SIZE: u64 = 1024;
    /// 1 min: no client waits longer for a decision.
    pub const TIMEOUT_MS: u64 = 60_000;
    /// 1 min: service managers wait about as long for a start.
    pub const START_TIMEOUT_MS: u64 = 60_000;
    /// All that 32-bit addresses reach.
    pub const MEMORY_MB: u64 = 4096;
    /// 1 h.
    pub const GRACE_MS: u64 = 3_600_000;
    /// Largest module configuration, in bytes: it is copied into every instance.
    pub const MODULE_CONFIG: usize = 1 << 20;
}

/// Time that the proxy waits for its configuration to be applied. Instances that take longer to
/// start can only do so before the proxy connects.
const PROXY_CONFIG_TIMEOUT: Duration = Duration::from_secs(5);

/// Most characters of a proxy's value that a message repeats.
const MAX_SHOWN: usize = 40;

/// Checks that `json` can be a module's configuration. Returns it without surrounding whitespace.
///
/// # Errors
///
/// It is not JSON, or too large.
pub fn checked_module_config(json: &[u8]) -> Result<Arc<[u8]>, String> {
    if json.len() > SettingLimits::MODULE_CONFIG {
        return Err(format!("it has {} bytes, the limit is {}", json.len(), SettingLimits::MODULE_CONFIG));
    }
    serde_json::from_slice::<serde::de::IgnoredAny>(json).map_err(|error| error.to_string())?;
    Ok(json.trim_ascii().into())
}

/// Most problems of a configuration in one message: more than there are keys.
const MAX_PROBLEMS: usize = 10;

impl Settings {
    /// The settings of the pool.
    pub fn pool(&self) -> zentinel_wasm_runtime::PoolSettings {
        zentinel_wasm_runtime::PoolSettings {
            size: self.pool_size,
            max_memory: (self.max_memory_mb as usize) << 20,
            max_output: self.max_output,
            isolation: self.isolation,
            config: self.module_config.clone(),
            start_timeout: self.start_timeout,
        }
    }

    /// What is probably not intended, each in one line.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if self.start_timeout > PROXY_CONFIG_TIMEOUT {
            warnings.push(format!(
                "`--start-timeout-ms` is {}, but the proxy waits only {} ms for its configuration to be applied: with a configuration, slower starts fail",
                self.start_timeout.as_millis(),
                PROXY_CONFIG_TIMEOUT.as_millis()
            ));
        }
        warnings
    }

    /// These settings with `file` as the module's configuration, if given.
    #[must_use]
    pub fn with_module_config(self, file: Option<Arc<[u8]>>) -> Self {
        Self { module_config: file.or(self.module_config), ..self }
    }

    /// These settings, overridden by those of the proxy's `config { }` block. Null and an empty
    /// object change nothing.
    ///
    /// # Errors
    ///
    /// A key is unknown or a value is invalid: one line that names all of them. No setting is
    /// applied then.
    pub fn with_proxy_config(&self, config: &Value) -> Result<Self, String> {
        let mut settings = self.clone();
        let object = match config {
            Value::Null => return Ok(settings),
            Value::Object(object) => object,
            _ => return Err("the configuration is not an object".into()),
        };
        let mut problems = Vec::new();
        for (key, value) in object {
            if let Err(problem) = settings.set(key, value) {
                problems.push(problem);
                if problems.len() == MAX_PROBLEMS {
                    break;
                }
            }
        }
        if problems.is_empty() { Ok(settings) } else { Err(problems.join("; ")) }
    }

    fn set(&mut self, key: &str, value: &Value) -> Result<(), String> {
        match key.replace('_', "-").as_str() {
            "pool-size" => self.pool_size = number(key, value, SettingLimits::POOL_SIZE)? as u32,
            "timeout-ms" => self.timeout = Duration::from_millis(number(key, value, SettingLimits::TIMEOUT_MS)?),
            "max-memory-mb" => self.max_memory_mb = number(key, value, SettingLimits::MEMORY_MB)? as u32,
            "collect-request-body" => {
                self.collect_request_body = value.as_bool().ok_or_else(|| bad(key, value, "true or false"))?;
            }
            "fail-open" => self.fail_open = value.as_bool().ok_or_else(|| bad(key, value, "true or false"))?,
            "isolation" => {
                self.isolation = match value.as_str() {
                    Some("pooled") => Isolation::Pooled,
                    Some("request") => Isolation::Request,
                    _ => return Err(bad(key, value, "`pooled` or `request`")),
                }
            }
            "module-config" => self.module_config = module_config(key, value)?,
            _ => {
                return Err(format!(
                    "unknown key `{}`: expected one of pool-size, fail-open, timeout-ms, max-memory-mb, isolation, collect-request-body, module-config",
                    shortened(key, MAX_SHOWN)
                ));
            }
        }
        Ok(())
    }
}

fn number(key: &str, value: &Value, to: u64) -> Result<u64, String> {
    // KDL has one type of number, so a proxy may send 4 as 4.0.
    let whole =
        value.as_u64().or_else(|| value.as_f64().filter(|number| number.fract() == 0.0 && *number >= 0.0).map(|number| number as u64));
    whole.filter(|number| (1..=to).contains(number)).ok_or_else(|| bad(key, value, &format!("a whole number from 1 to {to}")))
}

/// A string is parsed as JSON; any other value is the configuration itself.
fn module_config(key: &str, value: &Value) -> Result<Option<Arc<[u8]>>, String> {
    let json = match value {
        Value::Null => return Ok(None),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    checked_module_config(json.as_bytes()).map(Some).map_err(|error| format!("`{key}` is not valid JSON: {error}"))
}

fn bad(key: &str, value: &Value, expected: &str) -> String {
    format!("`{key}` is {}: expected {expected}", shortened(&value.to_string(), MAX_SHOWN))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn settings() -> Settings {
        Settings {
            pool_size: 4,
            fail_open: false,
            timeout: Duration::from_millis(40),
            max_memory_mb: 64,
            isolation: Isolation::Pooled,
            module_config: None,
            max_body: 1,
            collect_request_body: false,
            max_output: 1,
            header_case: HeaderCase::Canonical,
            start_timeout: Duration::from_secs(5),
            breaker: BreakerLimits::default(),
        }
    }

    #[test]
    fn accepts_both_spellings_of_keys() {
        let config = json!({"pool-size": 8.0, "fail_open": true, "timeout-ms": 10, "max_memory_mb": 16, "isolation": "request", "collect-request-body": true, "module-config": "{\"a\":1}"});
        let configured = settings().with_proxy_config(&config).unwrap();
        let expected = Settings {
            pool_size: 8,
            fail_open: true,
            timeout: Duration::from_millis(10),
            max_memory_mb: 16,
            isolation: Isolation::Request,
            collect_request_body: true,
            module_config: Some(br#"{"a":1}"#.as_slice().into()),
            ..settings()
        };
        assert_eq!(configured, expected);
        let nested = settings().with_proxy_config(&json!({"module_config": {"a": 1}})).unwrap();
        assert_eq!(nested.module_config, expected.module_config);
    }

    #[test]
    fn are_unchanged_without_keys() {
        assert_eq!(settings().with_proxy_config(&Value::Null), Ok(settings()));
        assert_eq!(settings().with_proxy_config(&json!({})), Ok(settings()));
    }

    #[test]
    fn names_all_problems() {
        let error =
            settings().with_proxy_config(&json!({"pool-size": 0, "fail-open": "yes", "colour": 1, "module-config": "{"})).unwrap_err();
        for part in [
            "`pool-size` is 0: expected a whole number from 1 to 1024",
            "`fail-open` is \"yes\"",
            "unknown key `colour`",
            "`module-config` is not valid JSON",
        ] {
            assert!(error.contains(part), "{part} in {error}");
        }
        settings().with_proxy_config(&json!([1])).unwrap_err();
    }
}
