//! The records of writers: who has claimed which epoch of a VM.

use std::collections::HashSet;

use checkpoint_format::{Epoch, VmName};
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::bounded::Bounded;
use super::layout::{self, WriterFile};
use super::retry::retrying;
use crate::error::{Result, StoreError};

pub(super) const MAX_RECORD_LEN: u64 = 64 << 10;

/// Who claims, as it is saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriterRecord {
    /// The host's name.
    pub host: String,
    /// The kernel's boot id: tells a helper that restarted from a host that did.
    pub boot_id: String,
    /// The VM's running instance: a helper that restarts beside the same QEMU process continues
    /// with it.
    pub instance: String,
    /// The helper's process ID.
    pub pid: u32,
    /// RFC 3339.
    pub claimed_at: String,
    /// The Stillpoint version.
    #[serde(default)]
    pub version: String,
    /// What tells this host's hardware from a clone of its disk; `None` where that could not be
    /// read, and in records of older versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hardware: Option<String>,
}

/// The record in the store. The nonce tells a claimer whose answer was lost whether the record is
/// its own.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct SavedRecord {
    pub(super) nonce: String,
    #[serde(flatten)]
    pub(super) record: WriterRecord,
}

/// One claim, as found in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WriterInfo {
    /// The epoch that was claimed.
    pub epoch: Epoch,
    /// `None` if the record can't be read as one.
    pub record: Option<WriterRecord>,
    /// Whether its writer has released the VM.
    pub released: bool,
}

/// The epochs claimed, ascending, and those released.
pub(super) async fn list_claims(
    store: &Bounded,
    vm: &VmName,
) -> Result<(Vec<Epoch>, HashSet<Epoch>)> {
    let path = layout::writers(vm);
    let entries = match retrying(|| store.list(&path)).await {
        Err(error) if error.is_not_found() => Vec::new(),
        other => other?,
    };
    let (mut claims, mut released) = (Vec::new(), HashSet::new());
    for entry in entries {
        match layout::parse_writer_file(&entry.name) {
            Some(WriterFile::Claim(epoch)) => claims.push(epoch),
            Some(WriterFile::Released(epoch)) => {
                released.insert(epoch);
            }
            None => warn!(%path, name = entry.name, "unknown file among the writers"),
        }
    }
    claims.sort();
    Ok((claims, released))
}

pub(super) async fn read_record(
    store: &Bounded,
    vm: &VmName,
    epoch: Epoch,
) -> Result<Option<WriterRecord>> {
    let path = layout::writer(vm, epoch);
    let text = match retrying(|| store.read(&path, MAX_RECORD_LEN)).await {
        Ok(text) => text,
        // Pruned since it was listed, or nothing that we wrote: a claim all the same.
        Err(StoreError::NotFound { .. } | StoreError::Limit { .. }) => return Ok(None),
        Err(error) => return Err(error),
    };
    Ok(serde_json::from_slice::<SavedRecord>(&text).ok().map(|saved| saved.record))
}
