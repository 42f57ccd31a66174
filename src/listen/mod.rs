//! Where connections come from.

pub mod admin;
pub mod grpc;
mod socket_file;
pub mod tls;
pub mod unix;

use tokio::sync::watch;
use zentinel_wasm_protocol::Stage;

/// Waits until the agent drains.
async fn drains(stage: &mut watch::Receiver<Stage>) {
    // Without a sender the agent is at its end too.
    let _ = stage.wait_for(|stage| *stage > Stage::Serving).await;
}
