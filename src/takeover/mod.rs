//! One process takes over from another: its listeners, and the connections of its socket.
//!
//! * `handover` is what is handed over: descriptors, and the state in sealed memory;
//! * `wire` sends it as messages on a Unix socket;
//! * [`control`] is the socket on which a running agent is asked for it, with `--takeover`;
//! * [`store`] keeps it in systemd's descriptor store between two processes;
//! * [`predecessor`] is the new process's side of both.
//!
//! Every step of the old process can be undone until the new one has everything. Only then does the
//! old one allow it to read from the connections, and never reads from them again itself.

pub mod control;
pub(crate) mod handover;
pub mod predecessor;
pub mod store;
mod wire;
