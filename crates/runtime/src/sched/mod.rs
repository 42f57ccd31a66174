//! Which instance a call gets, and on which thread it runs.

pub(crate) mod instances;
pub(crate) mod pool;
pub(crate) mod slot;
pub(crate) mod slow_lane;
pub(crate) mod ticker;
pub(crate) mod trial;

#[cfg(test)]
mod tests;
