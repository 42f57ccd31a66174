//! The agent's log.

/// The level of a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Single steps.
    Trace = 0,
    /// Details for debugging.
    Debug = 1,
    /// Informational.
    Info = 2,
    /// Unexpected, but not an error.
    Warn = 3,
    /// A failure.
    Error = 4,
}

/// Writes a line to the agent's log, or to standard error on targets other than Wasm.
pub fn log(level: Level, message: &str) {
    #[cfg(target_family = "wasm")]
    agent::log(level, message);
    #[cfg(not(target_family = "wasm"))]
    eprintln!("{level:?}: {message}");
}

#[cfg(target_family = "wasm")]
#[allow(unsafe_code, reason = "the agent's functions are imports")]
mod agent {
    #[link(wasm_import_module = "zentinel")]
    unsafe extern "C" {
        #[link_name = "log"]
        fn zentinel_log(level: i32, message: *const u8, length: usize);
    }

    pub(super) fn log(level: super::Level, message: &str) {
        // SAFETY: the agent reads the message during the call and keeps no pointer to it.
        unsafe { zentinel_log(level as i32, message.as_ptr(), message.len()) }
    }
}

/// Routes panic messages and the macros of the `log` crate to the agent's log.
#[cfg(target_family = "wasm")]
pub(crate) fn install() {
    std::panic::set_hook(Box::new(|panic| log(Level::Error, &panic.to_string())));
    #[cfg(feature = "log")]
    facade::install();
}

#[cfg(all(feature = "log", target_family = "wasm"))]
mod facade {
    use log::{LevelFilter, Log, Metadata, Record};

    use super::Level;

    struct AgentLog;

    impl Log for AgentLog {
        fn enabled(&self, _: &Metadata<'_>) -> bool {
            true
        }

        fn log(&self, record: &Record<'_>) {
            let level = match record.level() {
                log::Level::Trace => Level::Trace,
                log::Level::Debug => Level::Debug,
                log::Level::Info => Level::Info,
                log::Level::Warn => Level::Warn,
                log::Level::Error => Level::Error,
            };
            match record.args().as_str() {
                Some(message) => super::log(level, message),
                None => super::log(level, &record.args().to_string()),
            }
        }

        fn flush(&self) {}
    }

    pub(super) fn install() {
        // The agent filters by level. If the module has set its own logger, that one stays.
        if log::set_logger(&AgentLog).is_ok() {
            log::set_max_level(LevelFilter::Trace);
        }
    }
}
