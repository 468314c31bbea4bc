//! What a restore is asked for, and what it answers.

use super::hooks::Hooks;
use super::line::Mapping;
use crate::lineage::CheckpointName;
use checkpoint_format::{CheckpointId, VmName};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

/// What is to be restored, and how.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Request {
    /// Which one; the newest if it names none.
    pub checkpoint: CheckpointName,
    /// The store's URL.
    pub store: String,
    /// Where the runtime directories are; none for the default.
    pub runtime_base: Option<PathBuf>,
    /// Another name, under which it is a VM of its own.
    pub new_name: Option<VmName>,
    /// Directory of the restored disks; none for one of the VM's name here.
    pub dir: Option<PathBuf>,
    /// QEMU's program; none for the first of this host that knows the machine type and is not older
    /// than the QEMU that the checkpoint was taken of.
    pub qemu: Option<String>,
    /// Directory for temporary fleecing overlays; none for the default.
    pub fleecing: Option<PathBuf>,
    /// Values of the saved command line that are replaced.
    pub map: Vec<Mapping>,
    /// Things of this host that the VM may have: `OPTION.KEY` or `OPTION.KEY=VALUE`.
    pub allow: Vec<String>,
    /// The operator's order to fence the current writer.
    pub take_over: bool,
    /// The guest stays stopped, though it ran.
    pub paused: bool,
    /// The guest runs, though it was stopped.
    pub run: bool,
    /// The guest runs before all its memory has arrived, where that is possible.
    #[serde(default)]
    pub lazy: bool,
    /// A guest that waits for a page so long is stopped; none: it waits without end.
    #[serde(default)]
    pub deadline: Option<Duration>,
    /// Programs of the operator around the restore.
    #[serde(default)]
    pub hooks: Hooks,
    /// The guest's clock stays as of the checkpoint, even if an agent could set it.
    #[serde(default)]
    pub keep_clock: bool,
}

impl Request {
    /// Of the restored VM.
    pub fn name(&self) -> &VmName {
        self.new_name.as_ref().unwrap_or(&self.checkpoint.vm)
    }

    /// Under its own name it is no copy.
    pub(super) fn is_copy(&self) -> bool {
        *self.name() != self.checkpoint.vm
    }
}

/// What came of a restore. As JSON it is what `stillpoint restore --json` prints.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// The restored VM.
    pub name: VmName,
    /// The VM whose checkpoint it was.
    pub restored: VmName,
    /// Which checkpoint.
    pub id: CheckpointId,
    /// Whether the guest runs.
    pub running: bool,
    /// What it does, in QEMU's word.
    pub run_state: String,
    /// From the request until the guest may run, in milliseconds.
    pub resume_ms: f64,
    /// Bytes read from the store, layers included.
    pub bytes_read: u64,
    /// Of those, the bytes of layers that had no copy here.
    pub layer_bytes_read: u64,
    /// Directory of its disks.
    pub dir: PathBuf,
    /// Milliseconds in each phase, by its name.
    pub phases: BTreeMap<String, f64>,
    /// Memory that was still to come when the guest began to run.
    #[serde(default)]
    pub memory_bytes_to_come: u64,
    /// Disks whose blocks were still to come then, by their names in the store.
    #[serde(default)]
    pub disks_to_come: Vec<String>,
    /// What the operator should know though all went well.
    pub notes: Vec<String>,
    /// What the VM does, in words.
    #[serde(skip)]
    pub state: String,
}
