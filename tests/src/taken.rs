//! What a checkpoint said about itself, and where the guest was when it was taken.

use serde::Deserialize;

/// What `stillpoint checkpoint --json` says, as far as tests look at it.
#[derive(Clone, Debug, Deserialize)]
pub struct Outcome {
    pub id: u64,
    pub parent: Option<u64>,
    pub kind: String,
    /// Where the memory came from: `tracker`, `background-snapshot` or `pre-copy`.
    #[serde(default)]
    pub engine: String,
    pub pause_ms: f64,
    pub pages_dirty: u64,
    pub bytes_changed: u64,
    pub bytes_stored_raw: u64,
    pub bytes_stored: u64,
    #[serde(default)]
    pub bytes_carried: u64,
    pub layer_bytes_stored: u64,
    pub durable_ms: f64,
    pub replicas: Option<u16>,
    pub notes: Vec<String>,
}

impl Outcome {
    /// How much more than what changed is stored; compression apart.
    pub fn stored_over_changed(&self) -> f64 {
        self.bytes_stored_raw as f64 / self.bytes_changed as f64
    }
}

/// A checkpoint, and the guest's last steps that were seen before and after it.
#[derive(Clone, Debug)]
pub struct Taken {
    /// NAME@ID.
    pub name: String,
    pub outcome: Outcome,
    pub before: u64,
    pub after: u64,
}
