//! Which checkpoint one is, beyond its number.

use crate::digest::ContentDigest;
use crate::units::CheckpointId;
use serde::{Deserialize, Serialize};

/// One certain checkpoint. Its number alone could be that of another, in a store that lost its
/// newest checkpoints or that another store has replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointIdentity {
    /// Its number.
    #[serde(rename = "seq")]
    pub id: CheckpointId,
    /// Of the manifest's file.
    pub manifest: ContentDigest,
}

impl CheckpointIdentity {
    /// `manifest`: the bytes of the manifest's file.
    pub fn new(id: CheckpointId, manifest: &[u8]) -> Self {
        Self { id, manifest: ContentDigest::of(manifest) }
    }
}
