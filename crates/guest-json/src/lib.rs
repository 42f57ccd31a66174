//! The JSON interface of Wasm modules, without a Wasm engine.
//!
//! * [`input`] writes the object that a hook is given, directly from the
//!   [`Event`](zentinel_wasm_contract::Event);
//! * [`answer::read`] reads the object that a hook returns, and gives an
//!   [`Answer`](zentinel_wasm_contract::Answer);
//! * [`answer::InvalidAnswer`] names the field, the value and the rule that it breaks.
//!
//! ```
//! use zentinel_wasm_contract::{Decision, HeaderCase};
//! use zentinel_wasm_guest_json::{answer, input};
//!
//! let event = serde_json::from_str(
//!     r#"{"metadata": {"correlation_id": "1"}, "method": "GET", "uri": "/", "headers": {"accept": ["*/*"]}}"#,
//! )?;
//! let mut object = Vec::new();
//! input::request(&mut object, &event, HeaderCase::Canonical);
//! assert!(object.starts_with(br#"{"method":"GET","uri":"/","client_ip":"","correlation_id":"1","headers":{"Accept":"#));
//!
//! let answer = answer::read(br#"{"decision": "block", "status": 429}"#)?;
//! assert!(matches!(answer.decision, Decision::Block(block) if block.status().get() == 429));
//! let error = answer::read(br#"{"add_request_headers": {"Upgrade": "h2c"}}"#).unwrap_err();
//! assert_eq!(error.to_string(), "`add_request_headers`: `Upgrade` frames the message, so only the proxy may set it");
//! # Ok::<_, Box<dyn std::error::Error>>(())
//! ```
//!
//! The rules of an answer are those of its types, in `zentinel_wasm_contract::answer`. What escapes
//! strings and bounds values is in that crate too, because the wire needs it as well.
//!
//! The files in `golden/` are the JSON examples of the product page. The tests read them.

#![forbid(unsafe_code)]
#![deny(missing_docs)]
#![deny(clippy::print_stderr, clippy::print_stdout)]

pub mod answer;
mod fields;
pub mod input;
