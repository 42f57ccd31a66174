//! The command line. An option takes precedence over its environment variable, and that over the
//! default.

mod check;
mod early_exit;
mod environment;
mod health;
mod invocation;
mod options;
mod values;

pub use check::CheckOptions;
pub use early_exit::EarlyExit;
pub use health::{HealthOptions, HealthTarget};
pub use invocation::{Invocation, command};
pub use options::{Cli, ClientArg, DecisionLogArg, HeaderCaseArg, IsolationArg};
pub use values::ModuleConfig;
