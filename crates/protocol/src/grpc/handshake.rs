//! The handshake over gRPC.

use std::sync::Arc;

use serde_json::Value;
use zentinel_wasm_contract::Handler;

use super::proto;
use crate::config;
use crate::handshake::check_versions;

/// Checks that the agent can work with this proxy, and applies its configuration.
pub(super) async fn agree<H: Handler>(request: &proto::HandshakeRequest, handler: &Arc<H>) -> Result<(), String> {
    check_versions(&request.supported_versions)?;
    match config::parse(&request.config_json)? {
        Value::Null => Ok(()),
        // Sent by a proxy without a configuration.
        Value::Object(object) if object.is_empty() => Ok(()),
        config => handler.configure(config).await,
    }
}
