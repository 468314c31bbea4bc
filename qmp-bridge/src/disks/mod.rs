//! The disks of a machine: which can be captured, and on what layers they stand.
//!
//! `query-block` tells which devices have a medium and which node that is. How nodes stand on one another is only in
//! `x-debug-query-block-graph`, so chains are walked there (see [`graph`]). Whatever could not be brought back
//! faithfully is refused here, with the reason, before anything is touched.

mod graph;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use thiserror::Error;

use crate::qmp::{Qmp, QmpError};
use graph::Graph;

/// Most layers below a disk.
pub const MAX_BACKING_DEPTH: usize = 256;

#[derive(Debug, Error)]
pub enum DiskError {
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error("disk `{device}` cannot be part of a checkpoint: {why}")]
    Unsupported { device: String, why: String },
    #[error("QEMU's block graph does not fit its list of disks at `{device}`: {why}; try again when no block job runs")]
    Inconsistent { device: String, why: String },
}

impl DiskError {
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Qmp(error) => error.is_retryable(),
            Self::Inconsistent { .. } => true,
            Self::Unsupported { .. } => false,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ImageFormat {
    Qcow2,
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

/// A layer below a disk; never written while the machine runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackingImage {
    pub file: PathBuf,
    pub format: ImageFormat,
    pub node: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// The node that the device writes to, as QMP knows it.
    pub node: String,
    /// What outlives this QEMU: the disk's name in stores. The node's, unless whoever knows the command line gives another
    /// (QEMU generates node names like `#block123`, and others at the next start).
    pub name: String,
    /// `-drive id=`, or the path of the device.
    pub device: String,
    pub read_only: bool,
    pub format: ImageFormat,
    /// The image file, absolute if QEMU's working directory was given.
    pub file: PathBuf,
    /// What the guest sees, in bytes.
    pub virtual_size: u64,
    /// Top to bottom, without the disk itself.
    pub backing: Vec<BackingImage>,
    pub removable: bool,
}

/// All drives of a machine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Disks {
    pub disks: Vec<Disk>,
    /// Removable drives without a medium.
    pub empty: Vec<String>,
}

impl Disks {
    /// The disks whose content travels in checkpoints.
    pub fn writable(&self) -> impl Iterator<Item = &Disk> {
        self.disks.iter().filter(|disk| !disk.read_only)
    }
}

/// A node as `query-named-block-nodes` describes it.
#[derive(Debug, Clone)]
struct NodeInfo {
    driver: String,
    file: String,
    virtual_size: u64,
    encrypted: bool,
}

/// One drive of a machine, whatever is to be said of it.
#[derive(Debug)]
pub struct Drive {
    /// As [`Disk::device`].
    pub device: String,
    /// `None` where no medium is in it.
    pub disk: Result<Option<Disk>, DiskError>,
}

/// Every drive with what [`list`] would say of it alone.
pub async fn survey(qmp: &Qmp, qemu_cwd: Option<&Path>) -> Result<Vec<Drive>, QmpError> {
    let block = qmp.execute_json("query-block", Value::Null).await?;
    Ok(Survey::of(qmp, qemu_cwd).await?.drives(&block))
}

/// Lists the disks. Relative file names are relative to QEMU's working directory (`/proc/PID/cwd`).
pub async fn list(qmp: &Qmp, qemu_cwd: Option<&Path>) -> Result<Disks, DiskError> {
    let block = qmp.execute_json("query-block", Value::Null).await?;
    let disks = Survey::of(qmp, qemu_cwd).await?.read(&block)?;
    refuse_unsafe_iothreads(qmp, &disks).await?;
    Ok(disks)
}

/// Before this version QEMU's NBD server ends a connection in the thread of the disk. Debian's 7.2.22 asserts there that
/// this is the main thread and aborts, guest and all, as soon as a client of a disk in an iothread hangs up (seen).
const IOTHREADS_SAFE_SINCE: u32 = 9;

async fn refuse_unsafe_iothreads(qmp: &Qmp, disks: &Disks) -> Result<(), DiskError> {
    let Some(disk) = disks.writable().next() else { return Ok(()) };
    match unsafe_iothread(qmp).await? {
        None => Ok(()),
        Some(why) => Err(DiskError::Unsupported { device: disk.device.clone(), why }),
    }
}

/// Why no writable disk of this machine can be captured for the threads that it has.
pub async fn unsafe_iothread(qmp: &Qmp) -> Result<Option<String>, QmpError> {
    if qmp.version().major >= IOTHREADS_SAFE_SINCE {
        return Ok(None);
    }
    let threads = qmp.execute_json("query-iothreads", Value::Null).await?;
    // Which disk is in which thread cannot be asked in general, so any thread counts.
    let thread = threads.as_array().and_then(|threads| threads.first());
    Ok(thread.map(|thread| {
        format!(
            "QEMU {} has iothread `{}`, and before {IOTHREADS_SAFE_SINCE}.0 its NBD server can abort QEMU when a disk is in one; \
             run without `-object iothread` or with a newer QEMU",
            qmp.version(),
            thread["id"].as_str().unwrap_or("?"),
        )
    }))
}

fn node_infos(reply: &Value) -> HashMap<String, NodeInfo> {
    let list = reply.as_array().map(Vec::as_slice).unwrap_or_default();
    list.iter().filter_map(|node| Some((node["node-name"].as_str()?.into(), node_info(node)))).collect()
}

fn node_info(node: &Value) -> NodeInfo {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    NodeInfo {
        driver: text(&node["drv"]),
        file: text(&node["file"]),
        virtual_size: node["image"]["virtual-size"].as_u64().unwrap_or(0),
        encrypted: node["encrypted"] == true,
    }
}

struct Survey<'a> {
    nodes: HashMap<String, NodeInfo>,
    graph: Graph,
    qemu_cwd: Option<&'a Path>,
}

impl<'a> Survey<'a> {
    async fn of(qmp: &Qmp, qemu_cwd: Option<&'a Path>) -> Result<Self, QmpError> {
        let nodes = qmp.execute_json("query-named-block-nodes", json!({ "flat": true })).await?;
        let graph = qmp.execute_json("x-debug-query-block-graph", Value::Null).await?;
        Ok(Self { nodes: node_infos(&nodes), graph: Graph::parse(&graph), qemu_cwd })
    }

    fn read(&self, block: &Value) -> Result<Disks, DiskError> {
        let mut result = Disks::default();
        for drive in self.drives(block) {
            match drive.disk? {
                None => result.empty.push(drive.device),
                Some(disk) => result.disks.push(disk),
            }
        }
        Ok(result)
    }

    fn drives(&self, block: &Value) -> Vec<Drive> {
        let drive = |drive: &Value| {
            let device = device_name(drive);
            let disk = drive["inserted"]["node-name"].as_str().map(|node| self.disk(device.clone(), node, drive));
            Drive { device, disk: disk.transpose() }
        };
        block.as_array().into_iter().flatten().map(drive).collect()
    }

    fn disk(&self, device: String, node: &str, drive: &Value) -> Result<Disk, DiskError> {
        let top = self.image(&device, node)?;
        Ok(Disk {
            read_only: drive["inserted"]["ro"] == true,
            format: top.format,
            file: top.file,
            virtual_size: self.node(&device, node)?.virtual_size,
            backing: self.chain(&device, node)?,
            removable: drive["removable"] == true,
            node: node.into(),
            name: node.into(),
            device,
        })
    }

    fn chain(&self, device: &str, top: &str) -> Result<Vec<BackingImage>, DiskError> {
        let mut layers: Vec<BackingImage> = Vec::new();
        let mut node = top.to_owned();
        while let Some(below) = self.graph.child(&node, "backing") {
            if layers.len() == MAX_BACKING_DEPTH {
                let why = format!("it has more than {MAX_BACKING_DEPTH} backing files; merge some with block-commit");
                return Err(DiskError::Unsupported { device: device.into(), why });
            }
            layers.push(self.image(device, below)?);
            below.clone_into(&mut node);
        }
        Ok(layers)
    }

    fn node(&self, device: &str, node: &str) -> Result<&NodeInfo, DiskError> {
        let missing = || DiskError::Inconsistent { device: device.into(), why: format!("node `{node}` is not listed") };
        self.nodes.get(node).ok_or_else(missing)
    }

    /// What one layer of a chain is: its format node and the file under it.
    fn image(&self, device: &str, node: &str) -> Result<BackingImage, DiskError> {
        let refuse = |why: String| DiskError::Unsupported { device: device.into(), why };
        let info = self.node(device, node)?;
        if info.encrypted {
            return Err(refuse("its image is encrypted, and a checkpoint would hold it in clear; encrypt the store instead".into()));
        }
        let (format, storage) = match info.driver.as_str() {
            "qcow2" | "raw" => {
                let below = self.graph.child(node, "file");
                let below = below.ok_or_else(|| refuse(format!("node `{node}` has no file under it")))?;
                let format = if info.driver == "raw" { ImageFormat::Raw } else { ImageFormat::Qcow2 };
                (format, self.node(device, below)?)
            }
            "file" | "host_device" => (ImageFormat::Raw, info),
            other => return Err(refuse(unsupported_driver(other))),
        };
        if self.graph.child(node, "data-file").is_some() {
            return Err(refuse("its qcow2 image keeps its data in an external data file; convert it with qemu-img".into()));
        }
        if !matches!(storage.driver.as_str(), "file" | "host_device") {
            return Err(refuse(unsupported_driver(&storage.driver)));
        }
        Ok(BackingImage { file: self.path(device, &storage.file)?, format, node: node.into() })
    }

    fn path(&self, device: &str, file: &str) -> Result<PathBuf, DiskError> {
        if file.is_empty() || file.starts_with("json:") || file.starts_with("/dev/fdset/") {
            let why = format!("its file has no path of its own (`{file}`); open it by path");
            return Err(DiskError::Unsupported { device: device.into(), why });
        }
        let file = Path::new(file.strip_prefix("file:").unwrap_or(file));
        Ok(self.qemu_cwd.map_or_else(|| file.to_owned(), |cwd| cwd.join(file)))
    }
}

fn device_name(drive: &Value) -> String {
    let named = |field: &str| drive[field].as_str().filter(|name| !name.is_empty());
    named("device").or_else(|| named("qdev")).unwrap_or("unnamed").into()
}

fn unsupported_driver(driver: &str) -> String {
    let why = match driver {
        "vvfat" => "a directory of the host shown as a disk changes without QEMU seeing it; copy it into an image",
        "null-co" | "null-aio" | "blkdebug" | "blkverify" | "quorum" => "it is a test or mirror driver",
        "host_cdrom" => "a CD drive of this host exists nowhere else; copy the medium into an image",
        "nbd" | "iscsi" | "rbd" | "ssh" | "nfs" | "http" | "https" | "ftp" | "ftps" | "curl" | "gluster" => {
            "it is on a network server, whose content a checkpoint does not hold; put a local image above or instead"
        }
        "nvme" | "virtio-blk-vhost-vdpa" | "virtio-blk-vfio-pci" | "nvme-io_uring" | "io_uring" => {
            "the hardware writes guest memory by itself, unseen; use a file or a host device"
        }
        "luks" => "its image is encrypted, and a checkpoint would hold it in clear; encrypt the store instead",
        "copy-before-write" | "backup-top" | "mirror_top" | "commit_top" | "preallocate" | "throttle" | "copy-on-read" => {
            "a filter or a block job stands above its image; end the job or set up the disk without the filter"
        }
        _ => "only qcow2 and raw images in files or host devices are supported; convert it with qemu-img",
    };
    format!("driver `{driver}`: {why}")
}

#[cfg(test)]
mod test;
