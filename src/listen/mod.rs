//! The addresses that the agent serves: the Unix socket, gRPC, and HTTP for operators.

mod accept;
pub mod admin;
pub mod grpc;
pub(crate) mod socket_file;
pub mod tls;
pub mod unix;
