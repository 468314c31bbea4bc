//! Whether the store still holds the lineage that the next checkpoint adds to.
//!
//! A directory of many thousand checkpoints is not listed for each of them. The store says when an
//! entry of the directory last came or went. Changes of the helper's own are known, so any other
//! time than that of the last of them means that the directory has to be listed again.

use super::parent::Parent;
use anyhow::{Context, Result};
use checkpoint_format::{CheckpointId, VmName};
use checkpoint_store::Repository;
use std::collections::BTreeSet;
use std::time::SystemTime;

/// It is listed after so many checkpoints anyhow, and as many more as are an eighth of those
/// listed: what another did in the very moment of a change of ours, or within one tick of the
/// store's clock, is found then.
const LISTING_DUE: usize = 64;

/// The parent with what it builds on, and what is known of their directory in the store.
pub(super) struct HeldLineage {
    vm: VmName,
    /// `None`: the next checkpoint is full.
    parent: Option<Parent>,
    /// Checkpoints that a restore of the parent needs, and perhaps some that it needed before their
    /// pages were written again.
    needed: BTreeSet<CheckpointId>,
    /// In the store, of this lineage or not.
    newest: Option<CheckpointId>,
    /// None: it has to be listed.
    listed: Option<Listed>,
}

/// The directory had all of the lineage, and nothing newer, since it was listed.
#[derive(Clone, Copy)]
struct Listed {
    /// By the store's clock.
    changed: SystemTime,
    entries: usize,
    /// Checkpoints that this helper has added since.
    added: usize,
}

/// The checkpoints of a VM, and when that was so.
pub(super) struct Listing {
    pub checkpoints: Vec<CheckpointId>,
    changed: Option<SystemTime>,
}

impl Listing {
    pub(super) async fn read(repository: &Repository, vm: &VmName) -> Result<Self> {
        // Before the listing: what comes or goes meanwhile shows in the next time.
        let changed = repository.checkpoints_changed(vm).await;
        let changed =
            changed.with_context(|| format!("looking for changes of {vm}'s checkpoints"))?;
        let checkpoints = repository
            .checkpoints(vm)
            .await
            .with_context(|| format!("looking for checkpoints of {vm}"))?;
        Ok(Self { checkpoints, changed })
    }

    fn listed(&self) -> Option<Listed> {
        Some(Listed { changed: self.changed?, entries: self.checkpoints.len(), added: 0 })
    }
}

impl HeldLineage {
    /// `listing`: made before the parent was read.
    pub(super) fn new(
        vm: &VmName,
        parent: Option<Parent>,
        needed: BTreeSet<CheckpointId>,
        listing: &Listing,
    ) -> Self {
        Self {
            vm: vm.clone(),
            parent,
            needed,
            newest: listing.checkpoints.last().copied(),
            listed: listing.listed(),
        }
    }

    pub(super) fn parent(&self) -> Option<&Parent> {
        self.parent.as_ref()
    }

    pub(super) fn newest(&self) -> Option<CheckpointId> {
        self.newest
    }

    /// A checkpoint is durable, and the parent of the next.
    pub(super) fn add(&mut self, checkpoint: Parent) {
        let id = checkpoint.identity.id;
        self.needed.insert(id);
        self.newest = Some(id);
        self.parent = Some(checkpoint);
        self.listed.iter_mut().for_each(|listed| listed.added += 1);
    }

    /// The next checkpoint is full.
    pub(super) fn clear(&mut self) {
        self.parent = None;
        self.needed.clear();
    }

    /// Whether the store still holds all of the lineage, and nothing newer than what was found.
    pub(super) async fn is_held(&mut self, repository: &Repository) -> Result<bool> {
        if !self.is_unchanged(repository).await? {
            self.listed = None;
            let listing = Listing::read(repository, &self.vm).await?;
            let is_complete =
                |parent: &Parent| parent.is_complete(&self.needed, &listing.checkpoints);
            if listing.checkpoints.last().copied() != self.newest
                || !self.parent.as_ref().is_none_or(is_complete)
            {
                return Ok(false);
            }
            self.listed = listing.listed();
        }
        match &self.parent {
            Some(parent) => parent.is_in(repository, &self.vm).await,
            None => Ok(true),
        }
    }

    async fn is_unchanged(&self, repository: &Repository) -> Result<bool> {
        let Some(listed) =
            self.listed.filter(|listed| listed.added < LISTING_DUE + listed.entries / 8)
        else {
            return Ok(false);
        };
        let changed = repository.checkpoints_changed(&self.vm).await;
        let changed =
            changed.with_context(|| format!("looking for changes of {}'s checkpoints", self.vm))?;
        Ok(changed == Some(listed.changed))
    }

    /// Runs a change of our own to the directory: a checkpoint begins in it, is committed or
    /// removed.
    pub(super) async fn change<T>(
        &mut self,
        repository: &Repository,
        change: impl Future<Output = T>,
    ) -> T {
        let before = self.is_unchanged(repository).await;
        let result = change.await;
        let after = repository.checkpoints_changed(&self.vm).await;
        self.listed = match (self.listed, before, after) {
            (Some(listed), Ok(true), Ok(Some(changed))) => Some(Listed { changed, ..listed }),
            _ => None,
        };
        result
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use bytes::Bytes;
    use checkpoint_format::CheckpointIdentity;
    use checkpoint_store::{
        Claim, FaultyStore, MemoryStore, Mode, Op, Store, StorePath, Writer, WriterRecord,
    };
    use std::sync::Arc;
    use std::time::Duration;

    /// A VM in a store that counts what is asked of it.
    struct Lab {
        store: FaultyStore,
        repository: Repository,
        writer: Writer,
    }

    const OPS: [Op; 8] = [
        Op::CreateDirAll,
        Op::CreateDir,
        Op::Put,
        Op::PutExclusive,
        Op::Read,
        Op::Stat,
        Op::RenameDir,
        Op::Remove,
    ];

    fn manifest(id: CheckpointId) -> Bytes {
        Bytes::from(format!("manifest {id}"))
    }

    fn vm() -> VmName {
        "vm".parse().unwrap()
    }

    fn parent(id: CheckpointId, manifest: &[u8]) -> Parent {
        Parent {
            identity: CheckpointIdentity::new(id, manifest),
            head_len: manifest.len() as u64,
            checkpoints: id.0,
            spaces: Vec::new(),
            segments: None,
        }
    }

    impl Lab {
        async fn new() -> Self {
            let store = FaultyStore::new(Arc::new(MemoryStore::new()));
            let repository =
                Repository::open(Arc::new(store.clone()), Mode::CreateIfMissing).await.unwrap();
            let record = WriterRecord {
                host: String::new(),
                boot_id: String::new(),
                instance: "i".to_owned(),
                pid: 1,
                claimed_at: String::new(),
                version: String::new(),
                hardware: None,
            };
            let writer = repository.claim_writer(&vm(), record, Claim::TakeOver).await.unwrap();
            Self { store, repository, writer }
        }

        /// So many checkpoints, and the lineage that they are.
        async fn with(checkpoints: u64) -> (Self, HeldLineage) {
            let lab = Self::new().await;
            let listing = Listing::read(&lab.repository, &vm()).await.unwrap();
            let mut lineage = HeldLineage::new(&vm(), None, BTreeSet::new(), &listing);
            for _ in 0..checkpoints {
                lab.checkpoint(&mut lineage).await;
            }
            // As a helper that begins.
            let listing = Listing::read(&lab.repository, &vm()).await.unwrap();
            let lineage = HeldLineage::new(&vm(), lineage.parent, lineage.needed, &listing);
            (lab, lineage)
        }

        /// What a checkpoint asks of the store beside its data.
        async fn checkpoint(&self, lineage: &mut HeldLineage) {
            let Self { repository, writer, .. } = self;
            assert!(lineage.is_held(repository).await.unwrap());
            let id = lineage.newest().map_or(CheckpointId::FIRST, CheckpointId::next);
            let partial = lineage.change(repository, writer.begin(id)).await.unwrap();
            assert!(lineage.is_held(repository).await.unwrap());
            drop(lineage.change(repository, partial.commit(manifest(id))).await.unwrap());
            lineage.add(parent(id, &manifest(id)));
        }

        /// All calls, and the listings of the directory of checkpoints among them.
        fn calls(&self) -> (usize, usize) {
            let listings = self.store.calls(Op::List, "");
            (
                OPS.iter().map(|op| self.store.calls(*op, "")).sum::<usize>() + listings,
                self.store.calls(Op::List, "checkpoints"),
            )
        }

        /// Another removes it, when the store's clock has gone on.
        async fn remove(&self, id: u64) {
            tokio::time::sleep(Duration::from_millis(1)).await;
            self.store
                .remove(&StorePath::new(&format!("vms/vm/checkpoints/{id}")).unwrap())
                .await
                .unwrap();
        }
    }

    #[tokio::test]
    async fn store_calls_of_a_checkpoint_do_not_grow_with_the_lineage() {
        let mut all = Vec::new();
        for checkpoints in [3, 30, 300] {
            let (lab, mut lineage) = Lab::with(checkpoints).await;
            let before = lab.calls();
            lab.checkpoint(&mut lineage).await;
            let after = lab.calls();
            all.push(after.0 - before.0);
            assert_eq!(
                after.1, before.1,
                "the directory is listed beside {checkpoints} checkpoints"
            );
        }
        assert!(all.iter().all(|calls| *calls == all[0]) && all[0] < 20, "{all:?}");
    }

    #[tokio::test]
    async fn lineage_that_lost_any_checkpoint_is_not_held() {
        for lost in [1, 2, 3] {
            let (lab, mut lineage) = Lab::with(3).await;
            lab.checkpoint(&mut lineage).await;
            lab.remove(lost).await;
            assert!(!lineage.is_held(&lab.repository).await.unwrap(), "{lost}");
            assert!(!lineage.is_held(&lab.repository).await.unwrap(), "{lost}, asked again");
        }
    }

    #[tokio::test]
    async fn lineage_is_not_held_beside_a_newer_checkpoint_or_another_parent() {
        let (lab, mut lineage) = Lab::with(2).await;
        assert!(lineage.is_held(&lab.repository).await.unwrap());
        drop(
            lab.writer
                .begin(CheckpointId(3))
                .await
                .unwrap()
                .commit(manifest(CheckpointId(3)))
                .await
                .unwrap(),
        );
        assert!(!lineage.is_held(&lab.repository).await.unwrap(), "a newer one");

        let (lab, mut lineage) = Lab::with(2).await;
        lab.checkpoint(&mut lineage).await;
        lineage.add(parent(CheckpointId(3), b"another one"));
        assert!(!lineage.is_held(&lab.repository).await.unwrap(), "another parent");
    }

    #[tokio::test]
    async fn lineage_is_listed_again_after_changes_of_others_and_now_and_then() {
        let (lab, mut lineage) = Lab::with(1).await;
        let listings = |lab: &Lab| lab.calls().1;
        let before = listings(&lab);
        lab.store.create_dir(&StorePath::new("vms/vm/checkpoints/other").unwrap()).await.unwrap();
        assert!(lineage.is_held(&lab.repository).await.unwrap());
        assert_eq!(listings(&lab), before + 1);
        for _ in 0..LISTING_DUE {
            lab.checkpoint(&mut lineage).await;
        }
        assert_eq!(listings(&lab), before + 1);
        lab.checkpoint(&mut lineage).await;
        assert_eq!(listings(&lab), before + 2);
    }
}
