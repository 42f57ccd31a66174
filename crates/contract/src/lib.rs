//! What a Wasm module is given and what it may answer. No I/O, no Wasm engine, no wire format.
//!
//! * [`Event`]: what the proxy reports about a request, borrowed from its message;
//! * [`Hook`]: the export of the module that takes an event;
//! * [`Answer`]: what the module decides. The types of its parts keep the rules of the contract; an
//!   [`AnswerBuilder`] puts them together;
//! * [`Failure`]: why there is no usable answer;
//! * [`Handler`] and [`Encode`]: where transports meet the engine.
//!
//! ```
//! use zentinel_wasm_contract::{AnswerBuilder, Block, BlockStatus, Decision, Event, Hook};
//!
//! let event = Event::RequestHeaders(serde_json::from_str(
//!     r#"{"metadata": {"correlation_id": "1"}, "method": "GET", "uri": "/admin", "headers": {}}"#,
//! )?);
//! assert_eq!(event.hook(), Hook::RequestHeaders);
//!
//! let mut answer = AnswerBuilder::new(Decision::Block(Block::new(BlockStatus::FORBIDDEN, Some("No entry".into()))));
//! answer.tags(vec!["admin".into()])?;
//! // What breaks a rule cannot become part of an answer.
//! assert!(answer.set_response_headers(vec![("Content-Length".into(), vec!["9".into()])]).is_err());
//! assert!(BlockStatus::new(101).is_err());
//! # let _ = answer.build();
//! # Ok::<_, Box<dyn std::error::Error>>(())
//! ```
//!
//! [`json`] and [`Bounded`] are here, and not with the JSON interface of modules, because the wire
//! needs them too, and a transport must not depend on an interface of guests.

#![deny(unsafe_code)]
#![deny(missing_docs)]
#![deny(clippy::print_stderr, clippy::print_stdout)]

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
pub use failure::{Failure, FailureKind, Trace};
pub use handler::{Arrival, Capabilities, Encode, Handler};
pub use header::HeaderCase;
pub use hook::{Hook, Hooks};
pub use limits::MAX_ENTRIES;
pub use text::{Pairs, Text, shortened};
pub use value::Bounded;
