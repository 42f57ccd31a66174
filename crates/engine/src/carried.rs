//! What one agent carries to the next, which goes on with its connections.

use serde::{Deserialize, Serialize};

use crate::collect::CarriedBodies;
use crate::context::CarriedContexts;

/// What an agent remembers of live requests, for the process that takes over its connections.
#[derive(Serialize, Deserialize)]
pub struct LiveRequests {
    /// The key of a fixed id under a fixed secret: another version may hash differently.
    pub(crate) hash_check: u64,
    /// None if they were carried before.
    pub(crate) contexts: Option<CarriedContexts>,
    pub(crate) bodies: CarriedBodies,
}

/// The processes hash ids differently, so the state of requests cannot be carried over.
#[derive(Debug, thiserror::Error)]
#[error("the state of live requests cannot be taken over, because the other process hashes ids differently")]
pub struct OtherHash;
