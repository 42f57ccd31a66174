//! The messages of the standard health service, `proto/health.proto`.

#![allow(missing_docs, unreachable_pub, clippy::all)]

include!(concat!(env!("OUT_DIR"), "/grpc.health.v1.rs"));
