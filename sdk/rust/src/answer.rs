//! Return types of hooks.

use std::fmt::Display;

use crate::{Decision, Inspection};

/// A type that a hook may return.
pub trait IntoAnswer {
    /// Returns the JSON of the answer. An empty answer means that the module has no opinion.
    ///
    /// # Errors
    ///
    /// Returns a message for the agent's log if the module could not decide.
    fn into_answer(self) -> Result<Vec<u8>, String>;
}

impl IntoAnswer for Decision {
    fn into_answer(self) -> Result<Vec<u8>, String> {
        let mut out = Vec::new();
        if !self.is_plain_allow() {
            out.reserve(128);
            self.write(&mut out);
        }
        Ok(out)
    }
}

impl IntoAnswer for Inspection {
    fn into_answer(self) -> Result<Vec<u8>, String> {
        Ok(self.to_json().into_bytes())
    }
}

/// The end of a request needs no answer.
impl IntoAnswer for () {
    fn into_answer(self) -> Result<Vec<u8>, String> {
        Ok(Vec::new())
    }
}

impl<T: IntoAnswer> IntoAnswer for Option<T> {
    fn into_answer(self) -> Result<Vec<u8>, String> {
        self.map_or(Ok(Vec::new()), T::into_answer)
    }
}

impl<T: IntoAnswer, E: Display> IntoAnswer for Result<T, E> {
    fn into_answer(self) -> Result<Vec<u8>, String> {
        self.map_err(|error| error.to_string())?.into_answer()
    }
}
