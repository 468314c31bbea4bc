//! A checkpoint and its ancestors, as the store has them, and the names that users give them.

use anyhow::{Context, Result, anyhow};
use checkpoint_format::{
    CheckpointId, CheckpointIdentity, DigestTable, Manifest, PackIndex, PackPlace, PackRecord,
    PageCount, Records, SpaceName, SpaceRecord, VmName,
};
use checkpoint_store::{Repository, StoreError};
use futures::future::{BoxFuture, join_all};
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::str::FromStr;
use vm::error::{Class, EngineError, InPhase, Phase, class_of, damaged};

/// Most checkpoints of a lineage, the full one included. A reader takes more for damage.
pub(crate) const LONGEST_LINEAGE: usize = 100_000;
/// A lineage of this many checkpoints gets no more: the next one is full and begins another. A
/// restore of a checkpoint without an index, `verify` and a proof read each manifest of a lineage,
/// one after the other (about a minute on HDFS).
pub(crate) const NEW_LINEAGE_AFTER: u64 = LONGEST_LINEAGE as u64 / 10;
/// The manifests of one lineage, together: those of its most checkpoints of a large VM.
const LINEAGE_BYTES: u64 = 2 << 30;
/// Manifests and pack indexes read from the store at once.
const READS: usize = 8;

/// `NAME` or `NAME@ID`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointName {
    /// The VM's name in the store.
    pub vm: VmName,
    /// The checkpoint; none where any, or the newest, is meant.
    pub id: Option<CheckpointId>,
}

impl FromStr for CheckpointName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, id) = match text.split_once('@') {
            Some((name, id)) => (name, Some(id)),
            None => (text, None),
        };
        let vm = name.parse().map_err(|error| format!("{error}"))?;
        let number = |id: &str| {
            id.parse().map(CheckpointId).map_err(|_| {
                format!("'{id}' is no checkpoint id: a number was expected, as in {name}@7")
            })
        };
        Ok(Self { vm, id: id.map(number).transpose()? })
    }
}

/// The checkpoint that a name means: the newest when it names none.
///
/// # Errors
/// When the store has no such checkpoint, or cannot be read.
pub async fn resolve(
    repository: &Repository,
    name: &CheckpointName,
) -> Result<CheckpointId, EngineError> {
    if let Some(id) = name.id
        && repository.has_checkpoint(&name.vm, id).await.in_phase(Phase::Open)?
    {
        return Ok(id);
    }
    let known = checkpoints(repository, &name.vm).await?;
    let newest = known.last().context("internal error: an empty list of checkpoints");
    let newest = newest.in_phase(Phase::Open)?;
    let vm = &name.vm;
    match name.id {
        None => Ok(*newest),
        Some(id) if known.contains(&id) => Ok(id),
        Some(id) => {
            Err(anyhow!("the store has no checkpoint {vm}@{id}; the newest is {vm}@{newest}"))
                .in_phase(Phase::Open)
        }
    }
}

/// The checkpoints of a VM, ascending, at least one.
///
/// # Errors
/// When the store has none (the name is not known, or was only claimed), or cannot be read.
pub async fn checkpoints(
    repository: &Repository,
    vm: &VmName,
) -> Result<Vec<CheckpointId>, EngineError> {
    let known = repository
        .checkpoints(vm)
        .await
        .with_context(|| format!("looking for checkpoints of {vm}"))
        .in_phase(Phase::Open)?;
    if known.is_empty() {
        return Err(anyhow!(
            "the store has no checkpoint of {vm}; 'stillpoint ls' shows what it has"
        ))
        .in_phase(Phase::Open);
    }
    Ok(known)
}

/// Oldest first; the first is a full checkpoint.
pub(crate) struct Lineage {
    pub vm: VmName,
    pub files: Vec<ManifestFile>,
}

impl Lineage {
    pub(crate) async fn read(
        repository: &Repository,
        vm: &VmName,
        id: CheckpointId,
    ) -> Result<Self> {
        let mut files = Vec::new();
        let mut next = Some(id);
        let mut bytes = 0;
        let mut ahead = BTreeMap::new();
        while let Some(ancestor) = next {
            if files.len() == LONGEST_LINEAGE || bytes > LINEAGE_BYTES {
                return Err(damaged(format!(
                    "the lineage of {vm}@{id} has more than {LONGEST_LINEAGE} checkpoints or {LINEAGE_BYTES} bytes of manifests"
                )));
            }
            let file = match ahead.remove(&ancestor) {
                Some(file) => file,
                None => read_ahead(repository, vm, ancestor, &mut ahead).await,
            }?;
            next = file.manifest.parent;
            bytes += file.head_len;
            files.push(file);
        }
        files.reverse();
        Ok(Self { vm: vm.clone(), files })
    }

    pub(crate) fn manifests(&self) -> impl DoubleEndedIterator<Item = &Manifest> {
        self.files.iter().map(|file| &file.manifest)
    }

    /// Every pack, oldest first; its place in this list is its number in a page map.
    pub(crate) fn packs(&self) -> Vec<(CheckpointId, &PackRecord)> {
        let of = |manifest: &Manifest| manifest.id;
        self.manifests()
            .flat_map(|manifest| manifest.packs.iter().map(move |pack| (of(manifest), pack)))
            .collect()
    }

    /// The indexes of [`Lineage::packs`], in that order.
    pub(crate) async fn indexes(&self, repository: &Repository) -> Result<Vec<PackIndex>> {
        self.read_indexes(repository).try_collect().await
    }

    /// A few at a time: all of a long lineage's indexes together may be larger than the VM.
    fn read_indexes<'a>(&'a self, repository: &'a Repository) -> BoxStream<'a, Result<PackIndex>> {
        let mut reads: Vec<BoxFuture<'a, Result<PackIndex>>> = Vec::new();
        for (id, pack) in self.packs() {
            reads.push(Box::pin(index(repository, &self.vm, id, pack)));
        }
        futures::stream::iter(reads).buffered(READS).boxed()
    }

    /// What the checkpoints recorded, page by page.
    pub(crate) async fn records(&self, repository: &Repository) -> Result<Records> {
        let mut indexes = self.read_indexes(repository);
        let mut records = Records::new(None);
        for manifest in self.manifests() {
            records.begin_checkpoint(&manifest.space_sizes());
            for pack in &manifest.packs {
                let index =
                    indexes.try_next().await?.context("a pack of the lineage has no index")?;
                let place = PackPlace { checkpoint: manifest.id, name: pack.name.clone() };
                records.apply_pack(place, &index)?;
            }
        }
        Ok(records)
    }

    /// What the newest checkpoint holds, page by page. `tables` names the spaces wanted, each with
    /// the table that is filled.
    pub(crate) async fn digests(
        &self,
        repository: &Repository,
        tables: &mut [(SpaceName, DigestTable)],
    ) -> Result<()> {
        let mut indexes = self.read_indexes(repository);
        let mut sizes = vec![PageCount(0); tables.len()];
        for manifest in self.manifests() {
            for ((space, table), before) in tables.iter_mut().zip(&mut sizes) {
                // As a restore sees it: what a space lost when it shrank, or was away, does not
                // come back.
                let now = manifest.space(space).map_or(PageCount(0), SpaceRecord::pages);
                if now < *before {
                    table.truncate(now);
                }
                *before = now;
            }
            for _ in &manifest.packs {
                let index =
                    indexes.try_next().await?.context("a pack of the lineage has no index")?;
                tables.iter_mut().for_each(|(space, table)| table.apply_pack(space, &index));
            }
        }
        Ok(())
    }
}

/// Whether `id` is `of` or one of its ancestors. The IDs of a lineage descend.
pub(crate) async fn is_ancestor(
    repository: &Repository,
    vm: &VmName,
    of: CheckpointId,
    id: CheckpointId,
) -> Result<bool> {
    let (mut next, mut ahead) = (Some(of), BTreeMap::new());
    while let Some(ancestor) = next.filter(|ancestor| *ancestor > id) {
        let file = match ahead.remove(&ancestor) {
            Some(file) => file,
            None => read_ahead(repository, vm, ancestor, &mut ahead).await,
        };
        next = file.in_phase(Phase::Open)?.manifest.parent;
    }
    Ok(next == Some(id))
}

/// Reads a manifest, and those of the numbers below it, at once: most often the next ancestors.
async fn read_ahead(
    repository: &Repository,
    vm: &VmName,
    id: CheckpointId,
    ahead: &mut BTreeMap<CheckpointId, Result<ManifestFile>>,
) -> Result<ManifestFile> {
    let lowest = CheckpointId(id.0.saturating_sub(READS as u64 - 1)).max(CheckpointId::FIRST);
    let mut below: Vec<BoxFuture<'_, (CheckpointId, Result<ManifestFile>)>> = Vec::new();
    for id in (lowest.0..id.0).map(CheckpointId) {
        below.push(Box::pin(async move { (id, manifest_file(repository, vm, id).await) }));
    }
    let (file, below) = tokio::join!(manifest_file(repository, vm, id), join_all(below));
    // What no ancestor has need not be there, nor be sound.
    *ahead = below.into_iter().collect();
    file
}

/// What a checkpoint consists of, as its manifest says.
///
/// # Errors
/// When the store has no such checkpoint or cannot be read; damaged when the manifest is not one,
/// or is another checkpoint's.
pub async fn manifest(
    repository: &Repository,
    vm: &VmName,
    id: CheckpointId,
) -> Result<Manifest, EngineError> {
    manifest_file(repository, vm, id).await.map(|file| file.manifest).in_phase(Phase::Open)
}

/// A manifest, and what is known of its file.
pub(crate) struct ManifestFile {
    pub manifest: Manifest,
    pub identity: CheckpointIdentity,
    /// Bytes of header line and body. The segment of the index, if there is one, follows them.
    pub head_len: u64,
}

pub(crate) async fn manifest_file(
    repository: &Repository,
    vm: &VmName,
    id: CheckpointId,
) -> Result<ManifestFile> {
    let bytes = repository
        .read_manifest(vm, id)
        .await
        .with_context(|| format!("reading the manifest of {vm}@{id}"))?;
    let manifest = Manifest::parse(&bytes).with_context(|| format!("the manifest of {vm}@{id}"))?;
    if manifest.id != id || manifest.parent.is_some_and(|parent| parent >= id) {
        return Err(damaged(format!(
            "the manifest of {vm}@{id} says that it is {}@{}",
            manifest.vm, manifest.id
        )));
    }
    let identity = CheckpointIdentity::new(id, &bytes);
    Ok(ManifestFile { manifest, identity, head_len: bytes.len() as u64 })
}

/// Whether what was to be read is missing or damaged, and not only out of reach.
pub(crate) fn is_lost(error: &anyhow::Error) -> bool {
    let is_missing = |cause: &(dyn std::error::Error + 'static)| {
        cause.downcast_ref::<StoreError>().is_some_and(StoreError::is_not_found)
    };
    error.chain().any(is_missing) || class_of(error) == Class::Damaged
}

pub(crate) async fn index(
    repository: &Repository,
    vm: &VmName,
    id: CheckpointId,
    pack: &PackRecord,
) -> Result<PackIndex> {
    let about = || format!("the index of {vm}@{id}/{}", pack.name);
    let range = pack.info.footer().trailer_range();
    let trailer = repository
        .read_pack_range(vm, id, pack.name.as_str(), range.start, range.end - range.start)
        .await;
    pack.info.parse_index(&trailer.with_context(about)?).with_context(about)
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn checkpoint_names_are_parsed() {
        let name: CheckpointName = "web-1@12".parse().unwrap();
        assert_eq!((name.vm.as_str(), name.id), ("web-1", Some(CheckpointId(12))));
        assert!("web@x".parse::<CheckpointName>().unwrap_err().contains("web@7"));
        assert!("/etc@1".parse::<CheckpointName>().is_err());
    }
}
