//! The commands beside serving.

pub mod check;
pub mod health;
mod proxy_config;
