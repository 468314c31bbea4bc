//! Disks that arrive while the guest runs.
//!
//! The image of such a disk is an empty overlay on an export of this process, which has the blocks
//! that the checkpoint holds (see [`qmp_bridge::arriving`]). QEMU reads through it what the guest
//! needs, and a job of QEMU copies all into the overlay, in the order of the disk; then the overlay
//! is on the disk's layers alone, as an eager restore makes it, and QEMU depends on no helper.
//!
//! What the guest writes is in the overlay and in the disk's dirty bitmap; what is copied is not in
//! the bitmap, and what is not here is as the checkpoint has it. So an incremental checkpoint takes
//! only what the guest has written. It holds the copying meanwhile, since QEMU cannot copy blocks
//! into a disk and keep its blocks of one instant at the same time.
//!
//! If this process ends, QEMU's requests wait, and the next helper serves the same socket by the
//! record in the runtime directory.

mod shutdown;

use super::chain::image_format;
use super::disk_export::{DiskExports, Reader, Troubles, can_arrive};
use super::disks::Places;
use super::hydration::Trouble;
use super::on_demand::{OnDemand, Origin};
use super::source::Source;
use crate::checkpoint::{ArrivingDisks, Held};
use crate::kill_point::{self, Filling};
use anyhow::{Context, Result};
use checkpoint_format::{ByteLen, DiskRecord, SpaceName, VmName};
use futures::FutureExt;
use futures::future::BoxFuture;
use qmp_bridge::arriving::{self, ArrivingDisk};
use qmp_bridge::images::Backing;
use qmp_bridge::nbd::server::NbdServer;
use qmp_bridge::{Qmp, RunState};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use shutdown::Shutdown;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;
use tokio::net::UnixListener;
use tokio::task::AbortHandle;
use vm::drives::{self, Started};
use vm::error::{EngineError, InPhase, Phase, refused};
use vm::launch::arguments;
use vm::runtime_dir::{RuntimeDir, VmFile};

const FILE: &str = "arriving-disks.json";
const MAX_BYTES: u64 = 4 << 20;
/// Bytes a second that are copied into one disk: the guest's own reads come first.
const SPEED: u64 = 256 << 20;
/// A read that has failed is tried again within this time.
const TROUBLE: Duration = Duration::from_secs(4);
/// Between two looks at what is still to come.
const POLL_INTERVAL: Duration = Duration::from_millis(250);

/// What the next helper has to know.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    /// The QEMU that reads the exports.
    instance: String,
    #[serde(flatten)]
    origin: Origin,
    /// By their numbers among the VM's disks.
    disks: Vec<Exported>,
    /// QEMU ends when its guest shuts down; while disks arrive it is kept.
    #[serde(default)]
    ends_at_shutdown: bool,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Exported {
    number: usize,
    /// Its name in the store, and that of the export.
    disk: String,
    space: SpaceName,
    bytes: ByteLen,
    backing: Option<Below>,
    /// QEMU stops the guest when a block cannot be read.
    #[serde(default)]
    stops: bool,
}

/// What the image is on in the end.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Below {
    file: String,
    format: String,
}

/// Disks that are to arrive, while they are made.
pub(crate) struct LazyDisks {
    record: Record,
    /// Where QEMU will find the exports.
    socket: PathBuf,
}

/// Disks that arrive for as long as this lives, or have arrived.
#[derive(Clone)]
pub struct Disks(Arc<Running>);

struct Running {
    inner: Arc<Inner>,
    _server: NbdServer,
    copying: OnceLock<AbortHandle>,
}

struct Inner {
    record: Record,
    runtime: RuntimeDir,
    reader: Arc<Reader>,
    /// Taken by who changes what QEMU copies.
    turn: Arc<tokio::sync::Mutex<()>>,
    qmp: OnceLock<Qmp>,
    progress: Mutex<Vec<DiskStatus>>,
    is_done: AtomicBool,
}

/// What is known of disks that arrive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DisksStatus {
    /// The URL of the store that they come from.
    pub store: String,
    /// All that arrive.
    pub disks: Vec<DiskStatus>,
    /// The store does not answer; reads of the guest wait.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub store_away: Option<Trouble>,
    /// What the store has is damaged; reads of it wait.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub damaged: Option<Trouble>,
}

/// How far one is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStatus {
    /// Its name in the store.
    pub disk: String,
    /// Bytes from its start that were copied, or need not be.
    pub done_bytes: u64,
    /// Its size in bytes.
    pub total_bytes: u64,
}

impl DisksStatus {
    /// Bytes that are done, and all, over all disks.
    pub fn sum(&self) -> (u64, u64) {
        let sum = |of: fn(&DiskStatus) -> u64| self.disks.iter().map(of).sum();
        (sum(|disk| disk.done_bytes), sum(|disk| disk.total_bytes))
    }
}

impl LazyDisks {
    /// None yet; `store` is the URL by which the next helper opens it.
    pub(crate) fn new(
        source: &Source,
        vm: &VmName,
        store: String,
        instance: &str,
        runtime: &RuntimeDir,
    ) -> Self {
        let origin = Origin { store, vm: vm.clone(), checkpoint: source.identity() };
        let record = Record {
            instance: instance.to_owned(),
            origin,
            disks: Vec::new(),
            ends_at_shutdown: false,
        };
        Self { record, socket: runtime.blocks() }
    }

    /// What the overlay of this disk, the VM's `number`th, stands on at first; none for one that
    /// has to be restored whole. `backing` is what it stands on in the end.
    pub(crate) fn add(
        &mut self,
        number: usize,
        disk: &DiskRecord,
        backing: Option<&Backing>,
    ) -> Result<Option<Backing>> {
        if !can_arrive(disk) {
            return Ok(None);
        }
        let first = arriving::backing(&self.record.instance, number, &self.socket, &disk.node);
        let first = first.context("the path of the runtime directory is not UTF-8")?;
        self.record.disks.push(Exported {
            number,
            disk: disk.node.clone(),
            space: disk.space.clone().context("a writable disk without a space")?,
            bytes: disk.virtual_size,
            backing: backing.map(Below::of),
            stops: false,
        });
        Ok(Some(first))
    }

    /// The command line with which QEMU of this VM is started: where a disk's device knows that, it
    /// stops the guest when a block cannot be read, and the guest gets no error. That is no part of
    /// the VM, and not saved.
    pub(crate) fn command_line(&mut self, places: &Places<'_>, file: &VmFile) -> Result<VmFile> {
        let mut options = arguments::parse(&file.arguments)?;
        for exported in &mut self.record.disks {
            let is_it = |disk: &&DiskRecord| disk.node == exported.disk;
            let Some(disk) = places.manifest.disks.iter().find(is_it) else { continue };
            let started = Started {
                options: &options,
                machine_type: &file.machine_type,
                directory: &file.directory,
                pid: 0,
            };
            let made = drives::stop_at_errors(&started, &exported.disk, &places.image(disk));
            if let Some(stopping) = made {
                options = stopping;
                exported.stops = true;
            }
        }
        Ok(VmFile { arguments: arguments::words(&options), ..file.clone() })
    }

    /// From now on QEMU can open them. None if there are none. `state`: what the VM will be in.
    pub(crate) async fn serve(
        mut self,
        source: &Source,
        runtime: &RuntimeDir,
        (file, state): (&VmFile, RunState),
    ) -> Result<Option<Disks>> {
        if self.record.disks.is_empty() {
            return Ok(None);
        }
        let ends = shutdown::ends_qemu(&arguments::parse(&file.arguments)?);
        self.record.ends_at_shutdown = ends && state != RunState::Shutdown;
        let text = serde_json::to_vec(&self.record);
        runtime
            .replace(FILE, &text.with_context(|| format!("internal error: encoding {FILE}"))?)?;
        let pages = OnDemand::new(source.clone(), super::disk_export::CACHE);
        Disks::serve(self.record, runtime, DiskExports::new(pages)).map(Some)
    }
}

impl Below {
    fn of(backing: &Backing) -> Self {
        Self { file: backing.file.clone(), format: backing.format.as_str().to_owned() }
    }

    fn backing(&self) -> Result<Backing> {
        Ok(Backing { file: self.file.clone(), format: image_format(&self.format)? })
    }
}

impl Record {
    /// That of this QEMU, if its disks have not all arrived.
    fn load(runtime: &RuntimeDir) -> Result<Option<Self>> {
        let path = runtime.path().join(FILE);
        if !path.exists() {
            return Ok(None);
        }
        let text = runtime.read(FILE, MAX_BYTES)?;
        let record: Self = serde_json::from_slice(&text).with_context(|| {
            format!(
                "{} is damaged: where the rest of the VM's disks is cannot be known; restore the \
                 VM again",
                path.display()
            )
        })?;
        if record.instance == runtime.vm()?.instance {
            return Ok(Some(record));
        }
        tracing::info!("an earlier QEMU of this name ended before all its disks had arrived");
        Self::remove(runtime)?;
        Ok(None)
    }

    fn remove(runtime: &RuntimeDir) -> Result<()> {
        Ok(runtime.forget(FILE)?)
    }
}

impl Disks {
    /// Continues what an earlier helper of this VM has begun and not ended; none if there is
    /// nothing. To be called before anything is asked of QEMU, which may be waiting for a block.
    ///
    /// # Errors
    /// When the record cannot be read, or the socket cannot be made.
    pub fn resume(runtime: &RuntimeDir) -> Result<Option<Self>, EngineError> {
        Self::resumed(runtime).in_phase(Phase::Attach)
    }

    fn resumed(runtime: &RuntimeDir) -> Result<Option<Self>> {
        let Some(record) = Record::load(runtime)? else { return Ok(None) };
        let exports = DiskExports::later(record.origin.clone());
        exports.wait_for_reads()?;
        tracing::info!("the VM's disks are still arriving; this helper continues to serve them");
        Self::serve(record, runtime, exports).map(Some)
    }

    fn serve(record: Record, runtime: &RuntimeDir, mut exports: DiskExports) -> Result<Self> {
        for Exported { disk, space, bytes, backing, stops, .. } in &record.disks {
            let backing = backing.as_ref().map(Below::backing).transpose()?;
            exports.add(disk, (space.clone(), *bytes), backing.as_ref(), *stops)?;
        }
        let socket = runtime.blocks();
        // What a helper left that was killed; only one helper of a VM lives.
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket)
            .with_context(|| format!("listening at {}", socket.display()))?;
        let server = NbdServer::start(listener, exports.exports()?);
        let progress = record.disks.iter().map(|disk| DiskStatus {
            disk: disk.disk.clone(),
            done_bytes: 0,
            total_bytes: disk.bytes.0,
        });
        let inner = Inner {
            progress: Mutex::new(progress.collect()),
            record,
            runtime: runtime.clone(),
            reader: exports.reader(),
            turn: Arc::default(),
            qmp: OnceLock::new(),
            is_done: AtomicBool::new(false),
        };
        let copying = OnceLock::new();
        Ok(Self(Arc::new(Running { inner: Arc::new(inner), _server: server, copying })))
    }

    /// The guest may run: what cannot be read is waited for, and is no error any more. An error if
    /// something could not be read before.
    pub(crate) fn wait_for_reads(&self) -> Result<()> {
        let failed = self.0.inner.reader.wait_for_reads();
        failed.context("reading the disks while QEMU opened them")
    }

    /// Begins to copy. The disks must be active.
    pub fn copy(&self, qmp: &Qmp) {
        let Running { inner, copying, .. } = &*self.0;
        if inner.qmp.set(qmp.clone()).is_ok() {
            let task = tokio::spawn(copy(Arc::clone(inner), qmp.clone()));
            let _ = copying.set(task.abort_handle());
        }
    }

    /// Where they come from.
    pub(super) fn origin(&self) -> Origin {
        self.0.inner.record.origin.clone()
    }

    /// The names of those that are to come.
    pub fn names(&self) -> Vec<String> {
        self.0.inner.record.disks.iter().map(|disk| disk.disk.clone()).collect()
    }

    /// How far they are, and what is in their way; none if all are here.
    pub fn status(&self) -> Option<DisksStatus> {
        let inner = &self.0.inner;
        if self.is_done() {
            return None;
        }
        let Troubles { away: store_away, damaged } = inner.reader.troubles();
        let store = inner.record.origin.store.clone();
        Some(DisksStatus { store, disks: inner.progress().clone(), store_away, damaged })
    }
}

impl ArrivingDisks for Disks {
    fn is_done(&self) -> bool {
        self.0.inner.is_done.load(Ordering::Acquire)
    }

    fn describe(&self) -> String {
        let status = self.status();
        let names: Vec<String> =
            status.iter().flat_map(|status| &status.disks).map(percent).collect();
        format!("{} have arrived", names.join(", "))
    }

    fn hold(&self) -> BoxFuture<'_, Result<Held>> {
        self.0.inner.hold().boxed()
    }
}

fn percent(status: &DiskStatus) -> String {
    let percent = (status.done_bytes * 100).checked_div(status.total_bytes).unwrap_or(0);
    format!("{percent} % of disk {}", status.disk)
}

impl Drop for Running {
    fn drop(&mut self) {
        self.copying.get().into_iter().for_each(AbortHandle::abort);
    }
}

impl Inner {
    fn progress(&self) -> MutexGuard<'_, Vec<DiskStatus>> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// QEMU's `stop` would not return while a read waits, so no checkpoint begins then.
    async fn hold(&self) -> Result<Held> {
        let turn = Arc::clone(&self.turn).lock_owned().await;
        let mut troubles = self.reader.watch();
        let readable = troubles.wait_for(|troubles| *troubles == Troubles::default());
        let waited = tokio::time::timeout(TROUBLE, readable).await.is_ok();
        let Troubles { away, damaged } = self.reader.troubles();
        if let Some(trouble) = away.or(damaged).filter(|_| !waited) {
            return Err(refused(format!(
                "blocks of the VM's disks that have not arrived cannot be read since {}, and the \
                 guest would be stopped until they can ({})",
                trouble.since, trouble.message
            )));
        }
        if let Some(qmp) = self.qmp.get().filter(|_| !self.is_done.load(Ordering::Acquire)) {
            let stopped = arriving::stop_copying(qmp).await;
            stopped.context("holding the copying of blocks that are still to come")?;
        }
        Ok(Box::new(turn))
    }

    fn note(&self, disks: &[ArrivingDisk]) {
        let done = |exported: &Exported| {
            let total_bytes = exported.bytes.0;
            let disk = disks.iter().find(|disk| disk.number == exported.number);
            let offset = |disk: &ArrivingDisk| disk.copying.map_or(0, |copying| copying.offset);
            let done_bytes = disk.map_or(total_bytes, offset).min(total_bytes);
            DiskStatus { disk: exported.disk.clone(), done_bytes, total_bytes }
        };
        *self.progress() = self.record.disks.iter().map(done).collect();
    }

    fn finish(&self) {
        if let Err(error) = Record::remove(&self.runtime) {
            tracing::error!(
                error = format!("{error:#}"),
                "the record of arriving disks is left; the next helper looks again"
            );
        }
        self.is_done.store(true, Ordering::Release);
        tracing::info!("all disks have arrived");
    }
}

/// Until QEMU needs nothing from here.
async fn copy(inner: Arc<Inner>, qmp: Qmp) {
    let shutdown = Shutdown::of(&qmp, inner.record.ends_at_shutdown);
    shutdown.hold().await;
    loop {
        {
            let _turn = inner.turn.lock().await;
            match step(&inner, &qmp).await {
                Ok(true) => break,
                Ok(false) => {}
                Err(error) => tracing::debug!(error = format!("{error:#}"), "copying blocks"),
            }
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    kill_point::point("restore.disks-arrived");
    shutdown.release().await;
    inner.finish();
}

/// Whether all are complete.
async fn step(inner: &Inner, qmp: &Qmp) -> Result<bool> {
    if inner.reader.retry().await {
        resume(qmp).await?;
    }
    let disks = arriving::list(qmp).await?;
    inner.note(&disks);
    let holds = kill_point::holds_filler(Filling::Rest);
    if !holds && inner.reader.troubles().damaged.is_none() {
        for disk in &disks {
            let begun = disk.begin(qmp, SPEED).await;
            begun.with_context(|| format!("copying into {}", disk.node))?;
        }
    }
    Ok(disks.is_empty())
}

/// A guest that QEMU stopped because blocks could not be read continues; its requests are repeated.
async fn resume(qmp: &Qmp) -> Result<()> {
    if RunState::of(qmp).await? == RunState::IoError {
        tracing::info!("the store answers again; the guest, which was stopped, continues");
        qmp.execute_json("cont", Value::Null).await.context("letting the guest continue")?;
    }
    Ok(())
}
