//! Who may write a VM's checkpoints.
//!
//! There is no lock that a dead helper could hold and no clock that could be wrong. A writer claims
//! the next epoch by creating its record exclusively; the highest epoch is the writer. Claiming
//! then removes every partial checkpoint of lower epochs, and that is what stops a writer that does
//! not know yet that it was replaced: a partial directory's name carries its epoch, packs never
//! recreate a missing directory, and the rename that would commit has nothing left to rename. A
//! partial directory made after that removal is caught by the look at the epochs that follows its
//! creation (also where an HDFS observer answers it: it is never behind what the asking client has
//! done itself, and the claim came before that). What an older writer committed before the removal
//! is a checkpoint like any other: read the list of checkpoints after claiming, not before.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use checkpoint_format::{CheckpointId, Epoch, VmName};
use tracing::{info, warn};

use super::Repository;
use super::layout::{self, PartialName};
use super::partial::{KeptPartial, PartialCheckpoint};
use super::record::{
    MAX_RECORD_LEN, SavedRecord, WriterInfo, WriterRecord, list_claims, read_record,
};
use super::retry::{retrying, store_exclusive};
use crate::error::{Op, Result, StoreError};
use crate::nonce::nonce;

/// Lost races for an epoch before giving up; each lost race is another process's claim.
const MAX_CLAIM_TRIES: u32 = 32;
/// Tries to make a partial directory, each under a name of its own.
const MAX_BEGIN_TRIES: u32 = 3;
/// Records of earlier writers that are kept to look at.
const KEPT_RECORDS: usize = 8;

/// On what ground an epoch is claimed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Claim {
    /// The last writer was the same instance; or it released, or is known to be dead, and this
    /// instance was never replaced.
    Continue {
        /// The instance that claims, as in [`WriterRecord::instance`].
        instance: String,
        /// The highest epoch that this instance remembers to have claimed. Records in the store are
        /// pruned.
        last: Option<Epoch>,
        /// The epoch of a writer that cannot be alive.
        dead: Option<Epoch>,
    },
    /// The last writer is fenced, whichever it is.
    TakeOver,
}

impl Claim {
    /// Whether the next epoch may be claimed after `writers`, oldest first.
    ///
    /// An instance that another one replaced holds a state that the lineage has left behind. It
    /// does not become the writer again because its successor has ended: that takes an order.
    fn check(&self, vm: &VmName, writers: &[WriterInfo]) -> Result<()> {
        let (Claim::Continue { instance, last, dead }, Some(newest)) = (self, writers.last())
        else {
            return Ok(());
        };
        let is_own = |writer: &&WriterInfo| {
            writer.record.as_ref().is_some_and(|record| record.instance == *instance)
        };
        if is_own(&newest) {
            return Ok(());
        }
        let own = writers.iter().filter(is_own).map(|writer| writer.epoch).max().max(*last);
        if let Some(ours) = own.filter(|ours| *ours < newest.epoch) {
            return Err(StoreError::Fenced { vm: vm.clone(), ours, newest: newest.epoch });
        }
        if newest.released || *dead == Some(newest.epoch) { Ok(()) } else { Err(held(vm, newest)) }
    }

    fn last(&self) -> Option<Epoch> {
        match self {
            Claim::Continue { last, .. } => *last,
            Claim::TakeOver => None,
        }
    }
}

impl Repository {
    /// The claims on a VM, oldest first.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn writers(&self, vm: &VmName) -> Result<Vec<WriterInfo>> {
        let mut found = Vec::new();
        let (claims, released) = list_claims(&self.store, vm).await?;
        for epoch in claims {
            found.push(WriterInfo {
                epoch,
                record: read_record(&self.store, vm, epoch).await?,
                released: released.contains(&epoch),
            });
        }
        Ok(found)
    }

    /// Whether [`Repository::claim_writer`] would claim; nothing is changed.
    ///
    /// # Errors
    /// When another writer holds the VM or has fenced this instance, or the store cannot be read.
    pub async fn may_claim(&self, vm: &VmName, claim: &Claim) -> Result<()> {
        claim.check(vm, &self.writers(vm).await?)
    }

    /// Claims the next epoch and fences the lower ones.
    ///
    /// # Errors
    /// When another writer holds the VM or has fenced this instance, or the claim cannot be stored.
    pub async fn claim_writer(
        &self,
        vm: &VmName,
        record: WriterRecord,
        claim: Claim,
    ) -> Result<Writer> {
        self.store.create_dir_all(&layout::writers(vm)).await?;
        self.store.create_dir_all(&layout::checkpoints(vm)).await?;
        let epoch = self.claim_epoch(vm, record, &claim).await?;
        let writer = Writer {
            repository: self.clone(),
            vm: vm.clone(),
            epoch,
            attempts: Arc::default(),
            left: Arc::default(),
        };
        writer.remove_partials(|partial| partial.epoch < epoch).await?;
        writer.check().await?;
        writer.remove_old_records().await;
        info!(%vm, %epoch, "claimed");
        Ok(writer)
    }

    async fn claim_epoch(&self, vm: &VmName, record: WriterRecord, claim: &Claim) -> Result<Epoch> {
        let saved = SavedRecord { nonce: nonce(), record };
        let text = serde_json::to_vec_pretty(&saved).expect("strings and numbers are always JSON");
        let text = Bytes::from(text);
        let mut last = None;
        for _ in 0..MAX_CLAIM_TRIES {
            let writers = self.writers(vm).await?;
            claim.check(vm, &writers)?;
            let epoch =
                next_epoch(vm, writers.last().map(|newest| newest.epoch).max(claim.last()))?;
            match self.try_epoch(vm, epoch, &text).await {
                Ok(true) => return Ok(epoch),
                Ok(false) => {}
                Err(error) if error.is_retryable() => last = Some(error),
                Err(error) => return Err(error),
            }
        }
        Err(last.unwrap_or_else(|| {
            StoreError::unavailable(
                Op::PutExclusive,
                &layout::writers(vm),
                "others claimed at the same time, again and again",
            )
        }))
    }

    /// Whether this writer has the epoch now; `false`: another process has it.
    async fn try_epoch(&self, vm: &VmName, epoch: Epoch, text: &Bytes) -> Result<bool> {
        let path = layout::writer(vm, epoch);
        match store_exclusive(&self.store, &self.retry, &path, text).await {
            Ok(()) => Ok(true),
            // Perhaps taken by our own call, whose answer was lost.
            Err(error) if error.is_already_exists() || error.is_ambiguous() => {
                match retrying(|| self.store.read(&path, MAX_RECORD_LEN)).await {
                    Ok(found) => Ok(found == text),
                    Err(lost) if lost.is_not_found() => Err(error),
                    Err(lost) => Err(lost),
                }
            }
            Err(error) => Err(error),
        }
    }
}

fn next_epoch(vm: &VmName, newest: Option<Epoch>) -> Result<Epoch> {
    let newest = newest.map_or(0, |epoch| epoch.0);
    newest.checked_add(1).map(Epoch).ok_or_else(|| StoreError::Corrupt {
        path: layout::writers(vm).to_string(),
        reason: "the highest possible epoch is taken".to_owned(),
    })
}

fn held(vm: &VmName, holder: &WriterInfo) -> StoreError {
    let holder_text = holder.record.as_ref().map_or_else(
        || "a writer whose record can't be read".to_owned(),
        |record| {
            format!("process {} on {} (instance {})", record.pid, record.host, record.instance)
        },
    );
    StoreError::WriterHeld { vm: vm.clone(), epoch: holder.epoch, holder: holder_text }
}

/// The right to write a VM's checkpoints, until a higher epoch is claimed. One checkpoint at a
/// time.
#[derive(Debug, Clone)]
pub struct Writer {
    pub(super) repository: Repository,
    pub(super) vm: VmName,
    pub(super) epoch: Epoch,
    attempts: Arc<AtomicU64>,
    /// Partial checkpoints that no task of this process works on any more.
    left: Arc<Mutex<HashSet<PartialName>>>,
}

impl Writer {
    /// The VM that is written.
    pub fn vm(&self) -> &VmName {
        &self.vm
    }

    /// The epoch that was claimed.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The repository that is written.
    pub fn repository(&self) -> &Repository {
        &self.repository
    }

    /// `Fenced` if a higher epoch was claimed.
    ///
    /// # Errors
    /// When a newer writer has fenced this one, or the store cannot be read.
    pub async fn check(&self) -> Result<()> {
        self.is_claimed().await.map(drop)
    }

    /// Whether the store has this writer's claim: one that was set back to an earlier state may
    /// have lost it. `Fenced` if a higher epoch was claimed.
    ///
    /// # Errors
    /// When a newer writer has fenced this one, or the store cannot be read.
    pub async fn is_claimed(&self) -> Result<bool> {
        let (claims, _) = list_claims(&self.repository.store, &self.vm).await?;
        match claims.last() {
            Some(newest) if *newest > self.epoch => {
                Err(StoreError::Fenced { vm: self.vm.clone(), ours: self.epoch, newest: *newest })
            }
            newest => Ok(newest == Some(&self.epoch)),
        }
    }

    /// Says that this writer ended in order, so that any other writer may continue. Doing it twice
    /// is fine.
    ///
    /// # Errors
    /// When the store cannot be written.
    pub async fn release(&self) -> Result<()> {
        let path = layout::released(&self.vm, self.epoch);
        let Repository { store, retry, .. } = &self.repository;
        match store_exclusive(store, retry, &path, &Bytes::new()).await {
            Err(error) if error.is_already_exists() => Ok(()),
            other => other,
        }
    }

    /// For a writer that has stored nothing and will not: releases its epoch; where no checkpoint
    /// and no other claim of the VM was ever made, its name is removed from the store.
    ///
    /// # Errors
    /// When the store cannot be written.
    pub async fn withdraw(&self) -> Result<()> {
        let Repository { store, .. } = &self.repository;
        let (claims, _) = list_claims(store, &self.vm).await?;
        let (vm, checkpoints) = (layout::vm(&self.vm), layout::checkpoints(&self.vm));
        let committed = retrying(|| store.list(&checkpoints)).await?;
        if claims == [self.epoch] && committed.is_empty() {
            return retrying(|| store.remove(&vm)).await;
        }
        self.release().await
    }

    /// Begins checkpoint `seq`: `AlreadyExists` if there is one of that number. Removes what
    /// earlier tries of this writer left; it knows them, so the directory, which may hold thousands
    /// of checkpoints, is not listed.
    ///
    /// # Errors
    /// When the checkpoint exists, a newer writer has fenced this one, or the store cannot be
    /// written.
    pub async fn begin(&self, id: CheckpointId) -> Result<PartialCheckpoint> {
        self.check_free(id).await?;
        self.remove_left().await?;
        let partial = self.create_partial(id).await?;
        match self.check().await {
            Ok(()) => Ok(partial),
            Err(error) => {
                let _ = partial.abort().await;
                Err(error)
            }
        }
    }

    /// Begins checkpoint `seq` with the files that an earlier try of this writer stored: its
    /// directory gets the name of this try, so that what is still on its way to the old name finds
    /// no directory. `None` if the files are not there any more: a later claim removed them, or
    /// they are another writer's. After an error they may still be there.
    ///
    /// As after [`begin`](Self::begin) the look at the epochs comes last: a directory that was
    /// renamed behind the back of a claim's removal belongs to a writer that finds that claim now.
    ///
    /// # Errors
    /// When a newer writer has fenced this one, there is a checkpoint of that ID, or the store
    /// fails.
    pub async fn resume(
        &self,
        id: CheckpointId,
        kept: &KeptPartial,
    ) -> Result<Option<PartialCheckpoint>> {
        if kept.epoch() != self.epoch {
            return Ok(None);
        }
        self.check_free(id).await?;
        let store = &self.repository.store;
        let partial = PartialCheckpoint::after(kept, self.clone(), self.next_name(id));
        match store.rename_dir(&kept.dir(), partial.dir()).await {
            Ok(()) => {}
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => {
                let is_there = retrying(|| store.stat(partial.dir())).await?.is_some();
                warn!(dir = %partial.dir(), %error, is_there, "an earlier try's directory was not renamed in order");
                if !is_there {
                    return Err(error);
                }
            }
        }
        if let Err(error) = self.check().await {
            let _ = partial.abort().await;
            return Err(error);
        }
        Ok(Some(partial))
    }

    async fn check_free(&self, id: CheckpointId) -> Result<()> {
        let committed = layout::checkpoint(&self.vm, id);
        match retrying(|| self.repository.store.stat(&committed)).await? {
            Some(_) => Err(StoreError::already_exists(Op::CreateDir, &committed)),
            None => Ok(()),
        }
    }

    fn next_name(&self, id: CheckpointId) -> PartialName {
        PartialName {
            id,
            epoch: self.epoch,
            attempt: self.attempts.fetch_add(1, Ordering::Relaxed) + 1,
        }
    }

    async fn create_partial(&self, id: CheckpointId) -> Result<PartialCheckpoint> {
        let mut tries = 0;
        loop {
            tries += 1;
            let partial = PartialCheckpoint::new(self.clone(), self.next_name(id));
            match self.repository.store.create_dir(partial.dir()).await {
                Ok(()) => return Ok(partial),
                Err(error)
                    if tries < MAX_BEGIN_TRIES
                        && (error.is_retryable() || error.is_already_exists()) =>
                {
                    warn!(vm = %self.vm, %id, %error, "partial checkpoint could not be made, trying again");
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Removes a committed checkpoint. Whether others build on it is the caller's to know.
    ///
    /// Its name is taken away first, then readers are looked for once more: one that has noted
    /// itself meanwhile either finds no checkpoint, or is found here. In between it has the name of
    /// a partial checkpoint, which the next claim removes if this process dies.
    ///
    /// # Errors
    /// When the checkpoint is in use, a newer writer has fenced this one, or the store cannot be
    /// written.
    pub async fn remove_checkpoint(&self, id: CheckpointId) -> Result<()> {
        self.check().await?;
        let Repository { store, .. } = &self.repository;
        self.repository.check_unused(&self.vm, id).await?;
        let path = layout::checkpoint(&self.vm, id);
        let name = self.next_name(id);
        let aside = layout::partial_checkpoint(&self.vm, &name);
        match store.rename_dir(&path, &aside).await {
            Ok(()) => {}
            Err(error) if error.is_not_found() => return Ok(()),
            Err(error) => return Err(error),
        }
        if let Err(error) = self.repository.check_unused(&self.vm, id).await {
            store.rename_dir(&aside, &path).await?;
            return Err(error);
        }
        self.forget(&name);
        self.remove_left().await
    }

    /// Most of them are gone, because they were committed or aborted.
    async fn remove_left(&self) -> Result<()> {
        let left: Vec<PartialName> = lock(&self.left).iter().copied().collect();
        for name in left {
            let path = layout::partial_checkpoint(&self.vm, &name);
            retrying(|| self.repository.store.remove(&path)).await?;
            lock(&self.left).remove(&name);
        }
        Ok(())
    }

    async fn remove_partials(&self, doomed: impl Fn(&PartialName) -> bool) -> Result<()> {
        let store = &self.repository.store;
        let dir = layout::checkpoints(&self.vm);
        for entry in retrying(|| store.list(&dir)).await? {
            if PartialName::parse(&entry.name).is_some_and(|name| doomed(&name)) {
                let path = dir.join(&entry.name)?;
                warn!(%path, "removing a partial checkpoint");
                retrying(|| store.remove(&path)).await?;
            }
        }
        Ok(())
    }

    async fn remove_old_records(&self) {
        let store = &self.repository.store;
        let Ok((claims, released)) = list_claims(store, &self.vm).await else {
            return;
        };
        let old = claims.len().saturating_sub(KEPT_RECORDS);
        for epoch in &claims[..old] {
            // The release first: a record without one only looks more held than it was.
            if released.contains(epoch) {
                let _ = store.remove(&layout::released(&self.vm, *epoch)).await;
            }
            let _ = store.remove(&layout::writer(&self.vm, *epoch)).await;
        }
    }

    /// No task of this process works on it any more.
    pub(super) fn forget(&self, name: &PartialName) {
        lock(&self.left).insert(*name);
    }
}

/// A set is never left half changed, so a panic elsewhere does not spoil it.
fn lock(names: &Mutex<HashSet<PartialName>>) -> MutexGuard<'_, HashSet<PartialName>> {
    names.lock().unwrap_or_else(PoisonError::into_inner)
}
