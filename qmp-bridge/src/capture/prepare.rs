//! Phase `prepare`: all that can be done while the guest runs, so that the pause holds one round
//! trip for the disks.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use checkpoint_format::CheckpointRef;
use futures::future::{BoxFuture, join_all, try_join_all};
use serde_json::{Value, json};
use tokio::sync::OwnedMutexGuard;
use tokio::time::Instant;

use super::bitmaps::{self, KeptBitmap};
use super::captured::CapturedDisks;
use super::fleecing::OverlayFile;
use super::guard::{self, FleecingGuard};
use super::names::{self, BitmapTag, DiskNames};
use super::size_marks::{self, Place, Since, SizeMark};
use super::storage::Storage;
use super::{CaptureError, arriving, filter, fleecing, storage, sweep, turn};
use crate::disks::Disk;
use crate::nbd::NbdClient;
use crate::nbd_server;
use crate::paused::Paused;
use crate::qmp::{Qmp, QmpError};

/// A good [`CapturePlan::fleecing_reserve`].
pub const DEFAULT_FLEECING_RESERVE: u64 = 256 << 20;

/// What a capture has to know.
#[derive(Debug, Clone)]
pub struct CapturePlan {
    /// The prefix of all names that this VM's checkpoints give to QEMU.
    pub tag: BitmapTag,
    /// The checkpoint being made; only its receipt acknowledges the capture.
    pub checkpoint: CheckpointRef,
    /// The checkpoint it builds on. A disk whose bitmap records since a later one, or that has
    /// none, is captured in full. `None`: all disks are.
    pub parent: Option<u64>,
    /// Where fleecing overlays live. They grow by what the guest overwrites until
    /// [`CapturedDisks::release`].
    pub fleecing_dir: PathBuf,
    /// When fewer bytes than this are free there, the capture is given up rather than a write of
    /// the guest.
    pub fleecing_reserve: u64,
    /// Where QEMU's NBD server shall listen, in a directory that is ours alone.
    pub nbd_socket: PathBuf,
    /// The pause is that of a migration, which makes all block nodes inactive before: then filters
    /// are made in the pause.
    pub streamed: bool,
}

/// What a capture will need, before the guest is stopped for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outlook {
    /// Allocated bytes of the disks that are read in full, since nothing tells what changed.
    pub full_bytes: u64,
    /// Bytes that the fleecing overlays may take until the capture is given up: what the guest may
    /// overwrite meanwhile.
    pub room: u64,
}

/// How the old content of a disk's blocks is saved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Copying {
    /// By a filter of our own under this device; see [`filter`].
    Filter { device: String },
    /// By the filter of `blockdev-backup`.
    Job,
}

/// One disk in a capture.
#[derive(Debug, Clone)]
pub(super) struct Target {
    pub(super) node: String,
    pub(super) name: String,
    pub(super) bytes: u64,
    pub(super) names: DiskNames,
    pub(super) base: Option<KeptBitmap>,
    /// Where the base says nothing of what lies behind this offset: the disk has grown there, or
    /// may have been shorter.
    pub(super) certain_until: u64,
    pub(super) copying: Copying,
}

/// What a capture has put into QEMU, until it is torn down.
#[derive(Debug)]
pub(super) struct Session {
    /// On behalf of the plan's tag.
    pub(super) qmp: Qmp,
    pub(super) plan: CapturePlan,
    pub(super) targets: Vec<Target>,
    pub(super) released: bool,
    pub(super) guard: Option<FleecingGuard>,
    /// Bitmaps are as they shall stay.
    pub(super) decided: bool,
    /// One per target, until they are checked for failed write-back.
    pub(super) overlays: Vec<OverlayFile>,
    /// None: no disk is captured.
    storage: Option<Storage>,
    /// The running disks, to flush them: node and connection.
    live: Vec<(String, NbdClient)>,
    /// Held until nothing of this capture is left, so that the clean-up of one never meets the
    /// next.
    turn: Option<OwnedMutexGuard<()>>,
}

/// Disks ready for the instant.
#[must_use = "dropping it takes the preparation back"]
#[derive(Debug)]
pub struct PreparedDisks {
    session: Session,
}

/// Pause between two tries to take a capture apart whose overlays' directory hangs.
const HUNG_RETRY: Duration = Duration::from_secs(1);

impl PreparedDisks {
    /// Starts the NBD server, adds a fleecing overlay per writable disk, and flushes the disks.
    /// Read-only disks among `disks` are passed over.
    ///
    /// # Errors
    /// When a disk cannot be captured, an overlay cannot be made, or QEMU refuses a
    /// command.
    pub async fn prepare(
        qmp: &Qmp,
        disks: &[Disk],
        plan: CapturePlan,
    ) -> Result<Self, CaptureError> {
        let qmp = plan.tag.on(qmp);
        let turn = turn::take(&qmp).await?;
        let kept = bitmaps::reconcile(&qmp, &plan.tag, plan.id()).await?;
        // Of a checkpoint that was never made, because its helper was killed.
        size_marks::remove(&qmp, &plan.tag, |_, id, _| id >= plan.id()).await?;
        let marks = size_marks::find(&qmp, &plan.tag).await?;
        let devices = filter::devices(&qmp).await?;
        let copying = |disk: &Disk| {
            devices
                .get(&disk.node)
                .map_or(Copying::Job, |device| Copying::Filter { device: device.clone() })
        };
        let writable = disks.iter().filter(|disk| !disk.read_only).enumerate();
        let targets: Vec<Target> = writable
            .map(|(index, disk)| target(index, disk, &plan, (&kept, &marks), copying(disk)))
            .collect();
        arriving::refuse_whole(&targets, disks)?;
        let storage =
            if targets.is_empty() { None } else { Some(Storage::open(&plan.fleecing_dir).await?) };
        // From here on a cancelled call drops the session, which undoes everything that was done.
        let mut session = Session {
            qmp,
            plan,
            targets,
            released: false,
            guard: None,
            decided: false,
            overlays: Vec::new(),
            storage,
            live: Vec::new(),
            turn: Some(turn),
        };
        if let Err(error) = session.set_up().await {
            session.undo().await?;
            return Err(error);
        }
        Ok(Self { session })
    }

    /// What there is to read, and the room for what the guest overwrites meanwhile.
    ///
    /// # Errors
    /// When QEMU does not answer, or the overlays' file system cannot be asked.
    pub async fn outlook(&self) -> Result<Outlook, CaptureError> {
        let Session { qmp, plan, targets, .. } = &self.session;
        let nodes = qmp.query_block_nodes().await?;
        let allocated = |target: &Target| {
            let node = nodes.iter().find(|node| node.node_name == target.node);
            let bytes = node.and_then(|node| node.image.actual_size);
            bytes.map_or(target.bytes, |bytes| bytes.min(target.bytes))
        };
        let full_bytes = targets.iter().filter(|target| target.base.is_none()).map(allocated).sum();
        let free = storage::free_bytes(&plan.fleecing_dir);
        let free = free
            .map_err(|source| CaptureError::Fleecing { path: plan.fleecing_dir.clone(), source })?;
        Ok(Outlook { full_bytes, room: free.saturating_sub(plan.fleecing_reserve) })
    }

    /// Writes what the guest has written, and QEMU or the host still holds, to the disks' storage
    /// while the guest runs: `stop` would do it with the guest stopped. Again while that takes
    /// long, since the guest writes meanwhile; an error if it takes longer than `limit` altogether.
    ///
    /// # Errors
    /// When QEMU does not finish within `limit`.
    pub async fn flush(&self, limit: Duration) -> Result<(), CaptureError> {
        self.session.flush(limit).await
    }

    /// Takes the instant: one `transaction`, then the filters, and only while the guest is paused.
    ///
    /// # Errors
    /// When the transaction fails, or the guest does not stay paused.
    pub async fn capture(mut self, paused: &Paused) -> Result<CapturedDisks, CaptureError> {
        if !self.session.targets.is_empty() {
            self.session.take_instant(paused).await?;
            let plan = &self.session.plan;
            let guard = FleecingGuard::start(
                self.session.qmp.clone(),
                plan.fleecing_dir.clone(),
                plan.fleecing_reserve,
            );
            self.session.guard = Some(guard);
        }
        Ok(CapturedDisks::new(self.session))
    }

    /// Takes the preparation back and waits for it.
    ///
    /// # Errors
    /// When QEMU refuses to remove a node.
    pub async fn discard(mut self) -> Result<(), CaptureError> {
        self.session.undo().await
    }
}

type Marks = HashMap<String, Vec<SizeMark>>;

/// A base must be one bitmap, recording, and since the parent or before it: then it holds at least
/// what is needed.
fn target(
    index: usize,
    disk: &Disk,
    plan: &CapturePlan,
    (kept, marks): (&[KeptBitmap], &Marks),
    copying: Copying,
) -> Target {
    let mut own = kept.iter().filter(|bitmap| bitmap.node == disk.node);
    let base = match (own.next(), own.next(), plan.parent) {
        (Some(only), None, Some(parent)) if only.recording && only.since <= parent => {
            Some(only.clone())
        }
        _ => None,
    };
    let marks = marks.get(&disk.node).map(Vec::as_slice).unwrap_or_default();
    let history = base.as_ref().map(|base| size_marks::since(marks, base.since, disk.virtual_size));
    let (base, certain_until) = match history {
        Some(Since::NotShortened { certain_until }) => (base, certain_until),
        Some(Since::Unknown) => {
            tracing::info!(
                disk = disk.name,
                "it may have been shorter since the last checkpoint; all of it is read"
            );
            (None, 0)
        }
        None => (None, 0),
    };
    let names = DiskNames::new(&plan.tag, index);
    Target {
        node: disk.node.clone(),
        name: disk.name.clone(),
        bytes: disk.virtual_size,
        names,
        base,
        certain_until,
        copying,
    }
}

fn actions(plan: &CapturePlan, target: &Target) -> Vec<Value> {
    let base = target.base.as_ref();
    let granularity =
        base.map_or_else(|| bitmaps::granularity(target.bytes), |base| base.granularity);
    let mut actions = vec![json!({ "type": "block-dirty-bitmap-add", "data": {
        "node": target.node, "name": names::bitmap(&plan.tag, plan.id()),
        "granularity": granularity,
    }})];
    if target.copying == Copying::Job {
        actions.push(json!({ "type": "blockdev-backup", "data": {
            "job-id": target.names.backup_job(), "device": target.node, "target": target.names.overlay(),
            "sync": "none", "filter-node-name": target.names.filter(),
        }}));
    }
    if let Some(base) = &target.base {
        let data = json!({ "node": base.node, "name": base.name });
        actions.push(json!({ "type": "block-dirty-bitmap-disable", "data": data }));
    }
    actions
}

/// What the first flush of a capture may take; only the caller waits for it, not the guest.
const FIRST_FLUSH: Duration = Duration::from_secs(60);
/// A flush that took no longer has left little to the one within the pause.
const SHORT_FLUSH: Duration = Duration::from_millis(3);
/// A guest that writes all the time is not flushed for ever.
const MOST_FLUSHES: u32 = 8;

/// Over NBD, since a flush by monitor command would hold QEMU's main loop.
async fn flush_one(
    node: &str,
    client: &NbdClient,
    left: Duration,
    limit: Duration,
) -> Result<(), CaptureError> {
    match tokio::time::timeout(left, client.flush()).await {
        Ok(flushed) => Ok(flushed?),
        Err(_) => Err(CaptureError::SlowFlush { node: node.into(), after: limit }),
    }
}

/// The overlay and the filter above the disk; or, where QEMU has no such filter, an overlay for
/// `blockdev-backup`.
async fn add_copying(
    qmp: &Qmp,
    plan: &CapturePlan,
    target: &mut Target,
) -> Result<OverlayFile, CaptureError> {
    let (disk, directory) = ((target.node.as_str(), target.bytes), plan.fleecing_dir.as_path());
    let shows_disk = target.copying == Copying::Job;
    let overlay = fleecing::add_overlay(qmp, &target.names, disk, directory, shows_disk).await?;
    if shows_disk {
        return Ok(overlay);
    }
    match filter::add(qmp, &target.names, &target.node).await {
        Ok(()) if plan.streamed => filter::delete(qmp, &target.names).await?,
        Err(error) if error.is_refusal() => {
            tracing::warn!(%error, node = target.node, "no filter of our own; blockdev-backup saves the disk's old blocks");
            fleecing::delete(qmp, &target.names).await?;
            target.copying = Copying::Job;
            return fleecing::add_overlay(qmp, &target.names, disk, directory, true).await;
        }
        other => other?,
    }
    Ok(overlay)
}

async fn export_live(
    qmp: &Qmp,
    plan: &CapturePlan,
    target: &Target,
) -> Result<NbdClient, CaptureError> {
    let export = target.names.live_export();
    let options = json!({ "type": "nbd", "id": export, "node-name": target.node, "name": export });
    qmp.execute_json("block-export-add", options).await?;
    Ok(NbdClient::connect(&plan.nbd_socket, &export, &[]).await?)
}

impl Session {
    async fn set_up(&mut self) -> Result<(), CaptureError> {
        if self.targets.is_empty() {
            return Ok(());
        }
        guard::check(&self.plan.fleecing_dir, self.plan.fleecing_reserve)?;
        nbd_server::start(&self.qmp, &self.plan.nbd_socket).await?;
        for target in &mut self.targets {
            self.overlays.push(add_copying(&self.qmp, &self.plan, target).await?);
        }
        let marks = size_marks::find(&self.qmp, &self.plan.tag).await?;
        for target in &self.targets {
            let own = marks.get(&target.node).map(Vec::as_slice).unwrap_or_default();
            if size_marks::is_due(own, self.plan.id(), target.bytes) {
                let place = Place { node: &target.node, bytes: target.bytes, names: &target.names };
                let places = (self.plan.fleecing_dir.as_path(), self.plan.nbd_socket.as_path());
                let id = self.plan.id();
                size_marks::place(&self.qmp, &self.plan.tag, id, &place, places).await?;
            }
            let client = export_live(&self.qmp, &self.plan, target).await?;
            self.live.push((target.node.clone(), client));
        }
        self.flush(FIRST_FLUSH).await
    }

    async fn flush(&self, limit: Duration) -> Result<(), CaptureError> {
        let begun = Instant::now();
        for _ in 0..MOST_FLUSHES {
            let pass = Instant::now();
            let left = limit.saturating_sub(begun.elapsed());
            try_join_all(
                self.live.iter().map(|(node, client)| flush_one(node, client, left, limit)),
            )
            .await?;
            if pass.elapsed() < SHORT_FLUSH {
                break;
            }
        }
        Ok(())
    }

    /// All commands are on their way at once; QEMU carries them out in this order.
    async fn take_instant(&self, paused: &Paused) -> Result<(), CaptureError> {
        let qmp = paused.qmp();
        let actions: Vec<Value> =
            self.targets.iter().flat_map(|target| actions(&self.plan, target)).collect();
        let transaction = json!({ "actions": actions });
        let mut commands: Vec<BoxFuture<'_, Result<(), QmpError>>> =
            vec![Box::pin(async { qmp.execute_json("transaction", transaction).await.map(drop) })];
        for target in &self.targets {
            let Copying::Filter { device } = &target.copying else { continue };
            if self.plan.streamed {
                commands.push(Box::pin(filter::add(qmp, &target.names, &target.node)));
            }
            commands.push(Box::pin(filter::insert(qmp, &target.names, device)));
        }
        let results: Result<Vec<()>, QmpError> = join_all(commands).await.into_iter().collect();
        Ok(results.map(drop)?)
    }

    /// Ends copying before write and removes everything but bitmaps.
    pub(super) async fn release(&mut self) -> Result<(), CaptureError> {
        if !self.released {
            self.guard = None;
            self.live.clear();
            sweep::sweep(&self.qmp).await?;
            if !self.targets.is_empty() {
                nbd_server::stop_unused(&self.qmp, &self.plan.nbd_socket).await?;
            }
            self.released = true;
        }
        Ok(())
    }

    /// To be called after [`Self::release`]; see [`fleecing::first_failed`].
    pub(super) async fn failed_overlay(
        &mut self,
    ) -> Result<Option<(String, std::io::Error)>, CaptureError> {
        let overlays = std::mem::take(&mut self.overlays);
        fleecing::first_failed(overlays, &self.plan.fleecing_dir).await
    }

    /// As if the capture had not been: no change may be missing from the next one.
    pub(super) async fn undo(&mut self) -> Result<(), CaptureError> {
        if !self.released
            && let Some(storage) = &self.storage
        {
            let answers = storage.answers().await;
            // Who waits for this turn need not.
            self.qmp
                .capture_turn()
                .set_hung(answers.is_err().then(|| self.plan.fleecing_dir.clone()));
            answers?;
        }
        self.release().await?;
        // For the room that they take; what they held is not used.
        let _ = self.failed_overlay().await;
        size_marks::remove(&self.qmp, &self.plan.tag, |_, id, _| id == self.plan.id()).await?;
        let (incremental, full): (Vec<&Target>, Vec<&Target>) =
            self.targets.iter().partition(|t| t.base.is_some());
        // Without a base nothing is lost: what the new bitmap followed was never stored, and an
        // older one still records.
        let full: Vec<&str> = full.iter().map(|target| target.node.as_str()).collect();
        bitmaps::remove_since(&self.qmp, &self.plan.tag, self.plan.id(), |node| {
            full.contains(&node)
        })
        .await?;
        if !incremental.is_empty() {
            bitmaps::merge_back(&self.qmp, &self.plan.tag).await?;
        }
        self.decided = true;
        Ok(())
    }

    fn undo_in_background(&mut self) {
        let mut session = Self {
            qmp: self.qmp.clone(),
            plan: self.plan.clone(),
            targets: self.targets.clone(),
            released: self.released,
            guard: None,
            overlays: std::mem::take(&mut self.overlays),
            storage: self.storage.clone(),
            live: std::mem::take(&mut self.live),
            // Its own end must not start another.
            decided: true,
            turn: self.turn.take(),
        };
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return tracing::warn!(
                "a capture ends with its runtime; the next start of the helper cleans up"
            );
        };
        runtime.spawn(async move {
            while let Err(error) = session.undo().await {
                if !matches!(error, CaptureError::Hung { .. }) {
                    return tracing::warn!(%error, "cannot clean up an abandoned capture; the next start of the helper will");
                }
                tokio::time::sleep(HUNG_RETRY).await;
            }
        });
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if !self.decided {
            self.undo_in_background();
        }
    }
}
