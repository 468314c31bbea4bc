//! The result of a checkpoint: the JSON of `stillpoint checkpoint --json`.

use anyhow::Error;
use checkpoint_format::CheckpointId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::Instant;
use vm::error::{EngineError, Phase};

/// A checkpoint that was taken, or was not needed: what it holds, cost and stored.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// The checkpoint's ID; that of the parent when nothing changed.
    pub id: CheckpointId,
    /// The checkpoint that it is relative to; none for a full one.
    pub parent: Option<CheckpointId>,
    /// How much of the VM it holds.
    pub kind: Kind,
    /// Where the memory came from: `tracker`, `pre-copy`, `background-snapshot`, `stopped` or
    /// `process-memory`.
    pub engine: String,
    /// The guest's run state, by QEMU's name: `running`, `paused`, …
    #[serde(default)]
    pub run_state: String,
    /// RFC 3339, UTC.
    pub started_at: String,
    /// From the command `stop` until the guest ran again, in milliseconds.
    pub pause_ms: f64,
    /// Live passes before the pause; each has a pause of its own, in `brief_stops_ms`.
    #[serde(rename = "rounds")]
    pub passes: usize,
    /// The brief stops before those passes, in order, in milliseconds.
    pub brief_stops_ms: Vec<f64>,
    /// Pages written since the parent, also those with the same content as before.
    pub pages_dirty: u64,
    /// Pages whose content differs from the parent's, in bytes.
    pub bytes_changed: u64,
    /// What was stored, metadata included, before compression, in bytes.
    pub bytes_stored_raw: u64,
    /// What was stored, as the store holds it, in bytes.
    pub bytes_stored: u64,
    /// Of that, the bytes that earlier tries that failed had stored already.
    #[serde(default)]
    pub bytes_carried: u64,
    /// Bytes of read-only layers stored with this checkpoint (once for all VMs).
    pub layer_bytes_stored: u64,
    /// From the request until another host can restore it, in milliseconds.
    pub durable_ms: f64,
    /// Replicas of the pack that has the fewest; absent if the store does not report them.
    pub replicas: Option<u16>,
    /// Milliseconds in each phase, by its name.
    pub phases: BTreeMap<String, f64>,
    /// What the operator should know although the checkpoint succeeded.
    pub notes: Vec<String>,
}

/// How much of the VM a checkpoint holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// All of it: the first of a lineage.
    #[default]
    Full,
    /// What differs from its parent.
    Incremental,
    /// Nothing differs from the parent: no new checkpoint was made.
    Unchanged,
}

/// Milliseconds with the precision that a clock has here.
pub fn milliseconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

/// Whole milliseconds, as results of a proof have them.
pub(crate) fn whole_milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// The phase that work is in, and the times of those that it was in; a phase that comes twice adds
/// up.
#[derive(Debug)]
pub(crate) struct Phases {
    now: Phase,
    times: BTreeMap<String, f64>,
}

impl Phases {
    pub(crate) fn begin(first: Phase) -> Self {
        Self { now: first, times: BTreeMap::new() }
    }

    pub(crate) fn enter(&mut self, next: Phase) {
        self.now = next;
    }

    /// The error of the phase that the work is in.
    pub(crate) fn failed(&self, error: Error) -> EngineError {
        EngineError::new(self.now, error)
    }

    pub(crate) fn add(&mut self, name: &str, time: Duration) {
        *self.times.entry(name.to_owned()).or_default() += milliseconds(time);
    }

    pub(crate) fn since(&mut self, name: &str, begin: Instant) {
        self.add(name, begin.elapsed());
    }

    pub(crate) fn into_map(self) -> BTreeMap<String, f64> {
        self.times
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use serde_json::json;

    /// Scripts read it: names and forms stay.
    #[test]
    fn outcome_as_json_has_the_names_that_scripts_read() {
        let outcome = Outcome {
            id: CheckpointId(7),
            parent: Some(CheckpointId(6)),
            kind: Kind::Incremental,
            passes: 2,
            ..Outcome::default()
        };
        let expected = json!({
            "id": 7, "parent": 6, "kind": "incremental", "engine": "", "run_state": "",
            "started_at": "", "pause_ms": 0.0, "rounds": 2, "brief_stops_ms": [], "pages_dirty": 0,
            "bytes_changed": 0, "bytes_stored_raw": 0, "bytes_stored": 0, "bytes_carried": 0,
            "layer_bytes_stored": 0, "durable_ms": 0.0, "replicas": null, "phases": {},
            "notes": [],
        });
        assert_eq!(serde_json::to_value(&outcome).unwrap(), expected);
        assert_eq!(serde_json::from_value::<Outcome>(expected).unwrap(), outcome);
        let kinds = [Kind::Full, Kind::Unchanged].map(|kind| json!(kind));
        assert_eq!(kinds, [json!("full"), json!("unchanged")]);
    }
}
