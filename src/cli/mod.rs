//! The command line. An option takes precedence over its environment variable, and that over the
//! default.

mod early_exit;
mod environment;
mod options;
mod values;

pub use early_exit::EarlyExit;
pub use options::{Cli, HeaderCaseArg, IsolationArg, command};
pub use values::ModuleConfig;
