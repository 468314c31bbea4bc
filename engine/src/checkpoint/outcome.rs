//! What a checkpoint tells about itself: the JSON of `stillpoint checkpoint --json`.

use anyhow::Error;
use checkpoint_format::CheckpointId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::Instant;
use vm::error::{EngineError, Phase};

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// The checkpoint's number; of the parent when nothing changed.
    pub id: CheckpointId,
    pub parent: Option<CheckpointId>,
    pub kind: Kind,
    /// Where the memory came from: `tracker`, `pre-copy`, `background-snapshot`, `stopped` or
    /// `process-memory`.
    pub engine: String,
    /// What the guest was doing, in QEMU's word: `running`, `paused`, …
    #[serde(default)]
    pub run_state: String,
    /// RFC 3339, UTC.
    pub started_at: String,
    /// From the order to stop until the guest ran again.
    pub pause_ms: f64,
    /// Live passes before the pause; each has a pause of its own, in `brief_stops_ms`.
    #[serde(rename = "rounds")]
    pub passes: u32,
    pub brief_stops_ms: Vec<f64>,
    /// Written since the parent, whatever was written.
    pub pages_dirty: u64,
    /// Pages whose content differs from the parent's, in bytes.
    pub bytes_changed: u64,
    /// What was stored, metadata included, before compression.
    pub bytes_stored_raw: u64,
    /// What was stored, as the store holds it.
    pub bytes_stored: u64,
    /// Of that, what earlier tries that failed had stored already.
    #[serde(default)]
    pub bytes_carried: u64,
    /// Read-only layers stored with this checkpoint (once for all VMs).
    pub layer_bytes_stored: u64,
    /// From the request until another host can restore it.
    pub durable_ms: f64,
    /// Of the pack that has fewest; absent where the store does not say.
    pub replicas: Option<u16>,
    pub phases: BTreeMap<String, f64>,
    /// What the operator should know though all went well.
    pub notes: Vec<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    #[default]
    Full,
    Incremental,
    /// Nothing differs from the parent: no new checkpoint was made.
    Unchanged,
}

/// Milliseconds with the precision that a clock has here.
pub fn milliseconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

/// The phase that work is in, and the times of those that it was in; a phase that comes twice adds
/// up.
#[derive(Debug)]
pub struct Phases {
    now: Phase,
    times: BTreeMap<String, f64>,
}

impl Phases {
    pub fn begin(first: Phase) -> Self {
        Self { now: first, times: BTreeMap::new() }
    }

    pub fn enter(&mut self, next: Phase) {
        self.now = next;
    }

    /// The error of the phase that the work is in.
    pub fn failed(&self, error: Error) -> EngineError {
        EngineError::new(self.now, error)
    }

    pub fn add(&mut self, name: &str, time: Duration) {
        *self.times.entry(name.to_owned()).or_default() += milliseconds(time);
    }

    pub fn since(&mut self, name: &str, begin: Instant) {
        self.add(name, begin.elapsed());
    }

    pub fn into_map(self) -> BTreeMap<String, f64> {
        self.times
    }
}
