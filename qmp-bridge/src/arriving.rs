//! Disks whose blocks arrive while the guest runs.
//!
//! Such a disk is an empty overlay on an image that the helper exports
//! ([`crate::synthetic_qcow2`]), which is on the disk's layers. QEMU reads from that image what the
//! guest needs, and a job copies all of it into the overlay:
//!
//! ```text
//! before: overlay -> exported image (qcow2 over NBD) -> layers
//! after:  overlay -> layers
//! ```
//!
//! A stream that ends at the layers takes the exported image out of the chain and leaves in the
//! overlay's header what the exported image has in its own: the layers. What QEMU copies does not
//! count as written by the guest, so bitmaps stay exact.
//!
//! QEMU's requests wait while no helper listens at the socket, for [`RECONNECT_SECONDS`] at most:
//! they are sent again to the next helper. A request whose block the store does not give waits too.
//! QEMU ends a `stop` only when no request waits, and answers no other command until then.
//!
//! A job holds the chain, and a capture of the disk would change it: so no capture begins before
//! [`stop_copying`]. The job begins again from the start of the disk, and passes over what the
//! overlay has.
//!
//! Node and job are named after the VM's instance and the disk's number, so that the next helper
//! finds them.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::disks::ImageFormat;
use crate::images::Backing;
use crate::jobs::{JobError, Looks, tolerate_refusal};
use crate::names::ObjectNames;
use crate::qmp::replies::{BlockDeviceInfo, BlockJobInfo};
use crate::qmp::{Qmp, QmpError};

/// How long QEMU waits for a helper that died before it gives the guest an I/O error: a year.
pub const RECONNECT_SECONDS: u32 = 365 * 24 * 3600;

/// A job ends when the read that it waits for has come.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// A disk that is not complete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArrivingDisk {
    /// Its own format node.
    pub node: String,
    /// Its number among the VM's disks, as [`backing`] had it.
    pub number: usize,
    /// The job that copies, if it runs.
    pub copying: Option<Copying>,
    /// The layers' node; none for a disk without layers.
    base: Option<String>,
    /// What the overlay's header names in the end.
    backing: Option<String>,
}

/// How far a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Copying {
    /// Bytes of the disk that were looked at.
    pub offset: u64,
    /// Bytes of the disk.
    pub length: u64,
    /// It met an error, and waits.
    pub stopped: bool,
}

fn node_name(names: &ObjectNames, number: usize) -> String {
    names.arriving(&format!("disk-{number}"))
}

fn job_name(names: &ObjectNames, number: usize) -> String {
    names.arriving(&format!("copy-{number}"))
}

/// What the overlay of disk `number` stands on at first: the export at that socket. None if the
/// socket's path is not UTF-8.
pub fn backing(instance: &str, number: usize, socket: &Path, export: &str) -> Option<Backing> {
    let names = ObjectNames::of(instance);
    let node = json!({
        "driver": "qcow2",
        "node-name": node_name(&names, number),
        "file": {
            "driver": "nbd",
            "node-name": names.arriving(&format!("nbd-{number}")),
            "server": { "type": "unix", "path": socket.to_str()? },
            "export": export,
            "reconnect-delay": RECONNECT_SECONDS,
        },
    });
    Some(Backing { file: format!("json:{node}"), format: ImageFormat::Qcow2 })
}

/// Disks that are not complete, also those of an earlier helper.
///
/// # Errors
/// When QEMU does not answer.
pub async fn list(qmp: &Qmp) -> Result<Vec<ArrivingDisk>, QmpError> {
    let graph = qmp.query_block_graph().await?;
    let names = qmp.names();
    let prefix = names.arriving("disk-");
    let mut found = Vec::new();
    let mut images: Vec<BlockDeviceInfo> = Vec::new();
    let mut jobs: Vec<BlockJobInfo> = Vec::new();
    for top in graph.drivers().map(|node| node.name.as_str()) {
        let Some(source) = graph.child(top, "backing") else { continue };
        let number = source.strip_prefix(&prefix).and_then(|number| number.parse().ok());
        let Some(number) = number else { continue };
        if images.is_empty() {
            (images, jobs) = (qmp.query_block_nodes().await?, qmp.query_block_jobs().await?);
        }
        let image = images.iter().find(|node| node.node_name == source);
        let job = jobs.iter().find(|job| job.device == job_name(names, number));
        found.push(ArrivingDisk {
            node: top.to_owned(),
            number,
            copying: job.map(Copying::of),
            base: graph.child(source, "backing").map(str::to_owned),
            backing: image.and_then(|node| node.image.backing_filename.clone()),
        });
    }
    found.sort_unstable_by_key(|disk| disk.number);
    Ok(found)
}

/// Ends all copying; what was copied stays in the overlays, and [`ArrivingDisk::begin`] continues.
///
/// # Errors
/// When QEMU does not answer, or a job does not end because the block that it reads does not come.
pub async fn stop_copying(qmp: &Qmp) -> Result<(), JobError> {
    let mut looks = Looks::within(STOP_TIMEOUT);
    loop {
        let mut jobs = qmp.query_block_jobs().await?;
        jobs.retain(|job| qmp.names().is_arriving(&job.device));
        if jobs.is_empty() {
            return Ok(());
        }
        for job in &jobs {
            let cancel = json!({ "device": job.device, "force": true });
            tolerate_refusal(qmp.execute_json("block-job-cancel", cancel).await)?;
        }
        let names = || jobs.iter().map(|job| job.device.as_str()).collect::<Vec<_>>().join(", ");
        looks.again(|| format!("job {}", names())).await?;
    }
}

impl Copying {
    fn of(job: &BlockJobInfo) -> Self {
        Self { offset: job.offset, length: job.len, stopped: job.io_status != "ok" }
    }
}

impl ArrivingDisk {
    /// Begins to copy, at most `speed` bytes a second (0: as fast as it can), unless that is under
    /// way. The disk must be active: its guest has run, or may.
    ///
    /// # Errors
    /// When QEMU refuses it or does not answer.
    pub async fn begin(&self, qmp: &Qmp, speed: u64) -> Result<(), QmpError> {
        match self.copying {
            // An error stopped it; what it met may be over.
            Some(Copying { stopped: true, .. }) => {
                let job = json!({ "device": job_name(qmp.names(), self.number) });
                tolerate_refusal(qmp.execute_json("block-job-resume", job).await)
            }
            Some(_) => Ok(()),
            None => {
                let arguments = self.stream(qmp.names(), speed);
                qmp.execute_json("block-stream", arguments).await.map(drop)
            }
        }
    }

    fn stream(&self, names: &ObjectNames, speed: u64) -> Value {
        let mut arguments = json!({
            "job-id": job_name(names, self.number),
            "device": self.node,
            "speed": speed,
            // What is copied already stays, and the chain as it is.
            "on-error": "stop",
        });
        if let Some(base) = &self.base {
            arguments["base-node"] = base.as_str().into();
        }
        if let (Some(backing), Some(_)) = (&self.backing, &self.base) {
            arguments["backing-file"] = backing.as_str().into();
        }
        arguments
    }
}
