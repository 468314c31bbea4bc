//! Phase `prepare`: all that can be done while the guest runs, so that the pause holds one round trip for the disks.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::OwnedMutexGuard;

use super::bitmaps::{self, KeptBitmap};
use super::frozen::FrozenDisks;
use super::guard::{self, ScratchGuard};
use super::names::{self, BitmapTag, DiskNames};
use super::{CaptureError, scratch, sweep};
use crate::disks::Disk;
use crate::jobs::remove_exports;
use crate::nbd::NbdClient;
use crate::paused::Paused;
use crate::qmp::Qmp;

/// A good [`CapturePlan::scratch_reserve`].
pub const DEFAULT_SCRATCH_RESERVE: u64 = 256 << 20;

/// What a capture has to know.
#[derive(Debug, Clone)]
pub struct CapturePlan {
    pub tag: BitmapTag,
    /// The checkpoint being made.
    pub seq: u64,
    /// The checkpoint it builds on. A disk whose bitmap records since a later one, or that has none, is captured in
    /// full. `None`: all disks are.
    pub parent: Option<u64>,
    /// Where scratch overlays live. They grow by what the guest overwrites until [`FrozenDisks::release`].
    pub scratch_dir: PathBuf,
    /// When fewer bytes than this are free there, the capture is given up rather than a write of the guest.
    pub scratch_reserve: u64,
    /// Where QEMU's NBD server shall listen; a stale socket there is removed.
    pub nbd_socket: PathBuf,
}

/// One disk in a capture.
#[derive(Debug, Clone)]
pub(super) struct Target {
    pub(super) node: String,
    pub(super) name: String,
    pub(super) bytes: u64,
    pub(super) names: DiskNames,
    pub(super) base: Option<KeptBitmap>,
}

/// What a capture has put into QEMU, until it is torn down.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) qmp: Qmp,
    pub(super) plan: CapturePlan,
    pub(super) targets: Vec<Target>,
    pub(super) released: bool,
    pub(super) guard: Option<ScratchGuard>,
    /// Bitmaps are as they shall stay.
    pub(super) decided: bool,
    /// Held until nothing of this capture is left, so that the clean-up of one never meets the next.
    turn: Option<OwnedMutexGuard<()>>,
}

/// Disks ready for the instant.
#[must_use = "dropping it takes the preparation back"]
#[derive(Debug)]
pub struct PreparedDisks {
    session: Session,
    transaction: Value,
}

impl PreparedDisks {
    /// Starts the NBD server, adds a scratch overlay per writable disk, and flushes the disks so that the flush in
    /// `stop` finds little to do. Read-only disks among `disks` are passed over.
    pub async fn prepare(qmp: &Qmp, disks: &[Disk], plan: CapturePlan) -> Result<Self, CaptureError> {
        let turn = take_turn(qmp).await?;
        let kept = bitmaps::sort_out(qmp, &plan.tag, plan.seq).await?;
        let writable = disks.iter().filter(|disk| !disk.read_only);
        let targets: Vec<Target> = writable.enumerate().map(|(index, disk)| target(index, disk, &plan, &kept)).collect();
        let transaction = json!({ "actions": targets.iter().flat_map(|t| actions(&plan, t)).collect::<Vec<_>>() });
        // From here on a cancelled call is a drop, which takes back whatever was done.
        let mut session = Session { qmp: qmp.clone(), plan, targets, released: false, guard: None, decided: false, turn: Some(turn) };
        if let Err(error) = session.set_up().await {
            session.undo().await?;
            return Err(error);
        }
        Ok(Self { session, transaction })
    }

    /// Takes the instant: one `transaction`, and only while the guest is paused.
    pub async fn freeze(mut self, paused: &Paused) -> Result<FrozenDisks, CaptureError> {
        if !self.session.targets.is_empty() {
            paused.qmp().execute_json("transaction", self.transaction).await?;
            let plan = &self.session.plan;
            let guard = ScratchGuard::start(self.session.qmp.clone(), plan.scratch_dir.clone(), plan.scratch_reserve);
            self.session.guard = Some(guard);
        }
        Ok(FrozenDisks::new(self.session))
    }

    /// Takes the preparation back and waits for it.
    pub async fn discard(mut self) -> Result<(), CaptureError> {
        self.session.undo().await
    }
}

/// How long a capture waits for the clean-up of one before.
const TURN_PATIENCE: Duration = Duration::from_secs(60);

/// Waits until no other capture of this connection is left.
pub(super) async fn take_turn(qmp: &Qmp) -> Result<OwnedMutexGuard<()>, CaptureError> {
    let turn = tokio::time::timeout(TURN_PATIENCE, qmp.capture_turn().lock_owned()).await;
    turn.map_err(|_| CaptureError::Busy { after: TURN_PATIENCE })
}

/// A base must be one bitmap, recording, and since the parent or before it: then it holds at least what is needed.
fn target(index: usize, disk: &Disk, plan: &CapturePlan, kept: &[KeptBitmap]) -> Target {
    let mut own = kept.iter().filter(|bitmap| bitmap.node == disk.node);
    let base = match (own.next(), own.next(), plan.parent) {
        (Some(only), None, Some(parent)) if only.recording && only.since <= parent => Some(only.clone()),
        _ => None,
    };
    let names = DiskNames::new(plan.seq, index);
    Target { node: disk.node.clone(), name: disk.name.clone(), bytes: disk.virtual_size, names, base }
}

fn actions(plan: &CapturePlan, target: &Target) -> Vec<Value> {
    let granularity = target.base.as_ref().map_or_else(|| bitmaps::granularity(target.bytes), |base| base.granularity);
    let mut actions = vec![
        json!({ "type": "block-dirty-bitmap-add", "data": {
            "node": target.node, "name": names::bitmap(&plan.tag, plan.seq), "granularity": granularity,
        }}),
        json!({ "type": "blockdev-backup", "data": {
            "job-id": target.names.backup_job(), "device": target.node, "target": target.names.overlay(),
            "sync": "none", "filter-node-name": target.names.filter(),
        }}),
    ];
    if let Some(base) = &target.base {
        let data = json!({ "node": base.node, "name": base.name });
        actions.push(json!({ "type": "block-dirty-bitmap-disable", "data": data }));
    }
    actions
}

impl Session {
    async fn set_up(&self) -> Result<(), CaptureError> {
        if self.targets.is_empty() {
            return Ok(());
        }
        guard::check(&self.plan.scratch_dir, self.plan.scratch_reserve)?;
        self.start_server().await?;
        for target in &self.targets {
            let directory = &self.plan.scratch_dir;
            scratch::add_overlay(&self.qmp, &target.names, &target.node, target.bytes, directory).await?;
        }
        for target in &self.targets {
            self.flush(target).await?;
        }
        Ok(())
    }

    async fn start_server(&self) -> Result<(), CaptureError> {
        let path = &self.plan.nbd_socket;
        let text = path.to_str().ok_or_else(|| CaptureError::Path { path: path.clone() })?;
        // Only a socket that nobody serves any more can be here; missing is the rule.
        let _ = std::fs::remove_file(path);
        let address = json!({ "type": "unix", "data": { "path": text } });
        let started = self.qmp.execute_json("nbd-server-start", json!({ "addr": address })).await;
        started.map(drop).map_err(|source| CaptureError::Server { source })
    }

    /// Over NBD, since a flush by monitor command would hold QEMU's main loop.
    async fn flush(&self, target: &Target) -> Result<(), CaptureError> {
        let export = target.names.live_export();
        let options = json!({ "type": "nbd", "id": export, "node-name": target.node, "name": export });
        self.qmp.execute_json("block-export-add", options).await?;
        let client = NbdClient::connect(&self.plan.nbd_socket, &export, &[]).await?;
        client.flush().await?;
        client.close().await;
        remove_exports(&self.qmp, |id| id == export).await?;
        Ok(())
    }

    /// Ends copying before write and removes everything but bitmaps.
    pub(super) async fn release(&mut self) -> Result<(), CaptureError> {
        if !self.released {
            self.guard = None;
            sweep::sweep(&self.qmp).await?;
            if !self.targets.is_empty() {
                sweep::stop_server(&self.qmp).await?;
            }
            self.released = true;
        }
        Ok(())
    }

    /// As if the capture had not been: no change may be missing from the next one.
    pub(super) async fn undo(&mut self) -> Result<(), CaptureError> {
        self.release().await?;
        let (incremental, full): (Vec<&Target>, Vec<&Target>) = self.targets.iter().partition(|t| t.base.is_some());
        // Without a base nothing is lost: what the new bitmap followed was never stored, and an older one still records.
        let full: Vec<&str> = full.iter().map(|target| target.node.as_str()).collect();
        bitmaps::remove_since(&self.qmp, &self.plan.tag, self.plan.seq, |node| full.contains(&node)).await?;
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
            // Its own end must not start another.
            decided: true,
            turn: self.turn.take(),
        };
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return tracing::warn!("a capture ends with its runtime; the next start of the helper cleans up");
        };
        runtime.spawn(async move {
            if let Err(error) = session.undo().await {
                tracing::warn!(%error, "cannot clean up an abandoned capture; the next start of the helper will");
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
