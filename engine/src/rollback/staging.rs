//! Pages of the checkpoint, read and checked, on this host: what is needed while the guest is
//! stopped.

use super::wanted::Wanted;
use crate::progress::bytes;
use crate::restore::on_demand::{Content, OnDemand};
use anyhow::{Context, Result};
use bytes::Bytes;
use checkpoint_format::{PageCount, PageRange, PageSet, SpaceKind, SpaceName};
use futures::{StreamExt, TryStreamExt};
use nix::sys::statvfs::statvfs;
use qmp_bridge::capture::{DEFAULT_FLEECING_RESERVE, DiskRewrite};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use vm::error::refused;

/// Pages that are asked for at once.
const PIECE: PageCount = PageCount(256);
/// Pieces that are read at once.
const READS: usize = 4;

/// What the checkpoint holds of some pages.
pub(super) struct Staging {
    file: Arc<File>,
    length: u64,
    /// The longest that it may be.
    most: u64,
    parts: Vec<Part>,
    /// All pages that are here.
    pub pages: Wanted,
}

/// Pages one after another.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub space: SpaceName,
    pub pages: PageRange,
    /// Where they are in the file; none for zeros.
    at: Option<u64>,
}

impl Staging {
    /// In a file without a name in `directory`, of whose free space some stays free.
    pub(super) fn new(directory: &Path) -> Result<Self> {
        let about = || format!("making a file in {}", directory.display());
        let file = tempfile::tempfile_in(directory).with_context(about)?;
        let facts = statvfs(directory).with_context(about)?;
        let free = facts.blocks_available() * facts.fragment_size();
        let most = free.saturating_sub(DEFAULT_FLEECING_RESERVE);
        let (file, length, parts) = (Arc::new(file), 0, Vec::new());
        Ok(Self { file, length, most, parts, pages: Wanted::default() })
    }

    pub(super) fn parts(&self, space: &SpaceName) -> Vec<Part> {
        self.parts.iter().filter(|part| part.space == *space).cloned().collect()
    }

    /// For reading on other threads.
    pub(super) fn reader(&self) -> Reader {
        Reader(Arc::clone(&self.file))
    }

    /// Reads these pages of the checkpoint, and where it has none of a disk's, of the layers below.
    pub(super) async fn fetch(
        &mut self,
        to: &OnDemand,
        disks: &DiskRewrite,
        wanted: &Wanted,
    ) -> Result<()> {
        for (space, pages) in &wanted.0 {
            let pieces: Vec<PageRange> =
                pages.ranges().flat_map(|range| range.chunks(PIECE)).collect();
            let reads = pieces.into_iter().map(|piece| to.read(space, piece));
            let mut reads = std::pin::pin!(futures::stream::iter(reads).buffered(READS));
            while let Some(parts) = reads.try_next().await? {
                for (pages, content) in parts {
                    let content = match content {
                        Content::Data(content) => Some(content),
                        Content::Zero => None,
                        Content::Unknown => below(space, pages, disks).await?,
                    };
                    self.add(space, pages, content).await?;
                }
            }
            self.pages.insert(space, pages);
        }
        Ok(())
    }

    async fn add(
        &mut self,
        space: &SpaceName,
        pages: PageRange,
        content: Option<Bytes>,
    ) -> Result<()> {
        let at = match content {
            None => None,
            Some(content) => {
                let at = self.length;
                self.length += content.len() as u64;
                if self.length > self.most {
                    return Err(refused(format!(
                        "what differs does not fit into the {} that are free for it; name another \
                         directory by --fleecing-dir when the VM is started, or end the VM and \
                         restore the checkpoint",
                        bytes(self.most)
                    )));
                }
                let file = Arc::clone(&self.file);
                tokio::task::spawn_blocking(move || file.write_all_at(&content, at))
                    .await
                    .context("internal error: staging panicked")?
                    .context("staging pages of the checkpoint")?;
                Some(at)
            }
        };
        self.parts.push(Part { space: space.clone(), pages, at });
        Ok(())
    }
}

/// What the layers below a disk show. Memory that no checkpoint recorded is zero.
async fn below(space: &SpaceName, pages: PageRange, disks: &DiskRewrite) -> Result<Option<Bytes>> {
    if space.kind() != SpaceKind::Disk {
        return Ok(None);
    }
    let disk = disks.disks.iter().find(|disk| disk.name == space.local());
    let disk = disk.with_context(|| format!("the VM has no disk for {space}"))?;
    let length = u32::try_from(pages.byte_len().0).context("a piece of more than 4 GiB")?;
    Ok(Some(disk.read_below(pages.bytes().start, length).await?.into()))
}

/// The staged content.
pub(super) struct Reader(Arc<File>);

impl Reader {
    pub(super) fn read(&self, part: &Part) -> Result<Vec<u8>> {
        let mut content = vec![0; part.pages.byte_len().as_usize()];
        if let Some(at) = part.at {
            self.0.read_exact_at(&mut content, at).context("reading staged pages")?;
        }
        Ok(content)
    }
}

/// All pages of a space, in pieces that are staged one after another.
pub(super) fn pieces(space: &SpaceName, size: PageCount) -> impl Iterator<Item = Wanted> {
    /// 64 MiB.
    const AT_ONCE: PageCount = PageCount(16 << 10);
    let space = space.clone();
    size.all().chunks(AT_ONCE).map(move |piece| {
        let mut pages = PageSet::new(size);
        pages.insert_range(piece);
        let mut wanted = Wanted::default();
        wanted.insert(&space, &pages);
        wanted
    })
}
