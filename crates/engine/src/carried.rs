//! What one agent carries to the next, which goes on with its connections.

use serde::{Deserialize, Serialize};

use crate::collect::CarriedBodies;
use crate::context::CarriedContexts;

/// What an agent remembers of live requests, for the process that takes over its connections.
#[derive(Serialize, Deserialize)]
pub struct LiveRequests {
    /// The key of a fixed id under a fixed secret: the standard library may change how it hashes.
    pub(crate) hash_check: u64,
    /// None if they were carried before.
    pub(crate) contexts: Option<CarriedContexts>,
    pub(crate) bodies: CarriedBodies,
}

/// The processes hash ids differently, so the state of requests cannot be carried over.
#[derive(Debug, thiserror::Error)]
#[error("the other process was built with another version of the standard library, which hashes differently")]
pub struct OtherHash;
