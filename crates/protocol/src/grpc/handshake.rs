//! The first exchange on a stream.

use std::sync::Arc;

use serde_json::Value;
use zentinel_wasm_contract::Handler;

use super::proto;
use crate::config;
use crate::handshake::check_versions;

/// Whether the agent can work with this proxy, and under the configuration that it brings.
pub(super) async fn agree<H: Handler>(request: &proto::HandshakeRequest, handler: &Arc<H>) -> Result<(), String> {
    check_versions(&request.supported_versions)?;
    match config::parse(&request.config_json)? {
        Value::Null => Ok(()),
        // What a proxy without a configuration says.
        Value::Object(object) if object.is_empty() => Ok(()),
        config => handler.configure(config).await,
    }
}
