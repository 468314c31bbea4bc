//! Names of what a capture makes inside QEMU. They are all that a later helper has to find it by.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// Everything of ours begins so: nodes, jobs, exports, bitmaps.
pub(super) const PREFIX: &str = "stillpoint";
/// Node names may have 31 bytes, so the seq number is cut; one capture at a time makes that safe.
const SEQ_DIGITS: u64 = 1_000_000;
const MAX_TAG: usize = 64;

/// Ties bitmaps to the lineage they serve (a store's id and the writer's instance, say): bitmaps with another tag are
/// never taken as a base. Letters, digits, `.`, `_` and `-`, at most 64.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct BitmapTag(String);

#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("`{0}` cannot tag bitmaps; use 1 to {MAX_TAG} letters, digits, `.`, `_` or `-`")]
pub struct BadTag(String);

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

/// The bitmap that records what changes after checkpoint `seq`.
pub(super) fn bitmap(tag: &BitmapTag, seq: u64) -> String {
    format!("{PREFIX}/{tag}/{seq}")
}

/// The seq number in a bitmap's name if it has this tag.
pub(super) fn bitmap_seq(tag: &BitmapTag, name: &str) -> Option<u64> {
    name.strip_prefix(PREFIX)?.strip_prefix('/')?.strip_prefix(&tag.0)?.strip_prefix('/')?.parse().ok()
}

/// The names for one disk of one capture.
#[derive(Debug, Clone)]
pub(super) struct DiskNames {
    stem: String,
}

impl DiskNames {
    pub(super) fn new(seq: u64, index: usize) -> Self {
        Self { stem: format!("{PREFIX}-{}-{index}", seq % SEQ_DIGITS) }
    }

    /// The scratch overlay's format node.
    pub(super) fn overlay(&self) -> String {
        format!("{}-o", self.stem)
    }

    /// The file node under it.
    pub(super) fn file(&self) -> String {
        format!("{}-f", self.stem)
    }

    /// The filter that the backup job puts above the disk.
    pub(super) fn filter(&self) -> String {
        format!("{}-cbw", self.stem)
    }

    pub(super) fn create_job(&self) -> String {
        format!("{}-create", self.stem)
    }

    pub(super) fn backup_job(&self) -> String {
        format!("{}-backup", self.stem)
    }

    /// The NBD export of the instant.
    pub(super) fn export(&self) -> String {
        format!("{}-instant", self.stem)
    }

    /// The NBD export of the running disk, to flush it.
    pub(super) fn live_export(&self) -> String {
        format!("{}-live", self.stem)
    }
}

/// Whether a node, job or export is one of ours.
pub(crate) fn is_ours(name: &str) -> bool {
    name.strip_prefix(PREFIX).is_some_and(|rest| rest.starts_with('-'))
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn node_names_fit_into_qemu() {
        let names = DiskNames::new(u64::MAX, 9_999);
        for name in [names.overlay(), names.file(), names.filter()] {
            assert!(name.len() <= 31 && is_ours(&name), "{name}");
        }
        assert!(!is_ours("stillpointless") && !is_ours("drive0"));
    }

    #[test]
    fn bitmaps_belong_to_their_tag() {
        let tag: BitmapTag = "a-1".parse().expect("tag");
        assert_eq!(bitmap_seq(&tag, &bitmap(&tag, 42)), Some(42));
        let longer: BitmapTag = "a-1x".parse().expect("tag");
        assert_eq!(bitmap_seq(&tag, &bitmap(&longer, 42)), None);
        assert_eq!(bitmap_seq(&tag, "stillpoint/a-1/"), None);
        assert!("a/b".parse::<BitmapTag>().is_err() && "".parse::<BitmapTag>().is_err());
    }
}
