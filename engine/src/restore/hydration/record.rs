//! What the runtime directory says of a hydration, so that the next helper continues it.

use anyhow::{Context, Result};
use checkpoint_format::{CheckpointIdentity, VmName};
use serde::{Deserialize, Serialize};
use std::io::ErrorKind;
use vm::runtime_dir::RuntimeDir;

const FILE: &str = "hydration.json";
const MAX_BYTES: u64 = 64 << 10;

/// Where the missing pages come from, and where they go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    /// The store's URL.
    pub store: String,
    /// The VM whose checkpoint it is; a copy has another name.
    pub vm: VmName,
    /// The checkpoint: another of the same ID is another.
    pub checkpoint: CheckpointIdentity,
    /// The RAM block.
    pub block: String,
    /// Where QEMU has mapped it.
    pub host_address: u64,
    /// Its size.
    pub bytes: u64,
    /// Bytes of all pages that are not zero.
    pub total_bytes: u64,
}

impl Record {
    /// Before a thread can wait for a page.
    pub(super) fn save(&self, runtime: &RuntimeDir) -> Result<()> {
        let text = serde_json::to_vec(self).context("internal error: encoding hydration.json")?;
        Ok(runtime.replace(FILE, &text)?)
    }

    /// That of a hydration that has not ended.
    pub(super) fn load(runtime: &RuntimeDir) -> Result<Option<Self>> {
        if !runtime.path().join(FILE).exists() {
            return Ok(None);
        }
        let text = runtime.read(FILE, MAX_BYTES)?;
        let read = serde_json::from_slice(&text);
        read.map(Some).with_context(|| {
            format!(
                "{} is damaged: where the rest of the guest's memory is cannot be known; restore \
                 the VM again",
                runtime.path().join(FILE).display()
            )
        })
    }

    /// No thread waits for a page any more.
    pub(super) fn remove(runtime: &RuntimeDir) -> Result<()> {
        match std::fs::remove_file(runtime.path().join(FILE)) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(error).with_context(|| format!("removing {FILE}"))
            }
            _ => Ok(()),
        }
    }
}
