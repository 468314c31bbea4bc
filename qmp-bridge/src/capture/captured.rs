//! Upload phase and acknowledge: the point-in-time copies of the disks, readable while the guest
//! runs.

use checkpoint_format::{CheckpointRef, DurableReceipt};
use serde_json::{Value, json};

use super::prepare::{Copying, Session, Target};
use super::{CaptureError, bitmaps, filter, names, size_marks, storage};
use crate::nbd::{NbdClient, NbdError, context};
use crate::qmp::replies::{JobInfo, JobStatus};

/// What a look at a point-in-time copy reads.
const PROBE_BYTES: u64 = 512;

/// One disk of the instant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CapturedDisk {
    /// The node of the disk, as in [`crate::disks::Disk::node`].
    pub node: String,
    /// Its stable name, as in [`crate::disks::Disk::name`].
    pub name: String,
    /// What the guest sees, in bytes.
    pub bytes: u64,
    /// Its NBD export name.
    pub export: String,
    /// The meta context of the blocks changed since the parent; `None`: capture it in full.
    pub changes: Option<String>,
    /// What lies behind this offset counts as changed, whatever the meta context says.
    pub certain_until: u64,
}

/// The disks of one instant; see the module's head for what follows what.
#[must_use = "dropping it gives the changes back"]
#[derive(Debug)]
pub struct CapturedDisks {
    session: Session,
    disks: Vec<CapturedDisk>,
    exported: bool,
}

impl CapturedDisks {
    pub(super) fn new(session: Session) -> Self {
        let disks = session.targets.iter().map(captured_disk).collect();
        Self { session, disks, exported: false }
    }

    /// The checkpoint that it is for.
    pub fn checkpoint(&self) -> &CheckpointRef {
        &self.session.plan.checkpoint
    }

    /// The disks, in the order of the plan.
    pub fn disks(&self) -> &[CapturedDisk] {
        &self.disks
    }

    /// Makes the instant readable over NBD. To be called after the guest was resumed.
    ///
    /// # Errors
    /// When QEMU does not open its NBD server or refuses an export.
    pub async fn export(&mut self) -> Result<(), CaptureError> {
        let qmp = &self.session.qmp;
        for target in &self.session.targets {
            let node = match target.copying {
                Copying::Job => target.names.overlay(),
                Copying::Filter { .. } => {
                    filter::add_access(qmp, &target.names).await?;
                    target.names.access()
                }
            };
            let export = target.names.export();
            let options = json!({
                "type": "nbd", "id": export, "name": export, "node-name": node,
                "bitmaps": bitmaps_of(target), "allocation-depth": true,
            });
            qmp.execute_json("block-export-add", options).await?;
        }
        self.exported = true;
        Ok(())
    }

    /// A connection to the export of one of [`Self::disks`], with the meta contexts that say what
    /// to read: `base:allocation`, and the changes, or in a full capture the allocation depth (1
    /// and 2 are the disk's own blocks; more is a backing layer; 0 is a layer or nowhere).
    ///
    /// # Errors
    /// When QEMU's NBD server does not answer, or the disk is not exported.
    pub async fn connect(&self, disk: &CapturedDisk) -> Result<NbdClient, CaptureError> {
        let what = disk.changes.as_deref().unwrap_or(context::ALLOCATION_DEPTH);
        let contexts = [context::BASE_ALLOCATION, what];
        let client =
            NbdClient::connect(&self.session.plan.nbd_socket, &disk.export, &contexts).await?;
        if client.size() != disk.bytes {
            let why = format!(
                "it has {} bytes now, and had {} before: its size was changed",
                client.size(),
                disk.bytes
            );
            return Err(CaptureError::Broken { node: disk.node.clone(), why });
        }
        Ok(client)
    }

    /// Fails if the instant can no longer be trusted. To be called after the last read and before
    /// [`Self::release`]; and after a read that failed, to know why.
    ///
    /// # Errors
    /// When a backup job has failed or ended: its copy is not of the instant any more.
    pub async fn verify(&self) -> Result<(), CaptureError> {
        let qmp = &self.session.qmp;
        let jobs = qmp.query_jobs().await?;
        for target in &self.session.targets {
            match target.copying {
                Copying::Job => job_runs(target, &jobs)?,
                Copying::Filter { .. } => self.instant_holds(target).await?,
            }
        }
        // Last: a filter that is there now was there at each read.
        let filtered = self.session.targets.iter().filter(|target| target.copying != Copying::Job);
        let filters: Vec<String> = filtered.map(|target| target.names.filter()).collect();
        match filter::missing(qmp, &filters).await? {
            Some(filter) => Err(CaptureError::Broken {
                node: filter,
                why: format!("the filter was taken out; {}", self.room()),
            }),
            None => Ok(()),
        }
    }

    /// The filter answers no read any more once a block could not be saved.
    async fn instant_holds(&self, target: &Target) -> Result<(), CaptureError> {
        if target.bytes == 0 || !self.exported {
            return Ok(());
        }
        let read = async {
            let client =
                NbdClient::connect(&self.session.plan.nbd_socket, &target.names.export(), &[])
                    .await?;
            client.read(0, target.bytes.min(PROBE_BYTES) as u32).await?;
            client.close().await;
            Ok::<_, NbdError>(())
        };
        read.await.map_err(|error| {
            tracing::debug!(%error, node = target.node, "the point-in-time copy cannot be read");
            let why = format!(
                "QEMU could not save blocks that the guest has overwritten since, or not within {} s; {}",
                filter::TIMEOUT_SECONDS,
                self.room()
            );
            CaptureError::Broken { node: target.node.clone(), why }
        })
    }

    /// What is known of where the overlays are.
    fn room(&self) -> String {
        let directory = &self.session.plan.fleecing_dir;
        match storage::free_bytes(directory) {
            Ok(free) => format!(
                "the fleecing overlays are in {}, with {free} bytes free",
                directory.display()
            ),
            Err(error) => format!("the fleecing overlays are in {}: {error}", directory.display()),
        }
    }

    /// Ends copying before write: the point-in-time copy can no longer be read, and the guest's
    /// writes cost nothing extra. The changes can still be acknowledged or restored.
    ///
    /// To be called before the commit: only now can the kernel be asked whether the write-back of
    /// an overlay failed, which no read shows. After an error only [`Self::restore`] may follow.
    ///
    /// # Errors
    /// When QEMU refuses to remove an export, job or node; when write-back of an overlay failed, so
    /// that what was read may not be of the instant; when the overlays' file system hangs.
    pub async fn release(&mut self) -> Result<(), CaptureError> {
        self.session.release().await?;
        match self.session.failed_overlay().await? {
            Some((node, error)) => {
                let why =
                    format!("write-back of its fleecing overlay failed: {error}; {}", self.room());
                Err(CaptureError::Broken { node, why })
            }
            None => Ok(()),
        }
    }

    /// The checkpoint is durable: forgets the changes up to the instant.
    ///
    /// # Errors
    /// When the receipt is of another checkpoint: then the bitmaps are restored. When QEMU refuses
    /// to remove the older bitmap, export, job or node.
    pub async fn acknowledge(mut self, receipt: &DurableReceipt) -> Result<(), CaptureError> {
        if let Err(other) = receipt.confirm(&self.session.plan.checkpoint) {
            self.session.undo().await?;
            return Err(other.into());
        }
        // Whatever fails below, these changes are in a durable checkpoint: merging them back would
        // only store them again.
        self.session.release().await?;
        bitmaps::keep_only(&self.session.qmp, &self.session.plan.tag, receipt).await?;
        size_marks::keep_newest(&self.session.qmp, &self.session.plan.tag).await?;
        self.session.decided = true;
        Ok(())
    }

    /// Restores the dirty bitmaps after a failed checkpoint: the next one must carry these changes
    /// too.
    ///
    /// # Errors
    /// When QEMU refuses to merge the bitmaps, or to remove an export, job or node.
    pub async fn restore(mut self) -> Result<(), CaptureError> {
        self.session.undo().await
    }

    /// The name of the bitmap that records from the instant on, for logs.
    pub fn successor(&self) -> String {
        names::bitmap(&self.session.plan.tag, self.session.plan.id())
    }
}

/// With a filter, QEMU gets the bitmap's node too: what is above the filter has no backing chain in
/// which QEMU could find the bitmap.
fn bitmaps_of(target: &Target) -> Vec<Value> {
    let bitmap = |base: &bitmaps::KeptBitmap| match target.copying {
        Copying::Job => json!(base.name),
        Copying::Filter { .. } => json!({ "node": base.node, "name": base.name }),
    };
    target.base.iter().map(bitmap).collect()
}

fn job_runs(target: &Target, jobs: &[JobInfo]) -> Result<(), CaptureError> {
    let broken = |why| Err(CaptureError::Broken { node: target.node.clone(), why });
    match jobs.iter().find(|job| job.id == target.names.backup_job()) {
        None => broken("its job ended".into()),
        Some(job) if job.error.is_some() || job.status != JobStatus::Running => broken(format!(
            "its job is {}: {}",
            job.status,
            job.error.as_deref().unwrap_or("no error")
        )),
        Some(_) => Ok(()),
    }
}

fn captured_disk(target: &Target) -> CapturedDisk {
    CapturedDisk {
        node: target.node.clone(),
        name: target.name.clone(),
        bytes: target.bytes,
        export: target.names.export(),
        certain_until: target.certain_until,
        changes: target.base.as_ref().map(|base| context::dirty_bitmap(&base.name)),
    }
}
