//! Which call gets which instance, and which thread it runs on.

pub(crate) mod instances;
pub(crate) mod pool;
pub(crate) mod slot;
pub(crate) mod slow_lane;
pub(crate) mod ticker;

#[cfg(test)]
mod tests;
