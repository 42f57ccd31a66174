//! The fuzz targets.

#[cfg(feature = "core")]
mod modules;
mod readers;
mod uri;

#[cfg(feature = "core")]
pub use modules::modules;
pub use readers::{answers, frames, headers, messages};
