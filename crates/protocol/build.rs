//! Compiles the messages of the gRPC transport, without a `protoc`.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let files = ["proto/agent_v2.proto", "proto/health.proto"];
    println!("cargo::rerun-if-changed=proto");
    prost_build::Config::new()
        // Bodies stay in the buffer that they arrived in.
        .bytes([".zentinel.agent.v2.BodyChunkEvent.data", ".zentinel.agent.v2.WebSocketFrameEvent.payload"])
        // Maps go out in one order, so that the same answer is always the same bytes.
        .btree_map(["."])
        .compile_fds(protox::compile(files, ["proto"])?)?;
    Ok(())
}
