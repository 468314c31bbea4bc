//! Phases `drain` and `settle`: the disks of the instant, readable while the guest runs.

use serde_json::json;

use super::CaptureError;
use super::bitmaps;
use super::names;
use super::prepare::{Session, Target};
use crate::jobs;
use crate::nbd::{NbdClient, context};

/// One disk of the instant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FrozenDisk {
    /// The node of the disk, as in [`crate::disks::Disk::node`].
    pub node: String,
    /// Its stable name, as in [`crate::disks::Disk::name`].
    pub name: String,
    pub bytes: u64,
    /// Its NBD export name.
    pub export: String,
    /// The meta context of the blocks changed since the parent; `None`: capture it in full.
    pub changes: Option<String>,
}

/// The disks of one instant; see the module's head for what follows what.
#[must_use = "dropping it gives the changes back"]
#[derive(Debug)]
pub struct FrozenDisks {
    session: Session,
    disks: Vec<FrozenDisk>,
}

impl FrozenDisks {
    pub(super) fn new(session: Session) -> Self {
        let disks = session.targets.iter().map(frozen_disk).collect();
        Self { session, disks }
    }

    pub fn disks(&self) -> &[FrozenDisk] {
        &self.disks
    }

    /// Makes the instant readable over NBD. To be called after the guest was resumed.
    pub async fn export(&self) -> Result<(), CaptureError> {
        for target in &self.session.targets {
            let export = target.names.export();
            // A bitmap by bare name is looked for down the backing chain, so it is found on the disk under the overlay.
            let bitmaps: Vec<_> = target.base.iter().map(|base| &base.name).collect();
            let options = json!({
                "type": "nbd", "id": export, "name": export, "node-name": target.names.overlay(),
                "bitmaps": bitmaps, "allocation-depth": true,
            });
            self.session.qmp.execute_json("block-export-add", options).await?;
        }
        Ok(())
    }

    /// A connection to the export of one of [`Self::disks`], with the meta contexts that say what to read:
    /// `base:allocation`, and the changes, or in a full capture the allocation depth (1 and 2 are the disk's own
    /// blocks; more is a backing layer; 0 is nowhere).
    pub async fn connect(&self, disk: &FrozenDisk) -> Result<NbdClient, CaptureError> {
        let what = disk.changes.as_deref().unwrap_or(context::ALLOCATION_DEPTH);
        let contexts = [context::BASE_ALLOCATION, what];
        Ok(NbdClient::connect(&self.session.plan.nbd_socket, &disk.export, &contexts).await?)
    }

    /// Fails if the instant can no longer be trusted. To be called after the last read and before the commit.
    pub async fn verify(&self) -> Result<(), CaptureError> {
        let jobs = jobs::list(&self.session.qmp).await?;
        for target in &self.session.targets {
            let broken = |why| Err(CaptureError::Broken { node: target.node.clone(), why });
            match jobs.iter().find(|job| job.id == target.names.backup_job()) {
                None => return broken("its job ended".into()),
                Some(job) if job.error.is_some() || job.status != "running" => {
                    return broken(format!("its job is {}: {}", job.status, job.error.as_deref().unwrap_or("no error")));
                }
                Some(_) => {}
            }
        }
        Ok(())
    }

    /// Ends copying before write: the instant can be read no more, the guest's writes cost nothing any more. Whether
    /// the changes are settled or given back is still open.
    pub async fn release(&mut self) -> Result<(), CaptureError> {
        self.session.release().await
    }

    /// The checkpoint is durable: forgets the changes up to the instant.
    pub async fn settle(mut self) -> Result<(), CaptureError> {
        // Whatever fails below, these changes are in a durable checkpoint: merging them back would only store them again.
        self.session.release().await?;
        bitmaps::keep_only(&self.session.qmp, &self.session.plan.tag, self.session.plan.seq).await?;
        self.session.decided = true;
        Ok(())
    }

    /// The checkpoint failed: the next one must carry these changes too.
    pub async fn give_back(mut self) -> Result<(), CaptureError> {
        self.session.undo().await
    }

    /// The name of the bitmap that records from the instant on, for logs.
    pub fn successor(&self) -> String {
        names::bitmap(&self.session.plan.tag, self.session.plan.seq)
    }
}

fn frozen_disk(target: &Target) -> FrozenDisk {
    FrozenDisk {
        node: target.node.clone(),
        name: target.name.clone(),
        bytes: target.bytes,
        export: target.names.export(),
        changes: target.base.as_ref().map(|base| context::dirty_bitmap(&base.name)),
    }
}
