//! Compiles the messages of the gRPC transport, without a `protoc`.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let files = ["proto/agent_v2.proto", "proto/health.proto"];
    println!("cargo::rerun-if-changed=proto");
    prost_build::Config::new()
        // Bodies stay in the buffer in which they were received.
        .bytes([".zentinel.agent.v2.BodyChunkEvent.data", ".zentinel.agent.v2.WebSocketFrameEvent.payload"])
        // Maps are encoded in key order, so the same answer always has the same bytes.
        .btree_map(["."])
        .compile_fds(protox::compile(files, ["proto"])?)?;
    Ok(())
}
