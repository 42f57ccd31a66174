//! Which call gets which instance, and which thread.

pub(crate) mod pool;
pub(crate) mod ticker;
