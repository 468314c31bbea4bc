//! Taking a checkpoint: RAM, device state and disks of one instant.
//!
//! The phases are files, in the order in which data flows:
//!
//! ```text
//! prepare      guest runs    engine, writer epoch, layers, fleecing overlays, room for the copies
//! precopy      guest runs    live copies, each after a brief stop
//! pause        guest paused  scan, copy, disk transaction, device state
//! (stream      instead of precopy and pause, where QEMU's own migration brings the memory)
//! upload       guest runs    compare, compress, store; disks over NBD
//! commit       guest runs    manifest, one rename
//! acknowledge  guest runs    claims, bitmaps, tables
//! ```
//! When a phase before the commit fails, [`Checkpointer::take`] restores the dirty set that the
//! checkpoint claimed, and the next checkpoint carries it.

mod acknowledge;
mod base;
mod carried;
mod commit;
mod delta;
mod direct;
mod held;
mod holder;
pub mod outcome;
mod pause;
mod precopy;
mod prepare;
mod receive;
mod staging;
mod stream;
mod upload;
mod window;
mod writer;

use crate::kill_point;
use crate::progress::{Update, bytes};
use anyhow::{Error, Result};
use base::Base;
use carried::Carried;
use outcome::{Outcome, Phases, milliseconds};
use qmp_bridge::poll::poll_until;
use qmp_bridge::said;
use serde::{Deserialize, Serialize};
use staging::Staging;
use std::future::ready;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::mpsc;
use vm::error::{EngineError, Phase};
use vm::inventory::unchanged;
use vm::launch::command::is_running;
use vm::memory_source::{Engine, EngineChoice, StreamChoice};
use vm::running::Vm;
use vm::runtime_dir::Marks;

pub use writer::{Force, StoreSession};
pub(crate) use writer::{claim, may_claim};

/// Between the end of QEMU's monitor and that of its process.
const QEMU_EXIT: Duration = Duration::from_secs(5);
const EXIT_POLL: Duration = Duration::from_millis(50);

/// How long a checkpoint that has failed continues storing what was read for it, which counts for
/// the next one: the packs under way at 1 MiB a second.
const UPLOAD_GRACE: Duration = Duration::from_secs(60);

/// For the removal of what failed checkpoints stored, when the helper ends.
const REMOVAL: Duration = Duration::from_secs(5);

/// A connection to a process that is killed ends with it, a moment after whatever else was noticed.
const MONITOR_END: Duration = Duration::from_millis(200);

/// Sends progress to the client that listens; never waits for it.
pub struct Report(pub mpsc::Sender<Update>);

impl Report {
    fn say(&self, phase: &str, done: u64, total: u64) {
        // A full queue means a slow client: it misses an update, the guest misses nothing.
        let _ = self.0.try_send(Update { phase: phase.to_owned(), done, total });
    }
}

/// What the request chooses; an engine that it leaves open is as the VM was attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Choice {
    pub engine: Option<EngineChoice>,
    pub stream: Option<StreamChoice>,
    /// A full checkpoint, which begins a new lineage.
    pub full: bool,
}

/// Everything that lasts from one checkpoint of a VM to the next.
pub struct Checkpointer {
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
    /// What an earlier helper may have left in QEMU has been cleaned up.
    is_clean: bool,
}

impl Checkpointer {
    pub fn new(vm: Vm) -> Self {
        let staging = Staging::new(prepare::STAGING_PAGES);
        let marks = vm.runtime.marks();
        Self {
            vm,
            staging,
            store: None,
            base: None,
            carried: None,
            marks,
            layers: Default::default(),
            is_clean: false,
        }
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
        self.base.iter_mut().for_each(|base| base.is_exact = false);
        self.marks.iter_mut().for_each(|marks| marks.is_exact = false);
    }

    /// One checkpoint, complete and durable, or an error and nothing.
    pub async fn take(&mut self, choice: Choice, report: &Report) -> Result<Outcome, EngineError> {
        let begun = Instant::now();
        let started_at = humantime::format_rfc3339_millis(SystemTime::now()).to_string();
        let mut phases = Phases::begin(Phase::Prepare);
        let mut outcome = match self.run_phases(choice, &mut phases, report).await {
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
        let mut run = prepared.inspect_err(|_| self.after_failure())?;
        let captured = self.capture(&mut run, phases, report).await;
        match captured {
            Ok(outcome) => Ok(outcome),
            Err(error) => {
                // The guest and its disks first: the store may take its time.
                self.restore_claimed(&mut run).await;
                report.say("storing what was read", 0, 0);
                let error = match run.packer.take() {
                    Some(packer) => packer.why(error, UPLOAD_GRACE).await,
                    None => error,
                };
                let inventory = Arc::clone(&run.inventory);
                self.abort(run).await;
                let error = self.with_carried(error);
                self.after_failure();
                match inventory.change(&self.vm).await {
                    None => Err(error),
                    change => {
                        tracing::info!(
                            error = format!("{error:#}"),
                            "what was noticed first of a change of the VM"
                        );
                        Err(unchanged(change).err().unwrap_or(error))
                    }
                }
            }
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

    /// A failed pause restores its disks in the background, so the next checkpoint looks for what
    /// is left of it. A base whose tables were lost with the checkpoint is looked up again.
    fn after_failure(&mut self) {
        self.is_clean = false;
        self.base.take_if(|base| base.spaces.is_empty());
    }

    async fn capture(
        &mut self,
        run: &mut prepare::Run,
        phases: &mut Phases,
        report: &Report,
    ) -> Result<Outcome> {
        kill_point::point("prepared");
        match (run.engine.mode(), run.engine) {
            (Some(mode), _) => {
                phases.enter(Phase::Stream);
                self.stream(run, mode, phases, report).await?;
            }
            (None, Engine::ProcessMemory) => {
                phases.enter(Phase::Memory);
                self.read_process_memory(run, phases, report).await?;
            }
            (None, _) => {
                phases.enter(Phase::PreCopy);
                self.passes(run, phases, report).await?;
                kill_point::point("pre-copy");
                phases.enter(Phase::Pause);
                self.pause(run, phases).await?;
            }
        }
        kill_point::point("pause.captured");
        run.inventory.check_vm(&self.vm).await?;
        phases.enter(Phase::Upload);
        self.upload(run, phases, report).await?;
        run.inventory.check_disks(&self.vm).await?;
        unchanged(
            self.layers
                .changed(&run.inventory.drives)
                .map(|path| format!("the layer {} was written to", path.display())),
        )?;
        kill_point::point("upload");
        phases.enter(Phase::Commit);
        self.commit(run, phases).await
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
