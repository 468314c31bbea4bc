//! The proof remembered: when a checkpoint was restored and compared, with which QEMU and where.
//!
//! For people. Nothing depends on a note, and a store that cannot be written is proven as well.

use super::Report;
use crate::checkpoint::outcome::whole_milliseconds;
use crate::stores;
use anyhow::{Context, Result};
use bytes::Bytes;
use checkpoint_format::{CheckpointId, Checksum, VmName};
use checkpoint_store::Repository;
use serde::{Deserialize, Serialize};
use std::time::SystemTime;
use vm::error::{EngineError, InPhase, Phase};

const FORMAT: u32 = 1;

/// What `show --json` has under `proofs`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Note {
    /// That of the version that wrote it; others are not read.
    pub format: u32,
    /// Of the manifest that was proven.
    pub manifest: Checksum,
    /// RFC 3339, UTC.
    pub proven_at: String,
    /// Of the QEMU that restored it, as `MAJOR.MINOR.MICRO`.
    pub qemu_version: String,
    /// The name of the host where it was proven.
    pub host: String,
    /// Of this program.
    pub stillpoint_version: String,
    /// How long the guest ran on after the comparison, in milliseconds; absent where it did not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ran_ms: Option<u64>,
}

pub(super) async fn manifest_checksum(
    repository: &Repository,
    vm: &VmName,
    id: CheckpointId,
) -> Result<Checksum> {
    let bytes = repository
        .read_manifest(vm, id)
        .await
        .with_context(|| format!("reading the manifest of {vm}@{id}"))?;
    Ok(Checksum::of(&bytes))
}

/// One note for each QEMU version and host, and one more where the guest ran.
pub(super) async fn write(store: &str, report: &Report) -> Result<()> {
    let note = Note {
        format: FORMAT,
        manifest: report.manifest,
        proven_at: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
        qemu_version: report.qemu_version.clone(),
        host: nix::unistd::gethostname()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default(),
        stillpoint_version: env!("CARGO_PKG_VERSION").to_owned(),
        ran_ms: report.ran.as_ref().map(|ran| whole_milliseconds(ran.time)),
    };
    let key = Checksum::of(
        format!("{} {} {} {}", note.manifest, note.qemu_version, note.host, note.ran_ms.is_some())
            .as_bytes(),
    );
    let text = serde_json::to_vec_pretty(&note).context("encoding the note")?;
    let repository = stores::open_existing(store).await?;
    repository.note_proof(&report.vm, report.id, &key, Bytes::from(text)).await?;
    Ok(())
}

/// Proofs of this very checkpoint, oldest first. A note that cannot be parsed is another
/// version's.
///
/// # Errors
/// When the store cannot be read, or has no such checkpoint.
pub async fn read(
    repository: &Repository,
    vm: &VmName,
    id: CheckpointId,
) -> Result<Vec<Note>, EngineError> {
    all_of(repository, vm, id).await.in_phase(Phase::Verify)
}

async fn all_of(repository: &Repository, vm: &VmName, id: CheckpointId) -> Result<Vec<Note>> {
    let manifest = manifest_checksum(repository, vm, id).await?;
    let notes = repository.proofs(vm, id).await.context("reading the notes of proofs")?;
    let parsed = notes.iter().filter_map(|note| serde_json::from_slice::<Note>(note).ok());
    let mut notes: Vec<Note> =
        parsed.filter(|note| note.format == FORMAT && note.manifest == manifest).collect();
    notes.sort_by(|one, other| one.proven_at.cmp(&other.proven_at));
    Ok(notes)
}

impl std::fmt::Display for Note {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} with QEMU {} on {}", self.proven_at, self.qemu_version, self.host)?;
        match self.ran_ms {
            Some(ms) => write!(f, ", and ran for {ms} ms"),
            None => Ok(()),
        }
    }
}
