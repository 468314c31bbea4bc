//! Taking a checkpoint: RAM, device state and disks of one instant.
//!
//! The phases are files, in the order in which data flows:
//!
//! ```text
//! prepare      guest runs    engine, writer epoch, layers, fleecing overlays, room for the copies
//! precopy      guest runs    live copies, each after a brief stop
//! pause        guest paused  scan, copy, disk transaction, device state
//! (stream      instead of precopy and pause, if memory comes by QEMU's own migration)
//! upload       guest runs    compare, compress, store; disks over NBD
//! commit       guest runs    manifest, one rename
//! acknowledge  guest runs    claims, bitmaps, tables
//! ```
//! Between `prepare` and `acknowledge` each phase is a type that owns its data (`underway`), and
//! becomes the next one. When one fails, `Checkpointer::fail` restores the dirty set that the
//! checkpoint claimed, and the next checkpoint carries it. `source` is the trait of what reads
//! memory.

mod acknowledge;
mod back;
mod base;
mod buffers;
mod carried;
mod commit;
mod delta;
mod direct;
mod held;
mod holder;
mod index;
pub mod outcome;
mod parent;
mod pause;
mod precopy;
mod prepare;
mod receive;
mod source;
mod staging;
mod stream;
#[cfg(test)]
pub(crate) mod synthetic;
#[cfg(test)]
mod test;
mod underway;
mod upload;
mod window;
mod writer;

use crate::progress::{Update, bytes};
use anyhow::{Error, Result};
use base::Base;
use carried::Carried;
use futures::future::BoxFuture;
use outcome::{Outcome, Phases, milliseconds};
use qmp_bridge::poll::poll_until;
use qmp_bridge::said;
use serde::{Deserialize, Serialize};
use staging::Staging;
use std::future::ready;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::mpsc;
use tokio::time::Instant;
use underway::{Committed, Failed, Prepared, Site};
use vm::error::{EngineError, Phase, refused};
use vm::launch::command::is_running;
use vm::memory_source::{EngineChoice, StreamChoice};
use vm::running::Vm;
use vm::runtime_dir::Marks;

pub(crate) use back::Standing;
pub use writer::{Force, StoreSession};
pub(crate) use writer::{claim, may_claim};

/// Between the end of QEMU's monitor and that of its process.
const QEMU_EXIT: Duration = Duration::from_secs(5);
const EXIT_POLL: Duration = Duration::from_millis(50);

/// For the removal of what failed checkpoints stored, when the helper ends.
const REMOVAL: Duration = Duration::from_secs(5);

/// A connection to a process that is killed ends with it, a moment after whatever else was noticed.
const MONITOR_END: Duration = Duration::from_millis(200);

/// Sends progress to the client that listens; never waits for it: an update that finds the queue
/// full is dropped.
pub struct Report(mpsc::Sender<Update>);

impl Report {
    /// To the receiver of `updates`.
    pub fn to(updates: mpsc::Sender<Update>) -> Self {
        Self(updates)
    }

    pub(crate) fn say(&self, phase: &str, done: u64, total: u64) {
        // A full queue means a slow client: it misses an update, the guest misses nothing.
        let _ = self.0.try_send(Update { phase: phase.to_owned(), done, total });
    }
}

/// What the request chooses; an engine that it leaves open is as the VM was attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Choice {
    /// Where the memory comes from.
    pub engine: Option<EngineChoice>,
    /// How the stream engine gets memory of one instant.
    pub stream: Option<StreamChoice>,
    /// A full checkpoint, which begins a new lineage.
    pub full: bool,
}

/// Memory of the VM that is still on its way from the store, while its guest runs.
pub trait Arriving: Send + Sync {
    /// Whether all of it is here.
    fn is_done(&self) -> bool;

    /// How far it is, for an error.
    fn describe(&self) -> String;
}

/// Nothing is copied into arriving disks while it lives.
pub type Held = Box<dyn Send + Sync>;

/// Disks of the VM whose blocks are still on their way from the store, while its guest runs.
pub trait ArrivingDisks: Send + Sync {
    /// Whether all blocks of all of them are here.
    fn is_done(&self) -> bool;

    /// How far they are, for an error.
    fn describe(&self) -> String;

    /// Holds the copying; refused while blocks cannot be read.
    fn hold(&self) -> BoxFuture<'_, Result<Held>>;
}

/// Everything that lasts from one checkpoint of a VM to the next.
pub struct Checkpointer {
    /// The VM, with this helper attached.
    pub vm: Vm,
    staging: Staging,
    store: Option<StoreSession>,
    base: Option<Base>,
    /// What failed checkpoints have stored for the next one.
    carried: Option<Carried>,
    /// What the marks of written pages count from; whether that is of use decides the lineage of
    /// the base.
    marks: Option<Marks>,
    layers: crate::layers::Known,
    /// Of a VM whose memory is still arriving, or was when this helper began.
    arriving: Option<Arc<dyn Arriving>>,
    /// The same of its disks.
    arriving_disks: Option<Arc<dyn ArrivingDisks>>,
    /// What an earlier helper may have left in QEMU has been cleaned up.
    is_clean: bool,
}

impl Checkpointer {
    /// Of a VM that this helper attached to. What its runtime directory says of the marks of
    /// written pages is used; the store is opened by the first checkpoint.
    pub fn new(vm: Vm) -> Self {
        let marks = vm.runtime.marks();
        Self {
            vm,
            staging: Staging::default(),
            store: None,
            base: None,
            carried: None,
            marks,
            layers: Default::default(),
            arriving: None,
            arriving_disks: None,
            is_clean: false,
        }
    }

    /// The VM's memory is still arriving: until it is here, a checkpoint that needs all of it is
    /// refused.
    pub fn follow(&mut self, arriving: Arc<dyn Arriving>) {
        self.arriving = Some(arriving);
    }

    fn arriving(&self) -> Option<&dyn Arriving> {
        self.arriving.as_deref().filter(|arriving| !arriving.is_done())
    }

    /// The same of the VM's disks: each checkpoint holds what is copied into them meanwhile.
    pub fn follow_disks(&mut self, arriving: Arc<dyn ArrivingDisks>) {
        self.arriving_disks = Some(arriving);
    }

    fn arriving_disks(&self) -> Option<&dyn ArrivingDisks> {
        self.arriving_disks.as_deref().filter(|arriving| !arriving.is_done())
    }

    async fn hold_disks(&self) -> Result<Option<Held>> {
        match self.arriving_disks() {
            None => Ok(None),
            Some(arriving) => arriving.hold().await.map(Some),
        }
    }

    /// Refuses `what` while memory or disks are still arriving.
    pub(crate) fn refuse_arriving(&self, what: &str) -> Result<()> {
        let how_far = match (self.arriving(), self.arriving_disks()) {
            (None, None) => return Ok(()),
            (Some(memory), _) => format!("all of the VM's memory, and {}", memory.describe()),
            (None, Some(disks)) => format!("all of the VM's disks, and {}", disks.describe()),
        };
        Err(refused(format!(
            "{what} needs {how_far}; wait until all is here ('stillpoint status {}' shows how far \
             it is)",
            self.vm.file.name
        )))
    }

    /// The same where the writer epoch is claimed already.
    pub fn with_session(vm: Vm, session: StoreSession) -> Self {
        Self { store: Some(session), ..Self::new(vm) }
    }

    /// Of a VM that this process restored: its writer epoch is claimed, what `marks` say is known
    /// first-hand, and no earlier helper left anything in its QEMU.
    pub async fn of_restored(vm: Vm, session: StoreSession, marks: Option<Marks>) -> Self {
        // What may be read may yet not be added to; then the first checkpoint is refused.
        let store = session.repository.check_redundancy().await.is_ok().then_some(session);
        Self { store, marks, is_clean: true, ..Self::new(vm) }
    }

    /// The VM continues in another QEMU: what the store holds is as it was; what was written since
    /// is not known.
    pub fn replace_vm(&mut self, vm: Vm) {
        self.vm = vm;
        self.is_clean = false;
        self.distrust_marks();
    }

    /// What was written to memory since the last checkpoint is not known any more.
    fn distrust_marks(&mut self) {
        self.base.iter_mut().for_each(|base| base.history.is_exact = false);
        self.marks.iter_mut().for_each(|marks| marks.is_exact = false);
    }

    /// One checkpoint, complete and durable, or an error and nothing.
    ///
    /// # Errors
    /// With the phase that failed, and its class: refused where the VM cannot be checkpointed as it
    /// is, store where the store does not answer or another writer has it. The guest runs on, what
    /// was claimed as written counts as written again, and a next call is possible.
    pub async fn take(&mut self, choice: Choice, report: &Report) -> Result<Outcome, EngineError> {
        let begun = Instant::now();
        let started_at = humantime::format_rfc3339_millis(SystemTime::now()).to_string();
        let mut phases = Phases::begin(Phase::Prepare);
        let held = match self.hold_disks().await {
            Ok(held) => held,
            Err(error) => return Err(phases.failed(self.cause(error).await)),
        };
        let taken = self.run_phases(choice, &mut phases, report).await;
        drop(held);
        let mut outcome = match taken {
            Ok(outcome) => outcome,
            Err(error) => return Err(phases.failed(self.cause(error).await)),
        };
        outcome.started_at = started_at;
        outcome.durable_ms = milliseconds(begun.elapsed());
        outcome.phases = phases.into_map();
        Ok(outcome)
    }

    async fn run_phases(
        &mut self,
        choice: Choice,
        phases: &mut Phases,
        report: &Report,
    ) -> Result<Outcome> {
        let prepared = self.prepare(choice, phases, report).await;
        // A preparation of disks that failed is undone in the background.
        let prepared = prepared.inspect_err(|_| self.is_clean = false)?;
        self.finish(prepared, phases, report).await
    }

    /// All that follows the preparation, from whichever source the memory comes.
    async fn finish(
        &mut self,
        prepared: Prepared,
        phases: &mut Phases,
        report: &Report,
    ) -> Result<Outcome> {
        let site = Site { vm: &self.vm, layers: &self.layers, report };
        let ended = run(prepared, &site, phases).await;
        match ended {
            Ok(Committed::Durable(durable)) => Ok(self.acknowledge(durable, phases).await),
            Ok(Committed::Unchanged(same)) => Ok(self.restore_unchanged(same).await),
            Err(failed) => Err(self.fail(failed, report).await),
        }
    }

    /// What is not lost belongs to the message.
    fn with_carried(&self, error: Error) -> Error {
        match &self.carried {
            Some(carried) => error.context(format!(
                "the checkpoint failed; the next one needs not store again the {} that it stored",
                bytes(carried.bytes().0)
            )),
            None => error,
        }
    }

    /// A QEMU that has ended is why, whatever was noticed of it first.
    async fn cause(&self, error: Error) -> Error {
        if tokio::time::timeout(MONITOR_END, self.vm.qmp.closed()).await.is_err() {
            return error;
        }
        let ended = || ready(self.vm.has_ended().then_some(()));
        if poll_until(QEMU_EXIT, EXIT_POLL, ended).await.is_none() {
            return error;
        }
        tracing::info!(error = format!("{error:#}"), "what was noticed first of QEMU's end");
        let (pid, name) = (self.vm.pid, &self.vm.file.name);
        let said = said::quote_log(&self.vm.runtime.qemu_log());
        let said = if said.is_empty() { said } else { format!(" (it said: {said})") };
        anyhow::anyhow!(
            "QEMU (pid {pid}) ended while the checkpoint was taken{said}; the last checkpoint is intact: 'stillpoint restore {name}'"
        )
    }

    /// No next checkpoint of this helper makes use of it.
    async fn forget_carried(&mut self) {
        let Some(carried) = self.carried.take() else { return };
        match tokio::time::timeout(REMOVAL, carried.kept.remove()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(%error, "what failed checkpoints stored stays in the store until the next claim of the epoch")
            }
            Err(_) => tracing::warn!(
                "what failed checkpoints stored stays in the store until the next claim of the epoch"
            ),
        }
    }

    /// If the VM has ended, releases its writer epoch: the next writer needs no take-over.
    ///
    /// While QEMU runs the epoch is kept, however the helper ends: a restore on another host would
    /// make a second VM.
    pub async fn release(&mut self) {
        self.forget_carried().await;
        if tokio::time::timeout(Duration::from_millis(1), self.vm.qmp.closed()).await.is_err() {
            return;
        }
        let ended = || ready((!is_running(&self.vm.file.instance)).then_some(()));
        if poll_until(QEMU_EXIT, EXIT_POLL, ended).await.is_none() {
            return;
        }
        if let Some(session) = &self.store
            && let Err(error) = session.writer.release().await
        {
            tracing::warn!(%error, "the writer's place in the store was not released");
        }
    }
}

/// The phases between the preparation and the acknowledgement.
async fn run(
    prepared: Prepared,
    site: &Site<'_>,
    phases: &mut Phases,
) -> Result<Committed, Failed> {
    let captured = prepared.capture(site, phases).await?;
    let uploaded = captured.upload(site, phases).await?;
    uploaded.commit(site, phases).await
}
