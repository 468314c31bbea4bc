//! The blocks of a checkpoint's disks, exported to QEMU while its guest runs: see
//! [`qmp_bridge::arriving`].

use super::backoff::Backoff;
use super::on_demand::{Content, OnDemand};
use anyhow::{Context, Result};
use bytes::{Bytes, BytesMut};
use checkpoint_format::{
    ByteLen, DiskRecord, PageCount, PageIndex, PageLocation, PageRange, SpaceName,
};
use futures::FutureExt;
use futures::future::BoxFuture;
use qmp_bridge::images::Backing;
use qmp_bridge::nbd;
use qmp_bridge::nbd::server::{Export, ExportError, Exports};
use qmp_bridge::synthetic_qcow2::{MAX_DISK, OwnPages, OwnRun, SyntheticQcow2};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use tokio::sync::watch;
use vm::error::{Class, class_of, explain};

/// Why blocks cannot be read at the moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// What the store has is damaged; else it does not answer.
    pub is_damage: bool,
    /// The message of the last failure.
    pub message: String,
}

/// The disks of a checkpoint that can be exported, and how reading them goes.
pub struct DiskExports {
    pages: Arc<OnDemand>,
    by_name: BTreeMap<String, Arc<dyn Export>>,
    trouble: watch::Sender<Option<Trouble>>,
}

/// Whether a disk's blocks can arrive while its guest runs. A raw image cannot be on another one.
pub fn can_arrive(disk: &DiskRecord) -> bool {
    !disk.read_only && disk.format == "qcow2" && disk.virtual_size.0 <= MAX_DISK
}

impl DiskExports {
    /// None yet, of the checkpoint that `pages` reads.
    pub fn new(pages: Arc<OnDemand>) -> Self {
        Self { pages, by_name: BTreeMap::new(), trouble: watch::Sender::new(None) }
    }

    /// Adds a disk under the name of its node, on the layers that `backing` names.
    ///
    /// # Errors
    /// When the disk has no space in the checkpoint, or no synthetic image of it is possible.
    pub fn add(&mut self, disk: &DiskRecord, backing: Option<&Backing>) -> Result<()> {
        let space = disk.space.clone().context("a writable disk without a space")?;
        let pages =
            DiskPages { pages: Arc::clone(&self.pages), space, trouble: self.trouble.clone() };
        let image = SyntheticQcow2::new(disk.virtual_size.0, backing, pages)
            .with_context(|| format!("exporting disk {}", disk.node))?;
        self.by_name.insert(disk.node.clone(), Arc::new(image));
        Ok(())
    }

    /// To be served.
    ///
    /// # Errors
    /// When a disk's name is too long.
    pub fn exports(&self) -> Result<Exports> {
        Ok(Exports::new(self.by_name.clone())?)
    }

    /// What is in the way of reading, as it changes; none if nothing is.
    pub fn trouble(&self) -> watch::Receiver<Option<Trouble>> {
        self.trouble.subscribe()
    }
}

/// A reader waits until the content is here and verified: an error would reach the guest.
struct DiskPages {
    pages: Arc<OnDemand>,
    space: SpaceName,
    trouble: watch::Sender<Option<Trouble>>,
}

impl DiskPages {
    /// Tries again until it goes well.
    async fn insist<'a, T>(&'a self, read: impl Fn() -> BoxFuture<'a, Result<T>>) -> T {
        let mut backoff = Backoff::new();
        loop {
            match read().await {
                Ok(read) => {
                    self.note(None);
                    return read;
                }
                Err(error) => self.note(Some(Trouble {
                    is_damage: class_of(&error) == Class::Damaged,
                    message: explain(&error),
                })),
            }
            backoff.wait().await;
        }
    }

    fn note(&self, trouble: Option<Trouble>) {
        self.trouble.send_if_modified(|known| {
            if *known == trouble {
                return false;
            }
            match &trouble {
                None => tracing::info!(space = %self.space, "blocks can be read again"),
                Some(Trouble { message, .. }) => tracing::warn!(
                    space = %self.space, error = message,
                    "blocks that are still to come cannot be read"
                ),
            }
            *known = trouble;
            true
        });
    }

    async fn runs(&self, pages: PageRange) -> Result<Vec<OwnRun>> {
        let mut runs: Vec<OwnRun> = Vec::new();
        for run in self.pages.locate(&self.space, pages).await? {
            let content = match run.location {
                PageLocation::Unknown => None,
                PageLocation::Zero => Some(nbd::Content::Zero),
                PageLocation::Data { .. } => Some(nbd::Content::Data),
            };
            match runs.last_mut() {
                Some(last) if last.content == content => last.pages.end = run.pages.end,
                _ => runs.push(OwnRun { pages: run.pages, content }),
            }
        }
        Ok(runs)
    }

    async fn content(&self, bytes: Range<u64>) -> Result<Bytes> {
        let first = PageIndex(bytes.start / PAGE);
        let pages = PageRange::new(first, PageIndex(bytes.end.div_ceil(PAGE)));
        let mut content = BytesMut::with_capacity(pages.byte_len().as_usize());
        let parts = self.pages.read(&self.space, pages).await?;
        let skipped = ByteLen(bytes.start - pages.bytes().start).as_usize();
        let wanted = ByteLen(bytes.end - bytes.start).as_usize();
        if let [(_, Content::Data(data))] = parts.as_slice() {
            // What one frame has needs no copy.
            return Ok(data.slice(skipped..skipped + wanted));
        }
        for (_, part) in parts {
            match part {
                Content::Data(data) => content.extend_from_slice(&data),
                Content::Zero | Content::Unknown => {
                    anyhow::bail!("internal error: {pages} of {} are not all data", self.space)
                }
            }
        }
        Ok(content.freeze().slice(skipped..skipped + wanted))
    }
}

const PAGE: u64 = PageCount(1).byte_len().0;

impl OwnPages for DiskPages {
    fn locate(&self, pages: PageRange) -> BoxFuture<'_, Result<Vec<OwnRun>, ExportError>> {
        async move { Ok(self.insist(|| self.runs(pages).boxed()).await) }.boxed()
    }

    fn read(&self, bytes: Range<u64>) -> BoxFuture<'_, Result<Bytes, ExportError>> {
        async move { Ok(self.insist(|| self.content(bytes.clone()).boxed()).await) }.boxed()
    }
}
