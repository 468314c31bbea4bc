//! The disks of a VM: which can be captured, and on what layers they stand.
//!
//! `query-block` tells which devices have a medium and which node that is. How nodes stand on one
//! another is only in `x-debug-query-block-graph`, so chains are walked there (`graph.rs`).
//! Whatever could not be brought back faithfully is refused here, with the reason, before anything
//! is touched.

mod drivers;
mod survey;

use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::qmp::replies::BlockJobInfo;
use crate::qmp::{Qmp, QmpError};
use crate::quirks;
use survey::Survey;

/// Most layers below a disk.
pub const MAX_BACKING_DEPTH: usize = 256;

#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum DiskError {
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error("disk `{device}` cannot be part of a checkpoint: {why}")]
    Unsupported { device: String, why: String },
    #[error(
        "QEMU's block graph does not fit its list of disks at `{device}`: {why}; try again when no block job runs"
    )]
    Inconsistent { device: String, why: String },
    #[error(
        "block job `{job}` ({kind}) runs, and it changes what a disk consists of; wait for it, or end it (block-job-cancel)"
    )]
    Job { job: String, kind: String },
}

impl DiskError {
    /// Whether the same question may get another answer later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Qmp(error) => error.is_retryable(),
            Self::Inconsistent { .. } => true,
            Self::Unsupported { .. } | Self::Job { .. } => false,
        }
    }
}

/// How an image file is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ImageFormat {
    /// QEMU's copy-on-write format.
    Qcow2,
    /// The disk's bytes and nothing else.
    Raw,
}

impl ImageFormat {
    /// QEMU's driver name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
        }
    }
}

/// How a qcow2 image is made, as far as `blockdev-create` has options for it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Qcow2Layout {
    /// Bytes of a cluster.
    pub cluster_size: u64,
    /// `0.10` or `1.1`.
    pub compat: String,
    /// Whether refcounts are written late.
    pub lazy_refcounts: bool,
    /// Width of a refcount.
    pub refcount_bits: u32,
    /// Whether L2 entries have subclusters.
    pub extended_l2: bool,
    /// `zlib` or `zstd`.
    pub compression: String,
}

/// A layer below a disk; never written while the VM runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackingImage {
    /// The image file.
    pub file: PathBuf,
    /// Its format.
    pub format: ImageFormat,
    /// Its format node.
    pub node: String,
    /// What a reader of this image sees, in bytes.
    pub virtual_size: u64,
    /// On a block device of the host.
    pub is_device: bool,
}

/// One disk of a VM, with the chain below it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// The format node, which bitmaps and backup jobs go to: below filters, if there are any above
    /// it.
    pub node: String,
    /// The node that the device has: [`Self::node`], or the topmost filter above it.
    pub root: String,
    /// The disk's name in stores, which outlives this QEMU. The node's name, unless the code that
    /// knows the command line sets another (QEMU generates node names like `#block123`, and others
    /// at the next start).
    pub name: String,
    /// `-drive id=`, or the path of the device, or the node where no device has it.
    pub device: String,
    /// The device model's id or QOM path; none for a drive or a node that no device uses.
    pub qdev: Option<String>,
    /// Whether `device` is the id of a `-drive`; otherwise the device model has the drive alone.
    pub is_named: bool,
    /// Whether the guest can only read it.
    pub read_only: bool,
    /// The format of its own image.
    pub format: ImageFormat,
    /// The image file, absolute if QEMU's working directory was given.
    pub file: PathBuf,
    /// On a block device of the host.
    pub is_device: bool,
    /// What the guest sees, in bytes.
    pub virtual_size: u64,
    /// Top to bottom, without the disk itself.
    pub backing: Vec<BackingImage>,
    /// Whether its medium can be changed.
    pub removable: bool,
    /// Of a qcow2 image.
    pub layout: Option<Qcow2Layout>,
    /// Some of its own blocks are not in its image yet: see [`crate::arriving`].
    pub arriving: bool,
}

impl Disk {
    /// The image files that are only read, top to bottom: the backing chain, and before it a
    /// read-only disk's own image.
    pub fn layers(&self) -> Vec<BackingImage> {
        let own = BackingImage {
            file: self.file.clone(),
            format: self.format,
            node: self.node.clone(),
            virtual_size: self.virtual_size,
            is_device: self.is_device,
        };
        Some(own)
            .filter(|_| self.read_only)
            .into_iter()
            .chain(self.backing.iter().cloned())
            .collect()
    }
}

/// A removable drive without a medium.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EmptyDrive {
    /// As [`Disk::device`].
    pub device: String,
    /// As [`Disk::qdev`].
    pub qdev: Option<String>,
    /// As [`Disk::is_named`].
    pub is_named: bool,
}

/// All drives of a VM.
#[derive(Debug, Default)]
pub struct Disks {
    /// Drives with a medium, and nodes that are used without a drive.
    pub disks: Vec<Disk>,
    /// Removable drives without one.
    pub empty: Vec<EmptyDrive>,
    /// Nodes that nothing uses, by name: what each would be as a disk.
    pub unused: Vec<(String, Result<Disk, DiskError>)>,
}

impl Disks {
    /// The disks whose content travels in checkpoints.
    pub fn writable(&self) -> impl Iterator<Item = &Disk> {
        self.disks.iter().filter(|disk| !disk.read_only)
    }
}

/// One drive of a VM, whatever is to be said of it.
#[derive(Debug)]
pub struct Drive {
    /// As [`Disk::device`].
    pub device: String,
    /// [`EmptyDrive`] where no medium is in it.
    pub disk: Result<Medium, DiskError>,
}

/// What is in a drive.
#[derive(Debug)]
pub enum Medium {
    /// A disk.
    Disk(Disk),
    /// An empty drive.
    None(EmptyDrive),
}

/// Every drive with what [`list`] would say of it alone.
///
/// # Errors
/// When QEMU does not answer.
pub async fn survey(qmp: &Qmp, qemu_cwd: Option<&Path>) -> Result<Vec<Drive>, QmpError> {
    let block = qmp.query_block().await?;
    Ok(Survey::of(qmp, qemu_cwd).await?.drives(&block))
}

/// Lists the disks. Relative file names are relative to QEMU's working directory (`/proc/PID/cwd`).
///
/// # Errors
/// When a drive is no disk that a checkpoint can hold, or QEMU does not answer.
pub async fn list(qmp: &Qmp, qemu_cwd: Option<&Path>) -> Result<Disks, DiskError> {
    let block = qmp.query_block().await?;
    refuse_jobs(qmp).await?;
    let disks = Survey::of(qmp, qemu_cwd).await?.read(&block)?;
    refuse_unsafe_iothreads(qmp, &disks).await?;
    Ok(disks)
}

/// A job that streams, commits or mirrors changes the chain below a disk, or the disk's node, at
/// its end. What arrives by a stream of ours is in [`Disk::arriving`].
///
/// # Errors
/// When a job of another client runs, or QEMU does not answer.
pub async fn refuse_jobs(qmp: &Qmp) -> Result<(), DiskError> {
    let jobs = qmp.query_block_jobs().await?;
    let names = qmp.names();
    let is_other = |job: &BlockJobInfo| !names.owns(&job.device) && !names.is_arriving(&job.device);
    match jobs.into_iter().find(is_other) {
        None => Ok(()),
        Some(job) => Err(DiskError::Job { job: job.device, kind: job.r#type }),
    }
}

async fn refuse_unsafe_iothreads(qmp: &Qmp, disks: &Disks) -> Result<(), DiskError> {
    let Some(disk) = disks.writable().next() else { return Ok(()) };
    match unsafe_iothread(qmp).await? {
        None => Ok(()),
        Some(why) => Err(DiskError::Unsupported { device: disk.device.clone(), why }),
    }
}

/// Why no writable disk of this VM can be captured for the threads that it has.
///
/// # Errors
/// When QEMU does not answer.
pub async fn unsafe_iothread(qmp: &Qmp) -> Result<Option<String>, QmpError> {
    let aborts = quirks::NBD_SERVER_ABORTS_IN_IOTHREAD;
    if !qmp.version().has(aborts) {
        return Ok(None);
    }
    // Which disk is in which thread cannot be asked in general, so any thread counts.
    let threads = qmp.query_iothreads().await?;
    Ok(threads.first().map(|thread| {
        format!(
            "QEMU {} has iothread `{}`, and before {} its NBD server can abort QEMU when a disk is in one; \
             run without `-object iothread` or with a newer QEMU",
            qmp.version(),
            thread.id,
            aborts.changed_in(),
        )
    }))
}

#[cfg(test)]
mod test;
