//! The promises a store makes: few, and each one a commit protocol can lean on.

use std::fmt::Debug;
use std::time::SystemTime;

use async_trait::async_trait;
use bytes::Bytes;

use crate::error::Result;
use crate::path::StorePath;

/// The longest single `read_range` and the highest limit of `read`: a length from a damaged file
/// must not become an allocation.
pub const MAX_READ_LEN: u64 = 1 << 30;

/// The most entries that a listing may have before it is refused.
pub(crate) const MAX_LIST_LEN: usize = 1 << 20;

/// Options of one put.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PutOptions {
    /// Copies to write before the put counts as done; `None`: the store's default. Stores without
    /// copies ignore it.
    pub replicas: Option<u16>,
}

/// What a put has stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PutReceipt {
    /// Bytes stored: the sum of what was given.
    pub len: u64,
    /// Copies that the store keeps of the file, if it keeps copies. HDFS does not say how many of
    /// them live at this moment: a write pipeline that lost a node still closes, and the NameNode
    /// replaces the copy later.
    pub replicas: Option<u16>,
}

/// Metadata of one path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    /// Bytes; 0 for a directory.
    pub len: u64,
    /// Whether it is a directory.
    pub is_dir: bool,
    /// Replicas that the store keeps of the file, if it keeps replicas.
    pub replicas: Option<u16>,
    /// When its content changed last (of a directory: an entry came or went), by the store's own
    /// clock: to be compared with other such times of the same store only.
    pub modified: SystemTime,
}

/// One entry of a listing.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    /// The last component of its path.
    pub name: String,
    /// Whether it is a directory.
    pub is_dir: bool,
    /// Bytes; 0 for a directory.
    pub len: u64,
}

/// A tree of immutable files.
///
/// Every call ends: with a result, or with an error within the store's own time limits. An error
/// for which [`crate::StoreError::is_ambiguous`] holds may have taken effect, now or (in a store
/// that queues requests) later; a caller that must know looks again, and a caller that retries uses
/// a new name.
#[async_trait]
pub trait Store: Send + Sync + Debug {
    /// Where this store is, as it would be given to [`crate::open`].
    fn url(&self) -> &str;

    /// Makes a directory and whatever is missing above it. Already there is fine.
    async fn create_dir_all(&self, path: &StorePath) -> Result<()>;

    /// Makes one directory in an existing one; exactly one of several concurrent callers wins, the
    /// others get `AlreadyExists`. `NotFound` if the parent is missing.
    async fn create_dir(&self, path: &StorePath) -> Result<()>;

    /// Stores a whole file in an existing directory (`NotFound` if it is missing: a removed
    /// directory must never come back by a late write). At `Ok` the file is complete, visible and
    /// on stable storage; before that no reader sees any of it. Never overwrites: `AlreadyExists`.
    async fn put(
        &self,
        path: &StorePath,
        data: Vec<Bytes>,
        options: PutOptions,
    ) -> Result<PutReceipt>;

    /// Like `put`; that exactly one of any number of concurrent callers gets `Ok` is what it is
    /// called for.
    async fn put_exclusive(
        &self,
        path: &StorePath,
        data: Bytes,
        options: PutOptions,
    ) -> Result<PutReceipt>;

    /// The whole file, if it is not longer than `limit` bytes.
    async fn read(&self, path: &StorePath, limit: u64) -> Result<Bytes>;

    /// Exactly `len` bytes from `offset` (`PastEnd` if the file does not have them).
    async fn read_range(&self, path: &StorePath, offset: u64, len: u64) -> Result<Bytes>;

    /// What a name stands for; `None` if it is free.
    async fn stat(&self, path: &StorePath) -> Result<Option<Stat>>;

    /// The entries of a directory, by name. Unfinished files are not shown. `NotFound` if there is
    /// no such directory.
    async fn list(&self, path: &StorePath) -> Result<Vec<Entry>>;

    /// Gives a directory a new name, in one step for all who look, durably. Never replaces
    /// anything, not even an empty directory: `AlreadyExists`. `NotFound` if `from`, or the
    /// directory that should hold `to`, is missing.
    async fn rename_dir(&self, from: &StorePath, to: &StorePath) -> Result<()>;

    /// Removes a file, or a directory with all that is in it: the name disappears in one step.
    /// Missing is fine.
    async fn remove(&self, path: &StorePath) -> Result<()>;

    /// Refuses a store whose files would not survive what they must; creates and removes a probe
    /// file in the existing root. Called when a store is opened to be written to.
    async fn check_redundancy(&self) -> Result<()> {
        Ok(())
    }

    /// Asks for `replicas` copies from now on. Stores without copies do nothing.
    async fn set_replication(&self, path: &StorePath, replicas: u16) -> Result<()>;
}

pub(crate) fn total_len(data: &[Bytes]) -> u64 {
    data.iter().map(|chunk| chunk.len() as u64).sum()
}
