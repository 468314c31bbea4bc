//! Block devices, nodes, exports and the jobs on them.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

/// A device that can have a medium.
#[derive(Debug, Clone, Deserialize)]
pub struct BlockInfo {
    /// The id of its `-drive`; empty where it has none.
    pub device: String,
    /// Its id, or its path in the object tree; none of a drive without a device.
    pub qdev: Option<String>,
    /// Whether its medium can be changed.
    pub removable: bool,
    /// Its medium; none where it is empty.
    pub inserted: Option<Medium>,
}

impl BlockInfo {
    /// The node that it has.
    pub fn node(&self) -> Option<&str> {
        self.inserted.as_ref().map(|medium| medium.node_name.as_str())
    }
}

/// The node that a device has.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Medium {
    /// Its name.
    pub node_name: String,
    /// Whether it can only be read.
    pub ro: bool,
}

/// A block node.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockDeviceInfo {
    /// Its name.
    pub node_name: String,
    /// Its driver.
    pub drv: String,
    /// What QEMU calls it: a path, or `json:{…}` with all options where a path cannot say what it
    /// is.
    pub file: String,
    /// Whether it can only be read.
    pub ro: bool,
    /// Whether its content is encrypted.
    pub encrypted: bool,
    /// What it shows.
    pub image: ImageInfo,
    /// Bitmaps on it; not there where it has none.
    #[serde(default)]
    pub dirty_bitmaps: Vec<BlockDirtyInfo>,
}

/// The image of a node.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ImageInfo {
    /// What a reader sees, in bytes.
    pub virtual_size: u64,
    /// Bytes that it takes; none where the host cannot say.
    pub actual_size: Option<u64>,
    /// Bytes of a cluster; none of a format that has none.
    pub cluster_size: Option<u64>,
    /// The backing file as the image's header names it; none where it names none.
    pub backing_filename: Option<String>,
    /// What only this format has; none of some formats.
    pub format_specific: Option<FormatSpecific>,
}

/// What only one image format has.
#[derive(Debug, Clone)]
pub enum FormatSpecific {
    /// Of a qcow2 image.
    Qcow2(Qcow2Info),
    /// Of another format, by its name.
    Other(String),
}

impl<'de> Deserialize<'de> for FormatSpecific {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Tagged {
            r#type: String,
            data: Value,
        }
        let Tagged { r#type, data } = Tagged::deserialize(deserializer)?;
        match r#type.as_str() {
            "qcow2" => Qcow2Info::deserialize(data).map(Self::Qcow2).map_err(D::Error::custom),
            _ => Ok(Self::Other(r#type)),
        }
    }
}

/// How a qcow2 image is laid out.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Qcow2Info {
    /// `0.10` or `1.1`.
    pub compat: String,
    /// Whether refcounts are written late; not there, as a `0.10` cannot.
    #[serde(default)]
    pub lazy_refcounts: bool,
    /// Width of a refcount.
    pub refcount_bits: u32,
    /// Whether L2 entries have subclusters; not there, as a `0.10` cannot.
    #[serde(default)]
    pub extended_l2: bool,
    /// `zlib` or `zstd`.
    pub compression_type: String,
}

/// A dirty bitmap.
#[derive(Debug, Clone, Deserialize)]
pub struct BlockDirtyInfo {
    /// Its name; none of QEMU's own.
    pub name: Option<String>,
    /// Bytes per bit.
    pub granularity: u64,
    /// Bytes that are marked.
    pub count: u64,
    /// Whether it records now.
    pub recording: bool,
    /// Whether a job or an export has it.
    pub busy: bool,
    /// Whether its image keeps it.
    pub persistent: bool,
    /// Whether it lost its truth; not there where it did not.
    #[serde(default)]
    pub inconsistent: bool,
}

/// How nodes stand on one another. Devices and jobs are nodes of it too: parents, but none that
/// has a name among block nodes.
#[derive(Debug, Clone, Default, Deserialize)]
#[expect(missing_docs, reason = "a graph's nodes and edges")]
pub struct BlockGraph {
    pub nodes: Vec<GraphNode>,
    pub edges: Vec<GraphEdge>,
}

/// A node of the graph.
#[derive(Debug, Clone, Deserialize)]
pub struct GraphNode {
    /// What edges call it.
    pub id: u64,
    /// `block-driver` for a block node.
    pub r#type: String,
    /// Its name, or that of a device or job.
    pub name: String,
}

/// One node above another.
#[derive(Debug, Clone, Deserialize)]
pub struct GraphEdge {
    /// The upper node's id.
    pub parent: u64,
    /// The lower node's id.
    pub child: u64,
    /// What the lower one is to the upper: `file`, `backing`, `root`.
    pub name: String,
    /// What the upper one may do with the lower: `write` and others.
    pub perm: Vec<String>,
}

impl BlockGraph {
    /// A block node's id.
    pub fn id(&self, node: &str) -> Option<u64> {
        self.drivers().find(|known| known.name == node).map(|known| known.id)
    }

    /// The block node below another by an edge of this name.
    pub fn child(&self, parent: &str, edge: &str) -> Option<&str> {
        let parent = self.id(parent)?;
        let below = self.edges.iter().find(|known| known.parent == parent && known.name == edge)?;
        self.drivers().find(|node| node.id == below.child).map(|node| node.name.as_str())
    }

    /// What is above a block node, whatever it is.
    pub fn above(&self, node: &str) -> impl Iterator<Item = &GraphEdge> {
        let id = self.id(node);
        self.edges.iter().filter(move |edge| Some(edge.child) == id)
    }

    /// The block nodes; the others are devices and jobs.
    pub fn drivers(&self) -> impl Iterator<Item = &GraphNode> {
        self.nodes.iter().filter(|node| node.r#type == "block-driver")
    }
}

/// An export of a block node.
#[derive(Debug, Clone, Deserialize)]
pub struct BlockExportInfo {
    /// Its id.
    pub id: String,
    /// `nbd` or another kind.
    pub r#type: String,
}

/// A job on a block device.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockJobInfo {
    /// The job's id.
    pub device: String,
    /// `mirror`, `commit` or another kind.
    pub r#type: String,
    /// Where it is, in bytes of the disk for a stream.
    pub offset: u64,
    /// Where it ends.
    pub len: u64,
    /// `ok`, or the kind of the error that stopped it.
    pub io_status: String,
}
