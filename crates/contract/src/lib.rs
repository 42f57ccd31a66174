//! What a Wasm module is given and what it may answer.
//!
//! No I/O happens here. The types stand in the order of a request's way:
//!
//! * [`event`]: what the proxy says, borrowed from the frame that it came in;
//! * [`hook`]: which export of the module takes it;
//! * [`answer`]: what it decides;
//! * [`handler`]: where a transport meets whoever decides;
//! * [`report`]: health and metrics, as the proxy gets them.

#![deny(unsafe_code)]
#![deny(missing_docs)]

pub mod answer;
mod dense;
pub mod event;
pub mod failure;
pub mod handler;
pub mod header;
pub mod hook;
pub mod json;
pub mod limits;
pub mod report;
pub mod text;
pub mod url;
mod value;

pub use answer::{
    Answer, AnswerBuilder, AnswerError, Audit, Block, BlockStatus, BodyAction, BodyMutation, Decision, HeaderOp, WebsocketDecision,
};
pub use event::Event;
pub use failure::{Failure, FailureKind};
pub use handler::{Arrival, Capabilities, Encode, Handler};
pub use header::HeaderCase;
pub use hook::{Hook, Hooks};
pub use limits::MAX_ENTRIES;
pub use text::{Pairs, Text, shortened};
pub use value::Bounded;
