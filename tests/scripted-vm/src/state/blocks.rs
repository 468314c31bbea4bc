//! Disks: nodes on one another, bitmaps, transactions, jobs and exports.

mod bitmap;
mod list;
mod orders;

use std::collections::HashMap;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

pub(crate) use bitmap::Bitmap;

/// What is wrong with QEMU's NBD server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NbdFault {
    /// Flushes do not end.
    FlushHangs,
    /// Flushes fail with EIO.
    FlushFails,
    /// Reads fail with EIO.
    ReadsFail,
    /// Reads do not end.
    ReadsHang,
    /// A read ends the connection.
    ReadsCut,
}

#[derive(Clone, Default)]
pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) driver: String,
    /// As QEMU calls it.
    pub(crate) filename: String,
    pub(crate) read_only: bool,
    /// Edge and node below.
    pub(crate) children: Vec<(&'static str, String)>,
    pub(crate) data: Vec<u8>,
    pub(crate) bitmaps: Vec<Bitmap>,
    /// What a filter or a backup's target shows: the disk below at the instant.
    pub(crate) snapshot: Option<Vec<u8>>,
    /// A block could not be saved: the snapshot answers no read any more.
    pub(crate) is_broken: bool,
}

impl Node {
    pub(crate) fn child(&self, edge: &str) -> Option<&str> {
        self.children.iter().find(|(name, _)| *name == edge).map(|(_, node)| node.as_str())
    }
}

#[derive(Clone)]
pub(crate) struct Drive {
    device: String,
    /// The device model's path.
    qdev: String,
    node: Option<String>,
}

#[derive(Clone)]
pub(crate) struct Export {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) node: String,
    pub(crate) is_writable: bool,
    /// Node and name of each bitmap that is a meta context.
    pub(crate) bitmaps: Vec<(String, String)>,
    pub(crate) has_depth: bool,
}

#[derive(Clone)]
struct Job {
    id: String,
    kind: &'static str,
    status: &'static str,
    error: Option<String>,
    /// The node whose old blocks it saves.
    node: Option<String>,
}

/// The disks of the VM, and all that stands above and below them.
#[derive(Default)]
pub struct Blocks {
    /// Whether nodes are active: after a migration they are not.
    pub is_active: bool,
    /// What is wrong with the NBD server.
    pub nbd_fault: Option<NbdFault>,
    pub(crate) nodes: Vec<Node>,
    drives: Vec<Drive>,
    pub(crate) exports: Vec<Export>,
    jobs: Vec<Job>,
    /// Sizes of images that were made, by the node of their file.
    sizes: HashMap<String, u64>,
    server: Option<UnixListener>,
    /// Id of the export, and its client.
    pub(crate) clients: Vec<(String, Arc<UnixStream>)>,
}

impl Blocks {
    /// A raw disk, `device` being the id of its `-drive` and `DEVICE-node` its node; the file at
    /// `path` is only a name.
    pub fn add_disk(&mut self, device: &str, path: &Path, content: Vec<u8>, read_only: bool) {
        let (file, format) = (format!("#block{:03}", self.nodes.len()), format!("{device}-node"));
        let filename = path.to_str().expect("UTF-8").to_owned();
        let node = |name: &str, driver: &str| Node {
            name: name.to_owned(),
            driver: driver.to_owned(),
            filename: filename.clone(),
            read_only,
            ..Node::default()
        };
        self.nodes.push(Node {
            data: content.clone(),
            children: vec![("file", file.clone())],
            ..node(&format, "raw")
        });
        self.nodes.push(Node { data: vec![0; content.len()], ..node(&file, "file") });
        self.drives.push(Drive {
            device: device.to_owned(),
            qdev: format!("/machine/peripheral/{device}-dev/virtio-backend"),
            node: Some(format),
        });
        self.is_active = true;
    }

    /// The guest writes to a disk.
    pub fn write(&mut self, device: &str, offset: usize, bytes: &[u8]) {
        let node = self.disk_node(device);
        self.write_node(&node, offset, bytes);
    }

    pub(crate) fn write_node(&mut self, node: &str, offset: usize, bytes: &[u8]) {
        let node = self.nodes.iter_mut().find(|other| other.name == node).expect("it is there");
        if !node.data.is_empty() {
            node.data[offset..offset + bytes.len()].copy_from_slice(bytes);
        }
        node.bitmaps.iter_mut().for_each(|bitmap| bitmap.note(offset as u64, bytes.len() as u64));
    }

    /// What the guest reads from all of a disk.
    pub fn read(&self, device: &str) -> Vec<u8> {
        self.node(&self.disk_node(device)).expect("a disk").data.clone()
    }

    /// The owner changes the size of a disk: bits of what is cut off are lost.
    pub fn resize(&mut self, device: &str, bytes: usize) {
        let node = self.disk_node(device);
        let file = self.node(&node).and_then(|node| node.child("file").map(str::to_owned));
        for node in self
            .nodes
            .iter_mut()
            .filter(|other| other.name == node || file.as_deref() == Some(other.name.as_str()))
        {
            node.data.resize(bytes, 0);
            node.bitmaps.iter_mut().for_each(|bitmap| bitmap.truncate(bytes as u64));
        }
    }

    /// From now on the old content of overwritten blocks cannot be saved, as when the overlays'
    /// directory is full: the guest's writes are done, and the copies break.
    pub fn break_copies(&mut self) {
        self.nodes
            .iter_mut()
            .filter(|node| node.snapshot.is_some())
            .for_each(|node| node.is_broken = true);
        for job in self.jobs.iter_mut().filter(|job| job.kind == "backup") {
            (job.status, job.error) = ("concluded", Some("No space left on device".into()));
        }
    }

    /// Names of the bitmaps of a disk, and whether each records.
    pub fn bitmaps(&self, device: &str) -> Vec<(String, bool)> {
        let node = self.node(&self.disk_node(device)).expect("a disk");
        node.bitmaps.iter().map(|bitmap| (bitmap.name.clone(), bitmap.is_recording)).collect()
    }

    /// Names of all nodes but those of the disks themselves.
    pub fn extra_nodes(&self) -> Vec<String> {
        let names = self.nodes.iter().map(|node| node.name.clone());
        names.filter(|name| name.starts_with("sp-")).collect()
    }

    /// Ids of all exports.
    pub fn export_ids(&self) -> Vec<String> {
        self.exports.iter().map(|export| export.id.clone()).collect()
    }

    /// Ids of all jobs.
    pub fn job_ids(&self) -> Vec<String> {
        self.jobs.iter().map(|job| job.id.clone()).collect()
    }

    /// Another tool exports a disk by the NBD server that runs.
    pub fn add_export(&mut self, id: &str, device: &str) {
        let node = self.disk_node(device);
        self.exports.push(Export {
            id: id.to_owned(),
            name: id.to_owned(),
            node,
            is_writable: false,
            bitmaps: Vec::new(),
            has_depth: false,
        });
    }

    /// Another tool starts the NBD server, at a place of its own.
    pub fn start_other_server(&mut self, path: &Path) {
        self.server = Some(UnixListener::bind(path).expect("a socket"));
    }

    /// Whether the NBD server runs.
    pub fn has_server(&self) -> bool {
        self.server.is_some()
    }

    pub(crate) fn disconnect(&mut self) {
        for (_, client) in self.clients.drain(..) {
            let _ = client.shutdown(Shutdown::Both);
        }
    }

    pub(crate) fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.iter().find(|node| node.name == name)
    }

    /// The node of a disk, below filters.
    fn disk_node(&self, device: &str) -> String {
        let drive = self.drives.iter().find(|drive| drive.device == device).expect("a drive");
        let top = drive.node.as_deref().expect("a medium");
        match self.node(top).filter(|node| node.driver == "copy-before-write") {
            Some(filter) => filter.child("file").expect("a filter stands on a disk").to_owned(),
            None => top.to_owned(),
        }
    }

    /// What a reader of the node sees; none if it fails.
    pub(crate) fn content(&self, name: &str) -> Option<&[u8]> {
        let node = self.node(name)?;
        match node.driver.as_str() {
            "snapshot-access" => {
                let filter = self.node(node.child("file")?)?;
                filter.snapshot.as_deref().filter(|_| !filter.is_broken)
            }
            "copy-before-write" => self.content(node.child("file")?),
            _ if node.is_broken => None,
            _ => Some(node.snapshot.as_deref().unwrap_or(&node.data)),
        }
    }

    /// Bits of a bitmap by granule, and its granularity.
    pub(crate) fn bitmap(&self, node: &str, name: &str) -> Option<&Bitmap> {
        self.node(node)?.bitmaps.iter().find(|bitmap| bitmap.name == name)
    }
}

fn text<'a>(arguments: &'a Value, name: &str) -> &'a str {
    arguments[name].as_str().unwrap_or_default()
}
