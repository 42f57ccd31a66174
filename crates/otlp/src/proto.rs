//! The messages, generated from the crate's own definition of them.

#![allow(missing_docs, unreachable_pub, clippy::all)]

mod messages {
    include!(concat!(env!("OUT_DIR"), "/zentinel.otlp.rs"));
}

pub use messages::*;

use any_value::Value;

/// An attribute.
pub(crate) fn attribute(key: &str, value: Value) -> KeyValue {
    KeyValue { key: key.to_owned(), value: Some(AnyValue { value: Some(value) }) }
}

/// An attribute that is a text.
pub(crate) fn text(key: &str, value: impl Into<String>) -> KeyValue {
    attribute(key, Value::StringValue(value.into()))
}

/// An attribute that is a number.
pub(crate) fn number(key: &str, value: u64) -> KeyValue {
    attribute(key, Value::IntValue(i64::try_from(value).unwrap_or(i64::MAX)))
}

/// The library that the spans and metrics come from.
pub(crate) fn scope() -> InstrumentationScope {
    InstrumentationScope { name: env!("CARGO_PKG_NAME").to_owned(), version: env!("CARGO_PKG_VERSION").to_owned() }
}
