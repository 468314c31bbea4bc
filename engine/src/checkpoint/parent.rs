//! The checkpoint that the next one adds to.

use crate::index::LineageIndex;
use crate::lineage::{self, Lineage, ManifestFile};
use anyhow::{Context, Result};
use checkpoint_format::{
    ByteOffset, CheckpointId, CheckpointIdentity, DigestTable, Manifest, PageCount, SegmentRecord,
    SpaceName, VmName,
};
use checkpoint_store::{Repository, StoreError};
use std::collections::BTreeSet;
use vm::error::damaged;

/// Ancestors that are looked at for one certain checkpoint. Marks count from the parent, or from
/// the checkpoint before it if the helper ended before it had said so.
const ANCESTORS: usize = 16;

/// What the next checkpoint has to know of it.
#[derive(Clone, Debug)]
pub(crate) struct Parent {
    pub identity: CheckpointIdentity,
    /// Bytes of its manifest's header line and body, of which the identity is.
    pub head_len: u64,
    /// Checkpoints of its lineage, itself included.
    pub checkpoints: u64,
    pub spaces: Vec<(SpaceName, PageCount)>,
    /// Those of its index, each with its place. `None`: it has no index.
    pub segments: Option<Vec<SegmentRecord>>,
}

impl Parent {
    /// `checkpoints`: of its lineage, if it has no index.
    pub(super) fn new(
        manifest: &Manifest,
        identity: CheckpointIdentity,
        head_len: u64,
        checkpoints: u64,
    ) -> Self {
        let index = manifest.index.as_ref();
        let placed = |segment: &SegmentRecord| SegmentRecord {
            at: segment.at.or(Some(ByteOffset(head_len))),
            ..segment.clone()
        };
        Self {
            identity,
            head_len,
            checkpoints: index.map_or(checkpoints, |index| index.checkpoints),
            spaces: manifest.space_sizes(),
            segments: index.map(|index| index.segments.iter().map(placed).collect()),
        }
    }

    /// Whether what it builds on is among the checkpoints that are `listed`, ascending: those that
    /// are `needed` to restore it, and so many as it has ancestors. Without the others it could be
    /// restored but no longer verified.
    pub(super) fn is_complete(
        &self,
        needed: &BTreeSet<CheckpointId>,
        listed: &[CheckpointId],
    ) -> bool {
        let first = self.segments.iter().flatten().last().map(|oldest| oldest.first);
        let lineage = first.unwrap_or(CheckpointId::FIRST)..=self.identity.id;
        let there = listed.iter().filter(|id| lineage.contains(id)).count() as u64;
        there >= self.checkpoints && needed.iter().all(|id| listed.binary_search(id).is_ok())
    }

    /// Whether the store has this very checkpoint.
    pub(super) async fn is_in(&self, repository: &Repository, vm: &VmName) -> Result<bool> {
        let id = self.identity.id;
        match repository.read_manifest_range(vm, id, 0, self.head_len).await {
            Ok(bytes) => Ok(CheckpointIdentity::new(id, &bytes) == self.identity),
            Err(StoreError::NotFound { .. } | StoreError::PastEnd { .. }) => Ok(false),
            Err(error) => Err(error).with_context(|| format!("reading the manifest of {vm}@{id}")),
        }
    }
}

/// The parent with what it builds on, as a helper that begins finds it in the store.
pub(super) struct Ancestry {
    known: Known,
    /// The checkpoints that a restore of the parent needs, itself included.
    needed: BTreeSet<CheckpointId>,
}

enum Known {
    Index(Box<(ManifestFile, LineageIndex)>),
    /// It has no index.
    Lineage(Lineage),
}

impl Ancestry {
    /// `listed`: all checkpoints of the VM. An error if those that the parent needs are not among
    /// them.
    pub(super) async fn read(
        repository: &Repository,
        vm: &VmName,
        id: CheckpointId,
        listed: &[CheckpointId],
    ) -> Result<Self> {
        let file = lineage::manifest_file(repository, vm, id).await?;
        let Some(record) = &file.manifest.index else {
            let lineage = Lineage::read(repository, vm, id).await?;
            let needed = lineage.manifests().map(|manifest| manifest.id).collect();
            return Ok(Self { known: Known::Lineage(lineage), needed });
        };
        let index = LineageIndex::open(repository, vm, &file, record).await?;
        let mut needed = index.checkpoints();
        needed.insert(id);
        let this = Self { known: Known::Index(Box::new((file, index))), needed };
        if !this.parent()?.is_complete(&this.needed, listed) {
            return Err(damaged(format!("the store does not have all that {vm}@{id} builds on")));
        }
        Ok(this)
    }

    fn file(&self) -> Result<&ManifestFile> {
        match &self.known {
            Known::Index(found) => Ok(&found.0),
            Known::Lineage(lineage) => {
                lineage.files.last().context("a lineage without its newest checkpoint")
            }
        }
    }

    pub(super) fn manifest(&self) -> Result<&Manifest> {
        Ok(&self.file()?.manifest)
    }

    pub(super) fn parent(&self) -> Result<Parent> {
        let ManifestFile { manifest, identity, head_len } = self.file()?;
        Ok(Parent::new(manifest, *identity, *head_len, self.needed.len() as u64))
    }

    pub(super) fn into_needed(self) -> BTreeSet<CheckpointId> {
        self.needed
    }

    /// What the parent holds, page by page. `tables` names the spaces wanted, each with the table
    /// that is filled.
    pub(super) async fn digests(
        &self,
        repository: &Repository,
        tables: &mut [(SpaceName, DigestTable)],
    ) -> Result<()> {
        match &self.known {
            Known::Index(found) => found.1.digests(&found.0.manifest, tables).await,
            Known::Lineage(lineage) => lineage.digests(repository, tables).await,
        }
    }

    /// The parent and its ancestors back to `oldest`, as far as they can be read.
    pub(super) async fn identities(
        &self,
        repository: &Repository,
        oldest: CheckpointId,
    ) -> Vec<CheckpointIdentity> {
        let (file, index) = match &self.known {
            Known::Lineage(lineage) => {
                return lineage.files.iter().map(|file| file.identity).collect();
            }
            Known::Index(found) => (&found.0, &found.1),
        };
        let mut found = vec![file.identity];
        let mut next = file.manifest.parent;
        while let Some(id) = next.filter(|id| *id >= oldest && found.len() < ANCESTORS) {
            let Ok(file) = lineage::manifest_file(repository, index.vm(), id).await else { break };
            found.push(file.identity);
            next = file.manifest.parent;
        }
        found
    }
}
