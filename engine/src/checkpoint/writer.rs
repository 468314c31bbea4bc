//! The helper's writer epoch in the store: claimed at the first checkpoint, kept for all that
//! follow.

use super::holder::{self, Holder};
use crate::stores;
use anyhow::{Context, Result};
use checkpoint_format::{Epoch, VmName};
use checkpoint_store::{Claim, Mode, Repository, Writer};
use vm::error::{EngineError, InPhase, Phase};
use vm::runtime_dir::{RuntimeDir, VmFile};

/// A store in which this helper holds the VM's writer epoch.
#[derive(Clone)]
pub struct StoreSession {
    /// The store.
    pub repository: Repository,
    /// The epoch: what commits, as long as no later one is claimed.
    pub writer: Writer,
}

/// Whether a writer that may be alive is fenced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Force {
    /// Only one that cannot be alive.
    No,
    /// `--take-over`, for one claim. It is never stored.
    TakeOver,
}

impl Force {
    /// `take_over` is the operator's order.
    pub fn if_ordered(take_over: bool) -> Self {
        if take_over { Force::TakeOver } else { Force::No }
    }
}

impl StoreSession {
    /// Opens the store and claims the VM's next writer epoch.
    ///
    /// # Errors
    /// When the store does not answer, or as [`Self::claim`] does.
    pub async fn open(
        vm: &VmFile,
        runtime: &RuntimeDir,
        mode: Mode,
        force: Force,
    ) -> Result<Self, EngineError> {
        Self::claim(stores::open(&vm.store, mode).await?, vm, runtime, force).await
    }

    /// Claims the VM's next writer epoch in a store that is open.
    ///
    /// # Errors
    /// When another writer holds the epoch, or the store cannot keep what a commit needs.
    pub async fn claim(
        repository: Repository,
        vm: &VmFile,
        runtime: &RuntimeDir,
        force: Force,
    ) -> Result<Self, EngineError> {
        repository.check_redundancy().await.in_phase(Phase::Open)?;
        let writer = claim(&repository, &vm.name, &vm.instance, runtime, force).await;
        let writer = writer.in_phase(Phase::Open)?;
        tracing::info!(vm_name = %vm.name, epoch = writer.epoch().0, store = repository.url(), "this helper is the writer");
        Ok(Self { repository, writer })
    }

    /// Whether this is still the store that was opened, and it knows of this writer. Fails if it
    /// knows of a later one.
    pub(super) async fn is_current(&self) -> Result<bool> {
        Ok(self.repository.is_unchanged().await? && self.writer.is_claimed().await?)
    }
}

/// Claims the next writer epoch of a VM for one instance of it.
///
/// An epoch that another instance holds is not taken without `--take-over`, unless that holder
/// cannot be alive; and never by an instance that was itself replaced before.
pub(crate) async fn claim(
    repository: &Repository,
    vm_name: &VmName,
    instance: &str,
    runtime: &RuntimeDir,
    force: Force,
) -> Result<Writer> {
    let about = || format!("claiming the writer epoch of {vm_name}");
    let ground = ground(repository, vm_name, instance, runtime.writer_epoch(), force)
        .await
        .with_context(about)?;
    let writer = repository
        .claim_writer(vm_name, holder::record(instance)?, ground)
        .await
        .with_context(about)?;
    // Without it the store's records suffice, until they are pruned.
    if let Err(error) = runtime.set_writer_epoch(writer.epoch()) {
        tracing::warn!(error = format!("{error:#}"), "the claimed epoch was not written down");
    }
    Ok(writer)
}

/// Refuses what [`claim`] would refuse to an instance that has claimed nothing yet; claims nothing.
pub(crate) async fn may_claim(
    repository: &Repository,
    vm_name: &VmName,
    instance: &str,
    force: Force,
) -> Result<()> {
    let ground = ground(repository, vm_name, instance, None, force).await?;
    Ok(repository.may_claim(vm_name, &ground).await?)
}

async fn ground(
    repository: &Repository,
    vm_name: &VmName,
    instance: &str,
    last: Option<Epoch>,
    force: Force,
) -> Result<Claim> {
    if force == Force::TakeOver {
        return Ok(Claim::TakeOver);
    }
    let here = holder::record(instance)?;
    let is_dead =
        |holder: &Holder| holder.instance != instance && holder::cannot_live(holder, &here);
    let newest = repository.writers(vm_name).await?.pop();
    let dead = newest.and_then(|newest| newest.record.filter(is_dead).map(|_| newest.epoch));
    Ok(Claim::Continue { instance: instance.to_owned(), last, dead })
}
