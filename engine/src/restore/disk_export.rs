//! The blocks of a checkpoint's disks, exported to QEMU while its guest runs: see
//! [`qmp_bridge::arriving`].

use super::backoff::Backoff;
use super::hydration::Trouble;
use super::on_demand::{Content, OnDemand, Origin};
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
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};
use tokio::sync::{OnceCell, watch};
use vm::error::{Class, class_of, explain};

/// Frames that are kept for the reads that follow.
pub(super) const CACHE: ByteLen = ByteLen(32 << 20);
/// The most that exports hold in this process: frames that are kept, and what was read for QEMU and
/// not sent yet.
pub const MEMORY: ByteLen = ByteLen(128 << 20);
/// A read that takes longer is shown in the status, and continues.
const SLOW: Duration = Duration::from_secs(2);

/// Why blocks cannot be read at the moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Troubles {
    /// The store does not answer.
    pub away: Option<Trouble>,
    /// What the store has is damaged.
    pub damaged: Option<Trouble>,
}

/// The disks of a checkpoint that can be exported, and how reading them goes.
pub struct DiskExports {
    reader: Arc<Reader>,
    by_name: BTreeMap<String, Arc<dyn Export>>,
}

/// Whether a disk's blocks can arrive while its guest runs. A raw image cannot be on another one.
pub fn can_arrive(disk: &DiskRecord) -> bool {
    !disk.read_only && disk.format == "qcow2" && disk.virtual_size.0 <= MAX_DISK
}

impl DiskExports {
    /// None yet, of the checkpoint that `pages` reads.
    pub fn new(pages: OnDemand) -> Self {
        Self::of(OnceCell::from(pages), None)
    }

    /// None yet, of a checkpoint that is opened when QEMU reads.
    pub(super) fn later(origin: Origin) -> Self {
        Self::of(OnceCell::new(), Some(origin))
    }

    fn of(pages: OnceCell<OnDemand>, origin: Option<Origin>) -> Self {
        let troubles = watch::Sender::default();
        let reader = Reader { pages, origin, troubles, is_waited_for: AtomicBool::new(false) };
        Self { reader: Arc::new(reader), by_name: BTreeMap::new() }
    }

    /// Adds a disk under the name of its node, on the layers that `backing` names.
    ///
    /// # Errors
    /// When no synthetic image of it is possible.
    pub fn add(
        &mut self,
        node: &str,
        space: SpaceName,
        size: ByteLen,
        backing: Option<&Backing>,
    ) -> Result<()> {
        let pages = DiskPages { reader: Arc::clone(&self.reader), space };
        let image = SyntheticQcow2::new(size.0, backing, pages)
            .with_context(|| format!("exporting disk {node}"))?;
        self.by_name.insert(node.to_owned(), Arc::new(image));
        Ok(())
    }

    /// To be served.
    ///
    /// # Errors
    /// When a disk's name is too long.
    pub fn exports(&self) -> Result<Exports> {
        Ok(Exports::new(self.by_name.clone())?)
    }

    /// How reading goes.
    pub(super) fn reader(&self) -> Arc<Reader> {
        Arc::clone(&self.reader)
    }

    /// The guest may run from now on: what cannot be read is waited for. Until then it is an error,
    /// which ends a QEMU that opens its disks.
    pub fn wait_for_reads(&self) {
        self.reader.wait_for_reads();
    }

    /// What is in the way of reading, as it changes.
    pub fn troubles(&self) -> watch::Receiver<Troubles> {
        self.reader.watch()
    }
}

/// Reads a checkpoint for all of its disks.
pub(super) struct Reader {
    pages: OnceCell<OnDemand>,
    /// Where to open it, unless it is open.
    origin: Option<Origin>,
    troubles: watch::Sender<Troubles>,
    is_waited_for: AtomicBool,
}

impl Reader {
    pub(super) fn wait_for_reads(&self) {
        self.is_waited_for.store(true, Ordering::Release);
    }

    pub(super) fn troubles(&self) -> Troubles {
        self.troubles.borrow().clone()
    }

    pub(super) fn watch(&self) -> watch::Receiver<Troubles> {
        self.troubles.subscribe()
    }

    async fn pages(&self) -> Result<&OnDemand> {
        let open = async {
            let origin = self.origin.as_ref().context("internal error: no checkpoint is named")?;
            Ok(OnDemand::new(origin.open().await?, CACHE))
        };
        self.pages.get_or_try_init(|| open).await
    }

    /// Tries again until it goes well: an error would reach the guest.
    async fn insist<'a, T>(
        &'a self,
        read: impl Fn(&'a OnDemand) -> BoxFuture<'a, Result<T>>,
    ) -> Result<T, ExportError> {
        let mut backoff = Backoff::new();
        let mut is_damaged = false;
        loop {
            let tried = async { read(self.pages().await?).await };
            let error = match self.slowly(tried).await {
                Ok(read) => {
                    self.succeeded(is_damaged);
                    return Ok(read);
                }
                Err(error) => error,
            };
            if !self.is_waited_for.load(Ordering::Acquire) {
                return Err(ExportError(explain(&error)));
            }
            is_damaged |= class_of(&error) == Class::Damaged;
            self.failed(class_of(&error) == Class::Damaged, explain(&error));
            backoff.wait().await;
        }
    }

    /// If it takes long, the status says so.
    async fn slowly<T>(&self, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        match tokio::time::timeout(SLOW, &mut work).await {
            Ok(done) => done,
            Err(_) => {
                self.failed(false, "the store has not answered yet".to_owned());
                work.await
            }
        }
    }

    fn failed(&self, is_damage: bool, message: String) {
        self.troubles.send_if_modified(|troubles| {
            let known = if is_damage { &mut troubles.damaged } else { &mut troubles.away };
            match known {
                Some(known) if known.message == message => return false,
                Some(known) => known.message = message,
                None => {
                    tracing::warn!(error = message, "blocks that are still to come cannot be read");
                    let since = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
                    *known = Some(Trouble { since, message });
                }
            }
            true
        });
    }

    /// `was_damaged`: what was read now was damaged before.
    fn succeeded(&self, was_damaged: bool) {
        self.troubles.send_if_modified(|troubles| {
            let away = troubles.away.take();
            let damaged = troubles.damaged.take_if(|_| was_damaged);
            let is_over = away.is_some() || damaged.is_some();
            if let Some(trouble) = away.or(damaged) {
                tracing::info!(since = trouble.since, "blocks can be read again");
            }
            is_over
        });
    }
}

struct DiskPages {
    reader: Arc<Reader>,
    space: SpaceName,
}

impl DiskPages {
    async fn runs(&self, from: &OnDemand, pages: PageRange) -> Result<Vec<OwnRun>> {
        let mut runs: Vec<OwnRun> = Vec::new();
        for run in from.locate(&self.space, pages).await? {
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

    async fn content(&self, from: &OnDemand, bytes: Range<u64>) -> Result<Bytes> {
        let first = PageIndex(bytes.start / PAGE);
        let pages = PageRange::new(first, PageIndex(bytes.end.div_ceil(PAGE)));
        let mut content = BytesMut::with_capacity(pages.byte_len().as_usize());
        let parts = from.read(&self.space, pages).await?;
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
        self.reader.insist(move |from| self.runs(from, pages).boxed()).boxed()
    }

    fn read(&self, bytes: Range<u64>) -> BoxFuture<'_, Result<Bytes, ExportError>> {
        self.reader.insist(move |from| self.content(from, bytes.clone()).boxed()).boxed()
    }
}
