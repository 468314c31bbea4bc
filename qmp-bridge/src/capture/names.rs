//! Names of what a capture makes inside QEMU. They are all that a later helper has to find it by.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

use crate::names::ObjectNames;
use crate::qmp::Qmp;

/// Bitmaps of ours begin so; the tag that follows is the instance's.
const PREFIX: &str = "stillpoint";
const MAX_TAG: usize = 64;

/// Ties bitmaps to the lineage they serve (a store's id and the writer's instance, say): bitmaps
/// with another tag are never taken as a base. Letters, digits, `.`, `_` and `-`, at most 64.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct BitmapTag(String);

/// A tag that is empty, too long, or has characters that QEMU does not take in names.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("`{0}` cannot tag bitmaps; use 1 to {MAX_TAG} letters, digits, `.`, `_` or `-`")]
pub struct BadTag(String);

impl BitmapTag {
    /// How everything else that serves this lineage is named.
    fn names(&self) -> ObjectNames {
        ObjectNames::of(&self.0)
    }

    /// The connection, on behalf of this lineage.
    pub(super) fn on(&self, qmp: &Qmp) -> Qmp {
        qmp.for_instance(&self.0)
    }
}

impl FromStr for BitmapTag {
    type Err = BadTag;

    fn from_str(text: &str) -> Result<Self, BadTag> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        let sound = (1..=MAX_TAG).contains(&text.len()) && text.bytes().all(allowed);
        if sound { Ok(Self(text.into())) } else { Err(BadTag(text.into())) }
    }
}

impl fmt::Display for BitmapTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The bitmap that records what changes after checkpoint `id`.
pub(super) fn bitmap(tag: &BitmapTag, id: u64) -> String {
    format!("{PREFIX}/{tag}/{id}")
}

/// The checkpoint ID in a bitmap's name if it has this tag.
pub(super) fn bitmap_id(tag: &BitmapTag, name: &str) -> Option<u64> {
    name.strip_prefix(PREFIX)?
        .strip_prefix('/')?
        .strip_prefix(&tag.0)?
        .strip_prefix('/')?
        .parse()
        .ok()
}

/// The mark that was placed before checkpoint `seq` on a disk of `bytes`.
pub(super) fn size_mark(tag: &BitmapTag, id: u64, bytes: u64) -> String {
    format!("{PREFIX}/{tag}/size-{id}-{bytes}")
}

/// Checkpoint and size in a mark's name, if it has this tag.
pub(super) fn parse_size_mark(tag: &BitmapTag, name: &str) -> Option<(u64, u64)> {
    let rest = name
        .strip_prefix(PREFIX)?
        .strip_prefix('/')?
        .strip_prefix(&tag.0)?
        .strip_prefix("/size-")?;
    let (id, bytes) = rest.split_once('-')?;
    Some((id.parse().ok()?, bytes.parse().ok()?))
}

/// A copy of a disk's bitmap, to be read.
pub(super) fn bitmap_copy(tag: &BitmapTag) -> String {
    format!("{PREFIX}/{tag}/copy")
}

const HOLD: &str = "hold";
const PLACEHOLDER: &str = "placeholder";

/// The node that keeps the disk for which this one is the placeholder, if it is one.
pub(super) fn hold_of(node: &str) -> Option<String> {
    node.strip_suffix(PLACEHOLDER).map(|start| format!("{start}{HOLD}"))
}

/// The names for one disk of a capture. One QEMU has at most one capture of ours at a time.
#[derive(Debug, Clone)]
pub(super) struct DiskNames {
    names: ObjectNames,
    index: usize,
}

impl DiskNames {
    pub(super) fn new(tag: &BitmapTag, index: usize) -> Self {
        Self { names: tag.names(), index }
    }

    fn name(&self, kind: &str) -> String {
        self.names.name(&format!("{}-{kind}", self.index))
    }

    /// The fleecing overlay's format node.
    pub(super) fn overlay(&self) -> String {
        self.name("overlay")
    }

    /// The file node under it.
    pub(super) fn file(&self) -> String {
        self.name("file")
    }

    /// The filter above the disk that saves a block before it is overwritten.
    pub(super) fn filter(&self) -> String {
        self.name("cbw")
    }

    /// The node that shows the disk as it was when the filter came.
    pub(super) fn access(&self) -> String {
        self.name("access")
    }

    /// The node from which a size mark gets its bit.
    pub(super) fn mark(&self) -> String {
        self.name("mark")
    }

    pub(super) fn mark_export(&self) -> String {
        self.name("mark-w")
    }

    /// Keeps the disk's node while its device has the placeholder.
    pub(super) fn hold(&self) -> String {
        self.name(HOLD)
    }

    /// What the device has while the disk is written.
    pub(super) fn placeholder(&self) -> String {
        self.name(PLACEHOLDER)
    }

    /// The NBD export of the disk while it is written.
    pub(super) fn rewrite_export(&self) -> String {
        self.name("rewrite")
    }

    /// The NBD export of the layer below the disk.
    pub(super) fn backing_export(&self) -> String {
        self.name("backing")
    }

    /// The NBD export with a copy of the disk's bitmap.
    pub(super) fn changes_export(&self) -> String {
        self.name("changes")
    }

    pub(super) fn create_job(&self) -> String {
        self.name("create")
    }

    pub(super) fn backup_job(&self) -> String {
        self.name("backup")
    }

    /// The NBD export of the point-in-time copy.
    pub(super) fn export(&self) -> String {
        self.name("instant")
    }

    /// The NBD export of the running disk, to flush it.
    pub(super) fn live_export(&self) -> String {
        self.name("live")
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn node_names_fit_into_qemu() {
        let tag: BitmapTag = "a".repeat(MAX_TAG).parse().expect("tag");
        let names = DiskNames::new(&tag, 9_999);
        for name in [
            names.overlay(),
            names.file(),
            names.filter(),
            names.access(),
            names.mark(),
            names.hold(),
            names.placeholder(),
        ] {
            assert!(name.len() <= 31 && tag.names().owns(&name), "{name}");
        }
    }

    #[test]
    fn placeholder_leads_to_the_node_that_keeps_its_disk() {
        let names = DiskNames::new(&"a".parse().expect("tag"), 3);
        assert_eq!(hold_of(&names.placeholder()), Some(names.hold()));
        assert_eq!(hold_of(&names.filter()), None);
    }

    #[test]
    fn bitmaps_belong_to_their_tag() {
        let tag: BitmapTag = "a-1".parse().expect("tag");
        assert_eq!(bitmap_id(&tag, &bitmap(&tag, 42)), Some(42));
        let longer: BitmapTag = "a-1x".parse().expect("tag");
        assert_eq!(bitmap_id(&tag, &bitmap(&longer, 42)), None);
        assert_eq!(bitmap_id(&tag, "stillpoint/a-1/"), None);
        let mark = size_mark(&tag, 7, 4096);
        assert_eq!(
            (parse_size_mark(&tag, &mark), parse_size_mark(&longer, &mark), bitmap_id(&tag, &mark)),
            (Some((7, 4096)), None, None)
        );
        assert!("a/b".parse::<BitmapTag>().is_err() && "".parse::<BitmapTag>().is_err());
    }
}
