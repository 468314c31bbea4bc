//! The blocks of a checkpoint's disks, exported to QEMU while its guest runs: see
//! [`qmp_bridge::arriving`].

use super::backoff::Backoff;
use super::hydration::Trouble;
use super::on_demand::{Content, OnDemand, Origin};
use anyhow::{Context, Error, Result};
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
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{OnceCell, watch};
use vm::error::{Class, class_of, explain};

/// Frames that are kept for the reads that follow.
pub(super) const CACHE: ByteLen = ByteLen(32 << 20);
/// The most that exports hold in this process: frames that are kept, and what was read for QEMU and
/// not sent yet.
pub const MEMORY: ByteLen = ByteLen(128 << 20);
/// A read that takes longer is shown in the status, and continues.
const SLOW: Duration = Duration::from_secs(2);

/// Tries to read what is damaged before the guest is stopped: another replica may be whole.
const TRIES: u32 = 2;
/// After this time a read that QEMU stops the guest for is an error: a guest's own timeouts, which
/// it would act on, are of 30 s.
const GIVE_UP: Duration = Duration::from_secs(20);

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
        let (is_waited_for, given_up) = (AtomicBool::new(false), watch::Sender::default());
        let (failed_early, damaged) = Default::default();
        let reader =
            Reader { pages, origin, troubles, is_waited_for, failed_early, given_up, damaged };
        Self { reader: Arc::new(reader), by_name: BTreeMap::new() }
    }

    /// Adds a disk under the name of its node, on the layers that `backing` names. `stops`: QEMU
    /// stops the guest at an error, which the guest does not get.
    ///
    /// # Errors
    /// When no synthetic image of it is possible.
    pub fn add(
        &mut self,
        node: &str,
        (space, size): (SpaceName, ByteLen),
        backing: Option<&Backing>,
        stops: bool,
    ) -> Result<()> {
        let pages = DiskPages { reader: Arc::clone(&self.reader), space, stops };
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

    /// The guest may run from now on: what cannot be read is waited for. Until then it is an error.
    ///
    /// # Errors
    /// The first error until then: QEMU reads each disk's first sector when it makes the device,
    /// and passes over an error there.
    pub fn wait_for_reads(&self) -> Result<()> {
        self.reader.wait_for_reads()
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
    /// The first error before that.
    failed_early: Mutex<Option<Error>>,
    /// The first of the reads that were answered by an error since the store is away. While there
    /// is one, all that can be are answered so: QEMU ends no `stop` while one waits.
    given_up: watch::Sender<Option<Asked>>,
    /// The last of those whose content is damaged.
    damaged: Mutex<Option<Asked>>,
}

/// What is read.
#[derive(Clone, Debug)]
struct Asked {
    space: SpaceName,
    pages: PageRange,
    /// Not only where they are.
    content: bool,
    /// QEMU stops the guest if it is an error.
    stops: bool,
}

impl Reader {
    pub(super) fn wait_for_reads(&self) -> Result<()> {
        self.is_waited_for.store(true, Ordering::Release);
        let failed = self.failed_early.lock().unwrap_or_else(PoisonError::into_inner).take();
        failed.map_or(Ok(()), Err)
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

    /// What was answered by an error is read again. Whether that is a reason to let the guest
    /// continue: what was damaged is for an operator to look at.
    pub(super) async fn retry(&self) -> bool {
        let damaged = self.damaged().clone();
        if let Some(asked) = damaged
            && self.can_read(&asked).await
        {
            *self.damaged() = None;
            self.succeeded(true);
        }
        let given_up = self.given_up.borrow().clone();
        let Some(asked) = given_up else { return false };
        if !self.can_read(&asked).await {
            return false;
        }
        self.succeeded(false);
        self.given_up.send_replace(None);
        true
    }

    async fn can_read(&self, asked: &Asked) -> bool {
        let read = async {
            let from = self.pages().await?;
            match asked.content {
                true => from.read(&asked.space, asked.pages).await.map(drop),
                false => from.locate(&asked.space, asked.pages).await.map(drop),
            }
        };
        match tokio::time::timeout(SLOW, read).await {
            Ok(Ok(())) => true,
            Ok(Err(error)) => {
                self.failed(class_of(&error) == Class::Damaged, explain(&error));
                false
            }
            Err(_) => false,
        }
    }

    fn damaged(&self) -> MutexGuard<'_, Option<Asked>> {
        self.damaged.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An error only if QEMU stops the guest for it: else it would reach the guest.
    async fn insist<'a, T>(
        &'a self,
        asked: Asked,
        read: impl Fn(&'a OnDemand) -> BoxFuture<'a, Result<T>>,
    ) -> Result<T, ExportError> {
        let mut given_up = self.given_up.subscribe();
        let another = async {
            let _ = given_up.wait_for(Option::is_some).await;
        };
        tokio::select! {
            biased;
            () = another, if asked.stops => {}
            done = self.try_on(&asked, read) => return done,
            () = tokio::time::sleep(GIVE_UP), if asked.stops => {
                tracing::error!("the store is away; QEMU stops a guest that needs a block from it");
                self.given_up.send_replace(Some(asked));
            }
        }
        Err(ExportError("the store does not give this block".to_owned()))
    }

    /// Tries again until it goes well.
    async fn try_on<'a, T>(
        &'a self,
        asked: &Asked,
        read: impl Fn(&'a OnDemand) -> BoxFuture<'a, Result<T>>,
    ) -> Result<T, ExportError> {
        let (mut backoff, mut damaged) = (Backoff::new(), 0);
        loop {
            let tried = async { read(self.pages().await?).await };
            let error = match self.slowly(tried).await {
                Ok(read) => {
                    self.succeeded(damaged > 0);
                    return Ok(read);
                }
                Err(error) => error,
            };
            if !self.is_waited_for.load(Ordering::Acquire) {
                let answer = ExportError(explain(&error));
                let mut failed = self.failed_early.lock().unwrap_or_else(PoisonError::into_inner);
                failed.get_or_insert(error);
                return Err(answer);
            }
            let is_damage = class_of(&error) == Class::Damaged;
            self.failed(is_damage, explain(&error));
            damaged += u32::from(is_damage);
            if damaged == TRIES && asked.stops {
                tracing::error!("a block is damaged; QEMU stops a guest that needs it");
                *self.damaged() = Some(asked.clone());
                return Err(ExportError(explain(&error)));
            }
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
                    *known = Some(Trouble::now(message));
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
    stops: bool,
}

impl DiskPages {
    fn asked(&self, pages: PageRange, content: bool) -> Asked {
        Asked { space: self.space.clone(), pages, content, stops: self.stops }
    }

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
        let pages = pages_of(&bytes);
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

fn pages_of(bytes: &Range<u64>) -> PageRange {
    PageRange::new(PageIndex(bytes.start / PAGE), PageIndex(bytes.end.div_ceil(PAGE)))
}

impl OwnPages for DiskPages {
    fn locate(&self, pages: PageRange) -> BoxFuture<'_, Result<Vec<OwnRun>, ExportError>> {
        let asked = self.asked(pages, false);
        self.reader.insist(asked, move |from| self.runs(from, pages).boxed()).boxed()
    }

    fn read(&self, bytes: Range<u64>) -> BoxFuture<'_, Result<Bytes, ExportError>> {
        let asked = self.asked(pages_of(&bytes), true);
        self.reader.insist(asked, move |from| self.content(from, bytes.clone()).boxed()).boxed()
    }
}
