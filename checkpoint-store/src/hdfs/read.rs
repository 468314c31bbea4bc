//! Reading, with the block locations kept for a while: a restore reads many ranges of few files.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt};
use hdfs_native::file::FileReader;

use super::HdfsStore;
use super::errors::{Effect, explain};
use super::tasks::{Progress, watched};
use crate::error::{Op, Result, StoreError};
use crate::path::StorePath;

/// Readers kept at most; each holds a list of block locations.
const MAX_READERS: usize = 128;
/// Locations (and, on secured clusters, the right to read them) go stale.
const READER_LIFE: Duration = Duration::from_secs(60);

/// Open files by path. Files never change under their name, so a kept reader is at worst one of
/// dead nodes.
#[derive(Default)]
pub(super) struct Readers(Mutex<HashMap<StorePath, (Arc<FileReader>, Instant)>>);

impl std::fmt::Debug for Readers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Readers").field(&self.map().len()).finish()
    }
}

impl Readers {
    fn map(&self) -> MutexGuard<'_, HashMap<StorePath, (Arc<FileReader>, Instant)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self, path: &StorePath) -> Option<Arc<FileReader>> {
        let map = self.map();
        let (reader, since) = map.get(path)?;
        (since.elapsed() < READER_LIFE).then(|| Arc::clone(reader))
    }

    fn keep(&self, path: &StorePath, reader: &Arc<FileReader>) {
        let mut map = self.map();
        if map.len() >= MAX_READERS {
            map.retain(|_, (_, since)| since.elapsed() < READER_LIFE);
        }
        if map.len() >= MAX_READERS {
            map.clear();
        }
        map.insert(path.clone(), (Arc::clone(reader), Instant::now()));
    }

    pub(super) fn forget(&self, path: &StorePath) {
        self.map().remove(path);
    }

    pub(super) fn forget_all(&self) {
        self.map().clear();
    }
}

pub(super) async fn open(store: &HdfsStore, op: Op, path: &StorePath) -> Result<Arc<FileReader>> {
    let (client, target) = (store.client.clone(), store.at(path));
    let call = async move { client.read(&target).await };
    store.call(op, path, Effect::None, call).await.map(Arc::new)
}

pub(super) async fn open_cached(
    store: &HdfsStore,
    op: Op,
    path: &StorePath,
) -> Result<Arc<FileReader>> {
    if let Some(reader) = store.readers.get(path) {
        return Ok(reader);
    }
    let reader = open(store, op, path).await?;
    store.readers.keep(path, &reader);
    Ok(reader)
}

/// Exactly `len` bytes; the caller has checked that the file has them (the client panics
/// otherwise).
pub(super) async fn transfer(
    store: &HdfsStore,
    op: Op,
    path: &StorePath,
    reader: &FileReader,
    offset: u64,
    len: u64,
) -> Result<Bytes> {
    if len == 0 {
        return Ok(Bytes::new());
    }
    #[expect(
        clippy::cast_possible_truncation,
        reason = "both are within the file's length, which is a usize"
    )]
    let (from, count) = (offset as usize, len as usize);
    let stream = reader.read_range_stream(from, count);
    let progress = Progress::default();
    let work = collect(Box::pin(stream), count, progress.clone());
    let read = watched(op, path, store.options.stall_timeout, progress, work).await?;
    let data = read.map_err(|error| explain(op, path, Effect::None, error))?;
    if data.len() as u64 != len {
        let reason = format!("{} of {len} bytes came", data.len());
        return Err(StoreError::unavailable(op, path, reason));
    }
    Ok(data)
}

async fn collect(
    mut stream: impl Stream<Item = hdfs_native::Result<Bytes>> + Unpin,
    len: usize,
    progress: Progress,
) -> hdfs_native::Result<Bytes> {
    let mut data = BytesMut::with_capacity(len);
    while let Some(chunk) = stream.next().await.transpose()? {
        data.extend_from_slice(&chunk);
        progress.step();
    }
    Ok(data.freeze())
}
