//! A qcow2 image that exists only while it is read: the blocks that a checkpoint holds of a disk,
//! as an image on the disk's layers.
//!
//! A restored disk is the VM's own blocks above read-only layers. An NBD node of QEMU can have no
//! backing file, but a qcow2 node over an NBD node can. So what is exported is a qcow2 *file*: its
//! header, tables and reference counts are computed from the map of the disk's pages, its data
//! clusters are read from the checkpoint when QEMU reads them, and its header names the layers:
//! QEMU's own driver combines them.
//!
//! A cluster is a page, so no block is rounded. A page of zeros is a zero cluster and hides the
//! layers; a page that no checkpoint recorded is not allocated and shows them. Every page has a
//! place of its own in the file whether or not it is there, and so has every L2 table, also one
//! without entries: nothing has to be counted, and an image is opened without asking for a page.
//!
//! ```text
//! header | L1 table | refcount table | refcount blocks | L2 tables | page 0 | page 1 | ...
//! ```
//!
//! The layout is that of QEMU's `docs/interop/qcow2.txt`, version 3. QEMU reads L1 tables of at
//! most 32 MiB, which with clusters of 4 KiB makes a disk of at most 8 TiB.

mod layout;

use std::ops::Range;

use bytes::Bytes;
use checkpoint_format::{PAGE_SIZE, PageIndex, PageRange};
use futures::future::BoxFuture;
use thiserror::Error;

use crate::images::{Backing, MAX_BACKING_NAME};
use crate::nbd::context::{STATE_HOLE, STATE_ZERO};
use crate::nbd::server::{Export, ExportError};
use crate::nbd::{Content, Extent};
use layout::{Layout, Part};

/// Largest disk in bytes: what an L1 table of 32 MiB reaches, the longest that QEMU opens.
pub const MAX_DISK: u64 = layout::MAX_GROUPS * layout::GROUP_BYTES;

const CLUSTER: u64 = PAGE_SIZE as u64;
/// Most extents that one status has.
const MAX_EXTENTS: usize = 4096;

/// Why there is no image of a disk.
#[derive(Debug, Clone, Error, PartialEq, Eq)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum SyntheticError {
    #[error("a disk of {size} bytes is too large for a synthetic image; the limit is {MAX_DISK}")]
    TooLarge { size: u64 },
    #[error("the name of the layer below has {length} bytes; the limit is {MAX_BACKING_NAME}")]
    LongBacking { length: usize },
}

/// Pages one after another that are all in the same state; `content` is none for those that the
/// layers below show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OwnRun {
    /// The pages.
    pub pages: PageRange,
    /// What they hold.
    pub content: Option<Content>,
}

/// The blocks that a checkpoint holds of one disk.
pub trait OwnPages: Send + Sync {
    /// These pages in runs, in order and without gaps; all are pages of the disk.
    fn locate(&self, pages: PageRange) -> BoxFuture<'_, Result<Vec<OwnRun>, ExportError>>;

    /// The content of these bytes of the disk, all in pages of data. The last page of a disk is as
    /// long as the others.
    fn read(&self, bytes: Range<u64>) -> BoxFuture<'_, Result<Bytes, ExportError>>;
}

/// The image of one disk.
#[derive(Debug)]
pub struct SyntheticQcow2<P> {
    layout: Layout,
    header: Vec<u8>,
    pages: P,
}

/// A part of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    /// Made here.
    Made(Vec<u8>),
    /// So many bytes of a hole.
    Hole(u64),
    /// Bytes of the disk.
    Disk(Range<u64>),
}

impl<P: OwnPages> SyntheticQcow2<P> {
    /// An image of `virtual_size` bytes, rounded up to sectors of 512 as QEMU does. `backing` is
    /// what is below.
    ///
    /// # Errors
    /// When the disk is larger than [`MAX_DISK`], or the backing name too long for a header.
    pub fn new(
        virtual_size: u64,
        backing: Option<&Backing>,
        pages: P,
    ) -> Result<Self, SyntheticError> {
        if virtual_size > MAX_DISK {
            return Err(SyntheticError::TooLarge { size: virtual_size });
        }
        if let Some(length) = backing.map(|backing| backing.file.len())
            && length > MAX_BACKING_NAME
        {
            return Err(SyntheticError::LongBacking { length });
        }
        let layout = Layout::of(virtual_size.next_multiple_of(512));
        let header = layout.header(backing);
        Ok(Self { layout, header, pages })
    }

    /// The parts of a range of the file, in order.
    async fn pieces(&self, range: Range<u64>) -> Result<Vec<Piece>, ExportError> {
        let mut pieces = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let (part, _) = self.layout.part(at);
            at = if part == Part::Data {
                self.push_data(&mut pieces, at..range.end).await?;
                range.end
            } else {
                let end = range.end.min((at / CLUSTER + 1) * CLUSTER);
                push_made(&mut pieces, &self.metadata(part, at / CLUSTER).await?, at, end);
                end
            };
        }
        Ok(pieces)
    }

    /// A cluster that holds no page.
    async fn metadata(&self, part: Part, cluster: u64) -> Result<Vec<u8>, ExportError> {
        let layout = &self.layout;
        Ok(match part {
            Part::Header => self.header.clone(),
            Part::L1 => layout.l1(cluster),
            Part::RefcountTable => layout.refcount_table(cluster),
            Part::RefcountBlocks => {
                let counted = layout.counted_by(cluster);
                layout.refcount_block(cluster, self.used_clusters(counted).await?)
            }
            Part::L2 => {
                let group = layout.group_of(cluster);
                layout.l2(group, self.locate(layout.pages_of(group..group + 1)).await?)
            }
            Part::Data => Vec::new(),
        })
    }

    /// As [`OwnPages::locate`], checked.
    async fn locate(&self, pages: PageRange) -> Result<Vec<OwnRun>, ExportError> {
        if pages.is_empty() {
            return Ok(Vec::new());
        }
        let runs = self.pages.locate(pages).await?;
        let mut next = pages.start;
        for run in &runs {
            if run.pages.start != next || run.pages.is_empty() {
                break;
            }
            next = run.pages.end;
        }
        if next == pages.end {
            return Ok(runs);
        }
        Err(ExportError(format!("internal error: the runs of {pages:?} end at {next}")))
    }

    /// Runs of clusters of the file and whether anything is in them.
    async fn used_clusters(
        &self,
        clusters: Range<u64>,
    ) -> Result<Vec<(Range<u64>, bool)>, ExportError> {
        let mut found = Vec::new();
        let mut at = clusters.start;
        while at < clusters.end {
            let (part, part_end) = self.layout.part(at * CLUSTER);
            let end = clusters.end.min(part_end / CLUSTER);
            match part {
                Part::Data => {
                    let page = |cluster: u64| PageIndex(self.layout.page_at(cluster));
                    let runs = self.locate(PageRange::new(page(at), page(end))).await?;
                    found.extend(runs.iter().map(|run| {
                        let is_data = run.content == Some(Content::Data);
                        (self.layout.clusters_of(run.pages), is_data)
                    }));
                }
                _ => found.push((at..end, true)),
            }
            at = end;
        }
        Ok(found)
    }

    async fn push_data(
        &self,
        pieces: &mut Vec<Piece>,
        range: Range<u64>,
    ) -> Result<(), ExportError> {
        let start = range.start - self.layout.data_start();
        let end = range.end - self.layout.data_start();
        let pages = PageRange::new(PageIndex(start / CLUSTER), PageIndex(end.div_ceil(CLUSTER)));
        for run in self.locate(pages).await? {
            let bytes = run.pages.bytes();
            let part = bytes.start.max(start)..bytes.end.min(end);
            let length = part.end - part.start;
            match (run.content, pieces.last_mut()) {
                (Some(Content::Data), Some(Piece::Disk(last))) if last.end == part.start => {
                    last.end = part.end;
                }
                (Some(Content::Data), _) => pieces.push(Piece::Disk(part)),
                (_, Some(Piece::Hole(last))) => *last += length,
                (_, _) => pieces.push(Piece::Hole(length)),
            }
        }
        Ok(())
    }

    async fn assemble(&self, range: Range<u64>) -> Result<Bytes, ExportError> {
        let wanted = range.end - range.start;
        let pieces = self.pieces(range).await?;
        // Most reads are of data that lies together, which needs no copy.
        if let [Piece::Disk(bytes)] = pieces.as_slice() {
            return self.pages.read(bytes.clone()).await;
        }
        let mut content = Vec::with_capacity(layout::index(wanted));
        for piece in pieces {
            match piece {
                Piece::Made(bytes) => content.extend(bytes),
                Piece::Hole(length) => content.resize(content.len() + layout::index(length), 0),
                Piece::Disk(bytes) => content.extend(self.pages.read(bytes).await?),
            }
        }
        Ok(content.into())
    }

    async fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>, ExportError> {
        let clusters = range.start / CLUSTER..range.end.div_ceil(CLUSTER);
        let mut extents: Vec<Extent> = Vec::new();
        // A refcount block's worth at a time.
        for first in clusters.clone().step_by(layout::COUNTED) {
            let end = clusters.end.min(first + layout::COUNTED as u64);
            for (run, used) in self.used_clusters(first..end).await? {
                let start = (run.start * CLUSTER).max(range.start);
                let end = run.end * CLUSTER;
                let flags = if used { 0 } else { STATE_HOLE | STATE_ZERO };
                match extents.last_mut() {
                    Some(last) if last.flags == flags => last.end = end,
                    _ => extents.push(Extent { start, end, flags }),
                }
            }
            if extents.len() >= MAX_EXTENTS {
                break;
            }
        }
        Ok(extents)
    }
}

fn push_made(pieces: &mut Vec<Piece>, cluster: &[u8], at: u64, end: u64) {
    let from = layout::index(at % CLUSTER);
    let part = &cluster[from..from + layout::index(end - at)];
    match pieces.last_mut() {
        Some(Piece::Made(bytes)) => bytes.extend(part),
        _ => pieces.push(Piece::Made(part.to_vec())),
    }
}

impl<P: OwnPages> Export for SyntheticQcow2<P> {
    fn size(&self) -> u64 {
        self.layout.file_bytes()
    }

    fn read(&self, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, ExportError>> {
        Box::pin(self.assemble(range))
    }

    fn status(&self, range: Range<u64>) -> BoxFuture<'_, Result<Vec<Extent>, ExportError>> {
        Box::pin(self.extents(range))
    }
}

#[cfg(test)]
mod test;
