//! The messages of the standard health service, as `proto/health.proto` has them.

#![allow(missing_docs, unreachable_pub, clippy::all)]

include!(concat!(env!("OUT_DIR"), "/grpc.health.v1.rs"));
