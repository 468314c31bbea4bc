//! A store in HDFS, and how HDFS is used to keep the promises of a store.
//!
//! - A file is written under a hidden name, synced, closed, renamed without overwriting: HDFS would
//!   show an open file under its name, keep it there after the writer died, and let a second writer
//!   open it.
//! - No call creates a missing parent: a directory that was removed stays removed, whatever arrives
//!   late.
//! - A stopped NameNode or DataNode leaves calls hanging for ever, so each call has a progress
//!   timeout. The node may still execute the request when it continues, so every name of an
//!   unfinished file is used once.
//! - When an answer is lost, the error says that the effect is unknown; nothing here guesses.
//! - Directories with an erasure coding policy are refused: with XOR-2-1 and one DataNode killed
//!   and started again, files that were closed had wrong content, also for Hadoop's own client,
//!   and no such file can be synced. The policy is checked when the store is opened, and again
//!   with each file, because a directory below may get one later.
//! - A DataNode lost from a write pipeline is not replaced (there may be no other); the NameNode
//!   makes the missing replica later. A DataNode that is dead when a block is opened fails the put;
//!   the retry policy of the repository deals with it.

mod errors;
mod read;
mod tasks;
mod url;
mod write;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use hdfs_native::{Client, ClientBuilder, HdfsError, WriteOptions};

use crate::error::{Op, Result, StoreError};
use crate::local::check_range_len;
use crate::nonce::nonce;
use crate::path::{StorePath, is_visible};
use crate::store::{Entry, MAX_LIST_LEN, MAX_READ_LEN, PutOptions, PutReceipt, Stat, Store};
use errors::{Effect, explain};
use read::Readers;
use tasks::{Progress, watched};
use url::HdfsUrl;

/// A checkpoint holds the guest's memory, so its files are not world-readable.
const FILE_MODE: u32 = 0o640;
const DIR_MODE: u32 = 0o750;

/// Timeouts and replication of an [`HdfsStore`].
#[derive(Debug, Clone)]
pub struct HdfsOptions {
    /// How long the NameNode may take to answer.
    pub call_timeout: Duration,
    /// How long a transfer may be stopped. Reads switch to another replica after a third of it.
    pub stall_timeout: Duration,
    /// Whether the DataNodes sync to disk before a put counts as done. Without, a power cut of all
    /// of them at once can lose a file that was stored. Not possible for erasure-coded files, which
    /// are refused.
    pub sync: bool,
    /// Bytes in an HDFS block; a multiple of 1 MiB. A pack that fits into one block
    /// depends on fewer DataNodes.
    pub block_size: u64,
    /// Client configuration that overrides the user's Hadoop configuration.
    pub config: Vec<(String, String)>,
}

impl Default for HdfsOptions {
    fn default() -> Self {
        HdfsOptions {
            call_timeout: Duration::from_secs(20),
            stall_timeout: Duration::from_secs(20),
            sync: true,
            block_size: 128 << 20,
            config: Vec::new(),
        }
    }
}

/// A store below one HDFS directory. One client for its whole life; clones share it.
#[derive(Debug, Clone)]
pub struct HdfsStore {
    client: Client,
    url: HdfsUrl,
    options: Arc<HdfsOptions>,
    readers: Arc<Readers>,
}

impl HdfsStore {
    /// A store at `url`. Reads `core-site.xml` and `hdfs-site.xml` of `HADOOP_CONF_DIR` or
    /// `HADOOP_HOME`, if set; contacts no server yet.
    ///
    /// # Errors
    /// When the URL is no `hdfs://` URL, or the Hadoop configuration cannot be read.
    pub fn open(url: &str, options: &HdfsOptions) -> Result<Self> {
        let url = HdfsUrl::parse(url)?;
        let invalid =
            |reason: String| StoreError::InvalidUrl { url: url.shown().to_owned(), reason };
        let handle =
            tasks::runtime().map_err(|error| invalid(format!("no I/O threads: {error}")))?;
        let client = ClientBuilder::new()
            .with_url(url.service())
            .with_config(configuration(&url, options))
            .with_io_runtime(handle)
            .build()
            .map_err(|error| invalid(error.to_string()))?;
        Ok(HdfsStore { client, url, options: Arc::new(options.clone()), readers: Arc::default() })
    }

    fn at(&self, path: &StorePath) -> String {
        self.url.path_of(path)
    }

    /// One or a few calls to the NameNode.
    async fn call<T: Send + 'static>(
        &self,
        op: Op,
        path: &StorePath,
        effect: Effect,
        call: impl Future<Output = hdfs_native::Result<T>> + Send + 'static,
    ) -> Result<T> {
        let limit = self.options.call_timeout;
        match watched(op, path, limit, Progress::default(), call).await? {
            Ok(value) => Ok(value),
            Err(error) => Err(explain(op, path, effect, error)),
        }
    }

    async fn write_file(
        &self,
        op: Op,
        path: &StorePath,
        data: Vec<Bytes>,
        replicas: Option<u16>,
    ) -> Result<PutReceipt> {
        let progress = Progress::default();
        let job = write::Job {
            client: self.client.clone(),
            op,
            path: path.clone(),
            target: self.at(path),
            unfinished: self.hidden_sibling(path),
            data,
            replicas,
            options: Arc::clone(&self.options),
            progress: progress.clone(),
        };
        let unfinished = job.unfinished.clone();
        let limit = self.options.stall_timeout.max(self.options.call_timeout);
        let result = watched(op, path, limit, progress, job.run()).await.and_then(|result| result);
        if result.is_err() {
            self.remove_later(unfinished);
        }
        result
    }

    fn hidden_sibling(&self, path: &StorePath) -> String {
        let parent = path.parent().unwrap_or_else(StorePath::root);
        format!("{}/.tmp-{}", self.at(&parent).trim_end_matches('/'), nonce())
    }

    /// Removes in the background what a failed operation may have left: no reader sees it, so no
    /// caller waits for the removal.
    fn remove_later(&self, path: String) {
        let (client, limit) = (self.client.clone(), self.options.call_timeout);
        tasks::detached(async move {
            let _ = tokio::time::timeout(limit, client.delete(&path, true)).await;
        });
    }
}

/// Settings that override the user's configuration: ours, then the caller's.
fn configuration(url: &HdfsUrl, options: &HdfsOptions) -> Vec<(String, String)> {
    let socket_timeout = (options.stall_timeout / 3).max(Duration::from_millis(100));
    let mut config = vec![
        (
            "dfs.client.block.write.replace-datanode-on-failure.policy".to_owned(),
            "NEVER".to_owned(),
        ),
        ("dfs.client.socket-timeout".to_owned(), socket_timeout.as_millis().to_string()),
    ];
    if url.is_single_namenode() {
        // There is no other NameNode to fail over to: report soon that this one is unreachable.
        config.push(("dfs.client.failover.max.attempts".to_owned(), "2".to_owned()));
        config.push(("dfs.client.failover.sleep.base.millis".to_owned(), "100".to_owned()));
    }
    config.extend(options.config.iter().cloned());
    config
}

#[async_trait]
impl Store for HdfsStore {
    fn url(&self) -> &str {
        self.url.shown()
    }

    async fn create_dir_all(&self, path: &StorePath) -> Result<()> {
        let (client, target) = (self.client.clone(), self.at(path));
        let call = async move { client.mkdirs(&target, DIR_MODE, true).await };
        self.call(Op::CreateDirAll, path, Effect::Idempotent, call).await
    }

    /// `mkdirs` does not say whether the directory was there, so a new directory gets its name by a
    /// rename.
    async fn create_dir(&self, path: &StorePath) -> Result<()> {
        let (client, target, fresh) =
            (self.client.clone(), self.at(path), self.hidden_sibling(path));
        let made = fresh.clone();
        let call = async move {
            client.mkdirs(&made, DIR_MODE, false).await?;
            client.rename(&made, &target, false).await
        };
        let result = self.call(Op::CreateDir, path, Effect::Once, call).await;
        if result.is_err() {
            self.remove_later(fresh);
        }
        result
    }

    async fn put(
        &self,
        path: &StorePath,
        data: Vec<Bytes>,
        options: PutOptions,
    ) -> Result<PutReceipt> {
        self.write_file(Op::Put, path, data, options.replicas).await
    }

    async fn put_exclusive(
        &self,
        path: &StorePath,
        data: Bytes,
        options: PutOptions,
    ) -> Result<PutReceipt> {
        self.write_file(Op::PutExclusive, path, vec![data], options.replicas).await
    }

    async fn read(&self, path: &StorePath, limit: u64) -> Result<Bytes> {
        let reader = read::open(self, Op::Read, path).await?;
        let (len, limit) = (reader.file_length() as u64, limit.min(MAX_READ_LEN));
        if len > limit {
            return Err(StoreError::Limit {
                path: path.to_string(),
                what: "its length",
                actual: len,
                limit,
            });
        }
        read::transfer(self, Op::Read, path, &reader, 0, len).await
    }

    async fn read_range(&self, path: &StorePath, offset: u64, len: u64) -> Result<Bytes> {
        check_range_len(path, len)?;
        let reader = read::open_cached(self, Op::ReadRange, path).await?;
        let file_len = reader.file_length() as u64;
        if offset.checked_add(len).is_none_or(|end| end > file_len) {
            self.readers.forget(path);
            return Err(StoreError::PastEnd { path: path.to_string(), offset, len, file_len });
        }
        let result = read::transfer(self, Op::ReadRange, path, &reader, offset, len).await;
        if result.is_err() {
            // The replicas may have moved since the reader was made.
            self.readers.forget(path);
        }
        result
    }

    async fn stat(&self, path: &StorePath) -> Result<Option<Stat>> {
        let (client, target) = (self.client.clone(), self.at(path));
        let call = async move { client.get_file_info(&target).await };
        match self.call(Op::Stat, path, Effect::None, call).await {
            Ok(status) => Ok(Some(Stat {
                len: if status.isdir { 0 } else { status.length as u64 },
                is_dir: status.isdir,
                replicas: replicas_of(&status),
                modified: SystemTime::UNIX_EPOCH + Duration::from_millis(status.modification_time),
            })),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn list(&self, path: &StorePath) -> Result<Vec<Entry>> {
        let (client, target) = (self.client.clone(), self.at(path));
        let call = async move { list_visible(&client, &target).await };
        let entries = self.call(Op::List, path, Effect::None, call).await?;
        if entries.len() > MAX_LIST_LEN {
            return Err(StoreError::Limit {
                path: path.to_string(),
                what: "the number of entries",
                actual: entries.len() as u64,
                limit: MAX_LIST_LEN as u64,
            });
        }
        Ok(entries)
    }

    async fn rename_dir(&self, from: &StorePath, to: &StorePath) -> Result<()> {
        self.readers.forget_all();
        match self.stat(from).await? {
            Some(stat) if stat.is_dir => {}
            Some(_) => {
                return Err(StoreError::failed(Op::RenameDir, from, "it is not a directory"));
            }
            None => return Err(StoreError::not_found(Op::RenameDir, from)),
        }
        let (client, source, target) = (self.client.clone(), self.at(from), self.at(to));
        let call = async move { client.rename(&source, &target, false).await };
        let renamed = self.call(Op::RenameDir, from, Effect::Once, call).await;
        renamed.map_err(|error| match error {
            StoreError::AlreadyExists { op, .. } => StoreError::already_exists(op, to),
            other => other,
        })
    }

    async fn remove(&self, path: &StorePath) -> Result<()> {
        if path.is_root() {
            return Err(StoreError::failed(Op::Remove, path, "a store never removes its root"));
        }
        self.readers.forget_all();
        let (client, target) = (self.client.clone(), self.at(path));
        let call = async move { client.delete(&target, true).await };
        self.call(Op::Remove, path, Effect::Idempotent, call).await.map(|_| ())
    }

    /// The client does not report a file's policy, but the NameNode sets the replication of
    /// replicated files only.
    async fn check_redundancy(&self) -> Result<()> {
        let root = StorePath::root();
        let (client, probe) = (self.client.clone(), self.hidden_sibling(&root));
        let made = probe.clone();
        let call = async move {
            let options = WriteOptions {
                permission: FILE_MODE,
                overwrite: false,
                create_parent: false,
                ..WriteOptions::default()
            };
            client.create(&made, options).await?.close().await?;
            let replication = client.get_file_info(&made).await?.replication.unwrap_or(1);
            let replicated = client.set_replication(&made, replication.max(1)).await?;
            client.delete(&made, false).await?;
            Ok(replicated)
        };
        let replicated = self.call(Op::SetReplication, &root, Effect::Idempotent, call).await;
        if replicated.is_err() {
            self.remove_later(probe);
        }
        match replicated? {
            true => Ok(()),
            false => Err(StoreError::ErasureCoded { path: self.at(&root) }),
        }
    }

    async fn set_replication(&self, path: &StorePath, replicas: u16) -> Result<()> {
        let (client, target) = (self.client.clone(), self.at(path));
        let call = async move { client.set_replication(&target, u32::from(replicas)).await };
        match self.call(Op::SetReplication, path, Effect::Idempotent, call).await? {
            true => Ok(()),
            false => Err(StoreError::not_found(Op::SetReplication, path)),
        }
    }
}

/// `None` for directories.
fn replicas_of(status: &hdfs_native::client::FileStatus) -> Option<u16> {
    status.replication.and_then(|n| u16::try_from(n).ok()).filter(|n| *n > 0)
}

/// The visible entries, at most one more than allowed.
async fn list_visible(client: &Client, target: &str) -> hdfs_native::Result<Vec<Entry>> {
    let iterator = client.list_status_iter(target, false);
    let mut entries = Vec::new();
    while let Some(status) = iterator.next().await.transpose()? {
        if status.path.trim_end_matches('/') == target.trim_end_matches('/') {
            return Err(HdfsError::InvalidPath("it is not a directory".to_owned()));
        }
        let name = status.path.rsplit('/').next().unwrap_or_default();
        if !is_visible(name) {
            continue;
        }
        entries.push(Entry {
            name: name.to_owned(),
            is_dir: status.isdir,
            len: if status.isdir { 0 } else { status.length as u64 },
        });
        if entries.len() > MAX_LIST_LEN {
            break;
        }
    }
    entries.sort();
    Ok(entries)
}
