//! What each block node really is. A name says nothing: the node's driver, its options and its
//! children do.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::graph::Graph;
use super::{
    BackingImage, Disk, DiskError, Disks, Drive, EmptyDrive, ImageFormat, MAX_BACKING_DEPTH,
    Medium, Qcow2Layout, drivers,
};
use crate::names::ObjectNames;
use crate::qmp::{Qmp, QmpError};

/// Filters on one another above a disk.
const MAX_FILTERS: usize = 16;

/// A node as `query-named-block-nodes` describes it.
#[derive(Debug, Clone)]
struct NodeInfo {
    driver: String,
    /// What QEMU calls it: a path, or `json:{…}` with all options where a path cannot say what it
    /// is.
    file: String,
    virtual_size: u64,
    read_only: bool,
    encrypted: bool,
    layout: Option<Qcow2Layout>,
}

fn node_info(node: &Value) -> NodeInfo {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    NodeInfo {
        driver: text(&node["drv"]),
        file: text(&node["file"]),
        virtual_size: node["image"]["virtual-size"].as_u64().unwrap_or(0),
        read_only: node["ro"] == true,
        encrypted: node["encrypted"] == true,
        layout: layout(&node["image"]),
    }
}

fn layout(image: &Value) -> Option<Qcow2Layout> {
    let data = &image["format-specific"]["data"];
    Some(Qcow2Layout {
        cluster_size: image["cluster-size"].as_u64()?,
        compat: data["compat"].as_str()?.to_owned(),
        lazy_refcounts: data["lazy-refcounts"] == true,
        refcount_bits: u32::try_from(data["refcount-bits"].as_u64()?).ok()?,
        extended_l2: data["extended-l2"] == true,
        compression: data["compression-type"].as_str().unwrap_or("zlib").to_owned(),
    })
}

pub(super) struct Survey<'a> {
    /// In QEMU's order.
    names: Vec<String>,
    nodes: HashMap<String, NodeInfo>,
    graph: Graph,
    qemu_cwd: Option<&'a Path>,
    /// How a capture of this VM's instance names what it has in QEMU.
    own: ObjectNames,
}

impl<'a> Survey<'a> {
    pub(super) async fn of(qmp: &Qmp, qemu_cwd: Option<&'a Path>) -> Result<Self, QmpError> {
        let nodes = qmp.execute_json("query-named-block-nodes", json!({ "flat": true })).await?;
        let graph = qmp.execute_json("x-debug-query-block-graph", Value::Null).await?;
        Ok(Self { own: qmp.names().clone(), ..Self::new(&nodes, &graph, qemu_cwd) })
    }

    pub(super) fn new(nodes: &Value, graph: &Value, qemu_cwd: Option<&'a Path>) -> Self {
        let list = nodes.as_array().map(Vec::as_slice).unwrap_or_default();
        let named = list
            .iter()
            .filter_map(|node| Some((node["node-name"].as_str()?.to_owned(), node_info(node))));
        let (names, nodes) = named.map(|(name, info)| (name.clone(), (name, info))).unzip();
        Self { names, nodes, graph: Graph::parse(graph), qemu_cwd, own: ObjectNames::of("") }
    }

    pub(super) fn read(&self, block: &Value) -> Result<Disks, DiskError> {
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

    pub(super) fn drives(&self, block: &Value) -> Vec<Drive> {
        block.as_array().into_iter().flatten().map(|drive| self.drive(drive)).collect()
    }

    fn drive(&self, drive: &Value) -> Drive {
        let device = device_name(drive);
        let qdev = drive["qdev"].as_str().map(str::to_owned);
        let is_named = drive["device"].as_str().is_some_and(|name| !name.is_empty());
        let disk = match drive["inserted"]["node-name"].as_str() {
            None => Ok(Medium::None(EmptyDrive { device: device.clone(), qdev, is_named })),
            Some(node) => self.disk(device.clone(), node).and_then(|disk| {
                let removable = drive["removable"] == true && qdev.is_some();
                let read_only = drive["inserted"]["ro"] == true;
                on_files(Disk { read_only, removable, qdev, is_named, ..disk }).map(Medium::Disk)
            }),
        };
        Drive { device, disk }
    }

    /// Nodes that neither a device nor another node uses. What a capture of ours has in QEMU is
    /// none of the VM's.
    fn unused(&self) -> Vec<(String, Result<Disk, DiskError>)> {
        let is_unused = |name: &&String| !self.graph.is_used(name) && !self.own.owns(name);
        let unused = self.names.iter().filter(is_unused);
        unused
            .map(|name| (name.clone(), self.disk(name.clone(), name).and_then(on_files)))
            .collect()
    }

    fn disk(&self, device: String, root: &str) -> Result<Disk, DiskError> {
        let node = self.below_filters(&device, root)?;
        let top = self.image(&device, &node)?;
        let info = self.node(&device, &node)?;
        Ok(Disk {
            read_only: self.node(&device, root)?.read_only,
            format: top.format,
            file: top.file,
            is_device: top.is_device,
            virtual_size: info.virtual_size,
            backing: self.chain(&device, &node)?,
            removable: false,
            layout: info.layout.clone().filter(|_| top.format == ImageFormat::Qcow2),
            root: root.into(),
            name: node.clone(),
            node,
            qdev: None,
            is_named: false,
            device,
        })
    }

    /// The node that holds the data: what the filters above it show.
    fn below_filters(&self, device: &str, root: &str) -> Result<String, DiskError> {
        let mut node = root.to_owned();
        for _ in 0..MAX_FILTERS {
            let driver = self.node(device, &node)?.driver.as_str();
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

    fn node(&self, device: &str, node: &str) -> Result<&NodeInfo, DiskError> {
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
        let (format, storage) = match info.driver.as_str() {
            "qcow2" | "raw" => {
                let format =
                    if info.driver == "raw" { ImageFormat::Raw } else { ImageFormat::Qcow2 };
                (format, self.storage(device, node)?)
            }
            "file" | "host_device" => (ImageFormat::Raw, info),
            other => return Err(refuse(drivers::refusal(other))),
        };
        if self.graph.child(node, "data-file").is_some() {
            return Err(refuse(drivers::DATA_FILE.into()));
        }
        if !matches!(storage.driver.as_str(), "file" | "host_device") {
            return Err(refuse(drivers::refusal(&storage.driver)));
        }
        if let Some(why) = slice(info, storage) {
            return Err(refuse(why));
        }
        let file = self.path(device, &storage.file)?;
        let is_device = storage.driver == "host_device";
        Ok(BackingImage {
            file,
            format,
            node: node.into(),
            virtual_size: info.virtual_size,
            is_device,
        })
    }

    /// The node under a format node, below a throttle filter if there is one.
    fn storage(&self, device: &str, node: &str) -> Result<&NodeInfo, DiskError> {
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

/// Why a raw node is not the file under it: `offset` or `size` show a part. QEMU calls such a node
/// by all its options.
fn slice(info: &NodeInfo, storage: &NodeInfo) -> Option<String> {
    if info.driver != "raw" {
        return None;
    }
    let number = |value: &Value| value.as_u64().or_else(|| value.as_str()?.parse().ok());
    let said = info
        .file
        .strip_prefix("json:")
        .map(|text| serde_json::from_str(text).unwrap_or(Value::Null));
    let offset = said
        .as_ref()
        .map_or(0, |said| number(&said["offset"]).unwrap_or(u64::from(said.is_null())));
    if offset == 0 && info.virtual_size == storage.virtual_size {
        return None;
    }
    Some(format!(
        "its raw image is a part (offset={offset}, size={}) of a file of {} bytes ({}); copy that part into an image of its own",
        info.virtual_size, storage.virtual_size, storage.file
    ))
}

fn device_name(drive: &Value) -> String {
    let named = |field: &str| drive[field].as_str().filter(|name| !name.is_empty());
    named("device").or_else(|| named("qdev")).unwrap_or("unnamed").into()
}
