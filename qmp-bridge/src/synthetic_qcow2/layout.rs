//! Where each part of the file is, and the bytes of its tables.

use std::ops::Range;

use checkpoint_format::{PAGE_SIZE, PageIndex, PageRange};

use super::{CLUSTER, OwnRun};
use crate::images::Backing;
use crate::nbd::Content;

/// Entries of 8 bytes in a cluster.
const ENTRIES: u64 = CLUSTER / 8;
/// Bytes of the disk that one L2 table maps.
pub(super) const GROUP_BYTES: u64 = ENTRIES * CLUSTER;
/// QEMU's `QCOW_MAX_L1_SIZE` in entries.
pub(super) const MAX_GROUPS: u64 = (32 << 20) / 8;
/// Clusters that one refcount block counts, with one bit each: every cluster is used once or not.
pub(super) const COUNTED: usize = PAGE_SIZE * 8;
/// The entry's cluster has a refcount of exactly one, as all here have.
const COPIED: u64 = 1 << 63;
/// The cluster reads as zeros.
const ZERO: u64 = 1;
const HEADER_LENGTH: u32 = 104;
const BACKING_FORMAT: u32 = 0xe279_2aca;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Header,
    L1,
    RefcountTable,
    RefcountBlocks,
    L2,
    Data,
}

/// First clusters of the parts.
#[derive(Debug)]
pub(super) struct Layout {
    virtual_size: u64,
    /// L2 tables that there may be.
    groups: u64,
    refcount_table: u64,
    refcount_blocks: u64,
    l2: u64,
    data: u64,
    end: u64,
}

/// Of things in memory.
#[expect(clippy::cast_possible_truncation, reason = "usize has 64 bits on all hosts of QEMU's KVM")]
pub(super) fn index(number: u64) -> usize {
    number as usize
}

impl Layout {
    pub(super) fn of(virtual_size: u64) -> Self {
        let pages = virtual_size.div_ceil(CLUSTER);
        // QEMU takes no image without an L1 table.
        let groups = pages.div_ceil(ENTRIES).max(1);
        let refcount_table = 1 + groups.div_ceil(ENTRIES);
        let mut blocks = 1;
        loop {
            let refcount_blocks = refcount_table + u64::div_ceil(blocks, ENTRIES);
            let l2 = refcount_blocks + blocks;
            let data = l2 + groups;
            let end = data + pages;
            let needed = end.div_ceil(COUNTED as u64);
            if needed <= blocks {
                return Self {
                    virtual_size,
                    groups,
                    refcount_table,
                    refcount_blocks,
                    l2,
                    data,
                    end,
                };
            }
            blocks = needed;
        }
    }

    pub(super) fn file_bytes(&self) -> u64 {
        self.end * CLUSTER
    }

    /// Where page 0 is in the file.
    pub(super) fn data_start(&self) -> u64 {
        self.data * CLUSTER
    }

    /// The part that this byte of the file is in, and where that ends.
    pub(super) fn part(&self, offset: u64) -> (Part, u64) {
        let parts = [
            (Part::Header, 1),
            (Part::L1, self.refcount_table),
            (Part::RefcountTable, self.refcount_blocks),
            (Part::RefcountBlocks, self.l2),
            (Part::L2, self.data),
        ];
        let cluster = offset / CLUSTER;
        let found = parts.into_iter().find(|(_, end)| cluster < *end);
        let (part, end) = found.unwrap_or((Part::Data, self.end));
        (part, end * CLUSTER)
    }

    /// The page that is in this cluster of the file.
    pub(super) fn page_at(&self, cluster: u64) -> u64 {
        cluster - self.data
    }

    /// Where these pages are.
    pub(super) fn clusters_of(&self, pages: PageRange) -> Range<u64> {
        self.data + pages.start.0..self.data + pages.end.0
    }

    /// Where the L2 tables begin.
    #[cfg(test)]
    pub(super) fn l2_start(&self) -> u64 {
        self.l2
    }

    /// The group whose L2 table this cluster is.
    pub(super) fn group_of(&self, cluster: u64) -> u64 {
        cluster - self.l2
    }

    /// The groups whose entries are in this cluster of the L1 table.
    fn groups_of(&self, cluster: u64) -> Range<u64> {
        let first = (cluster - 1) * ENTRIES;
        first..self.groups.min(first + ENTRIES)
    }

    pub(super) fn pages_of(&self, groups: Range<u64>) -> PageRange {
        let most = self.end - self.data;
        let page = |group: u64| PageIndex((group * ENTRIES).min(most));
        PageRange::new(page(groups.start), page(groups.end))
    }

    /// One cluster of the L1 table. All L2 tables are there.
    pub(super) fn l1(&self, cluster: u64) -> Vec<u8> {
        table(self.groups_of(cluster).map(|group| COPIED | ((self.l2 + group) * CLUSTER)))
    }

    /// One cluster of the refcount table. All blocks are there.
    pub(super) fn refcount_table(&self, cluster: u64) -> Vec<u8> {
        let first = (cluster - self.refcount_table) * ENTRIES;
        let blocks = self.l2 - self.refcount_blocks;
        let entries = first..blocks.min(first + ENTRIES);
        table(entries.map(|block| (self.refcount_blocks + block) * CLUSTER))
    }

    /// The clusters that this refcount block counts.
    pub(super) fn counted_by(&self, block: u64) -> Range<u64> {
        let first = (block - self.refcount_blocks) * COUNTED as u64;
        first.min(self.end)..self.end.min(first + COUNTED as u64)
    }

    /// A refcount block, which counts each of its clusters that is used once.
    pub(super) fn refcount_block(
        &self,
        block: u64,
        clusters: impl IntoIterator<Item = (Range<u64>, bool)>,
    ) -> Vec<u8> {
        let mut content = vec![0; PAGE_SIZE];
        let first = self.counted_by(block).start;
        for (used, _) in clusters.into_iter().filter(|(_, used)| *used) {
            for cluster in used {
                let bit = index(cluster - first);
                content[bit / 8] |= 1 << (bit % 8);
            }
        }
        content
    }

    /// The L2 table of a group, whose pages are in these runs.
    pub(super) fn l2(&self, group: u64, runs: Vec<OwnRun>) -> Vec<u8> {
        let mut entries = vec![0; index(ENTRIES)];
        let first = group * ENTRIES;
        for run in runs {
            for page in run.pages.start.0..run.pages.end.0 {
                entries[index(page - first)] = match run.content {
                    Some(Content::Data) => COPIED | ((self.data + page) * CLUSTER),
                    Some(Content::Zero) => ZERO,
                    None => 0,
                };
            }
        }
        table(entries)
    }

    /// The first cluster.
    pub(super) fn header(&self, backing: Option<&Backing>) -> Vec<u8> {
        let name = backing.map_or("", |backing| backing.file.as_str()).as_bytes();
        let format = backing.map_or("", |backing| backing.format.as_str()).as_bytes();
        let mut extensions = Vec::new();
        if backing.is_some() {
            extensions.extend(BACKING_FORMAT.to_be_bytes());
            extensions.extend(small(format.len()).to_be_bytes());
            extensions.extend(format);
            extensions.resize(extensions.len().next_multiple_of(8), 0);
        }
        // The end of the extensions.
        extensions.extend([0; 8]);
        let name_at = if backing.is_some() { HEADER_LENGTH + small(extensions.len()) } else { 0 };
        let mut header = b"QFI\xfb".to_vec();
        header.extend(3u32.to_be_bytes());
        header.extend(u64::from(name_at).to_be_bytes());
        header.extend(small(name.len()).to_be_bytes());
        header.extend(CLUSTER.trailing_zeros().to_be_bytes());
        header.extend(self.virtual_size.to_be_bytes());
        // Not encrypted.
        header.extend(0u32.to_be_bytes());
        header.extend(small(index(self.groups)).to_be_bytes());
        header.extend(CLUSTER.to_be_bytes());
        header.extend((self.refcount_table * CLUSTER).to_be_bytes());
        header.extend(small(index(self.refcount_blocks - self.refcount_table)).to_be_bytes());
        // No snapshots, then no feature of any kind, and refcounts of 2^0 bits.
        header.extend([0; 4 + 8 + 3 * 8 + 4]);
        header.extend(HEADER_LENGTH.to_be_bytes());
        header.extend(extensions);
        header.extend(name);
        header.resize(PAGE_SIZE, 0);
        header
    }
}

/// Entries as they are in the file, filled up to a cluster.
fn table(entries: impl IntoIterator<Item = u64>) -> Vec<u8> {
    let mut bytes: Vec<u8> = entries.into_iter().flat_map(u64::to_be_bytes).collect();
    bytes.resize(PAGE_SIZE, 0);
    bytes
}

/// What a header has in 32 bits: lengths and counts that are bounded far below.
#[expect(clippy::cast_possible_truncation, reason = "at most an L1 table's entries")]
fn small(number: usize) -> u32 {
    number as u32
}
