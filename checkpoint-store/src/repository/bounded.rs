//! A time limit on every call to the store.
//!
//! Stores limit most of what they wait for. This limit is on the whole call, for what a store
//! cannot limit (a hung NFS mount, for example): a checkpoint may fail, but not wait for ever.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::error::{Op, Result, StoreError};
use crate::path::StorePath;
use crate::store::{Entry, PutOptions, PutReceipt, Stat, Store, total_len};

/// A store that is slower than this is considered hung.
const BYTES_PER_SECOND: u64 = 1 << 20;

#[derive(Debug)]
pub(crate) struct Bounded {
    inner: Arc<dyn Store>,
    limit: Duration,
}

impl Bounded {
    pub(crate) fn new(inner: Arc<dyn Store>, limit: Duration) -> Self {
        Bounded { inner, limit }
    }

    pub(crate) fn inner(&self) -> Arc<dyn Store> {
        Arc::clone(&self.inner)
    }

    pub(crate) fn url(&self) -> &str {
        self.inner.url()
    }

    async fn bound<T>(
        &self,
        op: Op,
        path: &StorePath,
        bytes: u64,
        call: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let after = self.limit + Duration::from_secs(bytes / BYTES_PER_SECOND);
        match tokio::time::timeout(after, call).await {
            Ok(result) => result,
            Err(_) => Err(StoreError::Timeout { op, path: path.to_string(), after }),
        }
    }

    pub(crate) async fn create_dir_all(&self, path: &StorePath) -> Result<()> {
        self.bound(Op::CreateDirAll, path, 0, self.inner.create_dir_all(path)).await
    }

    pub(crate) async fn create_dir(&self, path: &StorePath) -> Result<()> {
        self.bound(Op::CreateDir, path, 0, self.inner.create_dir(path)).await
    }

    pub(crate) async fn put(
        &self,
        path: &StorePath,
        data: Vec<Bytes>,
        options: PutOptions,
    ) -> Result<PutReceipt> {
        let len = total_len(&data);
        self.bound(Op::Put, path, len, self.inner.put(path, data, options)).await
    }

    pub(crate) async fn put_exclusive(
        &self,
        path: &StorePath,
        data: Bytes,
        options: PutOptions,
    ) -> Result<PutReceipt> {
        self.bound(Op::PutExclusive, path, 0, self.inner.put_exclusive(path, data, options)).await
    }

    pub(crate) async fn read(&self, path: &StorePath, limit: u64) -> Result<Bytes> {
        self.bound(Op::Read, path, limit, self.inner.read(path, limit)).await
    }

    pub(crate) async fn read_range(
        &self,
        path: &StorePath,
        offset: u64,
        len: u64,
    ) -> Result<Bytes> {
        self.bound(Op::ReadRange, path, len, self.inner.read_range(path, offset, len)).await
    }

    pub(crate) async fn stat(&self, path: &StorePath) -> Result<Option<Stat>> {
        self.bound(Op::Stat, path, 0, self.inner.stat(path)).await
    }

    pub(crate) async fn list(&self, path: &StorePath) -> Result<Vec<Entry>> {
        self.bound(Op::List, path, 0, self.inner.list(path)).await
    }

    pub(crate) async fn rename_dir(&self, from: &StorePath, to: &StorePath) -> Result<()> {
        self.bound(Op::RenameDir, from, 0, self.inner.rename_dir(from, to)).await
    }

    pub(crate) async fn remove(&self, path: &StorePath) -> Result<()> {
        self.bound(Op::Remove, path, 0, self.inner.remove(path)).await
    }

    pub(crate) async fn check_redundancy(&self) -> Result<()> {
        self.bound(Op::SetReplication, &StorePath::root(), 0, self.inner.check_redundancy()).await
    }

    pub(crate) async fn set_replication(&self, path: &StorePath, replicas: u16) -> Result<()> {
        self.bound(Op::SetReplication, path, 0, self.inner.set_replication(path, replicas)).await
    }
}
