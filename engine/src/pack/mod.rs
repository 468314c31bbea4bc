//! Pages on their way into the store: jobs -> frames (compressed side by side) -> packs -> uploads.
//!
//! ```text
//! Packer::send --(bounded)--> encode x2 --(in order)--> builder --(full)--> upload x2
//! ```
//! Everything is bounded: a slow store fills the queues, then the caller waits, and the caller
//! never holds the guest. Frames reach the builder in the order of the jobs, so of two records of a
//! page the later one counts.

mod target;

pub(crate) use target::PackTarget;

use anyhow::{Context, Result, anyhow, bail};
use bytes::Bytes;
use checkpoint_format::{
    ByteLen, EncodedFrame, FinishedPack, PackBuilder, PackId, PackInfo, PackLayout, PackRecord,
    PageDigest, PageIndex, PageRange, SpaceId, SpaceTable,
};
use checkpoint_store::StoredPack;
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::SendTimeoutError;
use tokio::task::JoinHandle;

/// A pack is closed when its frames reach this length. HDFS keeps a few hundred bytes of NameNode
/// memory for each file, and a pack under way is held in memory so that it can be written again
/// from its start.
pub(crate) const PACK_BYTES: ByteLen = ByteLen(24 << 20);
/// And when its index reaches this length: pages that compress to next to nothing need as much of
/// it as others, and it is in memory four times when a pack is closed. 240,000 pages.
const INDEX_BYTES: ByteLen = ByteLen(4 << 20);
/// What is kept of the indexes of all packs, for the index of the lineage: those of 250,000
/// scattered pages, or of 40 GiB that are not. The others are read again.
const LAYOUT_BYTES: usize = 16 << 20;
/// Packs being written at once, besides the one being filled: HDFS gives a pipeline to each file.
const UPLOADS: usize = 2;
/// Frames being compressed at once.
const ENCODERS: usize = 2;
/// Jobs waiting for an encoder, of up to 256 KiB each.
const QUEUE: usize = 16;
const ZSTD_LEVEL: i32 = 1;

/// Up to 64 pages of one space and their content.
pub(crate) struct FrameJob {
    pub space: SpaceId,
    pub pages: Vec<(PageIndex, PageDigest)>,
    pub raw: Vec<u8>,
}

pub(crate) enum PackJob {
    Data(FrameJob),
    /// These pages hold zeros.
    Zero(SpaceId, PageRange),
}

enum Encoded {
    Frame(EncodedFrame),
    Zero(SpaceId, PageRange),
}

/// A pack of this pipeline that the store has acknowledged.
#[derive(Clone, Debug)]
pub(crate) struct NumberedPack {
    /// Of two records of a page the one in the pack of the higher number counts.
    pub number: u32,
    pub record: PackRecord,
    /// What its trailer says but for the digests, if there was room to keep it.
    pub layout: Option<Arc<PackLayout>>,
}

/// The packs that the store has acknowledged so far, whatever becomes of the pipeline.
#[derive(Clone, Default)]
pub(crate) struct StoredPacks(Arc<Mutex<Vec<NumberedPack>>>);

impl StoredPacks {
    fn push(&self, pack: NumberedPack) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(pack);
    }

    /// By number.
    pub(crate) fn list(&self) -> Vec<NumberedPack> {
        let mut packs = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        packs.sort_by_key(|pack| pack.number);
        packs
    }
}

/// The entrance of the pipeline. Dropping it unfinished stops the pipeline and its uploads.
pub(crate) struct Packer {
    jobs: mpsc::Sender<PackJob>,
    task: JoinHandle<Result<()>>,
    stored: StoredPacks,
}

impl Packer {
    /// `label` makes the packs' ids: the same for no two checkpoints or layers.
    pub(crate) fn new(target: Arc<dyn PackTarget>, spaces: SpaceTable, label: String) -> Self {
        Self::after(target, spaces, label, 0)
    }

    /// The packs' numbers begin behind `last`.
    pub(crate) fn after(
        target: Arc<dyn PackTarget>,
        spaces: SpaceTable,
        label: String,
        last: u32,
    ) -> Self {
        Self::with_packs_of(PACK_BYTES, target, spaces, label, last)
    }

    pub(crate) fn with_packs_of(
        pack_bytes: ByteLen,
        target: Arc<dyn PackTarget>,
        spaces: SpaceTable,
        label: String,
        last: u32,
    ) -> Self {
        let (jobs, queue) = mpsc::channel(QUEUE);
        let stored = StoredPacks::default();
        let pipeline = Pipeline::new(target, spaces, label, pack_bytes, last + 1, stored.clone());
        Self { jobs, task: tokio::spawn(pipeline.run(queue)), stored }
    }

    pub(crate) fn stored(&self) -> StoredPacks {
        self.stored.clone()
    }

    /// Waits while the queue is full. An error here only says that the pipeline ended;
    /// [`Packer::finish`] tells why.
    pub(crate) async fn send(&self, jobs: &mut Vec<PackJob>) -> Result<()> {
        for job in jobs.drain(..) {
            self.jobs.send(job).await.map_err(|_| ended())?;
        }
        Ok(())
    }

    /// The entrance for threads that may block.
    pub(crate) fn entrance(&self) -> Entrance {
        Entrance { jobs: self.jobs.clone(), timeout: None }
    }

    /// Ends the pipeline, and says what really went wrong, when `seen` may only be that the
    /// pipeline has ended. What was sent before is stored if the store takes it within `grace`.
    pub(crate) async fn why(mut self, seen: anyhow::Error, grace: Duration) -> anyhow::Error {
        if self.jobs.is_closed() {
            return self.finish().await.err().unwrap_or(seen);
        }
        self.close();
        if tokio::time::timeout(grace, &mut self.task).await.is_err() {
            self.task.abort();
            // Waited for, so that nothing holds the target any more.
            let _ = (&mut self.task).await;
        }
        seen
    }

    /// Waits until every pack is stored.
    pub(crate) async fn finish(mut self) -> Result<Vec<PackRecord>> {
        self.close();
        (&mut self.task).await.context("internal error: the pack pipeline panicked")??;
        Ok(self.stored.list().into_iter().map(|pack| pack.record).collect())
    }

    /// No job comes any more.
    fn close(&mut self) {
        self.jobs = mpsc::channel(1).0;
    }
}

/// [`Packer::send`] for a thread outside the asynchronous runtime.
pub(crate) struct Entrance {
    jobs: mpsc::Sender<PackJob>,
    timeout: Option<Duration>,
}

impl Entrance {
    /// Gives up when the pipeline takes no job for so long: where a guest waits for who sends.
    pub(crate) fn with_timeout(self, timeout: Duration) -> Self {
        Self { timeout: Some(timeout), ..self }
    }

    pub(crate) fn send(&self, jobs: &mut Vec<PackJob>) -> Result<()> {
        jobs.drain(..).try_for_each(|job| self.send_one(job))
    }

    fn send_one(&self, job: PackJob) -> Result<()> {
        let Some(timeout) = self.timeout else {
            return self.jobs.blocking_send(job).map_err(|_| ended());
        };
        match Handle::current().block_on(self.jobs.send_timeout(job, timeout)) {
            Ok(()) => Ok(()),
            Err(SendTimeoutError::Closed(_)) => Err(ended()),
            Err(SendTimeoutError::Timeout(_)) => {
                bail!("the store took nothing for {timeout:?}, for which the guest must not wait")
            }
        }
    }
}

fn ended() -> anyhow::Error {
    anyhow!("the pack pipeline has ended")
}

impl Drop for Packer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Pipeline {
    target: Arc<dyn PackTarget>,
    spaces: SpaceTable,
    label: String,
    builder: PackBuilder,
    /// A pack is closed when its frames reach this length.
    pack_bytes: ByteLen,
    /// The number of the builder's pack.
    begun: u32,
    uploads: FuturesUnordered<BoxFuture<'static, Result<NumberedPack>>>,
    stored: StoredPacks,
    /// Bytes of the layouts that are kept.
    layout_bytes: usize,
}

impl Pipeline {
    fn new(
        target: Arc<dyn PackTarget>,
        spaces: SpaceTable,
        label: String,
        pack_bytes: ByteLen,
        first: u32,
        stored: StoredPacks,
    ) -> Self {
        let builder = PackBuilder::new(pack_id(&label, first), &spaces);
        Self {
            target,
            spaces,
            label,
            builder,
            pack_bytes,
            begun: first,
            uploads: FuturesUnordered::new(),
            stored,
            layout_bytes: 0,
        }
    }

    async fn run(mut self, queue: mpsc::Receiver<PackJob>) -> Result<()> {
        let done = self.take_all(queue).await;
        if done.is_err() {
            // What one upload met need not meet another, and what is stored counts for the next
            // try.
            while let Some(other) = self.uploads.next().await {
                other.into_iter().for_each(|pack| self.stored.push(pack));
            }
        }
        done
    }

    async fn take_all(&mut self, queue: mpsc::Receiver<PackJob>) -> Result<()> {
        let jobs = futures::stream::unfold(queue, |mut queue| async {
            queue.recv().await.map(|job| (job, queue))
        });
        let mut encoded = Box::pin(jobs.map(encode).buffered(ENCODERS));
        loop {
            tokio::select! {
                record = encoded.next() => match record {
                    Some(record) => self.push(record?).await?,
                    None => break,
                },
                Some(done) = self.uploads.next() => self.stored.push(done?),
            }
        }
        self.close()?;
        while let Some(done) = self.uploads.next().await {
            self.stored.push(done?);
        }
        Ok(())
    }

    async fn push(&mut self, record: Encoded) -> Result<()> {
        if self.builder.len() >= self.pack_bytes || self.builder.index_len() >= INDEX_BYTES {
            self.close()?;
        }
        match record {
            Encoded::Zero(space, pages) => {
                if self.builder.push_zero(space, pages).is_err() {
                    // No room for more runs in this one.
                    self.close()?;
                    self.builder.push_zero(space, pages)?;
                }
            }
            Encoded::Frame(frame) => {
                if !self.builder.has_room_for(&frame) {
                    self.close()?;
                }
                self.builder.push_frame(frame)?;
            }
        }
        while self.uploads.len() >= UPLOADS {
            if let Some(done) = self.uploads.next().await {
                self.stored.push(done?);
            }
        }
        Ok(())
    }

    /// Sends the builder's pack on its way, if anything is in it.
    fn close(&mut self) -> Result<()> {
        if self.builder.is_empty() {
            return Ok(());
        }
        let number = self.begun;
        self.begun += 1;
        let next = PackBuilder::new(pack_id(&self.label, self.begun), &self.spaces);
        let pack = std::mem::replace(&mut self.builder, next).finish().context("closing a pack")?;
        let FinishedPack { chunks, info, layout } = pack;
        let layout_bytes = self.layout_bytes + layout.memory();
        let is_kept = layout_bytes <= LAYOUT_BYTES;
        self.layout_bytes = if is_kept { layout_bytes } else { self.layout_bytes };
        let layout = is_kept.then(|| Arc::new(layout));
        let upload = upload(Arc::clone(&self.target), number, (chunks, info), layout);
        self.uploads.push(Box::pin(upload));
        Ok(())
    }
}

fn pack_id(label: &str, number: u32) -> PackId {
    PackId::derive(&[label, &number.to_string()])
}

async fn upload(
    target: Arc<dyn PackTarget>,
    number: u32,
    (chunks, info): (Vec<Vec<u8>>, PackInfo),
    layout: Option<Arc<PackLayout>>,
) -> Result<NumberedPack> {
    let chunks = chunks.into_iter().map(Bytes::from).collect();
    let StoredPack { name, replicas, .. } =
        target.put_pack(&format!("pack-{number:04}"), chunks).await?;
    Ok(NumberedPack { number, record: PackRecord { name, info, replicas }, layout })
}

async fn encode(job: PackJob) -> Result<Encoded> {
    match job {
        PackJob::Zero(space, pages) => Ok(Encoded::Zero(space, pages)),
        PackJob::Data(job) => {
            let frame = move || EncodedFrame::encode(job.space, &job.pages, &job.raw, ZSTD_LEVEL);
            let frame = tokio::task::spawn_blocking(frame)
                .await
                .context("internal error: compressing a frame panicked")?;
            Ok(Encoded::Frame(frame.context("compressing a frame")?))
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use checkpoint_format::{FRAME_PAGES, PAGE_SIZE, SpaceName};

    /// Keeps the length of each pack.
    #[derive(Default)]
    struct Lengths(Mutex<Vec<usize>>);

    impl PackTarget for Lengths {
        fn put_pack<'a>(
            &'a self,
            stem: &'a str,
            chunks: Vec<Bytes>,
        ) -> BoxFuture<'a, Result<StoredPack>> {
            let len = chunks.iter().map(Bytes::len).sum();
            self.0.lock().unwrap().push(len);
            let name = format!("{stem}.pack").parse().unwrap();
            let stored = StoredPack {
                name,
                len: len as u64,
                replicas: None,
                wanted_replicas: None,
                more_requested: false,
                attempts: 1,
            };
            Box::pin(async move { Ok(stored) })
        }
    }

    /// 3 GiB of pages that compress to nothing: their digests alone would make one index of 13 MB.
    #[tokio::test(flavor = "multi_thread")]
    async fn packs_of_well_compressing_pages_end_with_their_index() {
        let name = SpaceName::disk("d").unwrap();
        let spaces = SpaceTable::new([name.clone()]).unwrap();
        let space = spaces.id(&name).unwrap();
        let target = Arc::new(Lengths::default());
        let packer =
            Packer::new(Arc::clone(&target) as Arc<dyn PackTarget>, spaces, "test".to_owned());
        let entrance = packer.entrance();
        let frames = 12 * 1024;
        let send = move || {
            (0..frames).try_for_each(|number: u64| {
                let page = |at: u64| {
                    let digest = blake3::hash(&(number * FRAME_PAGES as u64 + at).to_le_bytes());
                    (
                        PageIndex(number * FRAME_PAGES as u64 + at),
                        PageDigest(digest.as_bytes()[..16].try_into().unwrap()),
                    )
                };
                let pages = (0..FRAME_PAGES as u64).map(page).collect();
                entrance.send(&mut vec![PackJob::Data(FrameJob {
                    space,
                    pages,
                    raw: vec![1; FRAME_PAGES * PAGE_SIZE],
                })])
            })
        };
        tokio::task::spawn_blocking(send).await.unwrap().unwrap();
        let records = packer.finish().await.unwrap();
        assert!(records.len() >= 3, "{} packs", records.len());
        let frame = (FRAME_PAGES * 40) as u32;
        assert!(
            records
                .iter()
                .all(|record| record.info.trailer_raw_len <= INDEX_BYTES.0 as u32 + frame)
        );
        assert_eq!(records.iter().map(|record| record.info.frames).sum::<u32>(), frames as u32);
    }
}
