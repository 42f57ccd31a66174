//! The agent under the real proxy.
//!
//! [`Stack`] starts an upstream, the agent and the proxy on loopback, and stops them when it is
//! dropped. [`Ask`] is one HTTP request through the proxy; for the mirror guest it carries the
//! answer that each hook is to give.
//!
//! The tests are ignored unless `cargo xtask e2e` runs them: it builds what they need and says where
//! it lies.

#![forbid(unsafe_code)]
#![deny(missing_docs)]

pub mod http;
pub mod kdl;
mod request;
mod stack;
pub mod upstream;
pub mod wait;
pub mod websocket;

pub use kdl::Transport;
pub use request::Ask;
pub use stack::{Agent, Paths, Proxy, Stack, free_port};

/// Makes two tests of one function that takes a [`Transport`].
#[macro_export]
macro_rules! on_both_transports {
    ($($(#[$doc:meta])* fn $name:ident($transport:ident) $body:block)*) => {$(
        mod $name {
            use super::*;

            fn run($transport: $crate::Transport) $body

            $(#[$doc])*
            #[test]
            #[ignore = "needs the real proxy: cargo xtask e2e"]
            fn over_the_unix_socket() {
                run($crate::Transport::UnixSocket);
            }

            #[test]
            #[ignore = "needs the real proxy: cargo xtask e2e"]
            fn over_grpc() {
                run($crate::Transport::Grpc);
            }
        }
    )*};
}
