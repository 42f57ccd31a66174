//! Parsers of option values.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use clap::builder::{BoolishValueParser, TypedValueParser};
use zentinel_wasm_engine::checked_module_config;
use zentinel_wasm_otlp::{Headers, InvalidOption};

/// A module's configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModuleConfig {
    /// The JSON, as of when the command line was read.
    pub json: Arc<[u8]>,
    /// The regular file that contains it. None for a pipe, which can be read only once.
    pub file: Option<PathBuf>,
}

pub(super) fn boolean() -> impl TypedValueParser<Value = bool> {
    BoolishValueParser::new()
}

pub(super) fn number(from: u64, to: u64) -> impl Fn(&str) -> Result<u64, String> + Clone + Send + Sync + 'static {
    move |text| match text.parse() {
        Ok(number) if (from..=to).contains(&number) => Ok(number),
        _ => Err(format!("expected a whole number from {from} to {to}")),
    }
}

pub(super) fn share(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|share| (0.0..=1.0).contains(share)).ok_or_else(|| "expected a number from 0 to 1".into())
}

pub(super) fn octal(text: &str) -> Result<u32, String> {
    let digits = text.strip_prefix("0o").unwrap_or(text);
    match u32::from_str_radix(digits, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err("expected an octal mode from 000 to 777, such as 660".into()),
    }
}

pub(super) fn sha256(text: &str) -> Result<String, String> {
    if text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        Ok(text.to_ascii_lowercase())
    } else {
        Err("expected 64 hexadecimal digits".into())
    }
}

pub(super) fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| "expected an IP address and a port, such as 127.0.0.1:9090".into())
}

/// Accepts everything, because clap's message about an error would have the value, which may be a
/// secret.
pub(super) fn headers(text: &str) -> Result<Result<Headers, InvalidOption>, Infallible> {
    Ok(text.parse())
}

pub(super) fn module_config(text: &str) -> Result<ModuleConfig, String> {
    let (json, file) = match text.strip_prefix('@') {
        None => (text.as_bytes().to_vec(), None),
        Some(file) => {
            let json = std::fs::read(file).map_err(|error| format!("expected JSON or @FILE: cannot read the file: {error}"))?;
            (json, Some(PathBuf::from(file)).filter(|file| file.is_file()))
        }
    };
    let json = checked_module_config(&json).map_err(|error| format!("expected JSON or @FILE: {error}"))?;
    Ok(ModuleConfig { json, file })
}
