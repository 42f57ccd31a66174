//! The command line. A flag beats its environment variable, which beats the default.

mod environment;
mod options;
mod refusal;
mod values;

pub use options::{Case, Cli, Isolation, command};
pub use refusal::Refusal;
pub use values::ModuleConfig;
