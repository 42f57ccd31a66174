//! Compiles the messages of OTLP, without a `protoc`.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    prost_build::Config::new().compile_fds(protox::compile(["otlp.proto"], ["proto"])?)?;
    Ok(())
}
