//! The agent behind the real proxy.
//!
//! [`Stack`] starts an upstream, the agent and the proxy on loopback, and stops them when dropped.
//! [`HttpRequest`] is one HTTP request through the proxy. With the mirror module, it carries the
//! answer that each hook gives.
//!
//! The tests are ignored unless `cargo xtask e2e` runs them: it builds the binaries and modules,
//! and passes their paths in environment variables.

#![forbid(unsafe_code)]
#![deny(missing_docs)]

pub mod http;
pub mod kdl;
mod request;
pub mod restarts;
pub mod sample;
mod stack;
pub mod upstream;
pub mod wait;
pub mod websocket;

pub use kdl::Transport;
pub use request::HttpRequest;
pub use stack::{Agent, Paths, Proxy, Stack, free_port};

/// Makes two tests of each function that takes a [`Transport`].
#[macro_export]
macro_rules! on_both_transports {
    ($($test:ident)*) => {$(
        mod $test {
            #[test]
            #[ignore = "needs the real proxy: cargo xtask e2e"]
            fn over_the_unix_socket() {
                super::$test($crate::Transport::UnixSocket);
            }

            #[test]
            #[ignore = "needs the real proxy: cargo xtask e2e"]
            fn over_grpc() {
                super::$test($crate::Transport::Grpc);
            }
        }
    )*};
}
