//! What each block node really is. A name says nothing: the node's driver, its options and its
//! children do.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{
    BackingImage, Disk, DiskError, Disks, Drive, EmptyDrive, ImageFormat, MAX_BACKING_DEPTH,
    Medium, Qcow2Layout, drivers,
};
use crate::names::ObjectNames;
use crate::qmp::replies::{BlockDeviceInfo, BlockGraph, BlockInfo, FormatSpecific, ImageInfo};
use crate::qmp::{Qmp, QmpError};

/// Filters on one another above a disk.
const MAX_FILTERS: usize = 16;

pub(super) struct Survey<'a> {
    /// In QEMU's order.
    names: Vec<String>,
    nodes: HashMap<String, BlockDeviceInfo>,
    graph: BlockGraph,
    qemu_cwd: Option<&'a Path>,
    /// How a capture of this VM's instance names what it has in QEMU.
    own: ObjectNames,
}

impl<'a> Survey<'a> {
    pub(super) async fn of(qmp: &Qmp, qemu_cwd: Option<&'a Path>) -> Result<Self, QmpError> {
        let (nodes, graph) = (qmp.query_block_nodes().await?, qmp.query_block_graph().await?);
        Ok(Self { own: qmp.names().clone(), ..Self::new(nodes, graph, qemu_cwd) })
    }

    pub(super) fn new(
        nodes: Vec<BlockDeviceInfo>,
        graph: BlockGraph,
        qemu_cwd: Option<&'a Path>,
    ) -> Self {
        let names = nodes.iter().map(|node| node.node_name.clone()).collect();
        let nodes = nodes.into_iter().map(|node| (node.node_name.clone(), node)).collect();
        Self { names, nodes, graph, qemu_cwd, own: ObjectNames::of("") }
    }

    pub(super) fn read(&self, block: &[BlockInfo]) -> Result<Disks, DiskError> {
        let mut result = Disks { unused: self.unused(), ..Disks::default() };
        for drive in self.drives(block) {
            match drive.disk? {
                Medium::None(empty) => result.empty.push(empty),
                Medium::Disk(disk) => add(&mut result.disks, disk)?,
            }
        }
        refuse_shared(&result)?;
        Ok(result)
    }

    pub(super) fn drives(&self, block: &[BlockInfo]) -> Vec<Drive> {
        block.iter().map(|drive| self.drive(drive)).collect()
    }

    fn drive(&self, drive: &BlockInfo) -> Drive {
        let (device, qdev) = (device_name(drive), drive.qdev.clone());
        let is_named = !drive.device.is_empty();
        let disk = match &drive.inserted {
            None => Ok(Medium::None(EmptyDrive { device: device.clone(), qdev, is_named })),
            Some(medium) => self.disk(device.clone(), &medium.node_name).and_then(|disk| {
                let (removable, read_only) = (drive.removable && qdev.is_some(), medium.ro);
                on_files(Disk { read_only, removable, qdev, is_named, ..disk }).map(Medium::Disk)
            }),
        };
        Drive { device, disk }
    }

    /// Nodes that neither a device nor another node uses. What a capture of ours has in QEMU is
    /// none of the VM's.
    fn unused(&self) -> Vec<(String, Result<Disk, DiskError>)> {
        let is_unused =
            |name: &&String| self.graph.above(name).next().is_none() && !self.own.owns(name);
        let unused = self.names.iter().filter(is_unused);
        unused
            .map(|name| (name.clone(), self.disk(name.clone(), name).and_then(on_files)))
            .collect()
    }

    fn disk(&self, device: String, root: &str) -> Result<Disk, DiskError> {
        let root = self.below_own(root);
        let node = self.below_filters(&device, root)?;
        let top = self.image(&device, &node)?;
        let info = self.node(&device, &node)?;
        Ok(Disk {
            read_only: self.node(&device, root)?.ro,
            format: top.format,
            file: top.file,
            is_device: top.is_device,
            virtual_size: info.image.virtual_size,
            backing: self.chain(&device, &node)?,
            arriving: self.arriving(&node).is_some(),
            removable: false,
            layout: layout(&info.image).filter(|_| top.format == ImageFormat::Qcow2),
            root: root.into(),
            name: node.clone(),
            node,
            qdev: None,
            is_named: false,
            device,
        })
    }

    /// What the device has when no capture of ours is above the disk: one that has failed may still
    /// be taken apart.
    fn below_own<'b>(&'b self, root: &'b str) -> &'b str {
        let below = self.own.owns(root).then(|| self.graph.child(root, "file")).flatten();
        below.unwrap_or(root)
    }

    /// The node that holds the data: what the filters above it show.
    fn below_filters(&self, device: &str, root: &str) -> Result<String, DiskError> {
        let mut node = root.to_owned();
        for _ in 0..MAX_FILTERS {
            let driver = self.node(device, &node)?.drv.as_str();
            // Copying before write is ours where it has a name of ours.
            if !drivers::is_transparent(driver) && !self.own.owns(&node) {
                break;
            }
            let Some(below) = self.graph.child(&node, "file") else { break };
            below.clone_into(&mut node);
        }
        Ok(node)
    }

    fn chain(&self, device: &str, top: &str) -> Result<Vec<BackingImage>, DiskError> {
        let mut layers: Vec<BackingImage> = Vec::new();
        let mut node = top.to_owned();
        while let Some(below) = self.graph.child(&node, "backing") {
            if self.own.is_arriving(below) {
                // What the disk itself has in the end.
                below.clone_into(&mut node);
                continue;
            }
            if layers.len() == MAX_BACKING_DEPTH {
                let why = format!(
                    "it has more than {MAX_BACKING_DEPTH} backing files; merge some with block-commit"
                );
                return Err(DiskError::Unsupported { device: device.into(), why });
            }
            layers.push(self.image(device, below)?);
            below.clone_into(&mut node);
        }
        Ok(layers)
    }

    /// The node that a disk's own blocks still come from.
    fn arriving(&self, top: &str) -> Option<&str> {
        self.graph.child(top, "backing").filter(|below| self.own.is_arriving(below))
    }

    fn node(&self, device: &str, node: &str) -> Result<&BlockDeviceInfo, DiskError> {
        let missing = || DiskError::Inconsistent {
            device: device.into(),
            why: format!("node `{node}` is not listed"),
        };
        self.nodes.get(node).ok_or_else(missing)
    }

    /// What one layer of a chain is: its format node and the file under it.
    fn image(&self, device: &str, node: &str) -> Result<BackingImage, DiskError> {
        let refuse = |why: String| DiskError::Unsupported { device: device.into(), why };
        let info = self.node(device, node)?;
        if info.encrypted {
            return Err(refuse(drivers::ENCRYPTED.into()));
        }
        let (format, storage) = match info.drv.as_str() {
            "qcow2" | "raw" => {
                let format = if info.drv == "raw" { ImageFormat::Raw } else { ImageFormat::Qcow2 };
                (format, self.storage(device, node)?)
            }
            "file" | "host_device" => (ImageFormat::Raw, info),
            other => return Err(refuse(drivers::refusal(other))),
        };
        if self.graph.child(node, "data-file").is_some() {
            return Err(refuse(drivers::DATA_FILE.into()));
        }
        if !matches!(storage.drv.as_str(), "file" | "host_device") {
            return Err(refuse(drivers::refusal(&storage.drv)));
        }
        if let Some(why) = slice(info, storage) {
            return Err(refuse(why));
        }
        let file = self.path(device, &storage.file)?;
        let is_device = storage.drv == "host_device";
        Ok(BackingImage {
            file,
            format,
            node: node.into(),
            virtual_size: info.image.virtual_size,
            is_device,
        })
    }

    /// The node under a format node, below a throttle filter if there is one.
    fn storage(&self, device: &str, node: &str) -> Result<&BlockDeviceInfo, DiskError> {
        let below = self.graph.child(node, "file").ok_or_else(|| DiskError::Unsupported {
            device: device.into(),
            why: format!("node `{node}` has no file under it"),
        })?;
        self.node(device, &self.below_filters(device, below)?)
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

/// A node that several devices have is one disk.
fn add(disks: &mut Vec<Disk>, disk: Disk) -> Result<(), DiskError> {
    match disks.iter().find(|other| other.node == disk.node) {
        None => disks.push(disk),
        Some(other) if other.root == disk.root && other.read_only == disk.read_only => {}
        Some(_) => return Err(shared(&disk)),
    }
    Ok(())
}

/// What one disk writes, another one shows: restored, each would have an image of its own.
fn refuse_shared(disks: &Disks) -> Result<(), DiskError> {
    let written: HashSet<&str> = disks.writable().map(|disk| disk.node.as_str()).collect();
    let shows_it =
        |disk: &&Disk| disk.layers().iter().any(|image| written.contains(image.node.as_str()));
    disks.disks.iter().find(shows_it).map_or(Ok(()), |disk| Err(shared(disk)))
}

/// A layer is stored once, as long as its file does not change. The metadata of a file shows
/// whether it changed; that of a block device does not.
fn on_files(disk: Disk) -> Result<Disk, DiskError> {
    match disk.layers().into_iter().find(|image| image.is_device) {
        None => Ok(disk),
        Some(image) => Err(DiskError::Unsupported {
            device: disk.device,
            why: format!(
                "its read-only image is the block device {}, and a block device does not show whether it changed; copy it into a file: \
                 qemu-img convert -O qcow2 {0} NEW",
                image.file.display()
            ),
        }),
    }
}

fn shared(disk: &Disk) -> DiskError {
    let why = "it shows an image that another disk has; give each an image of its own".to_owned();
    DiskError::Unsupported { device: disk.device.clone(), why }
}

/// What cannot be read is taken for a part.
const UNKNOWN_OFFSET: u64 = 1;

/// The options of a raw node, as QEMU writes them.
#[derive(Deserialize)]
struct RawOptions {
    /// Not there for the beginning of the file.
    offset: Option<Offset>,
}

/// Text where the user wrote a list of keys.
#[derive(Deserialize)]
#[serde(untagged)]
enum Offset {
    Number(u64),
    Text(String),
}

impl Offset {
    fn bytes(self) -> u64 {
        match self {
            Self::Number(bytes) => bytes,
            Self::Text(text) => text.parse().unwrap_or(UNKNOWN_OFFSET),
        }
    }
}

/// Why a raw node is not the file under it: `offset` or `size` show a part. QEMU calls such a node
/// by all its options.
fn slice(info: &BlockDeviceInfo, storage: &BlockDeviceInfo) -> Option<String> {
    if info.drv != "raw" {
        return None;
    }
    let (size, of) = (info.image.virtual_size, storage.image.virtual_size);
    let offset = match info.file.strip_prefix("json:").map(serde_json::from_str) {
        None => 0,
        Some(Ok(RawOptions { offset })) => offset.map_or(0, Offset::bytes),
        Some(Err(_)) => UNKNOWN_OFFSET,
    };
    if offset == 0 && size == of {
        return None;
    }
    Some(format!(
        "its raw image is a part (offset={offset}, size={size}) of a file of {of} bytes ({}); copy that part into an image of its own",
        storage.file
    ))
}

fn device_name(drive: &BlockInfo) -> String {
    let mut names = [Some(drive.device.as_str()), drive.qdev.as_deref()].into_iter().flatten();
    names.find(|name| !name.is_empty()).unwrap_or("unnamed").into()
}

fn layout(image: &ImageInfo) -> Option<Qcow2Layout> {
    let Some(FormatSpecific::Qcow2(qcow2)) = &image.format_specific else { return None };
    Some(Qcow2Layout {
        cluster_size: image.cluster_size?,
        compat: qcow2.compat.clone(),
        lazy_refcounts: qcow2.lazy_refcounts,
        refcount_bits: qcow2.refcount_bits,
        extended_l2: qcow2.extended_l2,
        compression: qcow2.compression_type.clone(),
    })
}
